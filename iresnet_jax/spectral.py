"""Power iteration, which estimates operator norms from below, and scaling of kernels to a norm.

Power iteration keeps its singular vectors between calls, so that one or a few steps per training
step track the slowly moving weights. It approaches the norm from below and so proves nothing. For
bounds from above see :mod:`iresnet_jax.bounds`.

Everything here runs at the highest matrix precision, whatever the accelerator's default.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from iresnet_jax.operators import LinearOperator, with_kernel
from iresnet_jax.power_steps import (
    SingularVectors,
    applied,
    begun,
    dot,
    in_one_type,
    in_types_of,
    normalized,
    power_of_two,
    power_step,
    scaled,
    step_from,
    tiny,
)
from iresnet_jax.types import Scalar


class PowerIterationInfo(NamedTuple):
    """How a power iteration ended.

    Attributes:
      num_steps: number of steps taken.
      residual: ‖Av − σu‖ / σ at the end.
      converged: whether the residual met the tolerance.
    """

    num_steps: Int[Array, ""]
    residual: Scalar
    converged: Bool[Array, ""]


def init_singular_vectors(operator: LinearOperator) -> SingularVectors:
    """Start a power iteration, one step from a fixed vector that looks random.

    The vector is a Weyl sequence (multiples of the golden ratio, modulo 1) and needs no key. It has
    a part along every singular vector outside a set of measure zero.
    """
    vectors: SingularVectors = _first_vectors(operator)
    return vectors


# Traced once per operator shape, for all layers and programs.
@jax.jit
def _first_vectors(operator: LinearOperator) -> SingularVectors:
    return power_iteration(operator, unbegun_vectors(operator), num_steps=1)


def unbegun_vectors(operator: LinearOperator) -> SingularVectors:
    """Return zeros, from which a power iteration begins as from :func:`init_singular_vectors`."""
    shapes, dtype = (operator.codomain_shape, operator.domain_shape), operator.kernel.dtype
    return SingularVectors(*(jnp.zeros(shape, dtype) for shape in shapes))


def check_singular_vectors(operator: LinearOperator, vectors: SingularVectors) -> None:
    """Require singular vectors that fit the operator.

    Raises:
      ValueError: if their shapes differ from those of the codomain and domain.
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
    """Take ``num_steps`` of u ← Av/‖Av‖, v ← Aᵀu/‖Aᵀu‖, with no gradient.

    A zero v begins anew, as :func:`init_singular_vectors` does. The vectors keep their types.

    Args:
      operator: the linear operator A.
      vectors: the vectors to start from.
      num_steps: ≥ 0; zero returns the vectors unchanged.

    Raises:
      ValueError: if ``num_steps`` is negative or the vectors do not fit the operator.
    """
    return _checked_advance(operator, vectors, num_steps)[0]


def power_iteration_and_sigma(
    operator: LinearOperator, vectors: SingularVectors, num_steps: int
) -> tuple[SingularVectors, Scalar]:
    """Run :func:`power_iteration` and return :func:`sigma_estimate` at its result too.

    This costs no further product with A, since σ = uᵀAv = ‖Aᵀu‖, by which the last step divides.

    Raises:
      ValueError: as :func:`power_iteration`.
    """
    moved, sigma = _checked_advance(operator, vectors, num_steps)
    if num_steps == 0:
        return moved, sigma_estimate(operator, moved)
    return moved, _sigma_known(operator, moved, sigma)


def _checked_advance(
    operator: LinearOperator, vectors: SingularVectors, num_steps: int
) -> tuple[SingularVectors, Scalar]:
    if num_steps < 0:
        raise ValueError(f"num_steps of a power iteration must be ≥ 0; got {num_steps}.")
    check_singular_vectors(operator, vectors)
    operator, vectors = lax.stop_gradient((operator, vectors))
    advanced: tuple[SingularVectors, Scalar] = _advanced(operator, vectors, num_steps)
    return advanced


@partial(jax.jit, static_argnums=2)
def _advanced(
    operator: LinearOperator, vectors: SingularVectors, num_steps: int
) -> tuple[SingularVectors, Scalar]:
    operator, state = in_one_type(operator, vectors)
    operator, unit = scaled(operator)
    sigma = jnp.zeros((), state.v.dtype)
    if num_steps == 1:  # the usual number: a loop would be traced for nothing
        state, sigma = power_step(operator, state)
    else:
        state, sigma = lax.fori_loop(
            0, num_steps, lambda _, at: power_step(operator, at[0]), (state, sigma)
        )
    return in_types_of(vectors, state), sigma * unit


def power_iteration_to_tolerance(
    operator: LinearOperator,
    vectors: SingularVectors,
    *,
    rtol: float = 1e-4,
    max_steps: int = 1000,
) -> tuple[SingularVectors, PowerIterationInfo]:
    """Run a power iteration until ‖Av − σu‖ ≤ rtol·σ.

    *Some* singular value then lies within rtol·σ of σ; the largest one may be above.

    Args:
      operator: the linear operator A.
      vectors: the vectors to start from.
      rtol: tolerance, > 0.
      max_steps: number of steps after which to stop unconverged, ≥ 1.

    Returns:
      The vectors, and how the iteration ended.

    Raises:
      ValueError: if ``rtol`` or ``max_steps`` is out of range, or the vectors do not fit the
        operator.
    """
    if not rtol > 0 or max_steps < 1:
        raise ValueError(f"Need rtol > 0 and max_steps ≥ 1; got rtol={rtol}, {max_steps=}.")
    advanced, _, info = _checked_to_tolerance(operator, vectors, rtol, max_steps)
    return advanced, info


