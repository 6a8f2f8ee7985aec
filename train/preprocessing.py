"""Preprocessing of integer images."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

_CROP_MARGIN = 4


def normalize(images: jax.Array, num_levels: int, mean: Any, std: Any) -> jax.Array:
    """Map integer grey levels to [0, 1], then to (x − mean) / std, as a classifier sees them."""
    scaled = images.astype(jnp.float32) / (num_levels - 1)
    return (scaled - jnp.asarray(mean)) / jnp.asarray(std)


def denormalize(x: Any, mean: Any, std: Any) -> jax.Array:
    """Undo (x − mean) / std: the images in [0, 1] that :func:`normalize` came from."""
    return jnp.asarray(x) * jnp.asarray(std) + jnp.asarray(mean)


def crop_and_flip(images: jax.Array, keys: jax.Array) -> jax.Array:
    """Crop each image at random from a mirrored margin, and flip it half of the time.

    Args:
      images: [batch, height, width, channels].
      keys: one per image.
    """
    margin = ((_CROP_MARGIN, _CROP_MARGIN), (_CROP_MARGIN, _CROP_MARGIN), (0, 0))

    def one(image, key):
        place, side = jax.random.split(key)
        top, left = jax.random.randint(place, (2,), 0, 2 * _CROP_MARGIN + 1)
        cropped = lax.dynamic_slice(
            jnp.pad(image, margin, mode="symmetric"), (top, left, 0), image.shape
        )
        return jnp.where(jax.random.bernoulli(side), cropped[:, ::-1], cropped)

    return jax.vmap(one)(images, keys)
