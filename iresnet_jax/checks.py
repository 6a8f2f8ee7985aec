"""Checks of what users hand in: shapes and types always, values where they are concrete."""

import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def check_shape(x: jax.Array, event_shape: Sequence[int]) -> None:
    """Refuse anything but [batch, *event_shape].

    Raises:
      ValueError: naming both shapes.
      TypeError: for anything but an array.
    """
    _check_array("Data", x)
    if x.ndim != len(event_shape) + 1 or tuple(x.shape[1:]) != tuple(event_shape):
        raise ValueError(
            f"This model was built for data of shape [batch, {_join(event_shape)}]; got {x.shape}."
        )


def check_at_least_one(name: str, value: int) -> None:
    """Refuse a count below 1.

    Raises:
      ValueError: naming it and its value.
      TypeError: for a value that is no integer.
    """
    try:
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer ≥ 1; got {value!r}.") from None
    if count < 1:
        raise ValueError(f"{name} must be ≥ 1; got {value}.")


def check_latents(latents: Sequence[jax.Array], shapes: Sequence[Sequence[int]]) -> None:
    """Refuse latents of another number, shape or batch size than the model's.

    Raises:
      ValueError: naming the latent.
      TypeError: for latents that are no arrays, or not floating point.
    """
    if not isinstance(latents, (tuple, list)) or len(latents) != len(shapes):
        raise ValueError(
            f"This model has {len(shapes)} latent array(s), in a tuple; got "
            f"{len(latents) if isinstance(latents, (tuple, list)) else type(latents).__name__}."
        )
    for i, latent in enumerate(latents):
        _check_array(f"Latent {i}", latent)
    batch = latents[0].shape[0] if latents[0].ndim else "batch"
    for i, (latent, shape) in enumerate(zip(latents, shapes, strict=True)):
        if latent.shape != (batch, *shape):
            raise ValueError(
                f"Latent {i} must have shape [{batch}, {_join(shape)}]; got {latent.shape}."
            )
        if not jnp.issubdtype(latent.dtype, jnp.floating):
            raise TypeError(f"Latent {i} must be floating point; got {latent.dtype}.")


def check_domain(x: jax.Array, *, unit_interval: bool) -> None:
    """Refuse data that is not floating point, not finite, or outside of [0, 1] where that is due.

    Values are looked at only outside of ``jit``; a traced array has none yet.

    Raises:
      TypeError: for data that is not floating point.
      ValueError: for NaN, infinite or out-of-range values, naming the worst.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"Data must be floating point; got {x.dtype}. Integer images become floats in [0, 1] "
            "by iresnet_jax.dequantize."
        )
    if isinstance(x, jax.core.Tracer):
        return
    values = np.asarray(x)
    if not np.isfinite(values).all():
        raise ValueError(f"Data must be finite; {_offender(~np.isfinite(values), values)}.")
    outside = (values < 0.0) | (values > 1.0)
    if unit_interval and outside.any():
        raise ValueError(
            f"This model takes data in [0, 1]; got values from {values.min():.4g} to "
            f"{values.max():.4g}; {_offender(outside, values)}."
        )


def at_least_default_precision(x: jax.Array) -> jax.Array:
    """``x`` in JAX's default floating-point type, or its own where that is wider."""
    return jnp.asarray(x, jnp.promote_types(x.dtype, jnp.result_type(float)))


def _check_array(what: str, x: object) -> None:
    if not hasattr(x, "ndim") or not hasattr(x, "dtype"):
        raise TypeError(f"{what} must be an array (jax.Array or numpy); got {type(x).__name__}.")


def _offender(mask: np.ndarray, values: np.ndarray) -> str:
    where = tuple(int(i) for i in np.argwhere(mask)[0])
    return f"the first offending value is {values[where]} at index {where}"


def _join(shape: Sequence[int]) -> str:
    return ", ".join(str(n) for n in shape)
