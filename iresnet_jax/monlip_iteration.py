"""λ_max(V + Vᵀ + 2SSᵀ) by power iteration, with persistent state: one for a whole branch.

V couples each hidden layer with the next alone. So the spectrum of V + Vᵀ is symmetric about 0
(change the sign of every other layer), and λ_max(M) ≥ λ_max(V + Vᵀ) = −λ_min(V + Vᵀ) ≥ −λ_min(M)
for M = V + Vᵀ + 2SSᵀ. No eigenvalue of M is larger in size than λ_max; iterating M + ρ/2, with ρ
the Rayleigh quotient, separates it from a negative one of the same size.
"""

import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from iresnet_jax.monlip import Hidden, hidden_form
from iresnet_jax.operators import LinearOperator
from iresnet_jax.types import Scalar

Layers = tuple[tuple[LinearOperator, ...], tuple[LinearOperator, ...]]


def first_vector(inputs: Sequence[LinearOperator]) -> Hidden:
    """Start from a fixed vector of norm 1 that looks random, in the shape of the hidden layers."""
    shapes = [operator.codomain_shape for operator in inputs]
    sizes = [math.prod(shape) for shape in shapes]
    dtype = inputs[0].kernel.dtype
    sequence = jnp.arange(1, sum(sizes) + 1, dtype=dtype) * ((math.sqrt(5.0) - 1.0) / 2.0)
    flat = sequence % 1.0 - 0.5
    flat = flat / jnp.linalg.norm(flat)
    parts = jnp.split(flat, [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)])
    return tuple(part.reshape(shape) for part, shape in zip(parts, shapes, strict=True))


def advanced(layers: Layers, vector: Hidden, num_steps: int) -> Hidden:
    """Take ``num_steps`` of u ← (Mu + ρ/2·u)/‖…‖, with no gradient."""
    layers, vector = lax.stop_gradient((layers, vector))
    if num_steps == 1:  # the usual number: a loop would be traced for nothing
        return _step(layers, vector)[0]
    out: Hidden = lax.fori_loop(0, num_steps, lambda _, u: _step(layers, u)[0], vector)
    return out


@partial(jax.jit, static_argnames=("rtol", "max_steps"))
def to_tolerance(
    layers: Layers, vector: Hidden, *, rtol: float = 1e-4, max_steps: int = 1000
) -> Hidden:
    """Iterate until ‖Mu − ρu‖ ≤ rtol·ρ: *some* eigenvalue then lies within rtol·ρ of ρ."""
    layers, vector = lax.stop_gradient((layers, vector))

    def unfinished(carry: tuple[Hidden, Scalar, Int[Array, ""]]) -> Bool[Array, ""]:
        _, gap, count = carry
        return (gap > rtol) & (count < max_steps)

    def advance(
        carry: tuple[Hidden, Scalar, Int[Array, ""]],
    ) -> tuple[Hidden, Scalar, Int[Array, ""]]:
        new, gap = _step(layers, carry[0])
        return new, gap, carry[2] + 1

    start = vector, jnp.full((), jnp.inf, vector[0].dtype), jnp.zeros((), jnp.int32)
    out: Hidden = lax.while_loop(unfinished, advance, start)[0]
    return out


def eigenvalue_estimate(layers: Layers, vector: Hidden) -> Scalar:
    """Compute uᵀMu/‖u‖², which never exceeds λ_max; differentiable in the weights."""
    vector = lax.stop_gradient(vector)
    with jax.default_matmul_precision("highest"):
        image = hidden_form(*layers, vector)
    square = jnp.maximum(_dot(vector, vector), jnp.finfo(vector[0].dtype).tiny)
    return _dot(vector, image) / square


def _step(layers: Layers, vector: Hidden) -> tuple[Hidden, Scalar]:
    """The next vector, and ‖Mu − ρu‖/|ρ| of this one."""
    with jax.default_matmul_precision("highest"):
        image = hidden_form(*layers, vector)
    quotient = _dot(vector, image)
    rest = tuple(w - quotient * u for w, u in zip(image, vector, strict=True))
    tiny = jnp.finfo(vector[0].dtype).tiny
    gap = jnp.sqrt(_dot(rest, rest)) / jnp.maximum(jnp.abs(quotient), tiny)
    shifted = tuple(w + 0.5 * jnp.abs(quotient) * u for w, u in zip(image, vector, strict=True))
    norm = jnp.sqrt(_dot(shifted, shifted))
    moves = (norm > 0) & jnp.isfinite(norm)
    new = tuple(
        jnp.where(moves, w / jnp.maximum(norm, tiny), u)
        for w, u in zip(shifted, vector, strict=True)
    )
    return new, gap


def _dot(a: Hidden, b: Hidden) -> Scalar:
    total = jnp.zeros((), a[0].dtype)
    for x, y in zip(a, b, strict=True):
        total = total + jnp.vdot(x, y, precision="highest")
    return total
