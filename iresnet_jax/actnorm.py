"""ActNorm: a learned scale and shift for each channel, initialised from data (Kingma 2018)."""

import dataclasses
import math
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from iresnet_jax.bijections import Error, Shape
from iresnet_jax.certificates import Certificate, rounded_down, rounded_up
from iresnet_jax.convergence import FixedPointInfo
from iresnet_jax.logdet import Estimator
from iresnet_jax.residual import OPERATIONS
from iresnet_jax.rounding import gamma, unit_roundoff
from iresnet_jax.transforms import Transform


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ActNorm(Transform):
    """y = x · exp(log_scale) + shift, on the last axis.

    Attributes:
      log_scale: [channels].
      shift: [channels].
    """

    log_scale: Array
    shift: Array

    @classmethod
    def from_data(cls, x: Array, axis_name: str | None = None) -> Self:
        """Give every channel of ``x`` mean 0 and standard deviation 1.

        Args:
          x: [batch, ..., channels].
          axis_name: a mapped axis over which statistics are averaged (``pmap``, ``shard_map``).
        """
        mean = _channel_mean(x, axis_name)
        variance = _channel_mean(jnp.square(x - mean), axis_name)
        log_scale = -0.5 * jnp.log(variance + 1e-6)
        return cls(log_scale, -mean * jnp.exp(log_scale))

    def forward(self, x: Array) -> Array:
        return x * jnp.exp(self.log_scale) + self.shift

    def forward_and_log_det(
        self, x: Array, estimator: Estimator | None = None, keys: Array | None = None
    ) -> tuple[Array, Array]:
        """Return y, and log|det| = pixels · Σ log_scale, in nats: the same for every sample."""
        pixels = math.prod(x.shape[1:-1])
        return self.forward(x), jnp.full(x.shape[0], pixels * jnp.sum(self.log_scale))

    def backward(self, y: Array) -> Array:
        """Return (y − shift) · exp(−log_scale)."""
        return (y - self.shift) * jnp.exp(-self.log_scale)

    def certify(self, name: str, shape: Shape) -> Certificate:
        """Bound slopes by the largest scale, those of the inverse by the smallest."""
        with np.errstate(over="ignore"):
            scales = np.exp(np.asarray(self.log_scale, np.float64))
        smallest, largest = rounded_down(float(scales.min())), rounded_up(float(scales.max()))
        problem = ""
        if not 0.0 < smallest <= largest < math.inf:  # NaN fails every comparison
            problem = f"the scales of ActNorm lie in [{smallest:.4g}, {largest:.4g}]"
        elif not np.isfinite(np.asarray(self.shift)).all():
            problem = "not finite: the shift of ActNorm"
        inverse = math.inf if problem else rounded_up(1.0 / smallest)
        return Certificate((), largest, inverse, (problem,) if problem else ())

    def inverse_error(self, error: Error, info: FixedPointInfo | None, shape: Shape) -> Error:
        """ε ← ε/min|s| + ρ, ρ the rounding of the inverse itself."""
        unit = unit_roundoff(error.bound.dtype)
        slack = 1.0 + 2.0 * gamma(math.prod(shape) + OPERATIONS, unit)
        stretch = jnp.max(jnp.exp(-self.log_scale))
        shift = math.sqrt(math.prod(shape[:-1])) * jnp.linalg.norm(self.shift)
        norm = stretch * (error.norm + shift) * slack
        bound = (stretch * error.bound + OPERATIONS * unit * norm) * slack
        return Error(jnp.where(jnp.isnan(bound), jnp.inf, bound), norm)


def _channel_mean(x: Array, axis_name: str | None) -> Array:
    mean = jnp.mean(x, axis=tuple(range(x.ndim - 1)))
    return mean if axis_name is None else jax.lax.pmean(mean, axis_name)
