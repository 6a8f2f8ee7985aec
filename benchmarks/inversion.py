"""The inverse and sampling to a tolerance, beside 100 plain steps in PyTorch."""

import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import ours
from benchmarks.specs import SPECS, Spec
from benchmarks.timing import alternate, ratio
from iresnet_jax import FixedPointIteration, Flow
from iresnet_jax.nn import converge


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inverse:
    """From latents of data back to the data, every block to a tolerance."""

    config: str = "D2"
    """See benchmarks/specs.py."""
    tolerance: float = 1e-5
    """Of each block: ‖y − g(x) − x‖ ≤ tolerance·‖x‖."""
    training_steps: int = 20
    """Steps that the network is trained for before."""
    plain_steps: int = 100
    """Steps a block that the peer takes."""
    rounds: int = 5
    """Pairs of turns."""
    json: Path | None = None
    """Where the result goes, beside the terminal."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample(Inverse):
    """A batch of samples: from latents drawn from the prior to images."""


def run_inverse(options: Inverse) -> dict[str, Any]:
    """Times, function evaluations and errors of the reconstruction."""
    spec, variables, flow = _trained(options)
    images = ours.random_batch(spec)[0].astype(np.float32) / 256.0
    latents = jax.jit(lambda flow, x: flow.forward(x))(flow, images)
    result = _compare(options, spec, variables, flow, latents)
    x, peer = result.pop("x"), result.pop("x_peer")
    return result | {
        "largest_error_ours": float(np.abs(x - images).max()),
        "largest_error_peer": float(np.abs(peer - images).max()),
    }


def run_sample(options: Sample) -> dict[str, Any]:
    """Times and function evaluations, and how far the two batches of samples are apart."""
    spec, variables, flow = _trained(options)
    (prior,) = flow.priors
    latents = (prior.sample(jax.random.key(0), spec.batch),)
    result = _compare(options, spec, variables, flow, latents)
    x, peer = result.pop("x"), result.pop("x_peer")
    return result | {"samples_differ_by": float(np.abs(x - peer).max())}


def _trained(options: Inverse) -> tuple[Spec, Any, Flow]:
    spec = SPECS[options.config]
    training = ours.Training(spec, num_terms=3)
    for _ in range(options.training_steps):
        training.step()
    variables = jax.device_get(
        jax.jit(functools.partial(converge, training.model))(training.state.variables)
    )
    return spec, variables, jax.jit(training.model.flow)(variables)


def _compare(options: Inverse, spec: Spec, variables, flow: Flow, latents) -> dict[str, Any]:
    import torch

    from benchmarks import torch_peer

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    network = torch_peer.Network(dataclasses.replace(spec, power_steps=0), variables)
    z = torch_peer.to_torch(np.asarray(latents[-1]))
    solver = FixedPointIteration(options.tolerance, 1e-12, 1000)
    invert = jax.jit(lambda flow, latents: flow.inverse(latents, solver))
    steps: dict[str, Callable[[], Any]] = {
        "ours": lambda: jax.block_until_ready(invert(flow, latents)),
        "peer": functools.partial(network.inverse, z, options.plain_steps),
    }
    taken = alternate(steps, options.rounds)
    x, info = invert(flow, latents)
    evaluations = np.asarray(info.num_steps).max(axis=-1)
    return {
        **ratio(taken["peer"], taken["ours"]),
        "converged": bool(info.converged.all()),
        "evaluations_per_block": float(evaluations.mean()),
        "evaluations_of_slowest_block": int(evaluations.max()),
        "x": np.asarray(x),
        "x_peer": torch_peer.to_numpy(network.inverse(z, options.plain_steps)) + 0.5,
    }
