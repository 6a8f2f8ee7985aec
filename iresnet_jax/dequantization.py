"""Between integer grey levels and the floats in [0, 1] that a flow works on."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray

from iresnet_jax.checks import at_least_default_precision, typed_key

#: float32 holds every integer up to here.
MAX_LEVELS = 2**24


def dequantize(
    key: PRNGKeyArray | Key[Array, " batch"], levels: Array | np.ndarray, num_levels: int
) -> Float[Array, "..."]:
    """Uniform dequantisation: (k + u) / num_levels with u ~ U[0, 1), in [0, 1) as float32.

    :func:`quantize` recovers every level.

    Args:
      key: one key, or one per sample; typed or legacy.
      levels: integers in [0, num_levels), [batch, ...].
      num_levels: number of grey levels, in [2, 2²⁴]: float32 tells no more apart.

    Raises:
      TypeError: if ``levels`` are not integers, or ``key`` is no key.
      ValueError: if ``num_levels`` is out of range; if a level can be seen to be; for another
        number of keys.
    """
    check_levels(levels, num_levels)
    key = typed_key(key)
    if key.ndim == 0:
        noise = jax.random.uniform(key, levels.shape, jnp.float32)
    elif key.shape == levels.shape[:1]:
        draw = partial(jax.random.uniform, shape=levels.shape[1:], dtype=jnp.float32)
        noise = jax.vmap(draw)(key)
    else:
        raise ValueError(
            f"Need one key, or one for each sample of levels {levels.shape}; got {key.shape}."
        )
    return within_level(levels, noise, num_levels)


def within_level(
    levels: Array | np.ndarray, noise: Float[Array, "*shape"], num_levels: int
) -> Float[Array, "*shape"]:
    """Place values within their grey levels: (k + u) / num_levels in float32, u in [0, 1].

    :func:`quantize` recovers every level, wherever rounding falls.
    """
    levels = jnp.asarray(levels, jnp.float32)
    next_level = _edge(levels + 1.0, num_levels)  # rounding must not reach it
    below = jnp.nextafter(next_level, 0.0 * next_level)
    return jnp.minimum(_edge(levels + noise, num_levels), below)


def quantize(x: Float[Array | np.ndarray, "*shape"], num_levels: int) -> Int[Array, "*shape"]:
    """Return the grey level of each value of [0, 1], as int32; others are clipped to the ends.

    ``num_levels`` lies in [2, 2²⁴]. Values are rounded to float32 if they are of less precision.

    Raises:
      TypeError: if ``x`` is not floating point.
      ValueError: if ``num_levels`` is out of range; for NaN, where it can be seen.
    """
    _check_num_levels(num_levels)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"quantize takes floating-point values; got {x.dtype}.")
    if not isinstance(x, jax.core.Tracer) and np.isnan(np.asarray(x)).any():
        raise ValueError("quantize takes numbers; got NaN, which has no grey level.")
    x = at_least_default_precision(x)
    level = jnp.floor(x * num_levels)
    above = _edge(level + 1.0, num_levels) <= x  # off by one at an edge
    below = _edge(level, num_levels) > x
    level = level + above.astype(level.dtype) - below.astype(level.dtype)
    return jnp.clip(level, 0, num_levels - 1).astype(jnp.int32)


def _edge(level: Float[Array, "*shape"], num_levels: int) -> Float[Array, "*shape"]:
    """A true division: XLA's by one number multiplies by its reciprocal, which rounds otherwise."""
    divisor = jax.lax.optimization_barrier(jnp.full(level.shape, num_levels, level.dtype))
    return level / divisor


def _check_num_levels(num_levels: int) -> None:
    if not num_levels >= 2:
        raise ValueError(f"num_levels must be ≥ 2; got {num_levels}.")
    if num_levels > MAX_LEVELS or num_levels % 1:
        raise ValueError(
            f"num_levels must be an integer ≤ {MAX_LEVELS}, what float32 tells apart; got "
            f"{num_levels}."
        )


def check_levels(levels: Array | np.ndarray, num_levels: int) -> None:
    """Refuse what are no grey levels, and levels out of range where values can be seen.

    Raises:
      TypeError, ValueError: as :func:`dequantize`.
    """
    if not hasattr(levels, "dtype"):
        raise TypeError(f"Grey levels must be an array; got {type(levels).__name__}.")
    if not jnp.issubdtype(levels.dtype, jnp.integer):
        raise TypeError(f"Dequantisation takes integer grey levels; got {levels.dtype}.")
    _check_num_levels(num_levels)
    if isinstance(levels, jax.core.Tracer) or not levels.size:
        return
    values = np.asarray(levels)  # JAX would trace what it computes, within a jit
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= num_levels:
        raise ValueError(
            f"Grey levels must lie in [0, {num_levels - 1}], by num_levels; got {low} to {high}."
        )
