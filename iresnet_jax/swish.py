"""LipSwish with a learned β, and its concatenation with its mirror image, as stages.

**Slopes.** Let s = βx. The derivative of x·σ(βx) is f(s) = σ(s) + s·σ′(s), whatever β is, and
f(−s) = 1 − f(s). The maximum of f is at s·tanh(s/2) = 2: it is below 1.09984. So the slopes of
x·σ(βx)/1.1 lie in [−0.09984/1.1, 1.09984/1.1], for every real β (Chen et al. 2019, arXiv
1906.02735). The two slopes of [LipSwish(x), LipSwish(−x)] are f/1.1 and −(1 − f)/1.1, whose norm
is at most √(1.09984² + 0.09984²)/1.1 < 1.00397: less than the 1.004 that it is divided by
(Perugachi-Diaz et al. 2021, arXiv 2102.02694).

**Rounding.** The product βx is off by a relative u, which moves σ by at most u·|s|σ′(s) < 0.2239u.
The rest is relative to the value: that is measured, as of any activation.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from iresnet_jax.rounding import Arithmetic, activation_error, norm_above
from iresnet_jax.types import Batch, PerSample, SameArray, Samples

_LIPSWISH = 1.1
_CLIPSWISH = 1.004
_ULPS = (16.0, 0.0)  # those of "lipswish", and the rounding of a divisor
_MOVED = 0.5  # of u|x|: how far a product βx of rounded numbers moves the value


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LipSwish:
    """x ↦ x·σ(βx)/1.1, elementwise.

    Attributes:
      beta: β, a scalar or one for each channel. Any real number is allowed: the slopes are within
        the same bounds; usually β > 0.
    """

    beta: Float[Array, "*stack"]

    def __call__(self, x: Samples) -> Samples:
        _check_beta(self, self.beta, x)
        return _swish(x, jnp.asarray(self.beta), _LIPSWISH)

    def lipschitz_bound(self) -> float:
        """Return the largest absolute slope."""
        return max(map(abs, self.slopes()))

    def slopes(self) -> tuple[float, float]:
        """Return bounds on the slopes from below and above, for every β."""
        return -0.09077, 0.99986

    def rounding(self, x: Samples, error: PerSample, arithmetic: Arithmetic) -> PerSample:
        """Bound the error of the output, [batch]; infinite where β is not finite."""
        bound = activation_error(self, 1.0, _ULPS, x, error, arithmetic)
        return _finite(bound + _moved(x, error, arithmetic), self.beta)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class CLipSwish:
    """x ↦ [LipSwish(x), LipSwish(−x)]/1.004, on the last axis: [..., c] -> [..., 2c].

    It is 1-Lipschitz as a whole. :mod:`~iresnet_jax.lipsdp` takes it as a factor.

    Attributes:
      beta: β, as of :class:`LipSwish`.
    """

    beta: Float[Array, "*stack"]

    def __call__(self, x: Batch) -> Batch:
        _check_beta(self, self.beta, x)
        beta, divisor = jnp.asarray(self.beta), _LIPSWISH * _CLIPSWISH
        halves = [_swish(half, beta, divisor) for half in (x, -x)]
        return jnp.concatenate(halves, axis=-1)

    def lipschitz_bound(self) -> float:
        """Return the norm of the two slopes, from above."""
        return 0.99998

    def rounding(self, x: Batch, error: PerSample, arithmetic: Arithmetic) -> PerSample:
        """Bound the error of the output, [batch]; infinite where β is not finite."""
        bound = activation_error(self, 1.0, _ULPS, x, error, arithmetic)
        return _finite(bound + 1.5 * _moved(x, error, arithmetic), self.beta)


def _swish(x: Samples, beta: Float[Array, "..."], divisor: float) -> Samples:
    """At least in float32: in bfloat16, the result alone is rounded to it."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (wide * jax.nn.sigmoid(beta.astype(wide.dtype) * wide) / divisor).astype(x.dtype)


def _moved(x: Batch, error: PerSample, arithmetic: Arithmetic) -> PerSample:
    """What the rounding of βx adds, of an input off by at most 2e; and what is flushed to zero."""
    norm = norm_above(x.astype(error.dtype)) + 2.0 * error
    tiny = float(jnp.finfo(jnp.promote_types(x.dtype, jnp.float32)).tiny)
    return (_MOVED * arithmetic.unit * norm + tiny * norm * (1.0 + norm)) * 1.01


def _finite(bound: PerSample, beta: Float[Array, "..."]) -> PerSample:
    return jnp.where(jnp.isfinite(beta).all(), bound, jnp.inf)


def _check_beta(stage: object, beta: SameArray, x: Batch) -> None:
    if x.ndim < 2 or beta.shape not in ((), x.shape[-1:]):
        raise ValueError(
            f"{type(stage).__name__} with β of shape {beta.shape} cannot act on an array of shape "
            f"{x.shape}: it takes one β, or one for each channel, and a batch "
            "[batch, ..., channels]."
        )
