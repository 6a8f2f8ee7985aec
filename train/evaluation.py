"""How well a trained network inverts."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from iresnet_jax import Flow, inverse_error_in_double
from train.networks import ModelFunctions
from train.parallel import LocalDevices

_RECONSTRUCTED_AT_ONCE = 64


class Reconstruction(NamedTuple):
    """Examples sent to latents and back.

    Attributes:
      x: what came back.
      max_error: largest absolute difference.
      steps_max: most branch evaluations that any block needed for any example.
      all_converged: whether every example met its tolerance in every block.
      residual_max: largest residual of a block's inverse.
      error_bound_max: largest certified error of a single block's inverse.
      data_error_bound_max: largest rigorous bound on ‖x − x*‖₂, x* the exact preimage, from float32
        alone.
      latent_residual_max: largest ‖F(x) − z‖₂, an estimate of the error at the latents.
      diameter: of the examples' bounding box; a larger bound on an error says nothing.
      error_in_double_max: the same through an inverse in double precision, nearly sharp; None where
        it was not asked for.
      num_in_double: examples that it is of, the first.
    """

    x: np.ndarray
    max_error: float
    steps_max: int
    all_converged: bool
    residual_max: float
    error_bound_max: float
    data_error_bound_max: float
    latent_residual_max: float
    diameter: float
    error_in_double_max: float | None = None
    num_in_double: int = 0


def reconstruct(
    functions: ModelFunctions, flow: Flow, x: np.ndarray, *, in_double: bool = False
) -> Reconstruction:
    """Send ``x`` (floats) through the network and back.

    Args:
      functions: of the model.
      flow: the network.
      x: [examples, ...].
      in_double: whether the first batch is inverted in double precision, too, to bound its error.
    """
    devices = LocalDevices()
    replicated = devices.replicate(flow)
    outputs: list[Any] = []
    latents: Any = None
    errors, infos = [], []
    with jax.default_matmul_precision("highest"):
        for batch, count in padded_batches(x, _RECONSTRUCTED_AT_ONCE, devices.count, fill=True):
            there = functions.there_and_back(replicated, devices.split(batch))
            outputs.append(np.asarray(there.x)[:count])
            latents = latents or tuple(np.asarray(z)[:count] for z in there.latents)
            part = there.error_bound, there.latent_residual
            errors.append(np.stack([np.asarray(error)[:count] for error in part]))
            infos.append(
                jax.tree.map(lambda leaf, count=count: np.asarray(leaf)[:, :count], there.info)
            )
    back = np.concatenate(outputs)
    bound_max, residual_max = np.concatenate(errors, axis=1).max(axis=1)
    reconstruction = Reconstruction(
        back,
        float(np.abs(back - x).max()),
        int(max(info.num_steps.max() for info in infos)),
        bool(all(info.converged.all() for info in infos)),
        float(max(info.residual.max() for info in infos)),
        float(np.max([info.error_bound.max() for info in infos])),
        float(bound_max),
        float(residual_max),
        diameter(x),
    )
    if not in_double or latents is None:
        return reconstruction
    sharp = inverse_error_in_double(flow, outputs[0], latents)
    return reconstruction._replace(error_in_double_max=float(sharp.max()), num_in_double=len(sharp))


def diameter(x: np.ndarray) -> float:
    """Of the smallest box that holds all examples, Euclidean."""
    return float(np.linalg.norm(np.ptp(np.asarray(x, np.float64), axis=0)))


def padded_batches(
    x: np.ndarray, batch_size: int, multiple: int, *, fill: bool = False
) -> Iterator[tuple[np.ndarray, int]]:
    """Batches of one size, the last filled up with its last example, and how many count.

    The size is a multiple of ``multiple``; without ``fill``, no more than ``x`` needs.
    """
    size = batch_size if fill else min(batch_size, len(x))
    size = -(-size // multiple) * multiple
    for start in range(0, len(x), size):
        batch = x[start : start + size]
        count = len(batch)
        filling = np.repeat(batch[-1:], size - count, axis=0)
        yield np.concatenate([batch, filling]), count
