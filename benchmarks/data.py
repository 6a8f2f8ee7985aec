"""Does the device wait for data? A training step on fresh batches beside one on a cached batch.

``python -m benchmarks data --config cifar10-small`` alternates rounds of both in one
process and prints the median of the paired ratios with their spread; the goal is at most 1.05.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from train.batches import batch_iterator
from train.classification import Classification
from train.configs import CLASSIFICATION, find_config
from train.parallel import Devices, cpu_devices_for, use_cpu_devices
from train.steps import FirstState, training_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """A training step on fresh batches beside one on a cached batch, and images/s of the reader."""

    config: str = "cifar10-small"
    """A config of the classification program."""
    data_dir: Path | None = None
    """Where TFDS keeps its data sets."""
    rounds: int = 10
    """Pairs of rounds."""
    steps: int = 10
    """Steps in a round."""
    json: Path | None = None
    """Where the result goes, beside the terminal."""


def run(options: Data) -> dict[str, Any]:
    """The ratio fresh over cached, and what the reader alone delivers."""
    config = dataclasses.replace(
        find_config(CLASSIFICATION, options.config, None), data_dir=options.data_dir
    )
    use_cpu_devices(cpu_devices_for(config.batch_size))
    task = Classification(config)
    devices = Devices(config.parallel, config.batch_size)
    step = devices.map(training_step(task.loss, config))
    first = FirstState(task.init, config, task.inputs(task.dataset.train[:128]))
    state = devices.replicate(first.values())
    batches = batch_iterator(task.dataset, config.batch_size, 0, with_labels=True)
    cached = next(batches)

    def timed(state: Any, take: Callable[[], Any]) -> tuple[Any, float]:
        started = time.perf_counter()
        for _ in range(options.steps):
            state, _ = step(state, devices.split(take()))
        jax.block_until_ready(state)
        return state, (time.perf_counter() - started) / options.steps

    state, _ = timed(state, lambda: cached)
    fresh, repeated = [], []
    for _ in range(options.rounds):
        state, seconds = timed(state, lambda: next(batches))
        fresh.append(seconds)
        state, seconds = timed(state, lambda: cached)
        repeated.append(seconds)
    ratios = np.array(fresh) / np.array(repeated)
    started = time.perf_counter()
    for _ in range(options.rounds * options.steps):
        next(batches)
    alone = (time.perf_counter() - started) / (options.rounds * options.steps)
    return {
        "ratio": float(np.median(ratios)),
        "ratios": ratios.round(4).tolist(),
        "seconds_fresh": float(np.median(fresh)),
        "seconds_cached": float(np.median(repeated)),
        "images_per_second": config.batch_size / alone,
    }
