"""The inverse of a batch of latents and sampling, every block to a tolerance, in float32."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from benchmarks import ours
from benchmarks.accelerator.records import Record
from benchmarks.accelerator.settings import Settings
from iresnet_jax import Anderson, FixedPointIteration
from iresnet_jax.nn import converge

_TOLERANCE = 1e-5
_TRAINING_STEPS = 20


def measure(record: Record, settings: Settings) -> None:
    """Images a second, evaluations of a branch, and errors."""
    spec = settings.density
    training = ours.Training(spec, 3, remat=True, precision="bfloat16")
    training.run(_TRAINING_STEPS)
    variables = jax.jit(partial(converge, training.model))(training.state.variables)
    flow = jax.jit(training.model.flow)(variables)
    del training
    images = ours.random_batch(spec)[0].astype(np.float32) / 256.0
    latents = jax.jit(lambda flow, x: flow.forward(x))(flow, images)
    solvers = {
        "plain": FixedPointIteration(_TOLERANCE, 1e-12, 1000),
        "Anderson": Anderson(_TOLERANCE, 1e-12, 1000),
    }
    for name, solver in solvers.items():
        invert = jax.jit(lambda flow, latents, s=solver: flow.inverse(latents, s))
        taken, (x, info) = _timed(partial(invert, flow, latents))
        record.add(
            f"inverse, {name}",
            images_per_second=spec.batch / taken,
            seconds=taken,
            evaluations_a_block=float(np.asarray(info.num_steps).max(axis=-1).mean()),
            largest_error=float(np.abs(x - images).max()),
            converged=bool(info.converged.all()),
        )
    draw = jax.jit(lambda flow, key: flow.sample(key, spec.batch, solver=solvers["Anderson"]))
    taken, (_, info) = _timed(partial(draw, flow, jax.random.key(0)))
    converged = bool(info.converged.all())
    record.add("sampling", images_per_second=spec.batch / taken, seconds=taken, converged=converged)


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of the best of three calls after the first, and the result."""
    jax.block_until_ready(call())
    taken = []
    for _ in range(3):
        started = time.perf_counter()
        found = jax.block_until_ready(call())
        taken.append(time.perf_counter() - started)
    return min(taken), jax.device_get(found)
