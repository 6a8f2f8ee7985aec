"""Gram iteration with its rounding: norms of matrices from above, in traced computations.

The mathematics is in :func:`iresnet_jax.bounds.gram_upper_bound`.
"""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Inexact

from iresnet_jax.types import Matrices, SameArray

PerMatrix = Float[Array, " number"]


def squared_norm_above(matrices: Matrices, steps: int, epsilon: float, tiny: float) -> PerMatrix:
    """‖M‖₂² of each matrix M [n, c], from above."""
    first_error, gram = gram_error(matrices, epsilon, tiny), gram_of(matrices)
    levels = []
    for step in range(steps + 1):
        radius = frobenius(gram, tiny)
        scaled = gram / radius[:, None, None]
        square = _absolute_square(scaled, epsilon, tiny)
        levels.append((radius, square, square * _product_error(scaled, epsilon)))
        gram = gram_of(scaled) if step < steps else gram
    bound = jnp.full_like(levels[0][0], jnp.inf)
    for radius, square, error in reversed(levels):
        bound = radius * (jnp.sqrt(jnp.minimum(bound + error, square)) + 2.0 * epsilon)
    return bound + first_error


def gram_of(matrices: Matrices) -> Inexact[Array, "number rows rows"]:
    """MMᴴ of each matrix."""
    return matrices @ jnp.conj(jnp.swapaxes(matrices, -1, -2))


def gram_error(matrices: Matrices, epsilon: float, tiny: float) -> PerMatrix:
    """A bound on ‖fl(AAᴴ) − AAᴴ‖₂ of each matrix A."""
    return _absolute_square(matrices, epsilon, tiny) * _product_error(matrices, epsilon)


def _product_error(matrices: Matrices, epsilon: float) -> float:
    """γ: |fl(AAᴴ) − AAᴴ| ≤ γ|A||A|ᴴ, for A of c columns in any order of summation.

    γ_c where A is real, √2·γ_{2c} where it is complex (Higham 2002, §3.6), underflow included.
    """
    products, factor = matrices.shape[-1] + 8, 1.0
    if jnp.issubdtype(matrices.dtype, jnp.complexfloating):
        products, factor = 2 * products, math.sqrt(2.0)
    count = 0.5 * products * epsilon
    return factor * count / (1.0 - count) if count < 0.5 else math.inf


def _absolute_square(matrices: Matrices, epsilon: float, tiny: float) -> PerMatrix:
    """p ≥ ‖|A|‖₂² of each matrix A [n, c]: max_i (|A||A|ᴴx)_i/x_i or ‖A‖_F²; no gradient.

    x is |A||A|ᴴ1, kept away from zero.
    """
    absolute = jnp.abs(lax.stop_gradient(matrices))

    def multiplied(x: Float[Array, "number rows"]) -> Float[Array, "number rows"]:
        return jnp.einsum("fnc,fc->fn", absolute, jnp.einsum("fnc,fn->fc", absolute, x))

    x = multiplied(jnp.ones(absolute.shape[:2], absolute.dtype))
    x = jnp.maximum(x, epsilon * jnp.max(x, axis=-1, keepdims=True)) + tiny
    rows, columns = absolute.shape[-2:]
    quotient = jnp.max(multiplied(x) / x, axis=-1) * (1.0 + 2.0 * (rows + columns + 16) * epsilon)
    return jnp.minimum(quotient, squares(absolute) * (1.0 + rows * columns * epsilon)) + tiny


def squares(matrices: Inexact[SameArray, "number rows columns"]) -> Float[SameArray, " number"]:
    """‖M‖_F² of each matrix."""
    squares: SameArray = (matrices.real**2 + matrices.imag**2).sum(axis=(-2, -1))
    return squares


def frobenius(matrices: Matrices, tiny: float) -> PerMatrix:
    """‖M‖_F of each matrix, differentiable at zero."""
    return jnp.sqrt(squares(matrices) + tiny)
