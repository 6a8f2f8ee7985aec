"""Parameter-free transforms between images and what a flow works on.

Each is a plain function, with its inverse beside it. Where volume changes, the forward function
also returns log|det J| per sample, in nats.
"""

from functools import partial

import jax
import jax.numpy as jnp

#: How far :func:`logit` keeps the ends of [0, 1] from 0 and 1.
LOGIT_ALPHA = 0.01


def squeeze(x: jax.Array) -> jax.Array:
    """Space to depth: [..., H, W, C] -> [..., H/2, W/2, 4C].

    Output channels are ordered (row in the 2×2 patch, column, channel). A permutation: its
    log-determinant is 0 and its norm 1.

    Raises:
      ValueError: if a side is odd.
    """
    if x.ndim < 3:
        raise ValueError(f"squeeze needs an image [..., height, width, channels]; got {x.shape}.")
    *batch, height, width, channels = x.shape
    if height % 2 or width % 2:
        raise ValueError(f"squeeze needs even image sides; got height {height}, width {width}.")
    patches = x.reshape(*batch, height // 2, 2, width // 2, 2, channels)
    return jnp.moveaxis(patches, -4, -3).reshape(*batch, height // 2, width // 2, 4 * channels)


def unsqueeze(x: jax.Array) -> jax.Array:
    """The inverse of :func:`squeeze`: [..., H, W, 4C] -> [..., 2H, 2W, C].

    Raises:
      ValueError: if the number of channels is not a multiple of 4.
    """
    if x.ndim < 3 or x.shape[-1] % 4:
        raise ValueError(
            f"unsqueeze needs [..., height, width, channels], channels a multiple of 4; "
            f"got {x.shape}."
        )
    *batch, height, width, channels = x.shape
    patches = x.reshape(*batch, height, width, 2, 2, channels // 4)
    return jnp.moveaxis(patches, -3, -4).reshape(*batch, 2 * height, 2 * width, channels // 4)


def injective_pad(x: jax.Array, num_channels: int) -> jax.Array:
    """Append ``num_channels`` zero channels (i-RevNet's injective padding).

    Raises:
      ValueError: if ``num_channels`` is negative.
    """
    if num_channels < 0:
        raise ValueError(f"num_channels to append must be ≥ 0; got {num_channels}.")
    return jnp.concatenate([x, jnp.zeros((*x.shape[:-1], num_channels), x.dtype)], axis=-1)


def injective_unpad(x: jax.Array, num_channels: int) -> jax.Array:
    """Drop the last ``num_channels`` channels: the left inverse of :func:`injective_pad`.

    Raises:
      ValueError: unless 0 ≤ ``num_channels`` < the number of channels.
    """
    if not 0 <= num_channels < x.shape[-1]:
        raise ValueError(f"Channels to drop must lie in [0, {x.shape[-1]}); got {num_channels}.")
    return x[..., : x.shape[-1] - num_channels]


def logit(x: jax.Array, alpha: float = LOGIT_ALPHA) -> tuple[jax.Array, jax.Array]:
    """log(p/(1−p)) of p = α + (1−2α)x, and its log-determinant per sample.

    Args:
      x: [batch, ...], values in [0, 1]; others give NaN or a meaningless result.
      alpha: how far the ends are kept from 0 and 1, in (0, 0.5).

    Raises:
      ValueError: if ``alpha`` is outside (0, 0.5).
    """
    _check_alpha(alpha)
    p = alpha + (1.0 - 2.0 * alpha) * x
    log_det = jnp.log1p(-2.0 * alpha) - jnp.log(p) - jnp.log1p(-p)
    return jnp.log(p) - jnp.log1p(-p), jnp.sum(log_det, axis=tuple(range(1, x.ndim)))


def inverse_logit(y: jax.Array, alpha: float = LOGIT_ALPHA) -> jax.Array:
    """The inverse of :func:`logit`; values outside [0, 1] are possible and are not clipped."""
    _check_alpha(alpha)
    return (jax.nn.sigmoid(y) - alpha) / (1.0 - 2.0 * alpha)


def dequantize(key: jax.Array, levels: jax.Array, num_levels: int) -> jax.Array:
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
    if key.ndim == 0:
        noise = jax.random.uniform(key, levels.shape, jnp.float32)
    else:
        draw = partial(jax.random.uniform, shape=levels.shape[1:], dtype=jnp.float32)
        noise = jax.vmap(draw)(key)
    levels = levels.astype(jnp.float32)
    next_level = (levels + 1.0) / num_levels  # rounding must not reach it
    return jnp.minimum((levels + noise) / num_levels, jnp.nextafter(next_level, 0.0 * next_level))


def quantize(x: jax.Array, num_levels: int) -> jax.Array:
    """The grey level of each value of [0, 1], as int32; values outside are clipped to the ends."""
    level = jnp.floor(x * num_levels)
    above, below = (level + 1.0) / num_levels <= x, level / num_levels > x  # off by one at an edge
    level = level + above.astype(level.dtype) - below.astype(level.dtype)
    return jnp.clip(level, 0, num_levels - 1).astype(jnp.int32)


def _check_alpha(alpha):
    if not 0.0 < alpha < 0.5:
        raise ValueError(f"alpha of the logit must lie in (0, 0.5); got {alpha}.")