def converged_sigma(
    operator: LinearOperator,
    vectors: SingularVectors,
    *,
    rtol: float = 1e-4,
    max_steps: int = 1000,
) -> Scalar:
    """Return σ = uᵀAv at the end of :func:`power_iteration_to_tolerance`, with no gradient."""
    return _checked_to_tolerance(operator, vectors, rtol, max_steps)[1]


_Converged = tuple[SingularVectors, Scalar, PowerIterationInfo]


def _checked_to_tolerance(
    operator: LinearOperator, vectors: SingularVectors, rtol: float, max_steps: int
) -> _Converged:
    check_singular_vectors(operator, vectors)
    operator, vectors = lax.stop_gradient((operator, vectors))
    converged: _Converged = _advanced_to_tolerance(operator, vectors, rtol, max_steps)
    return converged


_Carry = tuple[SingularVectors, Float[Array, "..."], Int[Array, ""], Scalar]


@partial(jax.jit, static_argnums=(2, 3))
def _advanced_to_tolerance(
    operator: LinearOperator, vectors: SingularVectors, rtol: float, max_steps: int
) -> _Converged:
    """The image Av passes from a step's residual to the next step: two products a step."""

    def unfinished(carry: _Carry) -> Bool[Array, ""]:
        _, _, step, gap = carry
        return (step == 0) | (step < max_steps) & (gap > rtol)

    def advance(carry: _Carry) -> _Carry:
        state, image, step, _ = carry
        state, _ = step_from(operator, state, image)
        image = applied(operator, state.v)
        return state, image, step + 1, _residual(state.u, image)

    operator, given = in_one_type(operator, vectors)
    operator, unit = scaled(operator)
    given = given._replace(v=begun(given.v))
    image = applied(operator, given.v)
    start = (given, image, jnp.zeros((), jnp.int32), jnp.full((), jnp.inf, image.dtype))
    final, image, num_steps, gap = lax.while_loop(unfinished, advance, start)
    info = PowerIterationInfo(num_steps, gap, gap <= rtol)
    return in_types_of(vectors, final), dot(final.u, image) * unit, info


def _residual(u: Float[Array, "..."], image: Float[Array, "..."]) -> Scalar:
    """‖Av − σu‖/σ for the image Av and σ = uᵀAv; not divided where σ is no norm."""
    sigma = dot(u, image)
    gap = jnp.linalg.norm((image - sigma * u).ravel())
    return jnp.where(sigma > 0, gap / jnp.maximum(sigma, tiny(sigma)), gap)


def sigma_estimate(operator: LinearOperator, vectors: SingularVectors) -> Scalar:
    """Compute σ = |uᵀ A v|/(‖u‖‖v‖), which never exceeds the operator norm.

    So averaged or rounded vectors, which are no unit vectors, do not make it smaller. For u = 0 it
    is ‖Av‖/‖v‖, and for v = 0 it is 0. Differentiable in the kernel, with u and v held constant.

    Raises:
      ValueError: if the vectors do not fit the operator.
    """
    check_singular_vectors(operator, vectors)
    sigma: Scalar = _sigma(operator, lax.stop_gradient(vectors))
    return sigma


@jax.jit
def _sigma(operator: LinearOperator, vectors: SingularVectors) -> Scalar:
    operator, (u, v) = in_one_type(operator, vectors)
    operator, unit = scaled(operator)
    v, _ = normalized(v / power_of_two(v), v)
    image = applied(operator, v)
    u, _ = normalized(u / power_of_two(u), normalized(lax.stop_gradient(image), u)[0])
    return jnp.abs(dot(u, image)) * unit


@jax.custom_jvp
def _sigma_known(operator: LinearOperator, vectors: SingularVectors, sigma: Scalar) -> Scalar:
    """``sigma``, with the derivatives of :func:`sigma_estimate`."""
    del operator, vectors
    return sigma


@_sigma_known.defjvp
def _sigma_known_jvp(
    primals: tuple[LinearOperator, SingularVectors, Scalar],
    tangents: tuple[LinearOperator, SingularVectors, Scalar],
) -> tuple[Scalar, Scalar]:
    operator, vectors, _ = primals
    along = (tangents[0],)
    _, slope = jax.jvp(lambda operator: sigma_estimate(operator, vectors), (operator,), along)
    return _sigma_known(*primals), slope


def spectral_normalize(
    operator: LinearOperator, sigma: ArrayLike, coeff: float | None
) -> LinearOperator:
    """Scale an operator by min(1, coeff/σ).

    Args:
      operator: the raw operator.
      sigma: an estimate of its norm, or a bound; gradients flow through it.
      coeff: the largest norm allowed, in (0, 1), or None for no constraint.

    Raises:
      ValueError: if ``coeff`` is outside (0, 1).
    """
    check_coeff(coeff)
    if coeff is None:
        return operator
    return with_kernel(operator, operator.kernel * (coeff / jnp.maximum(sigma, coeff)))


def check_coeff(coeff: float | None) -> None:
    """Require a Lipschitz coefficient in (0, 1), or None for no constraint.

    Raises:
      ValueError: if it lies outside; names the value.
    """
    if coeff is not None and not 0.0 < coeff < 1.0:
        raise ValueError(
            f"coeff must lie in (0, 1), or be None for an unconstrained layer; got {coeff}."
        )
