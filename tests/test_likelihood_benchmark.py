"""``python -m benchmarks to-likelihood``: its clock, its data, what it tells, what it resumes."""

import json
import math
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks.accelerator.records import COMPLETE, Record, read
from benchmarks.likelihood import command, report
from benchmarks.likelihood.cells import DEFAULT, GRID, SECONDS, SEEDS, TUNED, Cell, plan
from benchmarks.likelihood.clock import LAST, Clock, Watch, points_of_time
from benchmarks.likelihood.curves import FAILED, Curve, median_and_range, on_common_times
from benchmarks.likelihood.methods import METHODS, methods_on
from benchmarks.likelihood.problems import (
    DATA,
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
from benchmarks.likelihood.thresholds import from_peers, thresholds


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


# Curves, thresholds and the table


def curve(*points, **more):
    """Of (seconds, test, validation)."""
    parts = {
        f"point {i:02d}": {
            "seconds": seconds,
            "test": test,
            "stderr": 0.0,
            "validation": validation,
            "whole": True,
            "enough": False,
        }
        for i, (seconds, test, validation) in enumerate(points)
    }
    return Curve.of({"method": {"parameters": 1234}, **parts, **more})


def test_a_threshold_is_crossed_at_the_first_point_at_or_below_it():
    found = curve((1.0, 3.0, 3.0), (2.0, 2.5, 2.5), (3.0, 2.6, 2.4), (4.0, 2.0, 2.6))
    assert [found.time_to(level) for level in (3.5, 2.5, 2.2, 1.9)] == [1.0, 2.0, 4.0, math.inf]
    assert found.time_to(2.2, limit=4.0) == 4.0 and found.time_to(2.2, limit=3.9) == math.inf


def test_the_final_value_is_chosen_by_validation_and_of_the_whole_test_set():
    assert curve((1.0, 3.0, 3.0), (2.0, 2.5, 2.4), (3.0, 2.0, 2.6)).final == (2.5, 0.0)
    parts = {"test": 2.0, "stderr": 0.1, "enough": False}
    of_some = {"seconds": 1.0, "validation": 1.0, "whole": False, **parts}
    of_all = {"seconds": 2.0, "validation": 2.0, "whole": True, **parts, "test": 2.2}
    assert Curve.of({"a": of_some, LAST: of_all}).final == (2.2, 0.1)
    assert math.isnan(Curve.of({"a": of_some}).final[0])


def test_seeds_that_missed_count():
    assert median_and_range([5.0, math.inf, 3.0]) == (5.0, 3.0, math.inf)
    assert median_and_range([math.inf, math.inf, 3.0])[0] == math.inf
    assert median_and_range([3.0, math.inf])[0] == math.inf


def test_curves_are_compared_where_all_have_begun():
    first = curve((1.0, 3.0, 0.0), (4.0, 2.0, 0.0), (9.0, 1.0, 0.0))
    second = curve((2.0, 5.0, 0.0), (8.0, 4.0, 0.0))
    times, values = on_common_times([first, second])
    assert times[0] == 2.0 and times[-1] == 8.0
    halfway = 2.0 - math.log(8.0 / 4.0) / math.log(9.0 / 4.0)
    np.testing.assert_allclose(values[:, 0], [2.5, 5.0])
    np.testing.assert_allclose(values[:, -1], [halfway, 4.0])
    with pytest.raises(ValueError, match="no time in common"):
        on_common_times([first, curve((10.0, 1.0, 1.0))])


def test_thresholds_are_the_peers_worst_middle_and_best():
    assert from_peers([1.234, 2.0, 1.5, 1.801]) == (2.0, 1.81, 1.24)
    assert from_peers([-3.456]) == (-3.45, -3.45, -3.45)
    for values in ([], [1.0, math.nan]):
        with pytest.raises(ValueError, match="finite"):
            from_peers(values)


def test_fixed_thresholds_come_easiest_first():
    fixed = thresholds()
    assert fixed.keys() <= set(DATA) and fixed["digits"] == (2.1, 2.0, 1.93)
    assert all(list(levels) == sorted(levels, reverse=True) for levels in fixed.values())


def test_the_table_shows_who_is_first_and_what_was_missed():
    found = {
        ("fit", DEFAULT): [
            curve((9.0, 2.6, 2.6), (90.0, 2.3, 2.7)),  # at 90 s, of 60: too late
            curve((8.0, 2.6, 2.6)),
            curve((7.0, 2.9, 2.9)),
        ],
        ("zuko-nsf", TUNED): [curve((3.0, 2.65, 2.6), (5.0, 2.5, 2.5))],
        ("flowjax-bnaf", DEFAULT): [curve((1.0, 4.0, 4.0), failed={"reason": "out of memory"})],
    }
    lines = report.table("checkerboard", found, (2.7, 2.6, 2.4)).splitlines()
    assert lines[0].startswith("| method | setting | s to 2.70 | s to 2.60 | s to 2.40 | final")
    nothing = "not in 60 s"
    fit = f"9.0 (8.0 to not) | 9.0 (8.0 to not) | {nothing} | 2.600 (2.600 to 2.900) | 3 | 1,234"
    assert lines[2] == f"| fit | default | {fit} |"
    zuko = f"**3.0** | **5.0** | {nothing} | 2.500 | 1 | 1,234"
    assert lines[3] == f"| zuko-nsf | tuned | {zuko} |"
    assert lines[-1] == "- flowjax-bnaf, default, seed 0: out of memory"


def test_curves_are_drawn_and_those_without_a_common_time_left_out(tmp_path):
    apart = [curve((1.0, 2.6, 2.6), (2.0, 2.5, 2.5)), curve((3.0, 2.9, 2.9))]
    found = {
        ("fit", DEFAULT): apart,
        ("zuko-nsf", TUNED): [curve((3.0, 2.7, 2.7), (9.0, 2.6, 2.6))],
    }
    report.draw(tmp_path / "curves.png", "checkerboard", found, (2.7, 2.6, 2.4))
    report.draw(tmp_path / "nothing.png", "checkerboard", {("fit", DEFAULT): apart}, None)
    drawn, nothing = ((tmp_path / f"{name}.png").stat().st_size for name in ("curves", "nothing"))
    assert drawn > nothing > 0


# Cells


def test_every_data_set_has_methods_of_both_kinds_a_budget_and_seeds():
    assert set(DATA) == SECONDS.keys() == SEEDS.keys()
    for name in DATA:
        assert {METHODS[method].ours for method in methods_on(name)} == {True, False}
    for method in METHODS.values():
        options = [method.default, *method.grid]
        assert len({json.dumps(setting) for setting in method.grid}) == 4
        assert all(setting.keys() >= method.default.keys() for setting in options)


def test_defaults_come_first_and_further_seeds_last():
    cells = list(
        plan(["wine"], ["fit", "zuko-nsf", "fit-vectors"], ["default", "tuned"], 2, "full")
    )
    told = [(cell.method, cell.setting, cell.seed) for cell in cells]
    assert told == [
        *(("fit", DEFAULT, 0), ("zuko-nsf", DEFAULT, 0), ("fit", TUNED, 0), ("zuko-nsf", TUNED, 0)),
        *(("fit", DEFAULT, 1), ("zuko-nsf", DEFAULT, 1), ("fit", TUNED, 1), ("zuko-nsf", TUNED, 1)),
    ]
    everything = list(plan(DATA, list(METHODS), ["default", "grid", "tuned"], None, "full"))
    assert len(set(everything)) == len(everything)


def test_a_cell_survives_the_way_to_another_process():
    cell = Cell(data="wine", method="fit", setting=GRID[2], seed=1, size="smoke")
    assert Cell.from_json(cell.to_json()) == cell
    assert cell.options() == {"learning_rate": 1e-2, "features": 32}


@pytest.fixture
def started(monkeypatch):
    """Cells whose process would have been started, and what the processes were given."""
    asked, environments = [], []

    def run(arguments, *, stdout, env, **_):
        cell, out = Cell.from_json(arguments[4]), arguments[3]
        asked.append(f"{cell.method}-{cell.setting}-{cell.seed}")
        environments.append(env)
        if cell.method == "flowjax-bnaf":
            stdout.write("Traceback …\nMemoryError: too much\n")
            return types.SimpleNamespace(returncode=1)
        record = Record(cell.record(Path(out)))
        loss = 1.0 + abs(GRID.index(cell.setting) - 2) if cell.setting in GRID else 5.0
        figures = {"stderr": 0.0, "validation": loss, "whole": True, "enough": False, "steps": 7}
        record.add(LAST, seconds=3.0, test=loss, **figures)
        record.complete()
        return types.SimpleNamespace(returncode=0)

    monkeypatch.setattr(command.subprocess, "run", run)
    monkeypatch.setattr(command, "_possible", lambda _: True)
    monkeypatch.setattr(report, "draw", lambda *_: None)  # takes a second
    return types.SimpleNamespace(asked=asked, environments=environments)


def arguments(out, *more):
    return ["to-likelihood", "--out", str(out), "--data", "wine", *more]


def test_a_grid_is_run_once_and_its_best_setting_is_the_tuned_one(tmp_path, started, capsys):
    wanted = arguments(tmp_path, "--methods", "fit", "--seeds", "2")
    assert main(wanted) == 0
    first = ["fit-default-0", *(f"fit-{setting}-0" for setting in GRID)]
    assert started.asked == [*first, "fit-default-1", "fit-tuned-1"]
    assert "tuned, seed 0: the same as grid-2" in capsys.readouterr().out
    assert read(tmp_path / "wine" / "fit-tuned-0.json")[LAST]["test"] == 1.0
    started.asked.clear()
    (tmp_path / "wine" / "fit-default-1.json").unlink()
    assert main(wanted) == 0
    assert started.asked == ["fit-default-1"]
    assert "1 of 8 cells" in capsys.readouterr().out


def test_nothing_cached_reaches_a_cell(tmp_path, started, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/somewhere")
    main(arguments(tmp_path, "--methods", "fit", "--settings", "default", "--seeds", "1"))
    (environment,) = started.environments
    assert environment["JAX_ENABLE_COMPILATION_CACHE"] == "false"
    assert "JAX_COMPILATION_CACHE_DIR" not in environment and "XLA_FLAGS" not in environment


def test_a_failed_cell_is_noted_and_stops_no_other(tmp_path, started, capsys):
    wanted = arguments(tmp_path, "--methods", "flowjax-bnaf", "flowjax-coupling")
    wanted += ["--settings", "default", "--seeds", "1"]
    assert main(wanted) == 1
    assert started.asked == ["flowjax-bnaf-default-0", "flowjax-coupling-default-0"]
    assert "FAILED, exit status 1: MemoryError: too much" in capsys.readouterr().out
    parts = read(tmp_path / "wine" / "flowjax-bnaf-default-0.json")
    assert COMPLETE in parts and "MemoryError" in parts[FAILED]["reason"]
    assert main(wanted) == 1 and len(started.asked) == 2  # not again
    assert "MemoryError: too much" in (tmp_path / "wine" / "table.md").read_text()


def test_an_interrupted_cell_is_begun_anew(tmp_path, started, monkeypatch, capsys):
    wanted = arguments(tmp_path, "--methods", "fit", "--settings", "default", "--seeds", "1")
    run = command.subprocess.run

    def interrupted(arguments, **_):
        record = Record(Cell.from_json(arguments[4]).record(tmp_path))
        record.add("point 01", seconds=1.0, test=9.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(command.subprocess, "run", interrupted)
    assert main(wanted) == 130
    assert "the same command goes on" in capsys.readouterr().err
    monkeypatch.setattr(command.subprocess, "run", run)
    assert main(wanted) == 0
    assert read(tmp_path / "wine" / "fit-default-0.json").keys() == {LAST, COMPLETE}


def test_a_tuned_cell_without_a_grid_is_left_out(tmp_path, started, capsys):
    assert main(arguments(tmp_path, "--methods", "fit", "--settings", "tuned", "--seeds", "1")) == 0
    assert not started.asked
    assert "left out, nothing of its grid is known" in capsys.readouterr().out


def test_a_missing_package_leaves_its_methods_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda _: None)
    assert main(arguments(tmp_path, "--methods", "zuko-nsf")) == 2
    assert "zuko-nsf: left out, torch and zuko not installed" in capsys.readouterr().out


@pytest.mark.parametrize(
    "wrong", [["--data", "cats"], ["--methods", "magic"], ["--seeds", "0"], ["--size", "huge"]]
)
def test_what_cannot_be_asked_for_is_refused(tmp_path, wrong):
    with pytest.raises(SystemExit, match="2"):
        main(["to-likelihood", "--out", str(tmp_path), *wrong])


def test_peers_alone_fix_the_thresholds_that_are_open(tmp_path, started):
    assert "wine" not in thresholds()
    wanted = ["--methods", "fit", "flowjax-coupling", "--settings", "grid", "tuned"]
    assert main(arguments(tmp_path, *wanted, "--seeds", "1")) == 0
    proposed = json.loads((tmp_path / "wine" / "thresholds.json").read_text())
    assert proposed == {"wine": [1.0, 1.0, 1.0]}


def test_a_report_of_nothing_writes_nothing(tmp_path):
    report.write_report(tmp_path, DATA)
    assert not list(tmp_path.iterdir())


# The methods


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_method_runs(tmp_path, method):
    for package in METHODS[method].packages:
        pytest.importorskip(package, exc_type=ImportError)
    name = METHODS[method].data[0]
    name = "wine" if "wine" in METHODS[method].data else name
    wanted = ["--data", name, "--methods", method, "--settings", "default", "--seeds", "1"]
    assert main(["to-likelihood", "--out", str(tmp_path), "--size", "smoke", *wanted]) == 0
    found = Curve.read(tmp_path / "smoke" / name / f"{method}-default-0.json")
    assert found.parameters > 0 and np.isfinite(found.final[0])


@pytest.mark.slow
def test_sigterm_ends_the_cell_that_runs(tmp_path):
    pytest.importorskip("flowjax", exc_type=ImportError)
    root = Path(__file__).parents[1]
    wanted = ["--data", "wine", "--methods", "flowjax-coupling", "--size", "smoke"]
    ours = [sys.executable, "-m", "benchmarks", "to-likelihood", "--out", str(tmp_path)]
    process = subprocess.Popen([*ours, *wanted], cwd=root, stderr=subprocess.PIPE, text=True)
    record = Cell(data="wine", method="flowjax-coupling", size="smoke").record(tmp_path)
    while not record.exists():  # which the cell writes
        assert process.poll() is None
        time.sleep(0.1)
    children = _children(process.pid)
    assert children
    process.terminate()
    assert "the same command goes on" in process.communicate()[1]
    assert process.returncode == 128 + signal.SIGTERM
    assert not any(Path(f"/proc/{child}").exists() for child in children)


def _children(pid):
    """Processes that another one started."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [child for task in tasks for child in task.read_text().split()]


def test_a_process_that_cannot_start_is_noted(tmp_path, monkeypatch):
    cell = Cell(data="wine", method="fit", size="smoke")
    cell.folder(tmp_path).mkdir(parents=True)
    monkeypatch.setattr(command.sys, "executable", "false")
    assert command._run(cell, tmp_path) == "FAILED, exit status 1: "
