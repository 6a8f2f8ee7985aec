"""The inverse of y = x + g(x) by fixed-point iteration (Behrmann et al. 2019, Algorithm 1).

The branch ``g`` is any pure function on batches ``[batch, ...]`` that treats samples
independently. Nothing here knows about networks.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Branch = Callable[[jax.Array], jax.Array]


class FixedPointInfo(NamedTuple):
    """How the iteration ended, for each sample; every field has shape [batch].

    Attributes:
      num_steps: evaluations of the branch until the sample stopped.
      residual: ‖y − g(x) − x‖₂ at the returned x, over the non-batch axes.
      converged: whether the residual met the tolerance.
      error_bound: residual / (1 − L), a bound on the distance ‖x − x*‖₂ to the exact preimage (up
        to the rounding of the residual); infinite where L is not given or is ≥ 1.
    """

    num_steps: jax.Array
    residual: jax.Array
    converged: jax.Array
    error_bound: jax.Array


def fixed_point_inverse(
    branch: Branch,
    y: jax.Array,
    *,
    rtol: float = 1e-6,
    atol: float = 1e-6,
    max_steps: int = 100,
    lipschitz: float | jax.Array | None = None,
) -> tuple[jax.Array, FixedPointInfo]:
    """Solve x + g(x) = y for x by x ← y − g(x), starting from y.

    A sample stops as soon as ‖y − g(x) − x‖₂ ≤ atol + rtol·‖x‖₂ and stays frozen from then on: its
    answer does not depend on the others in its batch. A sample that becomes NaN or infinite
    stops too, unconverged.

    The result is differentiable in ``y`` and in whatever ``branch`` closes over, by the implicit
    function theorem: dx = (I + J)⁻¹(dy − dg), the linear system solved by the same kind of
    iteration. Forward, reverse and second-order derivatives work where the branch's operations
    allow them. Where a sample, or its linear system, did not converge, the derivative is NaN.

    Args:
      branch: g, a contraction on batches [batch, ...].
      y: floating point, [batch, ...].
      rtol: relative tolerance, ≥ 0.
      atol: absolute tolerance, ≥ 0; one of the two must be > 0.
      max_steps: evaluations of the branch after which a sample stops unconverged, ≥ 1.
      lipschitz: an upper bound L on Lip(g), used for ``error_bound`` alone.

    Returns:
      x of the shape of y, and a :class:`FixedPointInfo`.

    Raises:
      ValueError: for an input without a batch axis, tolerances or steps out of range.
      TypeError: for an input that is not floating point.
    """
    _check(y, rtol, atol, max_steps)

    def solve(_, start):
        return _iterate(lambda x: y - branch(x), start, rtol, atol, max_steps)

    with jax.default_matmul_precision("highest"):
        x, aux = lax.custom_root(
            lambda x: x + branch(x) - y,
            lax.stop_gradient(y),
            solve,
            lambda linear, b: _solve_linear(linear, b, rtol, atol, max_steps),
            has_aux=True,
        )
    num_steps, residual, converged = lax.stop_gradient(aux)
    x = _nan_derivative_unless(x, converged)
    info = FixedPointInfo(
        num_steps.astype(jnp.int32), residual, converged > 0, _error_bound(residual, lipschitz)
    )
    return x, info


class _State(NamedTuple):
    x: jax.Array
    step: jax.Array
    num_steps: jax.Array  # counts and flags are floats: custom_root differentiates around them
    residual: jax.Array
    converged: jax.Array
    active: jax.Array


def _iterate(update: Branch, start: jax.Array, rtol: float, atol: float, max_steps: int):
    """x ← update(x) for each sample until the change meets the tolerance."""

    def unfinished(state):
        return (state.step < max_steps) & jnp.any(state.active > 0)

    def advance(state):
        proposal = update(state.x)
        change = _sample_norm(proposal - state.x)
        size = _sample_norm(state.x)  # infinite where it overflows: that must not meet a tolerance
        small = (change <= atol + rtol * size) & jnp.isfinite(size)
        converged = small.astype(start.dtype)
        keep_on = state.active * (1.0 - converged) * jnp.isfinite(change).astype(start.dtype)
        moves = (keep_on > 0) & (state.step + 1 < max_steps)  # the residual stays that of x
        return _State(
            jnp.where(_expand(moves, start), proposal, state.x),
            state.step + 1,
            state.num_steps + state.active,
            jnp.where(state.active > 0, change, state.residual),
            jnp.where(state.active > 0, converged, state.converged),
            keep_on,
        )

    zeros = jnp.zeros(start.shape[0], start.dtype)
    first = _State(start, jnp.zeros((), jnp.int32), zeros, zeros + jnp.inf, zeros, zeros + 1.0)
    last = lax.while_loop(unfinished, advance, first)
    return last.x, (last.num_steps, last.residual, last.converged)


def _solve_linear(linear: Branch, b: jax.Array, rtol: float, atol: float, max_steps: int):
    """Solve z + Jz = b, where ``linear`` is z ↦ z + Jz; NaN where it does not converge."""

    def neumann(matvec, b):
        z, (_, _, converged) = _iterate(lambda z: b - (matvec(z) - z), b, rtol, atol, max_steps)
        return jnp.where(_expand(converged, z) > 0, z, jnp.nan)

    return lax.custom_linear_solve(linear, b, neumann, neumann)


@jax.custom_jvp
def _nan_derivative_unless(x, valid):
    return x


@_nan_derivative_unless.defjvp
def _(primals, tangents):
    x, valid = primals
    return x, tangents[0] * _expand(jnp.where(valid > 0, 1.0, jnp.nan), x).astype(x.dtype)


def _check(y, rtol, atol, max_steps):
    if y.ndim < 2:
        raise ValueError(f"y needs a batch axis and at least one more; got shape {y.shape}.")
    if not jnp.issubdtype(y.dtype, jnp.floating):
        raise TypeError(f"y must be floating point; got {y.dtype}.")
    if not (rtol >= 0 and atol >= 0 and rtol + atol > 0):
        raise ValueError(f"Tolerances must be ≥ 0 and one of them > 0; got {rtol=}, {atol=}.")
    if max_steps < 1:
        raise ValueError(f"max_steps must be ≥ 1; got {max_steps}.")


def _error_bound(residual, lipschitz):
    if lipschitz is None:
        return jnp.full_like(residual, jnp.inf)
    contraction = lax.stop_gradient(jnp.asarray(lipschitz, residual.dtype))
    contraction = jnp.nextafter(contraction, jnp.full_like(contraction, jnp.inf))  # rounded up
    gap = jnp.where(contraction < 1, 1.0 - contraction, 0.0)
    known = (gap > 0) & jnp.isfinite(residual)
    return jnp.where(known, residual / jnp.where(gap > 0, gap, 1.0), jnp.inf)


def _sample_norm(x):
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=tuple(range(1, x.ndim))))


def _expand(per_sample, x):
    return per_sample.reshape(per_sample.shape + (1,) * (x.ndim - 1))
