"""A density model and what trains it for a few steps, without files: what measurements share."""

from typing import Any, NamedTuple

from train.batches import Batches, batch_iterator
from train.configs import DensityConfig
from train.data import Dataset
from train.density import Density
from train.parallel import Devices, cpu_devices_for, use_cpu_devices
from train.steps import FirstState, training_step


class ShortTraining(NamedTuple):
    """A training run before its first step.

    Attributes:
      task: with its data and its model.
      devices: what its step is mapped over.
      step: (state, batch) -> (state, metrics), mapped.
      state: the first, replicated.
      batches: endless.
    """

    task: Density
    devices: Devices
    step: Any
    state: Any
    batches: Batches


def set_up(config: DensityConfig, dataset: Dataset | None = None) -> ShortTraining:
    """What a config describes, on all devices of this process; of data other than its own."""
    use_cpu_devices(cpu_devices_for(config.batch_size))
    task = Density(config, dataset)
    devices = Devices(config.parallel, config.batch_size)
    step = devices.map(training_step(task.loss, config))
    first = FirstState(task.init, config, task.inputs(task.dataset.train[:512]))
    state = devices.replicate(first.values())
    batches = batch_iterator(task.dataset, config.batch_size, config.seed, with_labels=False)
    return ShortTraining(task, devices, step, state, batches)
