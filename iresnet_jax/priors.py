"""The learned diagonal Gaussian prior over latents, and bits per dimension."""

import dataclasses
import math

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class DiagonalGaussian:
    """N(mean, diag(exp(log_std))²) over arrays of one shape.

    Attributes:
      mean: the event's shape.
      log_std: the event's shape.
    """

    mean: jax.Array
    log_std: jax.Array

    def log_prob(self, z: jax.Array) -> jax.Array:
        """Log density of each sample of ``z`` [batch, *event], or of one [*event], in nats."""
        standardized = (z - self.mean) * jnp.exp(-self.log_std)
        terms = -0.5 * jnp.square(standardized) - self.log_std - 0.5 * math.log(2.0 * math.pi)
        return jnp.sum(terms, axis=tuple(range(-self.mean.ndim, 0)))

    def sample(self, key: jax.Array, num_samples: int, temperature: float = 1.0) -> jax.Array:
        """Draw [num_samples, *event], the standard deviation scaled by ``temperature`` ≥ 0."""
        if not isinstance(temperature, jax.core.Tracer) and temperature < 0:
            raise ValueError(f"temperature must be ≥ 0; got {temperature}.")
        noise = jax.random.normal(key, (num_samples, *self.mean.shape), self.mean.dtype)
        return self.mean + temperature * jnp.exp(self.log_std) * noise


def bits_per_dim(log_prob: jax.Array, dim: int, num_levels: int = 1) -> jax.Array:
    """−log₂ p per dimension of data with ``num_levels`` grey levels.

    Args:
      log_prob: log density of x = (k + u)/num_levels in [0, 1]ᵈ, in nats.
      dim: d, dimensions of one sample.
      num_levels: grey levels; 1 for data that is continuous.

    Returns:
      −log_prob/(d ln 2) + log₂(num_levels): an upper bound, in expectation over u, on the bits per
      dimension of the discrete data (Theis, van den Oord, Bethge 2016).
    """
    return -log_prob / (dim * math.log(2.0)) + math.log2(num_levels)
