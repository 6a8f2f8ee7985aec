"""A bound on λ_max(V + Vᵀ + 2SSᵀ) inside of traced computations, rounding included.

M = V + Vᵀ + 2SSᵀ is that of :mod:`iresnet_jax.monlip`, of raw weights. Its spectral norm is λ_max
(:mod:`iresnet_jax.monlip_iteration`), which Gram iteration bounds as in
:func:`~iresnet_jax.bounds.gram_upper_bound`: that of M itself for dense layers; for convolutions
that of M(ω) at every frequency ω of a torus, of which the image is a corner
(:mod:`iresnet_jax.monlip_proofs`).

**Rounding.** Weights are divided by s and s², a power of two, which makes the largest entry about 1
and errs where entries underflow alone. With S_k's and V_k's sums over taps T(·) (``tap_sum_norm``),
their symbols err by at most η·T each: e_S in the root of squares, and e_V in the sum. M̂ then errs
by 2(2pe_S + e_S²) + 2e_V from them, p = ‖Ŝ‖_F, by twice the error of the product ŜŜᴴ, and by ε‖M̂‖_F
from the sum of the parts. Weights that are scaled by the bound, and rounded in their type of
machine epsilon ε', err by 4ε' of each entry: 4ε'(2ΣT(S_k)² + 2ΣT(V_k)) is added for them, and what
the proof of the condition takes for its own rounding, in double precision.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Complex, Float

from iresnet_jax.gram_iteration import frobenius, gram_error, gram_of, squared_norm_above, squares
from iresnet_jax.monlip_proofs import fitting
from iresnet_jax.operators import ConvOperator, LinearOperator
from iresnet_jax.symbols import (
    Known,
    common_grid,
    phased_symbols,
    relative_symbol_error,
    tap_sum_norm,
)
from iresnet_jax.types import Matrices, Scalar

_EPSILON = float(np.finfo(np.float64).eps)


def eigenvalue_bound(
    inputs: Sequence[LinearOperator], hidden: Sequence[LinearOperator], num_iterations: int = 6
) -> Scalar:
    """Bound λ_max(V + Vᵀ + 2SSᵀ) rigorously from above; differentiable, as Gram iteration is.

    Args:
      inputs: S_1 … S_K.
      hidden: V_2 … V_K.
      num_iterations: of the Gram iteration, ≥ 0.

    Returns:
      The bound, a scalar; NaN where weights are not finite. Weights scaled by it
      (:func:`~iresnet_jax.monlip.scaled`) meet the condition as rounded.

    Raises:
      TypeError: for other operators than dense ones and convolutions.
      ValueError: for layers that do not fit one another, or a negative ``num_iterations``.
    """
    operators = fitting(inputs, hidden)
    if num_iterations < 0:
        raise ValueError(f"num_iterations of a Gram iteration must be ≥ 0; got {num_iterations}.")
    bound: Array = _bound(*operators, num_iterations)
    return bound


Operators = tuple[Known, ...]


@partial(jax.jit, static_argnums=2, inline=True)
def _bound(inputs: Operators, hidden: Operators, num_iterations: int) -> Scalar:
    coarsest = max(float(jnp.finfo(op.kernel.dtype).eps) for op in (*inputs, *hidden))
    inputs, hidden, scale = _scaled(inputs, hidden)
    dtype = inputs[0].kernel.dtype
    epsilon, tiny = float(jnp.finfo(dtype).eps), float(jnp.finfo(dtype).tiny)
    with jax.default_matmul_precision("highest"):
        s, v = _symbols(inputs, hidden)
        form = _form(s, v)
        norm = jnp.sqrt(squared_norm_above(form, num_iterations, epsilon, tiny))
    fixed = lax.stop_gradient((s, form))
    lost = _lost(*lax.stop_gradient((inputs, hidden)), *fixed, epsilon, tiny, coarsest)
    size, columns = s.shape[-2:]
    proof = 32.0 * _EPSILON * size * (size + columns + 64)
    margin = 1.0 + (16.0 + 4.0 * num_iterations) * epsilon + proof
    return (jnp.max(norm + lost) * margin * scale + tiny) * scale * (1.0 + 2.0 * epsilon) + tiny


def _scaled(inputs: Operators, hidden: Operators) -> tuple[Operators, Operators, Scalar]:
    """S/s, V/s² and s, in single precision or better.

    s is a power of two next to the largest of |S| and √|V|, whose square is in range.
    """
    dtype = jnp.result_type(jnp.float32, *(op.kernel.dtype for op in (*inputs, *hidden)))
    kernels = [[op.kernel.astype(dtype) for op in layers] for layers in (inputs, hidden)]
    sizes = [jnp.max(jnp.abs(kernel)) for kernel in kernels[0]]
    sizes += [jnp.sqrt(jnp.max(jnp.abs(kernel))) for kernel in kernels[1]]
    largest = lax.stop_gradient(jnp.max(jnp.stack(sizes)))
    most = int(jnp.finfo(dtype).maxexp) // 2 - 2
    exponent = jnp.clip(jnp.frexp(largest)[1], -most, most)
    scale = jnp.ldexp(jnp.ones_like(largest), jnp.where(jnp.isfinite(largest), exponent, 0))
    first = zip(inputs, kernels[0], strict=True)
    then = zip(hidden, kernels[1], strict=True)
    return (
        tuple(dataclasses.replace(op, kernel=k / scale) for op, k in first),
        tuple(dataclasses.replace(op, kernel=k / scale**2) for op, k in then),
        scale,
    )


def _symbols(inputs: Operators, hidden: Operators) -> tuple[Matrices, list[Matrices]]:
    """Ŝ, of all S_k one below the other, and V̂_2 … V̂_K, at each frequency."""
    convolutions = [op for op in (*inputs, *hidden) if isinstance(op, ConvOperator)]
    grid = common_grid(convolutions) if convolutions else None
    down = np.arange(grid[0] // 2 + 1) if grid else np.zeros(1, int)

    def of(operator: Known) -> Matrices:
        return phased_symbols(operator, operator.kernel, grid or (1, 1), down, jnp)

    stacked = [of(operator) for operator in inputs]
    count = max(len(part) for part in stacked)
    stacked = [jnp.broadcast_to(part, (count, *part.shape[1:])) for part in stacked]
    return jnp.concatenate(stacked, axis=1), [of(operator) for operator in hidden]


def _form(
    s: Matrices, v: Sequence[Matrices]
) -> Float[Array, "frequencies n n"] | Complex[Array, "frequencies n n"]:
    """M̂ at each frequency."""
    gram = 2.0 * gram_of(s)
    count = max(len(gram), *(len(part) for part in v)) if v else len(gram)
    form = jnp.broadcast_to(gram, (count, *gram.shape[1:]))
    form = form.astype(jnp.result_type(form, *v))
    start = 0
    for part in v:
        after, before = part.shape[1:]
        middle = start + before
        own = slice(middle, middle + after)
        form = form.at[:, own, start:middle].add(part)
        form = form.at[:, start:middle, own].add(jnp.conj(jnp.swapaxes(part, -1, -2)))
        start = middle
    return form


def _lost(
    inputs: Operators,
    hidden: Operators,
    s: Matrices,
    form: Matrices,
    epsilon: float,
    tiny: float,
    coarsest: float,
) -> Float[Array, " frequencies"]:
    """What rounding may take from the norm; see the module's docstring."""
    taps = [[tap_sum_norm(op.kernel) for op in layers] for layers in (inputs, hidden)]
    errors = [
        [
            relative_symbol_error(op, epsilon) * total + tiny * op.kernel.size
            for op, total in zip(layers, totals, strict=True)
        ]
        for layers, totals in zip((inputs, hidden), taps, strict=True)
    ]
    e_s = jnp.sqrt(jnp.asarray(sum(error**2 for error in errors[0])) + tiny)
    p = jnp.sqrt(squares(s)) * (1.0 + s.shape[-1] * s.shape[-2] * epsilon)
    symbols = 2.0 * (2.0 * p * e_s + e_s**2) + 2.0 * sum(errors[1])
    computed = 2.0 * gram_error(s, epsilon, tiny) + epsilon * frobenius(form, tiny)
    later = 4.0 * coarsest * (2.0 * sum(t**2 for t in taps[0]) + 2.0 * sum(taps[1]))
    return (symbols + computed + later) * (1.0 + 64.0 * epsilon)
