"""The invertible 1×1 convolution: a learned mixing of channels (Glow; Kingma & Dhariwal 2018).

arXiv 1807.03039. u is the unit roundoff, c the number of channels, γ as in
:mod:`iresnet_jax.rounding`.

**The smallest singular value.** For any R with ‖I − WR‖₂ ≤ δ < 1, W is regular, and
‖W⁻¹‖₂ ≤ ‖R‖₂/(1 − δ). An inverse found in floating point is such an R, unless the condition of W
exceeds about 1/u. δ is computed with its rounding: the product WR is off by at most γ|W||R|, entry
by entry. ‖R‖₂ is bounded as that of any layer (:mod:`iresnet_jax.bounds`).

**The inverse.** x ← x + (y − xW)R, from yR on, is made of products and sums alone. Each step
multiplies the distance from yW⁻¹ by at most δ, and adds its own rounding.
"""

import dataclasses
import math
from collections.abc import Iterator
from types import ModuleType
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from iresnet_jax.bijections import BranchBounds, Error, Mapped
from iresnet_jax.bounds import gram_upper_bound
from iresnet_jax.certificates import Certificate, rounded_up
from iresnet_jax.convergence import FixedPointInfo
from iresnet_jax.logdet import Estimator
from iresnet_jax.norm_proofs import proved_norm
from iresnet_jax.operators import DenseOperator
from iresnet_jax.rounding import gamma, unit_roundoff
from iresnet_jax.transforms import Transform
from iresnet_jax.types import AnyArray, Keys, PerSample, SameArray, Samples, Scalar, Shape

_REFINEMENTS = 3  # from an inverse in float32 to one in float64
_LARGEST_GRAM = 2048  # channels up to which the norm is bounded by Gram iteration


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Invertible1x1(Transform):
    """y = x W on the last axis: of vectors, or of each pixel of an image.

    Attributes:
      kernel: W, [channels, channels].
      rough_inverse: R ≈ W⁻¹, which :meth:`with_bounds` attaches. None: every inverse computes its
        own, and states no bound on its error.
    """

    kernel: Float[Array, "*stack channels channels"]
    rough_inverse: Float[Array, "*stack channels channels"] | None = None

    def forward(self, x: Samples) -> Samples:
        self._check(x.shape)
        return _mixed(x, self.kernel)

    def forward_and_log_det(
        self, x: Samples, estimator: Estimator | None = None, keys: Keys = None
    ) -> Mapped:
        """Return y, and pixels · log|det W| in nats: the same for every sample."""
        y = self.forward(x)
        kernel = _wide(self.kernel)
        largest = jax.lax.stop_gradient(jnp.max(jnp.abs(kernel)))  # so that no product overflows
        log_det = jnp.linalg.slogdet(kernel / largest)[1] + len(kernel) * jnp.log(largest)
        return y, jnp.full(x.shape[0], math.prod(x.shape[1:-1]) * log_det, y.dtype)

    def backward(self, y: Samples) -> Samples:
        """Solve x W = y; NaN or infinite where W is singular."""
        self._check(y.shape)
        inverse = _inverse(self.kernel) if self.rough_inverse is None else self.rough_inverse
        x = _mixed(y, inverse)
        for _ in range(_REFINEMENTS):
            x = x + _mixed(y - _mixed(x, self.kernel), inverse)
        return x

    def certify(self, name: str, shape: Shape) -> Certificate:
        """Bound ‖W‖₂ and ‖W⁻¹‖₂; weights not finite, or not proved to be regular, are a problem."""
        self._check(shape)
        kernel = np.asarray(self.kernel, np.float64)
        weights = f"the weights of {type(self).__name__}" + (f" in {name}" if name else "")
        if not np.isfinite(kernel).all():
            return Certificate().with_problems([f"not finite: {weights}"])
        forward, inverse = proved_norm(_dense(kernel)), inverse_upper_bound(kernel)
        lost = [] if forward < math.inf > inverse else [f"{weights} are not proved to be regular"]
        return Certificate((), forward, inverse).with_problems(lost)

    def with_bounds(self, bounds: Iterator[BranchBounds]) -> Self:
        return dataclasses.replace(self, rough_inverse=_inverse(self.kernel))

    def inverse_error(self, error: Error, info: FixedPointInfo | None, shape: Shape) -> Error:
        """ε ← ‖W⁻¹‖ε + ρ, ρ of the inverse itself; infinite unless R is attached and δ < 1.

        Let N ≥ ‖y‖, X = ‖W⁻¹‖N, and e the distance of x from yW⁻¹ before a step. The y − xW that
        the step sees is off by s = γ(N + ‖|W|‖(X + e)). After it,
        e ← (δe + ‖R‖s + γ‖|R|‖(‖|W|‖e + s))(1 + 2u) + 2uX.
        """
        if self.rough_inverse is None:
            nothing = jnp.full_like(error.bound, jnp.inf)
            return Error(nothing, nothing)
        dtype = jnp.promote_types(error.bound.dtype, _wide(self.kernel).dtype)
        kernel, inverse = self.kernel.astype(dtype), self.rough_inverse.astype(dtype)
        unit = max(unit_roundoff(error.bound.dtype), unit_roundoff(_wide(self.kernel).dtype))
        channels, root = kernel.shape[-1], math.sqrt(math.prod(shape))
        factor, slack = gamma(channels + 2, unit), 1.0 + 4.0 * gamma(channels + 128, unit)
        defect = _defect(kernel, inverse, jnp)
        inverse_norm = _norm(inverse)
        stretch = jnp.where(defect < 1.0, inverse_norm / (1.0 - defect), jnp.inf)
        sums, inverse_sums = _norm_by_sums(jnp.abs(kernel)), _norm_by_sums(jnp.abs(inverse))
        tiny = 4.0 * float(jnp.finfo(dtype).tiny)

        def flushed(norm: PerSample, sums: Scalar) -> PerSample:
            return tiny * (channels * norm + root * (channels + sums))

        size = stretch * error.norm
        off = defect * size + factor * inverse_sums * error.norm + flushed(error.norm, inverse_sums)
        for _ in range(_REFINEMENTS):
            reach = size + off
            seen = factor * (error.norm + sums * reach) + flushed(reach, sums)
            step = sums * off + seen
            missed = factor * inverse_sums * step + flushed(step, inverse_sums)
            off = (defect * off + inverse_norm * seen + missed) * (1.0 + 2.0 * unit)
            off = off + 2.0 * unit * size
        bound = ((stretch * error.bound + off) * slack).astype(error.bound.dtype)
        norm = ((size + off) * slack).astype(error.norm.dtype)
        return Error(*(jnp.where(jnp.isnan(b), jnp.inf, b) for b in (bound, norm)))

    def _check(self, shape: Shape) -> None:
        if (*shape[-1:], *shape[-1:]) != self.kernel.shape:
            raise ValueError(
                f"{type(self).__name__} of kernel {self.kernel.shape} cannot act on an array of "
                f"shape {tuple(shape)}: it takes [channels, channels]."
            )


