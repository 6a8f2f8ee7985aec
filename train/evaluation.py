"""Evaluation of a trained network's inverse."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from iresnet_jax import Flow, inverse_error_in_double
from train.networks import ModelFunctions, ThereAndBack
from train.parallel import LocalDevices

_AT_ONCE = 64


class Reconstruction(NamedTuple):
    """Examples mapped to latents and back.

    Attributes:
      x: the reconstructions.
      latents: of the examples, arrays [examples, ...].
      residual_max: largest residual of a block's inverse.
      report: their part of the report:

        - ``reconstruction_max_error``: largest absolute difference.
        - ``inverse_steps_max``: most evaluations of a branch that a block needed for an example.
        - ``all_converged``: whether every example met its tolerance in every block.
        - ``block_inverse_error_bound_max``: largest certified error of a single block's inverse.
        - ``inverse_error_bound_guaranteed``: largest rigorous bound on ‖x − x*‖₂, with x* the exact
          preimage, from float32 alone.
        - ``inverse_error_in_double_guaranteed``: the same through an inverse in double precision,
          nearly sharp, for the first ``inverse_error_in_double_examples``; only on request.
        - ``data_diameter``: of the examples' bounding box; a larger error bound is vacuous.
        - ``latent_residual_estimate_max``: largest ‖F(x) − z‖₂, an estimate of the latents' error.
    """

    x: np.ndarray
    latents: tuple[np.ndarray, ...]
    residual_max: float
    report: dict[str, Any]


def reconstruct(
    functions: ModelFunctions, flow: Flow, x: np.ndarray, *, in_double: bool = False
) -> Reconstruction:
    """Map ``x`` [examples, ...] to latents and back.

    With ``in_double``, the first batch is also inverted in double precision, to bound its error.
    """
    there = there_and_back(functions, flow, x)
    report = {
        "reconstruction_max_error": float(np.abs(there.x - x).max()),
        "inverse_steps_max": int(there.info.num_steps.max()),
        "all_converged": bool(there.info.converged.all()),
        "block_inverse_error_bound_max": float(there.info.error_bound.max()),
        "inverse_error_bound_guaranteed": float(there.error_bound.max()),
        "data_diameter": diameter(x),
        "latent_residual_estimate_max": float(there.latent_residual.max()),
    }
    if in_double:
        few = tuple(z[:_AT_ONCE] for z in there.latents)
        sharp = inverse_error_in_double(flow, there.x[:_AT_ONCE], few)
        report["inverse_error_in_double_guaranteed"] = float(sharp.max())
        report["inverse_error_in_double_examples"] = len(sharp)
    latents = tuple(map(np.asarray, there.latents))
    return Reconstruction(np.asarray(there.x), latents, float(there.info.residual.max()), report)


def there_and_back(
    functions: ModelFunctions, flow: Flow, x: np.ndarray, *, fill: bool = True
) -> ThereAndBack:
    """Map to latents and back in batches, over this process's devices.

    With ``fill``, every call takes batches of one size, and so one compiled program.
    """
    devices = LocalDevices()
    flow = devices.replicate(flow)
    parts: list[Any] = []
    with jax.default_matmul_precision("highest"):
        for batch, count in padded_batches(x, _AT_ONCE, devices.count, fill=fill):
            there = functions.there_and_back(devices, flow, devices.split(batch))
            rest = jax.tree.map(lambda a, n=count: np.asarray(a)[:n], there._replace(info=()))
            info = jax.tree.map(lambda a, n=count: np.asarray(a)[:, :n], there.info)
            parts.append((rest, info))
    rest, info = (list(column) for column in zip(*parts, strict=True))
    joined = jax.tree.map(lambda *a: np.concatenate(a), *rest)
    return joined._replace(info=jax.tree.map(lambda *a: np.concatenate(a, axis=1), *info))


def diameter(x: np.ndarray) -> float:
    """Return the Euclidean diameter of the smallest box that holds all examples."""
    return float(np.linalg.norm(np.ptp(np.asarray(x, np.float64), axis=0)))


def padded_batches(
    x: np.ndarray, batch_size: int, multiple: int, *, fill: bool = False
) -> Iterator[tuple[np.ndarray, int]]:
    """Yield batches of equal size, the last padded with its last example, and their true sizes.

    The size is a multiple of ``multiple``; without ``fill``, no larger than ``x`` needs.
    """
    size = batch_size if fill else min(batch_size, len(x))
    size = -(-size // multiple) * multiple
    for start in range(0, len(x), size):
        batch = x[start : start + size]
        filling = np.repeat(batch[-1:], size - len(batch), axis=0)
        yield np.concatenate([batch, filling]), len(batch)
