"""Between integer grey levels and the floats in [0, 1] that a flow works on."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray


def dequantize(
    key: PRNGKeyArray | Key[Array, " batch"], levels: Array | np.ndarray, num_levels: int
) -> Float[Array, "..."]:
    """Uniform dequantisation: (k + u) / num_levels with u ~ U[0, 1), in [0, 1) as float32.

    Args:
      key: one key, or one per sample.
      levels: integers in [0, num_levels), [batch, ...].
      num_levels: number of grey levels, ≥ 2.

    Raises:
      TypeError: if ``levels`` are not integers.
      ValueError: if ``num_levels`` is below 2.
    """
    if not hasattr(levels, "dtype"):
        raise TypeError(f"Grey levels must be an array; got {type(levels).__name__}.")
    if not jnp.issubdtype(levels.dtype, jnp.integer):
        raise TypeError(f"dequantize takes integer grey levels; got {levels.dtype}.")
    if num_levels < 2:
        raise ValueError(f"num_levels must be ≥ 2; got {num_levels}.")
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if key.ndim == 0:
        noise = jax.random.uniform(key, levels.shape, jnp.float32)
    else:
        draw = partial(jax.random.uniform, shape=levels.shape[1:], dtype=jnp.float32)
        noise = jax.vmap(draw)(key)
    levels = levels.astype(jnp.float32)
    next_level = (levels + 1.0) / num_levels  # rounding must not reach it
    return jnp.minimum((levels + noise) / num_levels, jnp.nextafter(next_level, 0.0 * next_level))


def quantize(x: Float[Array | np.ndarray, "*shape"], num_levels: int) -> Int[Array, "*shape"]:
    """Return the grey level of each value of [0, 1], as int32; others are clipped to the ends."""
    level = jnp.floor(x * num_levels)
    above, below = (level + 1.0) / num_levels <= x, level / num_levels > x  # off by one at an edge
    level = level + above.astype(level.dtype) - below.astype(level.dtype)
    return jnp.clip(level, 0, num_levels - 1).astype(jnp.int32)
