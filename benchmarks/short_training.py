"""A density model and what trains it for a few steps: what benchmarks of trained networks share."""

from typing import Any, NamedTuple

from grain import DatasetIterator
from iresnet_jax.nn import FlowModel

from train import density
from train.batches import batch_iterator
from train.configs.base import DensityConfig
from train.data import Dataset
from train.networks import fresh_state
from train.parallel import Devices, cpu_devices_for, use_cpu_devices
from train.steps import density_step


class ShortTraining(NamedTuple):
    """A training run before its first step.

    Attributes:
      dataset: what it trains on.
      model: the untrained model.
      devices: what its step is mapped over.
      step: (state, batch) -> (state, metrics), mapped.
      state: the first, replicated.
      batches: endless.
    """

    dataset: Dataset
    model: FlowModel
    devices: Devices
    step: Any
    state: Any
    batches: DatasetIterator


def set_up(config: DensityConfig) -> ShortTraining:
    """What a config describes, on all devices of this process."""
    use_cpu_devices(cpu_devices_for(config.batch_size))
    dataset = density.load(config)
    model = density.build_model(config, dataset)
    devices = Devices(config.parallel, config.batch_size)
    step = devices.map(density_step(model, config, dataset))
    first = density.as_floats(dataset, dataset.train[:512], config.seed)
    state = devices.replicate(fresh_state(model, config, first))
    batches = batch_iterator(dataset, config.batch_size, config.seed, with_labels=False)
    return ShortTraining(dataset, model, devices, step, state, batches)
