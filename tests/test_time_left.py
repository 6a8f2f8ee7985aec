"""The estimate of the time left, on runs with a clock of their own."""

import itertools
from types import SimpleNamespace

import pytest

from benchmarks.time_left import estimates, seconds_of, worst_ratio
from train.time_left import Compilations, TimeLeft
from train.training import _Training

EVALUATION = 40.0


class World:
    """A clock, and how much of it was compilation."""

    def __init__(self):
        self.now = self.compiled = 0.0

    def work(self, seconds, compiling=0.0):
        self.now += seconds + compiling
        self.compiled += compiling


def simulate(*, total=400, step=0.1, validation=4.0, checkpoint=3.0, picture=6.0, every=50):
    """Yield (seconds since the first step ended, estimate, seconds that are left in truth)."""
    world = World()
    due = {"validation": every, "checkpoint": 2 * every, "picture": 4 * every}
    planned = {name: [*range(often, total + 1, often)] for name, often in due.items()}
    planned["validation"].insert(0, 1)
    costs = {"validation": validation, "checkpoint": checkpoint, "picture": picture}
    left = TimeLeft(
        total, planned, evaluates=True, clock=lambda: world.now, compiled=lambda: world.compiled
    )
    seen, first, done = [], None, set()
    for number in range(1, total + 1):
        world.work(step, compiling=30.0 if number == 1 else 0.0)
        for name in [name for name in due if number in planned[name]]:
            with left.timed(name):
                world.work(costs[name], compiling=0.0 if name in done else 5.0)
            done.add(name)
        if number % 10 == 0 or number == 1:
            left.advance(number)
            first = world.now if first is None else first
            seen.append((world.now, left.seconds))
    end = world.now + EVALUATION
    return [(now - first, estimate, end - now) for now, estimate in seen]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"validation": 0.2, "checkpoint": 0.1, "picture": 0.5},
        {"total": 4000, "every": 500},
        {"step": 2.0, "validation": 20.0},
        {"step": 0.02, "validation": 15.0},
    ],
    ids=["slow validations", "quick", "long", "slow steps", "validations alone"],
)
def test_it_is_right_within_half_from_ten_seconds_after_the_first_step(options):
    told = [row for row in simulate(**options) if row[0] >= 10.0]
    assert len(told) > 5
    for since, estimate, truth in told:
        assert truth / 1.5 <= estimate <= 1.5 * truth, (since, estimate, truth)


@pytest.mark.parametrize("every", [(1, 1, 0), (7, 3, 5), (100, 40, 30), (3, 500, 500), (5, 10, 10)])
@pytest.mark.parametrize("steps", [1, 2, 41])
def test_what_is_planned_is_what_is_done(steps, every):
    names = "validate_every", "checkpoint_every", "picture_every"
    training = _Training.__new__(_Training)
    training._config = SimpleNamespace(steps=steps, **dict(zip(names, every, strict=True)))
    done = {
        "validation": training._validates,
        "picture": training._draws,
        "checkpoint": lambda step: training._due(step, training._config.checkpoint_every),
    }
    for name, planned in training._planned().items():
        assert planned == [step for step in range(1, steps + 1) if done[name](step)], name


def test_a_plan_takes_no_longer_for_more_steps_between():
    training = _Training.__new__(_Training)
    often = dict.fromkeys(("validate_every", "checkpoint_every", "picture_every"), 10**11)
    training._config = SimpleNamespace(steps=10**12, **often)
    assert [len(due) for due in training._planned().values()] == [11, 10, 10]


def test_at_first_nothing_is_known():
    assert simulate()[0][1] is None
    assert TimeLeft(10).seconds is None


def test_without_an_evaluation_nothing_is_left_at_the_end():
    world = World()
    left = TimeLeft(2, clock=lambda: world.now, compiled=lambda: 0.0)
    for number in (1, 2):
        world.work(1.0)
        left.advance(number)
    assert left.seconds == 0.0


def test_compilations_within_others_count_once():
    counted = Compilations()
    for end, seconds in [(3.0, 1.0), (4.0, 0.5), (5.0, 4.0), (6.0, 2.0), (9.0, 1.0)]:
        counted.add(end, seconds)
    assert counted.seconds == pytest.approx(4.0 + 1.0 + 1.0)  # [1, 5], [5, 6], [8, 9]


def test_only_compilation_counts():
    counted = Compilations()
    counted.listen("/jax/checkpoint/write", 3.0)
    assert counted.seconds == 0.0
    counted.listen("/jax/core/compile/backend_compile_duration", 3.0)
    assert counted.seconds == pytest.approx(3.0)


def test_jax_reports_what_it_compiles():
    """Or validations would be taken to last as long as the first."""
    import jax
    import jax.numpy as jnp

    from train.time_left import _compilations

    before = _compilations.seconds
    salt = next(itertools.count(int(before * 1e6)))
    jax.jit(lambda x: jnp.sin(x) * (salt + 0.5))(jnp.ones(3)).block_until_ready()
    assert _compilations.seconds > before


def test_a_log_is_judged_by_its_worst_line():
    lines = [
        (30.0, "digits  step 1/1,400 (0%)  elapsed 0:00:30  left -:--:--"),
        (35.0, "digits  step 90/1,400 (6%)  elapsed 0:00:35  left 0:09:00"),
        (50.0, "digits  step 500/1,400 (35%)  elapsed 0:00:50  left 0:01:00"),
        (80.0, "digits  step 1,400/1,400 (100%)  elapsed 0:01:20  left 0:00:39"),
        (99.0, "digits, test set  draw 3 of ~9  left 0:05:00"),
    ]
    assert seconds_of("1:02:03") == 3723
    assert estimates(lines) == [(50.0, 60), (80.0, 39)]  # the others are too early, or of a draw
    assert worst_ratio(lines, end=100.0) == pytest.approx(39 / 20)
