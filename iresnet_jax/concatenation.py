"""Dense concatenation with bounded weights (i-DenseNets; Perugachi-Diaz et al. 2021).

arXiv 2102.02694.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from iresnet_jax.outward import product_above
from iresnet_jax.rounding import Arithmetic, gamma, norm_above, unit_roundoff
from iresnet_jax.stages import Sequential
from iresnet_jax.statements import stated_lipschitz, stated_rounding
from iresnet_jax.types import Batch, PerSample, Scalar

_MARGIN = 1e-12  # of a few float64 operations


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class DenseConcatenation:
    """x ↦ [η₁·x, η₂·f(x)] on the last axis, [..., c] -> [..., c + features of f].

    Lip² ≤ η₁² + η₂²·Lip(f)², which is at most 1 where Lip(f) ≤ 1 and ‖η‖ ≤ 1.

    :mod:`~iresnet_jax.lipsdp` takes this bound as a factor: rows of layers end before it, and
    begin anew after it.

    Attributes:
      inner: f, such as a layer and an activation.
      weights: η₁ and η₂, as used: :func:`bounded_weights` has ‖η‖ ≤ 1.
    """

    inner: Sequential
    weights: Float[Array, "*stack 2"]

    def __call__(self, x: Batch) -> Batch:
        if self.weights.shape != (2,):
            raise ValueError(
                f"A dense concatenation has two weights, [2]; got shape {self.weights.shape}."
            )
        added = self.inner(x)
        if added.shape[:-1] != x.shape[:-1]:
            raise ValueError(
                f"What is concatenated differs in its last axis alone; {x.shape} is mapped to "
                f"{added.shape}."
            )
        kept, taken = self.weights.astype(x.dtype)
        return jnp.concatenate([kept * x, taken * added], axis=-1)

    def lipschitz_bound(self) -> float:
        """Return √(η₁² + η₂²·L²), L ≥ Lip(f)."""
        kept, taken = np.abs(np.asarray(self.weights, np.float64))
        inner = product_above(float(taken), stated_lipschitz(self.inner))
        return math.hypot(kept, inner) * (1.0 + _MARGIN)

    def rounding(self, x: Batch, error: PerSample, arithmetic: Arithmetic) -> PerSample:
        """Bound the error of both parts, and of their products with η, [batch]."""
        kept, taken = jnp.abs(self.weights).astype(error.dtype)
        inner = stated_rounding(self.inner, x, error, arithmetic)
        parts = (kept, x, error), (taken, self.inner(x), inner)
        first, second = (_scaled_error(*part, arithmetic.unit) for part in parts)
        return jnp.hypot(first, second) * (1.0 + gamma(16, unit_roundoff(error.dtype)))


def bounded_weights(raw: Float[Array, "*stack 2"]) -> Float[Array, "*stack 2"]:
    """Compute η = softplus(raw)/‖softplus(raw)‖, with ‖η‖ ≤ 1 after rounding too.

    η is not finite where both numbers are so negative that softplus vanishes (−100 in float32).
    """
    positive = jax.nn.softplus(raw)
    positive = positive / jax.lax.stop_gradient(positive.max(axis=-1, keepdims=True))
    norm = jnp.linalg.norm(positive, axis=-1, keepdims=True)
    return positive / norm * (1.0 - 8.0 * unit_roundoff(raw.dtype))


def _scaled_error(weight: Scalar, x: Batch, error: PerSample, unit: float) -> PerSample:
    """Bound the error of fl(ηx) by |η|(e + 3u(‖x‖ + 2e)), what is flushed to zero included."""
    norm = norm_above(x.astype(error.dtype)) + 2.0 * error
    tiny, root = float(jnp.finfo(x.dtype).tiny), math.sqrt(math.prod(x.shape[1:]))
    flushed = 2.0 * tiny * (norm + root * (1.0 + weight))
    slack = 1.0 + gamma(16, unit_roundoff(error.dtype))
    return (weight * (error + 3.0 * unit * norm) + flushed) * slack
