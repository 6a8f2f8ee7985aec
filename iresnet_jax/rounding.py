"""Running error analysis: rigorous bounds on the rounding errors of a branch.

Each stage of a branch maps an array and a bound e on ‖x̂ − x‖₂ to those of its output. Here x̂ is
*any* evaluation of the exact x, in any order of summation, with or without fused multiply-add.
γ_k = ku/(1 − ku), with u the unit roundoff (Higham, Accuracy and Stability of Numerical Algorithms,
2002, chapter 3).

The bounds assume that sums and products round to nearest, and that matrix products and convolutions
are computed as sums of products. They also assume that activations err by at most
``Elementwise.ulps``, which is measured (on CPU, in float32, float64 and bfloat16), not proved.
Algorithms that transform first (Winograd, FFT), as cuDNN may choose for convolutions on GPUs, are
not covered.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from iresnet_jax.operators import ConvOperator, DenseOperator, LinearOperator, with_kernel
from iresnet_jax.types import AnyArray, PerSample


class Arithmetic(NamedTuple):
    """The arithmetic in which a branch is evaluated.

    Attributes:
      unit: u, the relative error of one operation: 2⁻²⁴ in float32, 2⁻⁸ in bfloat16.
      input_rounding: relative error of each factor of a matrix product, before it is taken.
    """

    unit: float
    input_rounding: float = 0.0


def unit_roundoff(dtype: jax.typing.DTypeLike) -> float:
    """Compute u, half the distance from 1 to the next larger number."""
    return float(jnp.finfo(dtype).eps) / 2.0


def gamma(count: int, unit: float) -> float:
    """Compute γ = ku/(1 − ku), the relative error of k roundings; infinite from ku = 1/4."""
    return count * unit / (1.0 - count * unit) if count * unit < 0.25 else math.inf


def affine_error(
    operator: LinearOperator,
    bias: Float[AnyArray, "..."] | None,
    norm_bound: Float[AnyArray, ""] | None,
    x: Float[AnyArray, "batch *event"],
    error: PerSample,
    arithmetic: Arithmetic,
) -> PerSample:
    """Bound the error of fl(W x + b) by σe + γ(‖|W||x| + |b|‖ + 2‖|W|‖e), [batch].

    The computed input x̂ lies within 2e of the given ``x``. Its own error contributes σe, and
    ‖fl(W x̂ + b) − (W x̂ + b)‖ ≤ γ‖|W||x̂| + |b|‖. γ counts the K products of an output entry, the
    bias and the operations here. ‖|W|‖² is at most the largest row sum of |W| times the largest
    column sum, which also serves as σ² if no bound is given.

    Args:
      operator: W.
      bias: b, or None.
      norm_bound: rigorous σ ≥ ‖W‖₂, or None.
      x: the input as computed here, [batch, ...].
      error: e, [batch].
      arithmetic: the arithmetic of the evaluation to bound.

    Raises:
      TypeError: for operators other than dense matrices and convolutions.
    """
    if type(operator) not in (DenseOperator, ConvOperator):  # a subclass may map otherwise
        raise TypeError(f"No rounding bound is known for {type(operator).__name__}.")
    kernel = jnp.abs(operator.kernel).astype(error.dtype)
    products = math.prod(kernel.shape[:-1])
    factor = gamma(products + 16, arithmetic.unit) + 3.0 * arithmetic.input_rounding
    with jax.default_matmul_precision("highest"):
        terms = with_kernel(operator, kernel)(jnp.abs(x).astype(error.dtype))
    if bias is not None:
        terms = terms + jnp.broadcast_to(jnp.abs(bias).astype(error.dtype), terms.shape)
    rows = jnp.max(jnp.sum(kernel, axis=tuple(range(kernel.ndim - 1))))
    columns = jnp.max(jnp.sum(kernel, axis=(*range(kernel.ndim - 2), kernel.ndim - 1)))
    absolute_norm = jnp.sqrt(rows) * jnp.sqrt(columns)
    if norm_bound is None:
        norm = absolute_norm
    else:  # as it may have been rounded with the weights
        norm = jnp.asarray(norm_bound, error.dtype) * (1.0 + 4.0 * arithmetic.unit)
    out = norm * error + factor * (norm_above(terms) + 2.0 * absolute_norm * error)
    slack = 1.0 + 2.0 * gamma(
        kernel.size // min(kernel.shape[-2:]) + 16, unit_roundoff(error.dtype)
    )
    return out * slack + _underflow(terms, 8 * products, x.dtype)


def activation_error(
    function: Callable[[Array], Array],
    lipschitz: float,
    ulps: tuple[float, float],
    x: Float[AnyArray, "batch *event"],
    error: PerSample,
    arithmetic: Arithmetic,
) -> PerSample:
    """Bound the error of fl(φ(x)) by λ(1 + 2cu)e + u(c‖φ(x)‖ + a√d), [batch].

    Args:
      function: φ as computed.
      lipschitz: λ ≥ Lip(φ).
      ulps: (c, a) with |fl(φ(x)) − φ(x)| ≤ u(c|φ(x)| + a), up to underflow.
      x, error, arithmetic: as in :func:`affine_error`.
    """
    relative, absolute = (ulps[0] + 8.0) * arithmetic.unit, 1.01 * ulps[1] * arithmetic.unit
    out = function(jnp.asarray(x)).astype(error.dtype)
    slope = lipschitz * (1.0 + 4.0 * relative)
    terms = relative * norm_above(out) + absolute * math.sqrt(math.prod(x.shape[1:]))
    return slope * error + terms + _underflow(out, 2048, x.dtype)


def norm_above(x: Float[AnyArray, "batch *event"]) -> PerSample:
    """Compute ‖x‖₂ of each sample, [batch], rounded up."""
    size = math.prod(x.shape[1:])
    norm = jnp.sqrt(jnp.sum(jnp.square(x), axis=tuple(range(1, x.ndim))))
    return norm * (1.0 + 2.0 * gamma(size + 8, unit_roundoff(x.dtype))) + _underflow(x, 1, x.dtype)


def _underflow(x: Float[AnyArray, "..."], times: int, computed: DTypeLike) -> float:
    """What entries that are flushed to zero, or squares that are, take from ‖x‖₂ at most.

    Entries are flushed in the type that they are ``computed`` in, squares in that of ``x``.
    """
    tiny = max(float(jnp.finfo(dtype).tiny) for dtype in (x.dtype, computed))
    size = math.prod(x.shape[1:])
    return 2.0 * math.sqrt(size) * max(times * tiny, math.sqrt(tiny))
