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
    """Take ``num_steps`` ≥ 0 of u ← (Mu + ρ/2·u)/‖…‖, with no gradient.

    Raises:
      ValueError: if ``num_steps`` is negative, or the vector is of other shapes.
    """
    if num_steps < 0:
        raise ValueError(f"num_steps of a power iteration must be ≥ 0; got {num_steps}.")
    layers, vector = lax.stop_gradient((layers, _fitting(layers, vector)))
    if num_steps == 1:  # the usual number: a loop would be traced for nothing
        return _step(layers, vector)[0]
    out: Hidden = lax.fori_loop(0, num_steps, lambda _, u: _step(layers, u)[0], vector)
    return out


@partial(jax.jit, static_argnames=("rtol", "max_steps"))
def to_tolerance(
    layers: Layers, vector: Hidden, *, rtol: float = 1e-4, max_steps: int = 1000
) -> Hidden:
    """Iterate until ‖Mu − ρu‖ ≤ rtol·ρ: *some* eigenvalue then lies within rtol·ρ of ρ."""
    layers, vector = lax.stop_gradient((layers, _fitting(layers, vector)))

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
    vector = _unit(lax.stop_gradient(_fitting(layers, vector)))
    with jax.default_matmul_precision("highest"):
        return _dot(vector, hidden_form(*layers, vector))


def _step(layers: Layers, vector: Hidden) -> tuple[Hidden, Scalar]:
    """The next vector, and ‖Mu − ρu‖/|ρ| of this one; from a new start where it is of no use."""
    usable = _largest(vector) > 0
    usable &= jnp.isfinite(_largest(vector))
    vector = _where(usable, _unit(vector), first_vector(layers[0]))
    with jax.default_matmul_precision("highest"):
        image = hidden_form(*layers, vector)
    scale = jnp.maximum(_largest(image), _tiny(vector))
    image = tuple(w / scale for w in image)  # M/scale has the same eigenvectors
    quotient = _dot(vector, image)
    rest = tuple(w - quotient * u for w, u in zip(image, vector, strict=True))
    gap = jnp.sqrt(_dot(rest, rest)) / jnp.maximum(jnp.abs(quotient), _tiny(vector))
    half = 0.5 * jnp.abs(quotient)
    new = _unit(tuple(w + half * u for w, u in zip(image, vector, strict=True)))
    moves = (_largest(new) > 0) & jnp.isfinite(_largest(new))
    return _where(moves, new, vector), gap


def _fitting(layers: Layers, vector: Hidden) -> Hidden:
    """The vector in the weights' type; another image's is refused, by a ValueError."""
    expected = [operator.codomain_shape for operator in layers[0]]
    found = [part.shape for part in vector]
    if found != expected:
        raise ValueError(
            f"A vector of shapes {found} does not fit this branch, whose hidden layers have shapes "
            f"{expected}: was it made for another image size?"
        )
    return tuple(part.astype(layers[0][0].kernel.dtype) for part in vector)


def _unit(vector: Hidden) -> Hidden:
    """u/‖u‖, of whatever length; zero stays zero."""
    scaled = tuple(u / jnp.maximum(_largest(vector), _tiny(vector)) for u in vector)
    norm = jnp.maximum(jnp.sqrt(_dot(scaled, scaled)), _tiny(vector))
    return tuple(u / norm for u in scaled)


def _where(chosen: Bool[Array, ""], new: Hidden, old: Hidden) -> Hidden:
    return tuple(jnp.where(chosen, a, b) for a, b in zip(new, old, strict=True))


def _largest(vector: Hidden) -> Scalar:
    return jnp.max(jnp.stack([jnp.max(jnp.abs(u), initial=0.0) for u in vector]))


def _tiny(vector: Hidden) -> float:
    return float(jnp.finfo(vector[0].dtype).tiny)


def _dot(a: Hidden, b: Hidden) -> Scalar:
    total = jnp.zeros((), a[0].dtype)
    for x, y in zip(a, b, strict=True):
        total = total + jnp.vdot(x, y, precision="highest")
    return total
