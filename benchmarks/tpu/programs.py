"""The programs' own steps, traced and lowered for devices that need not exist."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import ours
from benchmarks.specs import Spec
from iresnet_jax import TruncatedSeries, gram_upper_bound
from iresnet_jax.layer_walk import layers_by_path
from iresnet_jax.stages import Precision
from train.parallel import Devices, LocalDevices
from train.steps import FirstState, example_keys, training_step
from train.task import Task

Lowered = Any
Chips = Sequence[jax.Device]


def lower(
    program: str,
    spec: Spec,
    devices: Chips,
    *,
    num_terms: int = 5,
    precision: Precision = "bfloat16",
) -> Lowered:
    """Lower a program for TPU devices.

    Args:
      program: a key of :data:`PROGRAMS`.
      spec: the network, and the global batch.
      devices: of the slice.
      num_terms: of the log-determinant's series.
      precision: inside the branches, in training.
    """
    with for_tpu():
        task, batch = ours.task_and_batch(spec, num_terms, None, precision)
        return PROGRAMS[program](task, batch, taking_part(program, devices), num_terms)


def taking_part(program: str, devices: Chips) -> Chips:
    """The devices that a program uses: some run on one."""
    return devices[:1] if program in _ON_ONE else devices


@contextlib.contextmanager
def for_tpu() -> Iterator[None]:
    """Let the library choose as it does on a TPU: it asks JAX for the default backend."""
    with mock.patch.object(jax, "default_backend", return_value="tpu"):
        yield


def train_step(task: Task, batch: Any, devices: Chips, num_terms: int) -> Lowered:
    """One training step, under ``jit`` with ``shard_map``."""
    mapped = Devices("shard_map", task.config.batch_size, devices)
    step = training_step(task.loss, task.config)
    return mapped.lower(step, *mapped.shapes(_first_state(task).template(), batch))


def sample(task: Task, batch: Any, devices: Chips, num_terms: int) -> Lowered:
    """The inverse of a batch of latents, as samples and pictures take it."""
    flow, here = _flow(task), LocalDevices(devices)
    latents = jax.eval_shape(type(flow).forward, flow, _images(batch))
    with jax.default_matmul_precision("highest"):
        return task.functions.invert.lower(here, *here.shapes(flow, latents))


def there_and_back(task: Task, batch: Any, devices: Chips, num_terms: int) -> Lowered:
    """Latents and back, with the bounds on the error, as a run's evaluation takes them."""
    here = LocalDevices(devices)
    with jax.default_matmul_precision("highest"):
        arguments = here.shapes(_flow(task), _images(batch))
        return task.functions.there_and_back.lower(here, *arguments)


def evaluate(task: Task, batch: Any, devices: Chips, num_terms: int) -> Lowered:
    """Bits per dimension of a batch, one draw, in float32, as a run's evaluation takes them."""
    keys = jax.eval_shape(lambda: example_keys(0, jnp.int32(0), jnp.arange(len(batch))))
    flow, (images, keys) = LocalDevices(devices).shapes(_flow(task), (batch, keys))
    estimator = TruncatedSeries(num_terms)

    def bits(flow, images, keys):
        return task.bits({}, flow, images, estimator, keys)  # type: ignore[attr-defined]

    with jax.default_matmul_precision("highest"):
        return jax.jit(bits).lower(flow, images, keys)


def converge(task: Task, batch: Any, devices: Chips, num_terms: int) -> Lowered:
    """Every power iteration, to its tolerance, as before a certificate."""
    variables = _first_state(task).template().averaged_variables
    return task.functions.converge.lower(LocalDevices(devices).shapes(variables, ())[0])


def bounds(task: Task, batch: Any, devices: Chips, num_terms: int) -> Lowered:
    """Bounds on the norms of all layers, by the Gram iteration that serves traced code."""

    def of_all(flow):
        layers = layers_by_path(flow).values()
        return [jax.lax.map(gram_upper_bound, layer.operator) for layer in layers]

    return jax.jit(of_all).lower(LocalDevices(devices).shapes(_flow(task), ())[0])


#: Program -> (task, batch, devices, terms) -> what is lowered.
PROGRAMS: Mapping[str, Callable[[Task, Any, Chips, int], Lowered]] = {
    "density": train_step,
    "classification": train_step,
    "sampling": sample,
    "there and back": there_and_back,
    "evaluation": evaluate,
    "power iterations": converge,
    "bounds": bounds,
}

_ON_ONE = {"power iterations", "bounds"}


def _first_state(task: Task) -> FirstState:
    return FirstState(
        task.init, task.config, np.zeros((1, *task.dataset.example_shape), np.float32)
    )


def _flow(task: Task) -> Any:
    variables = _first_state(task).template().averaged_variables
    return jax.eval_shape(task.functions.flow, variables)


def _images(batch: Any) -> jax.ShapeDtypeStruct:
    """The shape of a batch's images, as networks take them."""
    images = batch[0] if isinstance(batch, tuple) else batch
    return jax.ShapeDtypeStruct(images.shape, jnp.float32)
