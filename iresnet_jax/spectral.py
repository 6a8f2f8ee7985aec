"""Operator norms estimated from below, by power iteration, and kernels scaled to a norm.

Power iteration keeps its singular vectors between calls, so that one or a few steps a training
step follow the slowly moving weights. It approaches the norm from below and therefore proves
nothing; :mod:`iresnet_jax.bounds` bounds the norm from above.

Everything here runs at the highest matrix precision, whatever the accelerator's default.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from iresnet_jax.operators import LinearOperator, adjoint, with_kernel


class SingularVectors(NamedTuple):
    """The state of a power iteration: unit vectors with A v ≈ σ u.

    Attributes:
      u: left vector, of the operator's codomain shape.
      v: right vector, of the operator's domain shape.
    """

    u: jax.Array
    v: jax.Array


class PowerIterationInfo(NamedTuple):
    """How a power iteration ended.

    Attributes:
      num_steps: steps taken.
      residual: ‖Av − σu‖ / σ at the end.
      converged: whether the residual met the tolerance.
    """

    num_steps: jax.Array
    residual: jax.Array
    converged: jax.Array


def init_singular_vectors(operator: LinearOperator) -> SingularVectors:
    """Where a power iteration starts: one step from a fixed vector that looks random.

    The vector is a Weyl sequence (multiples of the golden ratio, modulo 1): it has a part along
    every singular vector but those of a set of measure zero, and takes no key.
    """
    return _first_vectors(operator)


# Traced once for all layers, and all programs, that have operators of one shape.
@jax.jit
def _first_vectors(operator: LinearOperator) -> SingularVectors:
    shape, dtype = operator.domain_shape, operator.kernel.dtype
    sequence = jnp.arange(1, math.prod(shape) + 1, dtype=dtype) * ((math.sqrt(5.0) - 1.0) / 2.0)
    v = (sequence % 1.0 - 0.5).reshape(shape)
    v = v / jnp.linalg.norm(v)
    start = SingularVectors(jnp.zeros(operator.codomain_shape, dtype), v)
    return power_iteration(operator, start, num_steps=1)


def check_singular_vectors(operator: LinearOperator, vectors: SingularVectors) -> None:
    """Refuse singular vectors that belong to another operator.

    Raises:
      ValueError: if their shapes are not those of the operator's codomain and domain.
    """
    expected = (operator.codomain_shape, operator.domain_shape)
    got = (vectors.u.shape, vectors.v.shape)
    if got != expected:
        raise ValueError(
            f"Singular vectors of shapes u {got[0]}, v {got[1]} do not fit this operator, which "
            f"needs u {expected[0]}, v {expected[1]}: were they made for another image size?"
        )


def power_iteration(
    operator: LinearOperator, vectors: SingularVectors, num_steps: int
) -> SingularVectors:
    """``num_steps`` of u ← Av/‖Av‖, v ← Aᵀu/‖Aᵀu‖. No gradient flows through it.

    Args:
      operator: the linear operator A.
      vectors: where to start.
      num_steps: ≥ 0; zero returns the vectors as they are.

    Raises:
      ValueError: if ``num_steps`` is negative or the vectors do not fit the operator.
    """
    return _checked_advance(operator, vectors, num_steps)[0]


def power_iteration_and_sigma(
    operator: LinearOperator, vectors: SingularVectors, num_steps: int
) -> tuple[SingularVectors, jax.Array]:
    """:func:`power_iteration`, and :func:`sigma_estimate` along the vectors that it returns.

    Without another product with A: σ = uᵀAv is ‖Aᵀu‖, by which the last step divided.

    Raises:
      ValueError: as :func:`power_iteration`.
    """
    moved, sigma = _checked_advance(operator, vectors, num_steps)
    if num_steps == 0:
        return moved, sigma_estimate(operator, moved)
    return moved, _sigma_known(operator, moved, sigma)


def _checked_advance(operator, vectors, num_steps) -> tuple[SingularVectors, jax.Array]:
    if num_steps < 0:
        raise ValueError(f"num_steps of a power iteration must be ≥ 0; got {num_steps}.")
    check_singular_vectors(operator, vectors)
    return _advanced(*lax.stop_gradient((operator, vectors)), num_steps)


@partial(jax.jit, static_argnums=2)
def _advanced(
    operator: LinearOperator, vectors: SingularVectors, num_steps: int
) -> tuple[SingularVectors, jax.Array]:
    if num_steps == 1:  # the usual number: a loop would be traced for nothing
        return _power_step(operator, vectors)
    start = vectors, jnp.zeros((), vectors.v.dtype)
    return lax.fori_loop(0, num_steps, lambda _, state: _power_step(operator, state[0]), start)


def power_iteration_to_tolerance(
    operator: LinearOperator,
    vectors: SingularVectors,
    *,
    rtol: float = 1e-4,
    max_steps: int = 1000,
) -> tuple[SingularVectors, PowerIterationInfo]:
    """Power iteration until ‖Av − σu‖ ≤ rtol·σ.

    The residual bounds the distance of σ to *some* singular value by rtol·σ; it is no bound from
    above on the largest one.

    Args:
      operator: the linear operator A.
      vectors: where to start.
      rtol: tolerance, > 0.
      max_steps: steps after which it stops unconverged, ≥ 1.

    Returns:
      The vectors, and how the iteration ended.

    Raises:
      ValueError: for ``rtol`` or ``max_steps`` out of range, and for vectors of other shapes than
        the operator's.
    """
    if not rtol > 0 or max_steps < 1:
        raise ValueError(f"Need rtol > 0 and max_steps ≥ 1; got rtol={rtol}, {max_steps=}.")
    check_singular_vectors(operator, vectors)
    return _advanced_to_tolerance(*lax.stop_gradient((operator, vectors)), rtol, max_steps)


@partial(jax.jit, static_argnums=(2, 3))
def _advanced_to_tolerance(
    operator: LinearOperator, vectors: SingularVectors, rtol: float, max_steps: int
) -> tuple[SingularVectors, PowerIterationInfo]:
    def residual(state):
        image = _apply(operator, state.v)
        sigma = jnp.vdot(state.u, image)
        gap = jnp.linalg.norm((image - sigma * state.u).ravel())
        return jnp.where(sigma > 0, gap / jnp.maximum(sigma, _tiny(sigma)), gap)

    def unfinished(carry):
        _, step, gap = carry
        return (step < max_steps) & (gap > rtol)

    def advance(carry):
        state, step, _ = carry
        state, _ = _power_step(operator, state)
        return state, step + 1, residual(state)

    first, _ = _power_step(operator, vectors)
    start = (first, jnp.ones((), jnp.int32), residual(first))
    final, num_steps, gap = lax.while_loop(unfinished, advance, start)
    return final, PowerIterationInfo(num_steps, gap, gap <= rtol)


def sigma_estimate(operator: LinearOperator, vectors: SingularVectors) -> jax.Array:
    """σ = uᵀ A v, never above the operator norm; differentiable in the kernel, u and v constant.

    Raises:
      ValueError: for vectors of other shapes than the operator's.
    """
    check_singular_vectors(operator, vectors)
    u, v = lax.stop_gradient(vectors)
    return jnp.vdot(u, _apply(operator, v))


@jax.custom_jvp
def _sigma_known(operator: LinearOperator, vectors: SingularVectors, sigma: jax.Array) -> jax.Array:
    """``sigma``, with the derivatives of :func:`sigma_estimate`."""
    del operator, vectors
    return sigma


@_sigma_known.defjvp
def _sigma_known_jvp(primals, tangents):
    operator, vectors, _ = primals
    along = (tangents[0],)
    _, slope = jax.jvp(lambda operator: sigma_estimate(operator, vectors), (operator,), along)
    return _sigma_known(*primals), slope


def spectral_normalize(
    operator: LinearOperator, sigma: jax.Array, coeff: float | None
) -> LinearOperator:
    """The operator scaled by min(1, coeff/σ): those already below ``coeff`` stay as they are.

    Args:
      operator: the raw operator.
      sigma: its norm, an estimate or a bound of it; gradients flow through it.
      coeff: the norm to allow, in (0, 1), or None for no constraint.

    Raises:
      ValueError: if ``coeff`` is outside (0, 1).
    """
    check_coeff(coeff)
    if coeff is None:
        return operator
    return with_kernel(operator, operator.kernel * (coeff / jnp.maximum(sigma, coeff)))


def check_coeff(coeff: float | None) -> None:
    """Refuse a Lipschitz coefficient outside (0, 1).

    Raises:
      ValueError: naming the value; None (unconstrained) passes.
    """
    if coeff is not None and not 0.0 < coeff < 1.0:
        raise ValueError(
            f"coeff must lie in (0, 1), or be None for an unconstrained layer; got {coeff}."
        )


def _power_step(
    operator: LinearOperator, state: SingularVectors
) -> tuple[SingularVectors, jax.Array]:
    """The vectors after one step, and ‖Aᵀu‖, their σ."""
    u, _ = _normalize(_apply(operator, state.v), state.u)
    v, sigma = _normalize(_adjoint(operator, u), state.v)
    return SingularVectors(u, v), sigma


def _apply(operator: LinearOperator, x: jax.Array) -> jax.Array:
    with jax.default_matmul_precision("highest"):
        return operator(x)


def _adjoint(operator: LinearOperator, y: jax.Array) -> jax.Array:
    with jax.default_matmul_precision("highest"):
        return adjoint(operator, y)


def _normalize(x: jax.Array, fallback: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x/‖x‖, or the fallback where x is zero; and ‖x‖."""
    norm = jnp.linalg.norm(x.ravel())
    return jnp.where(norm > 0, x / jnp.maximum(norm, _tiny(norm)), fallback), norm


def _tiny(x: jax.Array) -> float:
    return float(jnp.finfo(x.dtype).tiny)
