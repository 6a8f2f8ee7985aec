"""ActNorm: a learned scale and shift for each channel, initialised from data (Kingma 2018)."""

import dataclasses
import math

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ActNorm:
    """y = x · exp(log_scale) + shift, on the last axis.

    Attributes:
      log_scale: [channels].
      shift: [channels].
    """

    log_scale: jax.Array
    shift: jax.Array

    @classmethod
    def from_data(cls, x: jax.Array, axis_name: str | None = None) -> "ActNorm":
        """The scale and shift that give every channel of ``x`` mean 0 and standard deviation 1.

        Args:
          x: [batch, ..., channels].
          axis_name: a mapped axis over which statistics are averaged (``pmap``, ``shard_map``).
        """
        mean = _channel_mean(x, axis_name)
        variance = _channel_mean(jnp.square(x - mean), axis_name)
        log_scale = -0.5 * jnp.log(variance + 1e-6)
        return cls(log_scale, -mean * jnp.exp(log_scale))

    def forward_and_log_det(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """y, and log|det| = pixels · Σ log_scale, in nats: the same for every sample."""
        pixels = math.prod(x.shape[1:-1])
        y = x * jnp.exp(self.log_scale) + self.shift
        return y, jnp.full(x.shape[0], pixels * jnp.sum(self.log_scale))

    def inverse(self, y: jax.Array) -> jax.Array:
        """(y − shift) · exp(−log_scale)."""
        return (y - self.shift) * jnp.exp(-self.log_scale)


def _channel_mean(x, axis_name):
    mean = jnp.mean(x, axis=tuple(range(x.ndim - 1)))
    return mean if axis_name is None else jax.lax.pmean(mean, axis_name)
