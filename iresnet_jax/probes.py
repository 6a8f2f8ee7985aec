"""Random probes of trace estimators, and the keys that they are drawn by."""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Key, UInt32

from iresnet_jax.checks import check_at_least_one, typed_key
from iresnet_jax.logdet import SampleKeys
from iresnet_jax.types import PerSample, Samples

Probe = Literal["rademacher", "gaussian"]
#: As of :func:`per_sample_keys`.
KeyPerSample = Key[Array, " batch"]

#: What the backward pass of a block may keep: the random bits of the signs.
NOISE = "noise"


def per_sample_keys(key: SampleKeys, batch: int) -> KeyPerSample:
    """Return one key for each sample: those given, or one key folded with the samples' indices.

    ``key`` is one key or keys [batch], typed or legacy.

    Raises:
      ValueError: for another number of keys.
      TypeError: for what is no key.
    """
    key = typed_key(key)
    if key.ndim == 0:
        return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
    if key.shape != (batch,):
        raise ValueError(f"Need one key, or one for each of {batch} samples; got {key.shape}.")
    return key


def block_keys(
    key: SampleKeys | None, num_blocks: int, batch: int
) -> Key[Array, "blocks batch"] | None:
    """Return a key for each block and sample, [num_blocks, batch]; None for None.

    ``key`` is as of :func:`per_sample_keys`. One call compiles faster than one call a block.
    """
    if key is None:
        return None
    of_samples = jax.vmap(jax.random.fold_in, (0, None))
    of_blocks = jax.vmap(of_samples, (None, 0))
    return of_blocks(per_sample_keys(key, batch), jnp.arange(num_blocks))


def draw_probes(
    probe: Probe, keys: KeyPerSample, x: Samples, num_probes: int
) -> list[Callable[[], Samples]]:
    """Return functions that draw probes of the shape and type of x, each sample's by its own key.

    Signs are kept as bits until they are asked for, and through a block's backward pass.
    """
    if probe == "gaussian":
        return [partial(_normal, keys, i, x) for i in range(num_probes)]
    size = (num_probes, -(-math.prod(x.shape[1:]) // 32))
    words = jax.vmap(lambda key: jax.random.bits(key, size, jnp.uint32))(keys)
    words = checkpoint_name(words, NOISE)
    return [partial(_signs, words[:, i], x) for i in range(num_probes)]


def check_probes(num_probes: int, probe: Probe) -> None:
    """Refuse settings of probes that are out of range, by a TypeError or a ValueError."""
    check_at_least_one("num_probes", num_probes)
    if probe not in get_args(Probe):
        raise ValueError(f'probe must be "rademacher" or "gaussian"; got {probe!r}.')


def sample_dot(a: Samples, b: Samples) -> PerSample:
    """Return ⟨a, b⟩ of each sample, [batch]."""
    return jnp.sum(a * b, axis=tuple(range(1, a.ndim)))


def _normal(keys: KeyPerSample, index: int, x: Samples) -> Samples:
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, index)
    return jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], x.dtype))(keys)


def _signs(words: UInt32[Array, "batch words"], x: Samples) -> Samples:
    """±1, one bit each: ``jax.random.rademacher`` spends 32, a visible part of a step."""

    def of_sample(words: UInt32[Array, " words"]) -> Array:
        bits = (words[:, None] >> jnp.arange(32, dtype=jnp.uint32)[None]) & 1
        size = math.prod(x.shape[1:])
        return (2 * bits.ravel()[:size].astype(x.dtype) - 1).reshape(x.shape[1:])

    return jax.vmap(of_sample)(words)
