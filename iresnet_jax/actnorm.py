"""ActNorm: a learned scale and shift for each channel, initialised from data (Kingma 2018)."""

import dataclasses
import math
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from iresnet_jax.bijections import Error, Mapped
from iresnet_jax.certificates import Certificate, rounded_down, rounded_up
from iresnet_jax.checks import check_domain
from iresnet_jax.convergence import FixedPointInfo
from iresnet_jax.logdet import Estimator
from iresnet_jax.residual import OPERATIONS
from iresnet_jax.rounding import gamma, norm_above, unit_roundoff
from iresnet_jax.transforms import Transform
from iresnet_jax.types import Keys, Samples, Shape

PerChannel = Float[Array, " channels"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ActNorm(Transform):
    """y = x · exp(log_scale) + shift, on the last axis."""

    log_scale: Float[Array, "*stack channels"]
    shift: Float[Array, "*stack channels"]

    @classmethod
    def from_data(cls, x: Samples, axis_name: str | None = None) -> Self:
        """Give every channel of ``x`` mean 0 and standard deviation 1.

        Channels may be of any units; one that happens to vary little in this batch is magnified.
        A channel without spread keeps its scale, and has its mean subtracted: one that is constant
        up to rounding (a standard deviation of at most 4ε·|mean|), and all of them where the batch
        is one row. A channel that is not finite stays as it is, under ``jit``.

        Statistics are averaged over a mapped axis ``axis_name`` (``pmap``, ``shard_map``), if any.

        Raises:
          ValueError: for a batch without rows; for values that can be seen not to be finite.
        """
        check_initial_batch(x)
        unit = _unit(x, axis_name)
        mean, std = _moments(x / _everywhere(unit, x), axis_name)
        rows = x.shape[0] * (1 if axis_name is None else jax.lax.psum(1, axis_name))
        info = jnp.finfo(std.dtype)
        spreads = (std > 4.0 * float(info.eps) * jnp.abs(mean)) & (rows > 1)
        limit = min(math.log(float(info.max)), -math.log(float(info.tiny))) - 0.5
        wanted = jnp.where(spreads, -jnp.log(std) - jnp.log(unit), 0.0)
        log_scale = jnp.clip(wanted, -limit, limit)
        shift = -(mean * unit) * jnp.exp(log_scale)
        return cls(log_scale, jnp.where(jnp.isfinite(shift), shift, 0.0))

    def forward(self, x: Samples) -> Samples:
        if x.shape[-1:] != self.log_scale.shape:
            raise ValueError(
                f"ActNorm of {self.log_scale.shape} channels cannot act on an array of shape "
                f"{x.shape}."
            )
        scale = jnp.exp(self.log_scale)
        return x * _everywhere(scale, x) + _everywhere(self.shift, x)

    def forward_and_log_det(
        self, x: Samples, estimator: Estimator | None = None, keys: Keys = None
    ) -> Mapped:
        """Return y, and log|det| = pixels · Σ log_scale, in nats: the same for every sample."""
        pixels = math.prod(x.shape[1:-1])
        return self.forward(x), jnp.full(x.shape[0], pixels * jnp.sum(self.log_scale))

    def backward(self, y: Samples) -> Samples:
        scale = jnp.exp(-self.log_scale)
        return (y - _everywhere(self.shift, y)) * _everywhere(scale, y)

    def certify(self, name: str, shape: Shape) -> Certificate:
        """Bound slopes by the largest scale, those of the inverse by the smallest."""
        with np.errstate(over="ignore"):
            scales = np.exp(np.asarray(self.log_scale, np.float64))
        smallest, largest = rounded_down(float(scales.min())), rounded_up(float(scales.max()))
        problems = []
        if not np.finfo(np.float64).tiny <= smallest <= largest < math.inf:  # NaN fails all of it
            problems.append(f"the scales of ActNorm lie in [{smallest:.4g}, {largest:.4g}]")
        elif not np.isfinite(np.asarray(self.shift)).all():
            problems.append("not finite: the shift of ActNorm")
        inverse = math.inf if problems else rounded_up(1.0 / smallest)
        return Certificate((), largest, inverse).with_problems(problems)

    def inverse_error(self, error: Error, info: FixedPointInfo | None, shape: Shape) -> Error:
        """ε ← ε/min|s| + ρ, ρ the rounding of the inverse itself, numbers flushed to 0 included.

        The exponential is in the weights' precision, the rest in that of the error.
        """
        dtype, own = error.bound.dtype, self.log_scale.dtype
        unit = max(unit_roundoff(dtype), unit_roundoff(own))
        tiny = max(float(jnp.finfo(dtype).tiny), float(jnp.finfo(own).tiny))
        slack = 1.0 + 2.0 * gamma(math.prod(shape) + OPERATIONS, unit)
        stretch = jnp.maximum(jnp.max(jnp.exp(-self.log_scale)).astype(dtype), tiny)
        shift = norm_above(self.shift.astype(dtype)[None])[0]
        size = error.norm + math.sqrt(math.prod(shape[:-1])) * shift
        flushed = 4.0 * tiny * (size + math.sqrt(math.prod(shape)) * (1.0 + stretch))
        norm = (stretch * size + flushed) * slack
        bound = (stretch * error.bound + OPERATIONS * unit * norm + flushed) * slack
        return Error(*(jnp.where(jnp.isnan(x), jnp.inf, x) for x in (bound, norm)))


def check_initial_batch(x: Samples) -> None:
    """Require rows to take statistics from, finite where their values can be seen.

    Raises:
      ValueError: naming the shape, or the first value that is not finite.
    """
    if x.ndim < 2 or 0 in x.shape:
        raise ValueError(
            "ActNorm is initialised from a batch [batch, ..., channels] of at least one row; got "
            f"an array of shape {x.shape}."
        )
    check_domain(x, unit_interval=False)


def _unit(x: Samples, axis_name: str | None) -> PerChannel:
    """A power of two next to each channel's magnitude: squares in it stay in range."""
    largest = jnp.max(jnp.abs(x), axis=tuple(range(x.ndim - 1)))
    largest = largest if axis_name is None else jax.lax.pmax(largest, axis_name)
    exponent = jnp.where(largest > 0, jnp.frexp(largest)[1] - 1, 0)
    return jnp.ldexp(jnp.ones_like(largest), exponent)


def _moments(x: Samples, axis_name: str | None) -> tuple[PerChannel, PerChannel]:
    """Mean, exact for a constant but for its last bit, and standard deviation."""
    rough = _channel_mean(x, axis_name)
    mean = rough + _channel_mean(x - _everywhere(rough, x), axis_name)
    return mean, jnp.sqrt(_channel_mean(jnp.square(x - _everywhere(mean, x)), axis_name))


def _everywhere(values: PerChannel, x: Float[Array, "*batch channels"]) -> Samples:
    """Repeat one value a channel, explicitly: users may have rank promotion forbidden."""
    return jnp.broadcast_to(values, x.shape)


def _channel_mean(x: Float[Array, "*batch channels"], axis_name: str | None) -> PerChannel:
    mean = jnp.mean(x, axis=tuple(range(x.ndim - 1)))
    return mean if axis_name is None else jax.lax.pmean(mean, axis_name)
