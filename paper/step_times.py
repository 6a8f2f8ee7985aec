"""How much dearer one config's training step is than another's, timed in turns."""

import statistics
import time
from collections.abc import Callable

import jax

from train.configs import DensityConfig
from train.short_training import set_up

_TURN = 1.0  # seconds, about


def step_ratio(first: DensityConfig, other: DensityConfig, turns: int) -> float:
    """Time steps of both in turns; return the median of other's seconds over first's.

    What else the machine does slows both. Compilation is left out.
    """
    steps = [_stepper(config) for config in (first, other)]
    counts = [max(1, round(_TURN / seconds_of(step, 3))) for step in steps]
    ratio = statistics.median(
        seconds_of(steps[1], counts[1]) / seconds_of(steps[0], counts[0]) for _ in range(turns)
    )
    jax.clear_caches()
    return ratio


def seconds_of(step: Callable[[], None], count: int) -> float:
    """Return the mean seconds of ``count`` calls."""
    started = time.perf_counter()
    for _ in range(count):
        step()
    return (time.perf_counter() - started) / count


def _stepper(config: DensityConfig) -> Callable[[], None]:
    """Return a function that takes one compiled step, and waits for its end."""
    training = set_up(config)
    state = training.state

    def take() -> None:
        nonlocal state
        state, metrics = training.step(state, training.devices.split(next(training.batches)))
        jax.block_until_ready(metrics["loss"])

    take()
    return take
