"""``python -m benchmarks to-likelihood``: its clock, and its data."""

import math

import numpy as np
import pytest

from benchmarks.accelerator.records import Record, read
from benchmarks.likelihood.clock import LAST, Clock, Watch, points_of_time
from benchmarks.likelihood.problems import (
    TABLES,
    Entrance,
    Problem,
    Split,
    in_parts,
    resolution,
    stderr,
)
from benchmarks.likelihood.problems import (
    read as read_problem,
)


class Hands:
    """A clock's hands, moved by the test."""

    def __init__(self):
        self.at = 100.0

    def __call__(self):
        return self.at


@pytest.fixture
def hands():
    return Hands()


@pytest.fixture
def problem():
    """Points of the standard normal."""
    rng = np.random.default_rng(0)
    parts = [Split(rng.normal(size=(1, n, 2)).astype(np.float32)) for n in (50, 20, 30)]
    return Problem.of(parts)


def constant(value):
    return lambda split: np.full(split.points.shape[:2], value)


# The clock


def test_what_is_stopped_does_not_count_and_what_was_before_does(hands):
    clock = Clock(started=97.0, now=hands)
    assert clock.seconds == 3.0
    hands.at += 2.0
    with clock.stopped():
        hands.at += 50.0
        assert clock.seconds == 5.0
        with pytest.raises(RuntimeError, match="stands still already"), clock.stopped():
            pass
    assert clock.seconds == 5.0
    hands.at += 1.0
    assert clock.seconds == 6.0


def test_the_clock_goes_on_after_an_evaluation_that_failed(hands):
    clock = Clock(started=100.0, now=hands)
    with pytest.raises(ZeroDivisionError), clock.stopped():
        hands.at += 9.0
        raise ZeroDivisionError
    hands.at += 1.0
    assert clock.seconds == 1.0


def test_points_of_time_are_geometric_and_end_with_the_budget():
    times = points_of_time(60.0)
    assert len(times) == 15 and times[0] == pytest.approx(3.0) and times[-1] == 60.0
    np.testing.assert_allclose(times[1:] / times[:-1], 20.0 ** (1 / 14))


def test_a_watch_evaluates_when_it_is_due_and_waits_for_what_is_computed(tmp_path, hands, problem):
    record = Record(tmp_path / "cell.json")
    watch = Watch(record, Clock(100.0, hands), problem, seconds=60.0)

    def bits(split):
        hands.at += 1000.0  # which does not count
        return np.ones(split.points.shape[:2])

    watch.step(bits)
    assert not record.parts  # 0 s: too early
    hands.at += 10.0
    watch.step(bits, ready=lambda: setattr(hands, "at", hands.at + 2.0))
    watch.step(bits)  # no further point of time has come
    hands.at += 48.0
    assert watch.over
    watch.finish(bits)
    seconds = {name: part["seconds"] for name, part in record.parts.items()}
    assert seconds == {"point 07": 12.0, LAST: 60.0}  # the seventh is at 10.8 s
    assert record.parts["point 07"]["steps"] == 2 and record.parts[LAST]["steps"] == 3


def test_a_watch_is_over_by_steps_and_where_it_found_enough(tmp_path, hands, problem):
    clock = Clock(100.0, hands)
    few = Watch(Record(tmp_path / "few.json"), clock, problem, seconds=60.0, most_steps=1)
    assert not few.over
    few.step(constant(1.0))
    assert few.over
    good = Watch(Record(tmp_path / "good.json"), clock, problem, seconds=60.0, enough=2.5)
    hands.at += 4.0
    good.step(constant(2.6))
    assert not good.over
    hands.at += 4.0
    good.step(constant(2.5))
    assert good.over
    assert [part["enough"] for part in read(tmp_path / "good.json").values()] == [False, True]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_likelihood_that_is_not_finite_ends_a_cell_and_the_curve_stays(
    tmp_path, hands, problem, value
):
    watch = Watch(Record(tmp_path / "cell.json"), Clock(100.0, hands), problem, seconds=60.0)
    hands.at += 10.0
    watch.step(constant(3.0))
    hands.at += 10.0
    with pytest.raises(FloatingPointError, match="not finite after 2 steps"):
        watch.step(constant(value))
    assert [part["test"] for part in read(tmp_path / "cell.json").values()] == [3.0]


# The data


def test_bits_per_dimension_are_those_of_the_density(problem):
    def log_prob(x):
        return -0.5 * np.square(x).sum(axis=1) - math.log(2.0 * math.pi)

    x = problem.test.points[0].astype(np.float64)
    density = np.exp(-0.5 * np.square(x).sum(axis=1)) / (2.0 * math.pi)
    bits = problem.bits_of(log_prob)(problem.test)
    np.testing.assert_allclose(bits, -np.log2(density)[None] / 2.0, rtol=1e-6)


