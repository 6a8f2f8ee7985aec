"""The learned diagonal Gaussian prior over latents, and bits per dimension."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from iresnet_jax.checks import typed_key
from iresnet_jax.types import AnyArray, SameArray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class DiagonalGaussian:
    """The Gaussian N(mean, diag(exp(log_std))²) over arrays of one shape.

    Attributes:
      mean: shape [*event].
      log_std: shape [*event].
    """

    mean: Float[Array, "*event"]
    log_std: Float[Array, "*event"]

    def log_prob(self, z: Float[AnyArray, "..."]) -> Float[Array, "..."]:
        """Compute the log density of each sample of ``z`` [batch, *event], in nats, [batch].

        One sample [*event] gives a scalar.
        """
        mean, log_std = (jnp.broadcast_to(a, z.shape) for a in (self.mean, self.log_std))
        standardized = (z - mean) * jnp.exp(-log_std)
        terms = -0.5 * jnp.square(standardized) - log_std - 0.5 * math.log(2.0 * math.pi)
        return jnp.sum(terms, axis=tuple(range(-self.mean.ndim, 0)))

    def sample(
        self, key: PRNGKeyArray, num_samples: int, temperature: float | Float[AnyArray, ""] = 1.0
    ) -> Float[Array, "batch *event"]:
        """Draw [num_samples, *event], with the standard deviation scaled by ``temperature``.

        Raises:
          ValueError: if ``temperature`` is concrete and negative or not finite; for several keys.
          TypeError: for what is no key.
        """
        key = typed_key(key)
        if key.ndim:
            raise ValueError(f"Sampling takes one key; got {key.shape}.")
        known = 1.0 if isinstance(temperature, jax.core.Tracer) else float(np.asarray(temperature))
        if not 0 <= known < math.inf:
            told = "≥ 0" if known < 0 else "finite"
            raise ValueError(f"temperature must be {told}; got {temperature}.")
        noise = jax.random.normal(key, (num_samples, *self.mean.shape), self.mean.dtype)
        mean, std = (jnp.broadcast_to(a, noise.shape) for a in (self.mean, jnp.exp(self.log_std)))
        return mean + temperature * std * noise


def bits_per_dim(
    log_prob: Float[SameArray, "*batch"], dim: int, num_levels: int = 1
) -> Float[SameArray, "*batch"]:
    """Convert log densities to bits per dimension, −log_prob/(d ln 2) + log₂(num_levels).

    In expectation over u, an upper bound for the discrete data (Theis, van den Oord, Bethge 2016).

    Args:
      log_prob: log density of x = (k + u)/num_levels in [0, 1]ᵈ, in nats.
      dim: d, the dimension of one sample.
      num_levels: number of grey levels, 1 for continuous data.

    Raises:
      ValueError: if ``dim`` or ``num_levels`` is below 1.
    """
    if not (dim >= 1 and num_levels >= 1):
        raise ValueError(f"dim and num_levels must be ≥ 1; got {dim=}, {num_levels=}.")
    bits: SameArray = -log_prob / (dim * math.log(2.0)) + math.log2(num_levels)
    return bits
