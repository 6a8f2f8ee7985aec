"""One step of a power iteration, on operators and vectors of any finite scale and of any type.

Operators and vectors are first divided by powers of two, which rounds nothing, so that no square of
theirs leaves the range of their type.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from iresnet_jax.operators import LinearOperator, adjoint, with_kernel
from iresnet_jax.types import Scalar


class SingularVectors(NamedTuple):
    """The state of a power iteration: unit vectors with A v ≈ σ u.

    Attributes:
      u: left vector, of the operator's codomain shape.
      v: right vector, of the operator's domain shape.
    """

    u: Float[Array, "..."]
    v: Float[Array, "..."]


def power_step(operator: LinearOperator, state: SingularVectors) -> tuple[SingularVectors, Scalar]:
    """Take one step; return the vectors, and ‖Aᵀu‖, their σ."""
    start = state._replace(v=begun(state.v))
    return step_from(operator, start, applied(operator, start.v))


def step_from(
    operator: LinearOperator, state: SingularVectors, image: Float[Array, "..."]
) -> tuple[SingularVectors, Scalar]:
    """Take one step where the image Av is known; see :func:`power_step`."""
    u, _ = normalized(image, state.u)
    v, sigma = normalized(_adjoint(operator, u), state.v)
    return SingularVectors(u, v), sigma


def begun(v: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return the vector, of about unit size, or where it is zero the one to start from."""
    return jnp.where(jnp.any(v != 0), v / power_of_two(v), _weyl_vector(v.shape, v.dtype))


def in_one_type(
    operator: LinearOperator, vectors: SingularVectors
) -> tuple[LinearOperator, SingularVectors]:
    """Cast the kernel and the vectors to the one type that holds them all."""
    dtype = jnp.result_type(operator.kernel.dtype, vectors.u.dtype, vectors.v.dtype)
    wide = SingularVectors(vectors.u.astype(dtype), vectors.v.astype(dtype))
    return with_kernel(operator, operator.kernel.astype(dtype)), wide


def scaled(operator: LinearOperator) -> tuple[LinearOperator, Scalar]:
    """Divide by a power of two, so that no square leaves the range."""
    unit = power_of_two(operator.kernel)
    return with_kernel(operator, operator.kernel / unit), unit


def power_of_two(x: Float[Array, "..."]) -> Scalar:
    """Return a power of two near the largest entry; 1 where that is zero or not finite."""
    largest = lax.stop_gradient(jnp.max(jnp.abs(x), initial=0.0))
    info = jnp.finfo(largest.dtype)
    exponent = jnp.clip(jnp.frexp(largest)[1] - 1, int(info.minexp) + 1, int(info.maxexp) - 2)
    known = (largest > 0) & jnp.isfinite(largest)
    return jnp.ldexp(jnp.ones_like(largest), jnp.where(known, exponent, 0))


def in_types_of(like: SingularVectors, vectors: SingularVectors) -> SingularVectors:
    """Cast vectors to the types of others."""
    return SingularVectors(vectors.u.astype(like.u.dtype), vectors.v.astype(like.v.dtype))


def dot(u: Float[Array, "..."], v: Float[Array, "..."]) -> Scalar:
    """Compute uᵀv at the highest precision."""
    return jnp.vdot(u, v, precision="highest")


def applied(operator: LinearOperator, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Compute Ax at the highest precision."""
    with jax.default_matmul_precision("highest"):
        return operator(x)


def _adjoint(operator: LinearOperator, y: Float[Array, "..."]) -> Float[Array, "..."]:
    with jax.default_matmul_precision("highest"):
        return adjoint(operator, y)


def normalized(
    x: Float[Array, "*shape"], fallback: Float[Array, "*shape"]
) -> tuple[Float[Array, "*shape"], Scalar]:
    """Return x/‖x‖, or the fallback where x is zero; and ‖x‖."""
    norm = jnp.linalg.norm(x.ravel())
    return jnp.where(norm > 0, x / jnp.maximum(norm, tiny(norm)), fallback), norm


def tiny(x: Scalar) -> float:
    """Return the smallest normal number of a scalar's type."""
    return float(jnp.finfo(x.dtype).tiny)


def _weyl_vector(shape: tuple[int, ...], dtype: DTypeLike) -> Float[Array, "..."]:
    wide = jnp.promote_types(dtype, jnp.float32)  # narrower types do not count so far
    sequence = jnp.arange(1, math.prod(shape) + 1, dtype=wide) * ((math.sqrt(5.0) - 1.0) / 2.0)
    v = (sequence % 1.0 - 0.5).reshape(shape)
    return (v / jnp.linalg.norm(v)).astype(dtype)
