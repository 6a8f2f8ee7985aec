"""The library's side of every comparison: the training step that ``python -m train`` runs."""

import dataclasses
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.specs import Spec
from iresnet_jax import Flow, series_along_probe
from iresnet_jax.nn import ImageFlow, ImageNetwork, InvertibleClassifier
from iresnet_jax.stages import Precision
from train.classification import Classification
from train.configs import CLASSIFICATION, DENSITY
from train.data import Dataset
from train.density import Density
from train.parallel import Devices, cpu_devices_for, use_cpu_devices
from train.steps import FirstState, TrainState, training_step
from train.task import Task

_CLASSES = 10


def build_model(spec: Spec) -> ImageNetwork:
    """The Flax model of a spec."""
    options: dict[str, Any] = {
        "image_shape": spec.image_shape,
        "depths": spec.depths,
        "features": spec.features,
        "coeff": spec.coeff,
        "num_steps": spec.power_steps,
        "squeeze_first": False,
    }
    if spec.kind == "density":
        return ImageFlow(factor_out=False, **options)
    return InvertibleClassifier(padding=spec.padding, num_classes=_CLASSES, **options)


def random_batch(spec: Spec) -> tuple[np.ndarray, np.ndarray]:
    """Images of random grey levels, and random labels; the same in every process."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (spec.batch, *spec.image_shape), np.uint8)
    return images, rng.integers(0, _CLASSES, spec.batch)


class Training:
    """A training run on one repeated batch: dequantised density steps, or classification steps.

    Attributes:
      model: the Flax model.
      variables: its variables before the first step, on the host.

    Args:
      spec: the network.
      num_terms: of the log-determinant's series.
      remat: whether the backward pass recomputes blocks; None: as the programs do, where densities
        are trained.
      precision: inside the branches.
    """

    def __init__(
        self,
        spec: Spec,
        num_terms: int = 5,
        *,
        remat: bool | None = None,
        precision: Precision = "float32",
    ):
        task, batch = task_and_batch(spec, num_terms, remat, precision)
        step, devices = training_step(task.loss, task.config), _devices(spec)
        first = random_batch(spec)[0].astype(np.float32) / 256.0
        self.model, state = task.model, FirstState(task.init, task.config, first).values()
        self.variables = jax.device_get(state.variables)
        self._state, self._batch = devices.replicate(state), devices.split(batch)
        self._unmapped_step, self._devices = step, devices

    @cached_property
    def compiled(self) -> Any:
        """The compiled step."""
        return self._devices.lower(self._unmapped_step, self._state, self._batch).compile()

    def step(self) -> None:
        """One training step, to its end."""
        self.run(1)

    def run(self, steps: int) -> None:
        """Several training steps, the next begun while one is under way, to their end."""
        for _ in range(steps):
            self._state, _ = self.compiled(self._state, self._batch)
        jax.block_until_ready(self._state)

    @property
    def state(self) -> TrainState:
        """The train state as it is now."""
        return self._devices.one(self._state)

    def temporary_bytes(self) -> int:
        """Memory that the compiled step needs beside its arguments and results, on all devices."""
        return self.compiled.memory_analysis().temp_size_in_bytes * self._devices.count


def step_to_lower(spec: Spec, num_terms: int, *, remat: bool | None = None) -> Callable[[], Any]:
    """A function that traces and lowers the mapped step."""
    task, batch = task_and_batch(spec, num_terms, remat, "float32")
    step, devices = training_step(task.loss, task.config), _devices(spec)
    image = np.zeros((1, *spec.image_shape), np.float32)
    state = FirstState(task.init, task.config, image).template()
    copies = devices.count
    states = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((copies, *leaf.shape), leaf.dtype), state
    )
    return partial(devices.lower, step, states, devices.split(batch))


def _devices(spec: Spec) -> Devices:
    """One accelerator; or a CPU's cores, as ``python -m train`` takes them."""
    use_cpu_devices(cpu_devices_for(spec.batch))
    found = jax.devices()
    return Devices("pmap", spec.batch, found if found[0].platform == "cpu" else found[:1])


def task_and_batch(
    spec: Spec, num_terms: int, remat: bool | None, precision: Precision
) -> tuple[Task, Any]:
    """The task on a batch of random images (and labels), and the batch."""
    model, (images, labels) = build_model(spec), random_batch(spec)
    data = Dataset("random", images, images, images, num_levels=256, classes=_CLASSES)
    options: dict[str, Any] = {
        "augment": False,
        "batch_size": spec.batch,
        "remat": spec.kind == "density" if remat is None else remat,
        "precision": precision,
        "coeff": spec.coeff,
        "optimizer": "adamw",
    }
    if spec.kind == "density":
        density = dataclasses.replace(DENSITY["cifar10"], num_terms=num_terms, **options)
        return Density(density, data, model), images
    options |= {"mean": (0.5,), "std": (0.25,)}
    classification = dataclasses.replace(CLASSIFICATION["cifar10"], **options)
    return Classification(classification, data, model), (images, labels)


def fixed_probe(shape: tuple[int, ...]) -> np.ndarray:
    """Signs that look random and need no generator: the same probe for every implementation."""
    sequence = np.arange(1, np.prod(shape) + 1) * ((5.0**0.5 - 1.0) / 2.0)
    return np.where(sequence % 1.0 < 0.5, -1.0, 1.0).astype(np.float32).reshape(shape)


def fixed_probe_series(num_terms: int) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """An estimator along :func:`fixed_probe`, for comparing implementations number by number."""

    def estimate(branch, x: jax.Array, key: None = None, lipschitz: Any = None):
        return series_along_probe(branch, x, jnp.asarray(fixed_probe(x.shape), x.dtype), num_terms)

    return estimate


def latents_and_log_det(flow: Flow, x: np.ndarray, num_terms: int) -> tuple[np.ndarray, np.ndarray]:
    """z and the log-determinant along the fixed probe."""
    (z,), log_det = jax.jit(
        lambda flow, x: flow.forward_and_log_det(x, fixed_probe_series(num_terms))
    )(flow, x)
    return np.asarray(z), np.asarray(log_det)