def test_digits_have_noise_within_their_levels_and_count_it():
    problem = read_problem("digits", smoke=True)
    inside = problem.test.points * problem.num_levels - problem.test.levels.reshape(1, -1, 64)
    assert inside.min() >= -1e-5 and inside.max() <= 1.0 + 1e-5
    assert np.ptp(inside, axis=0).min() > 0.0  # two draws
    uniform = problem.bits_of(lambda x: np.zeros(len(x)))  # over [0, 1]⁶⁴, of 17 levels
    found = problem.judged(uniform, whole=True)
    assert found["test"] == pytest.approx(math.log2(17.0)) and found["stderr"] == 0.0
    new = problem.drawn(np.random.default_rng(1))
    assert (np.floor(new * 17) == problem.train.levels.reshape(len(new), -1)).mean() > 0.9999
    assert (new != problem.train.points[0]).any()
    few = problem.drawn(np.random.default_rng(1), np.array([7, 3]))
    assert (np.floor(few * 17) == problem.train.levels[[7, 3]].reshape(2, -1)).mean() > 0.99


@pytest.mark.parametrize("name", TABLES)
def test_tables_have_noise_of_a_step_and_rows_in_one_split_alone(name):
    problem, again = read_problem(name), read_problem(name)
    splits = [problem.train, problem.validation, problem.test]
    rows = np.concatenate([split.points[0] for split in splits])
    assert len(np.unique(rows, axis=0)) == len(rows)
    for column in rows.T:
        assert len(np.unique(column)) > 0.9 * len(column)
    np.testing.assert_array_equal(problem.test.points, again.test.points)


def test_the_resolution_of_a_column_is_its_finest_decimal():
    table = np.array([[1.0, 0.25, 3.125], [17.0, 0.5, 2.0], [300.0, 0.1, 1.5]])
    np.testing.assert_allclose(resolution(table), [1.0, 0.01, 0.001])


def test_data_survive_the_way_to_another_process(tmp_path):
    for name in ("wine", "digits"):
        problem = read_problem(name, smoke=True)
        problem.save(tmp_path / "data.npz")
        found = Problem.load(tmp_path / "data.npz")
        assert found.num_levels == problem.num_levels
        for split in ("train", "validation", "test"):
            ours, theirs = getattr(problem, split), getattr(found, split)
            np.testing.assert_array_equal(ours.points, theirs.points)
            np.testing.assert_array_equal(ours.levels, theirs.levels)


def test_unknown_data_are_refused():
    with pytest.raises(ValueError, match=r"checkerboard.*got 'cats'"):
        read_problem("cats")


def test_the_standard_error_is_that_of_the_mean_over_draws():
    rng = np.random.default_rng(0)
    spread = rng.uniform(0.1, 2.0, size=25)
    draws = rng.normal(size=(4000, 3, 25)) * spread + rng.normal(size=25)
    squared = np.mean([stderr(bits) ** 2 for bits in draws])
    true = np.square(spread).sum() / 3 / 25**2
    assert squared == pytest.approx(true, rel=0.03)  # s.e. of the mean of 4,000: below 0.005
    assert stderr(draws[0, :1]) == pytest.approx(draws[0, 0].std(ddof=1) / 5.0)


@pytest.mark.parametrize("name", ["digits", "wine"])
def test_an_entrance_tells_the_volume_that_it_changes(name):
    problem = read_problem(name, smoke=True)
    entrance = Entrance.of(problem)
    x = problem.train.points[0][:5].astype(np.float64)
    step = 1e-3 * x.std(axis=0) + 1e-6
    slopes = (entrance(x + step).astype(np.float64) - entrance(x - step)) / (2.0 * step)
    coarse = np.log(np.abs(slopes)).sum(axis=1)  # in float32
    np.testing.assert_allclose(entrance.log_det(x), coarse, rtol=0, atol=2e-3 * problem.dim)
    seen = entrance(problem.train.points[0]).astype(np.float64)
    np.testing.assert_allclose(seen.mean(axis=0), 0.0, atol=1e-4)
    if name == "wine":
        np.testing.assert_allclose(seen.std(axis=0), 1.0, atol=1e-4)
    else:
        assert seen.std(axis=0).max() == pytest.approx(1.0, abs=1e-4)
        inner = 0.05 + 0.9 * problem.train.points[0].astype(np.float64)
        logits = np.log(inner / (1.0 - inner))
        assert entrance.scale.min() >= 0.2499 * logits.std()


@pytest.mark.parametrize("count", [1, 3, 4, 9])
def test_parts_have_one_shape_and_lose_no_row(count):
    shapes = set()

    def double(x):
        shapes.add(x.shape)
        return 2.0 * x[:, 0]

    x = np.arange(count, dtype=np.float32)[:, None]
    np.testing.assert_array_equal(in_parts(double, x, 4), 2.0 * x[:, 0])
    assert len(shapes) == 1
