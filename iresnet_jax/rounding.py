"""Running error analysis: rigorous bounds on the rounding of what a branch computes.

Every stage of a branch maps an array and a bound e on the distance ‖x̂ − x‖₂ of *any* evaluation of
it from the exact one (any order of summation, with or without fused multiply-add) to those of its
output; γ_k = ku/(1 − ku), u the unit roundoff (Higham, Accuracy and Stability of Numerical
Algorithms, 2002, chapter 3).

Assumed: sums and products are rounded to nearest, and a product of matrices, or a convolution, is
computed as sums of products; activations err by no more than ``ACTIVATION_ULPS``, which are
measured (on CPU, in float32, float64 and bfloat16), not proved. Algorithms that transform first
(Winograd, FFT), as cuDNN may choose for convolutions on GPUs, are not covered.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from iresnet_jax.operators import ConvOperator, DenseOperator, LinearOperator, with_kernel


class Arithmetic(NamedTuple):
    """How a branch computes.

    Attributes:
      unit: u, relative error of an operation: 2⁻²⁴ in float32, 2⁻⁸ in bfloat16.
      input_rounding: relative error of each factor before the products of a matrix are taken.
    """

    unit: float
    input_rounding: float = 0.0


def unit_roundoff(dtype) -> float:
    """Half the distance from 1 to the next number."""
    return float(jnp.finfo(dtype).eps) / 2.0


def gamma(count: int, unit: float) -> float:
    """γ = ku/(1 − ku), the relative error of k roundings; infinite from ku = 1/4."""
    return count * unit / (1.0 - count * unit) if count * unit < 0.25 else math.inf


def affine_error(
    operator: LinearOperator,
    bias: jax.Array | None,
    norm_bound: jax.Array | None,
    x: jax.Array,
    error: jax.Array,
    arithmetic: Arithmetic,
) -> jax.Array:
    """σe + γ(‖|W||x| + |b|‖ + 2‖|W|‖e), a bound on the error of fl(W x + b), [batch].

    The computed input x̂ is within 2e of the ``x`` at hand, and ‖fl(W x̂ + b) − (W x̂ + b)‖ is at
    most γ‖|W||x̂| + |b|‖. What x̂ was off by adds σe. γ is that of the K products of an output
    entry, the bias and the operations here; ‖|W|‖² is at most the largest sum of a row of |W| times
    that of a column, which also serves as σ² where no bound is given.

    Args:
      operator: W.
      bias: b, or None.
      norm_bound: rigorous σ ≥ ‖W‖₂, or None.
      x: the input as computed here, [batch, ...].
      error: e, [batch].
      arithmetic: of what is bounded.

    Raises:
      TypeError: for an operator whose entries are not known to be those of its kernel.
    """
    if not isinstance(operator, (DenseOperator, ConvOperator)):
        raise TypeError(f"No rounding bound is known for {type(operator).__name__}.")
    kernel = jnp.abs(operator.kernel).astype(error.dtype)
    products = math.prod(kernel.shape[:-1])
    factor = gamma(products + 16, arithmetic.unit) + 3.0 * arithmetic.input_rounding
    with jax.default_matmul_precision("highest"):
        terms = with_kernel(operator, kernel)(jnp.abs(x).astype(error.dtype))
    terms = terms if bias is None else terms + jnp.abs(bias).astype(error.dtype)
    rows = jnp.max(jnp.sum(kernel, axis=tuple(range(kernel.ndim - 1))))
    columns = jnp.max(jnp.sum(kernel, axis=(*range(kernel.ndim - 2), kernel.ndim - 1)))
    absolute_norm = jnp.sqrt(rows) * jnp.sqrt(columns)
    if norm_bound is None:
        norm = absolute_norm
    else:  # as it may have been rounded with the weights
        norm = norm_bound.astype(error.dtype) * (1.0 + 4.0 * arithmetic.unit)
    out = norm * error + factor * (norm_above(terms) + 2.0 * absolute_norm * error)
    slack = 1.0 + 2.0 * gamma(
        kernel.size // min(kernel.shape[-2:]) + 16, unit_roundoff(error.dtype)
    )
    return out * slack + _underflow(terms, 8 * products)


def activation_error(
    function: Callable[[jax.Array], jax.Array],
    lipschitz: float,
    ulps: tuple[float, float],
    x: jax.Array,
    error: jax.Array,
    arithmetic: Arithmetic,
) -> jax.Array:
    """λ(1 + 2cu)e + u(c‖φ(x)‖ + a√d), a bound on the error of fl(φ(x)), [batch].

    Args:
      function: φ as computed.
      lipschitz: λ ≥ Lip(φ).
      ulps: (c, a), with |fl(φ(x)) − φ(x)| ≤ u(c|φ(x)| + a) but for underflow.
      x, error, arithmetic: as for :func:`affine_error`.
    """
    relative, absolute = (ulps[0] + 8.0) * arithmetic.unit, 1.01 * ulps[1] * arithmetic.unit
    out = function(x).astype(error.dtype)
    slope = lipschitz * (1.0 + 4.0 * relative)
    terms = relative * norm_above(out) + absolute * math.sqrt(math.prod(x.shape[1:]))
    return slope * error + terms + _underflow(out, 2048)


def norm_above(x: jax.Array) -> jax.Array:
    """‖x‖₂ of each sample, [batch], rounded up."""
    size = math.prod(x.shape[1:])
    norm = jnp.sqrt(jnp.sum(jnp.square(x), axis=tuple(range(1, x.ndim))))
    return norm * (1.0 + 2.0 * gamma(size + 8, unit_roundoff(x.dtype))) + _underflow(x, 1)


def _underflow(x, times: int) -> float:
    """What entries that are flushed to zero, or squares that are, take from ‖x‖₂ at most."""
    tiny, size = float(jnp.finfo(x.dtype).tiny), math.prod(x.shape[1:])
    return 2.0 * math.sqrt(size) * max(times * tiny, math.sqrt(tiny))
