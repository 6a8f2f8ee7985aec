"""How far the inverse of a whole network can be from the exact one: guaranteed, and estimated.

The exact preimage is that of the latents, as they are, under the real map that the weights define.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from iresnet_jax.convergence import FixedPointInfo
from iresnet_jax.flows import Flow, Latents
from iresnet_jax.iterations import sample_norm
from iresnet_jax.residual import OPERATIONS
from iresnet_jax.rounding import unit_roundoff
from iresnet_jax.solvers import FixedPointIteration
from iresnet_jax.types import AnyArray, PerSample


def inverse_error_bound(
    flow: Flow, info: FixedPointInfo, latents: Latents | None = None
) -> PerSample:
    """Bound ‖x − F⁻¹(z)‖₂ at the data rigorously, for each sample, [batch].

    From the latents to the data, the error ε grows in each block of contraction L, whose own bound
    is b, and in the ActNorm of scales s before it, whose rounding is ρ:
    ε ← (ε/(1 − L) + b)/min|s| + ρ; likewise in an invertible 1×1 convolution. So does the bound:
    like Π 1/((1 − L) min|s|), exponentially with depth. It is far from sharp in deep networks.
    Latents that join on the way bring no error.

    Args:
      flow: with its bounds attached, as :meth:`Flow.with_bounds` does.
      info: of :meth:`Flow.inverse`, fields of shape [solves, batch].
      latents: what was inverted. Without them there is no bound for a network with a level that
        ends in ActNorm, whose rounding grows with their norm.

    Returns:
      The bound; infinite where a block has no bound or was not solved in finite numbers.
    """
    return flow.inverse_error(info, latents).bound


def inverse_error_in_double(
    flow: Flow, x: AnyArray, latents: Latents, *, tolerance: float = 1e-14, max_steps: int = 10_000
) -> Float[np.ndarray, " batch"]:
    """Bound ‖x − F⁻¹(z)‖₂ as :func:`inverse_error_bound` does, but nearly sharply, [batch].

    The latents are inverted again, in float64. The distance to that result, plus its own bound,
    bounds the error of ``x``, however that was found. That bound grows with depth as in float32,
    but from 5e8 times less: it is nearly sharp until Π 1/(1 − L) is about that much. It costs a
    second inverse, on values that are concrete (not under ``jit``). Where a block has no bound
    below 1 nothing can be guaranteed, and the answer is infinite at once.

    Args:
      flow: with its bounds attached, and branches in full precision.
      x: what is in doubt, [batch, *event_shape].
      latents: z.
      tolerance: of the residuals in float64, absolute; no finer than they can be seen.
      max_steps: of each block's inverse.
    """
    if not flow.contracts:
        return np.full(len(x), np.inf)
    with jax.enable_x64(True):
        flow, latents = jax.tree.map(_in_double, (flow, latents))
        rtol = OPERATIONS * unit_roundoff(jnp.float64)  # below it no residual can be seen
        exact, info = _inverse(flow, latents, FixedPointIteration(rtol, tolerance, max_steps))
        bound = np.asarray(inverse_error_bound(flow, info, latents))
    difference = (np.asarray(x, np.float64) - np.asarray(exact)).reshape(len(bound), -1)
    guaranteed: np.ndarray = (np.linalg.norm(difference, axis=1) + bound) * (1.0 + 1e-9)
    return guaranteed


def latent_residual(flow: Flow, x: Float[AnyArray, "batch ..."], latents: Latents) -> PerSample:
    """Estimate ‖F(x) − z‖₂ of each sample over all its latents, [batch]: no bound.

    It is what the inverse leaves at the latents, as far as the rounding of F lets it be seen; at
    the data it may be Lip(F⁻¹) times as much.
    """
    pairs = zip(flow.forward_unchecked(x), latents, strict=True)
    return jnp.sqrt(sum(sample_norm(a - b) ** 2 for a, b in pairs))


@jax.jit
def _inverse(
    flow: Flow, latents: Latents, solver: FixedPointIteration
) -> tuple[Float[Array, "batch ..."], FixedPointInfo]:
    return flow.inverse(latents, solver)


def _in_double(leaf: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    values = np.asarray(leaf)
    return jnp.asarray(values, jnp.float64 if jnp.issubdtype(values.dtype, jnp.floating) else None)
