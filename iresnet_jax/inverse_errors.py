"""How far the inverse of a whole network can be from the exact one: guaranteed, and estimated.

The exact preimage is that of the latents, as they are, under the real map that the weights define.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from iresnet_jax.actnorm import ActNorm
from iresnet_jax.fixed_point import FixedPointInfo, contraction_gap
from iresnet_jax.flows import Flow, Latents
from iresnet_jax.iterations import sample_norm
from iresnet_jax.residual import ResidualBlock
from iresnet_jax.rounding import gamma, unit_roundoff
from iresnet_jax.transforms import LOGIT_ALPHA

_OPERATIONS = 16  # roundings of a step, an exponential's 4 among them, with room to spare


def inverse_error_bound(flow: Flow, info: FixedPointInfo) -> jax.Array:
    """A rigorous bound on ‖x − F⁻¹(z)‖₂ at the data, for each sample, [batch].

    From the latents to the data, the error ε grows in each block of contraction L, whose own bound
    is b, and in the ActNorm of scales s before it, whose rounding is ρ:
    ε ← (ε/(1 − L) + b)/min|s| + ρ. So does the bound: like Π 1/((1 − L) min|s|), exponentially with
    depth, and it is far from sharp in deep networks. Latents that join on the way bring no error.
    The logit's inverse has slopes of at most 1/(4(1 − 2α)).

    Args:
      flow: with its blocks' bounds attached, as :meth:`Flow.with_lipschitz_bounds` does.
      info: of :meth:`Flow.inverse`, fields of shape [blocks, batch].

    Returns:
      The bound; infinite where a block has no bound or was not solved in finite numbers.
    """
    error = size = jnp.zeros_like(info.norm[0])
    stop = len(flow.block_names())
    for scale, shape in reversed(list(zip(flow.scales, flow.scale_shapes(), strict=True))):
        for stack in reversed(scale.stacks):
            start = stop - stack.depth
            infos = jax.tree.map(lambda leaf, start=start, stop=stop: leaf[start:stop], info)
            parts = (stack.block.actnorm, stack.block.lipschitz, infos)
            step = partial(_through_block, shape)
            (error, size), _ = lax.scan(step, (error, size), parts, reverse=True)
            stop = start
    return _at_data(flow, error, size)


def inverse_error_in_double(
    flow: Flow, x: jax.Array, latents: Latents, *, tolerance: float = 1e-14, max_steps: int = 10_000
) -> np.ndarray:
    """A rigorous bound on ‖x − F⁻¹(z)‖₂, as :func:`inverse_error_bound`, but nearly sharp, [batch].

    The latents are inverted again, in float64: the distance to that result, plus its own bound,
    bounds the error of ``x``, however that was found. That bound grows with depth as in float32,
    but from 5e8 times less: it is nearly sharp until Π 1/(1 − L) is about that much. It costs a
    second inverse, on values that are concrete (not under ``jit``); where a block has no bound
    below 1 nothing can be guaranteed, and the answer is infinite at once.

    Args:
      flow: with its blocks' bounds attached, and branches in full precision.
      x: what is in doubt, [batch, *input_shape].
      latents: z.
      tolerance: of the residuals in float64, absolute; no finer than they can be seen.
      max_steps: of each block's inverse.
    """
    if not all(_contracts(stack.block) for scale in flow.scales for stack in scale.stacks):
        return np.full(len(x), np.inf)
    with jax.enable_x64(True):
        flow, latents = jax.tree.map(
            lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), (flow, latents)
        )
        exact, info = _inverse(flow, latents, tolerance, max_steps)
        bound = np.asarray(inverse_error_bound(flow, info))
    difference = (np.asarray(x, np.float64) - np.asarray(exact)).reshape(len(bound), -1)
    return (np.linalg.norm(difference, axis=1) + bound) * (1.0 + 1e-9)


@partial(jax.jit, static_argnums=(2, 3))
def _inverse(
    flow: Flow, latents: Latents, tolerance: float, max_steps: int
) -> tuple[jax.Array, FixedPointInfo]:
    rtol = _OPERATIONS * unit_roundoff(latents[-1].dtype)  # below it no residual can be seen
    return flow.inverse(latents, rtol=rtol, atol=tolerance, max_steps=max_steps)


def _contracts(block: ResidualBlock) -> bool:
    """Whether every block of a stack has a bound below 1."""
    return block.lipschitz is not None and bool((np.asarray(block.lipschitz) < 1.0).all())


def latent_residual(flow: Flow, x: jax.Array, latents: Latents) -> jax.Array:
    """‖F(x) − z‖₂ of each sample over all its latents, [batch]: an estimate, no bound.

    It is what the inverse leaves at the latents, as far as the rounding of F lets it be seen; at
    the data it may be Lip(F⁻¹) times as much.
    """
    reached = flow.forward_in_network(flow.to_network_unchecked(x)[0])
    pairs = zip(reached, latents, strict=True)
    return jnp.sqrt(sum(sample_norm(a - b) ** 2 for a, b in pairs))


def _through_block(
    shape: tuple[int, ...],
    bounds: tuple[jax.Array, jax.Array],
    block: tuple[ActNorm | None, jax.Array | None, FixedPointInfo],
) -> tuple[tuple[jax.Array, jax.Array], None]:
    """Bounds on the error and the norm of a block's output -> those of its input."""
    error, _ = bounds
    norm, lipschitz, info = block
    unit = unit_roundoff(error.dtype)
    count = math.prod(shape) + _OPERATIONS
    slack = 1.0 + 2.0 * gamma(count, unit)
    gap = 0.0 if lipschitz is None else contraction_gap(lipschitz, error.dtype)
    error = jnp.where(gap > 0, error / jnp.where(gap > 0, gap, 1.0), jnp.inf) + info.error_bound
    size = info.norm * slack
    if norm is not None:
        stretch = jnp.max(jnp.exp(-norm.log_scale))
        pixels = math.prod(shape[:-1])
        size = stretch * (size + math.sqrt(pixels) * jnp.linalg.norm(norm.shift)) * slack
        error = stretch * error + _OPERATIONS * unit * size
    error = error * slack
    return (jnp.where(jnp.isnan(error), jnp.inf, error), size), None


def _at_data(flow: Flow, error: jax.Array, size: jax.Array) -> jax.Array:
    unit, root = unit_roundoff(error.dtype), math.sqrt(flow.dim)
    if flow.domain == "logit":
        width = 1.0 - 2.0 * LOGIT_ALPHA
        error = (0.25 * error + _OPERATIONS * unit * root) / width
    elif flow.domain == "centered":
        error = error + unit * (size + root)
    return error * (1.0 + _OPERATIONS * unit)