def inverse_upper_bound(kernel: Float[np.ndarray, "channels channels"]) -> float:
    """Bound ‖W⁻¹‖₂ rigorously, on the host; infinite where W is not proved to be regular.

    Args:
      kernel: W, in float64.
    """
    if not np.isfinite(kernel).all() or not kernel.any():
        return math.inf
    exponent = int(np.frexp(np.abs(kernel).max())[1])
    kernel = np.ldexp(kernel, -exponent)
    try:
        inverse = np.linalg.inv(kernel)
    except np.linalg.LinAlgError:
        return math.inf
    with np.errstate(over="ignore", invalid="ignore"):
        defect = float(_defect(kernel, inverse, np))
        if not defect < 1.0:
            return math.inf
        return rounded_up(float(np.ldexp(proved_norm(_dense(inverse)) / (1.0 - defect), -exponent)))


def _defect(kernel: SameArray, inverse: SameArray, xp: ModuleType) -> SameArray:
    """δ ≥ ‖I − WR‖₂, rounding and numbers flushed to zero included."""
    channels, unit = kernel.shape[-1], unit_roundoff(kernel.dtype)
    tiny = float(jnp.finfo(kernel.dtype).tiny)
    with jax.default_matmul_precision("highest"):
        product, absolute = kernel @ inverse, abs(kernel) @ abs(inverse)
    sums = abs(kernel).sum(axis=1)[:, None] + abs(inverse).sum(axis=0)
    rounding = 2.0 * gamma(channels + 8, unit) * absolute + 4.0 * tiny * (channels + sums)
    identity: SameArray = xp.eye(channels, dtype=kernel.dtype)
    return _norm_by_sums(abs(identity - product) + rounding)


def _norm_by_sums(entries: SameArray) -> SameArray:
    """‖M‖₂ ≤ √(largest row sum · largest column sum), for entries ≥ 0."""
    rows, columns = entries.sum(axis=1).max(), entries.sum(axis=0).max()
    slack = 1.0 + 2.0 * gamma(entries.shape[-1] + 8, unit_roundoff(entries.dtype))
    norm: SameArray = rows**0.5 * columns**0.5 * slack
    return norm


def _norm(matrix: Float[Array, "channels channels"]) -> Scalar:
    """‖R‖₂, from above."""
    if matrix.shape[-1] > _LARGEST_GRAM:
        return _norm_by_sums(jnp.abs(matrix))
    return gram_upper_bound(DenseOperator(matrix))


def _dense(kernel: Float[np.ndarray, "channels channels"]) -> DenseOperator:
    return DenseOperator(kernel)  # type: ignore[arg-type]


def _mixed(x: Samples, kernel: Float[Array, "channels channels"]) -> Samples:
    """At full precision, so that forward and inverse are of the same map."""
    with jax.default_matmul_precision("highest"):
        return DenseOperator(kernel)(x)


def _inverse(kernel: Float[AnyArray, "*stack n n"]) -> Float[Array, "*stack n n"]:
    return jnp.linalg.inv(_wide(kernel))


def _wide(kernel: Float[AnyArray, "*stack n n"]) -> Float[Array, "*stack n n"]:
    """In a type that linear algebra takes."""
    return jnp.asarray(kernel, jnp.promote_types(kernel.dtype, jnp.float32))
