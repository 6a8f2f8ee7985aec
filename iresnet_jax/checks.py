"""Checks of user input: shapes and types always, values where they are concrete."""

import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key, PRNGKeyArray, Shaped

from iresnet_jax.types import AnyArray


def check_shape(x: AnyArray, event_shape: Sequence[int]) -> None:
    """Require an array of shape [batch, *event_shape].

    Raises:
      ValueError: if the shape differs.
      TypeError: if ``x`` is not an array.
    """
    _check_array("Data", x)
    if x.ndim != len(event_shape) + 1 or tuple(x.shape[1:]) != tuple(event_shape):
        raise ValueError(
            f"This model was built for data of shape [batch, {_join(event_shape)}]; got {x.shape}."
        )


def check_at_least_one(name: str, value: int) -> None:
    """Require a count ≥ 1 that JAX's integers of 32 bits hold.

    Raises:
      ValueError: if it is smaller, or larger.
      TypeError: if ``value`` is not an integer.
    """
    try:
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer ≥ 1; got {value!r}.") from None
    if count < 1:
        raise ValueError(f"{name} must be ≥ 1; got {value}.")
    if count > (most := np.iinfo(np.int32).max):
        raise ValueError(f"{name} must be ≤ {most}; got {value}.")


def check_latents(latents: Sequence[AnyArray], shapes: Sequence[Sequence[int]]) -> None:
    """Require one latent per shape, all of one batch size, in a tuple or list.

    Raises:
      ValueError: if a number or shape is wrong.
      TypeError: if a latent is not a floating-point array.
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


def check_domain(x: AnyArray, *, unit_interval: bool) -> None:
    """Require finite floating-point data, in [0, 1] for ``unit_interval``.

    They must be finite in the type that JAX gives them: float32, unless it runs with x64. Inside
    ``jit``, only the dtype is checked.

    Raises:
      TypeError: if the data is not floating point.
      ValueError: if a value is not finite, out of range or masked.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"Data must be floating point; got {x.dtype}. Integer images become floats in [0, 1] "
            "by iresnet_jax.dequantize."
        )
    if isinstance(x, jax.core.Tracer):
        return
    refuse_masked(x, "Data")
    with np.errstate(over="ignore"):  # what float64 holds and float32 does not
        values = np.asarray(x, jax.dtypes.canonicalize_dtype(x.dtype))
    if not np.isfinite(values).all():
        raise ValueError(f"Data must be finite; {_offender(~np.isfinite(values), values)}.")
    outside = (values < 0.0) | (values > 1.0)
    if unit_interval and outside.any():
        raise ValueError(
            f"This model takes data in [0, 1]; got values from {values.min():.4g} to "
            f"{values.max():.4g}; {_offender(outside, values)}."
        )


def refuse_masked(data: object, what: str) -> None:
    """Refuse a masked array: what is behind the mask would be taken for data.

    Raises:
      ValueError: if a value is masked.
    """
    if np.ma.is_masked(data):
        raise ValueError(f"{what} must not be masked. Drop what is, or fill it in.")


def typed_key(key: PRNGKeyArray | Key[Array, "..."]) -> Key[Array, "..."]:
    """Return a key of ``jax.random.key`` as it is, and one of ``jax.random.PRNGKey`` typed.

    Raises:
      TypeError: for anything else, such as a seed.
    """
    dtype = getattr(key, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return key
    words = jax.eval_shape(jax.random.PRNGKey, 0).shape
    if dtype != jnp.uint32 or key.shape[-1:] != words:
        got = repr(key) if dtype is None else f"an array of {dtype} of shape {key.shape}"
        raise TypeError(f"A key must come from jax.random.key(seed), or PRNGKey(seed); got {got}.")
    return jax.random.wrap_key_data(key)


def at_least_default_precision(x: Shaped[AnyArray, "*shape"]) -> Float[Array, "*shape"]:
    """Convert ``x`` to JAX's default floating-point dtype, unless its own is wider.

    A float64 table, NumPy's default, becomes float32 unless JAX runs with x64.
    """
    dtype = jnp.promote_types(x.dtype, jnp.result_type(float))
    return jnp.asarray(x, jax.dtypes.canonicalize_dtype(dtype))


def _check_array(what: str, x: object) -> None:
    if not hasattr(x, "ndim") or not hasattr(x, "dtype"):
        raise TypeError(f"{what} must be an array (jax.Array or numpy); got {type(x).__name__}.")


def _offender(mask: Bool[np.ndarray, "*shape"], values: Float[np.ndarray, "*shape"]) -> str:
    where = tuple(int(i) for i in np.argwhere(mask)[0])
    return f"the first offending value is {values[where]} at index {where}"


def _join(shape: Sequence[int]) -> str:
    return ", ".join(str(n) for n in shape)
