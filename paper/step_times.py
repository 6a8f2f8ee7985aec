"""How much dearer one config's training step is than another's, timed in turns."""

import statistics
import time
from collections.abc import Callable

import jax

from train.batches import batch_iterator
from train.configs import DensityConfig
from train.density import Density
from train.parallel import Devices
from train.steps import FirstState, training_step

_FIRST_BATCH = 512
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
    del steps
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
    task = Density(config)
    devices = Devices(config.parallel, config.batch_size, task.devices())
    first = FirstState(task.init, config, task.inputs(task.dataset.train[:_FIRST_BATCH]))
    batches = batch_iterator(task.dataset, config.batch_size, config.seed, with_labels=False)
    step = devices.map(training_step(task.loss, config))
    state = devices.replicate(first.values())

    def take() -> None:
        nonlocal state
        state, metrics = step(state, devices.split(next(batches)))
        jax.block_until_ready(metrics["loss"])

    take()
    return take
