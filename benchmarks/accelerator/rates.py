"""What the device reaches at best: matrix products in each precision, and a copy of its memory."""

import importlib.metadata
import platform
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.accelerator.records import Record
from benchmarks.accelerator.settings import Settings
from benchmarks.timing import seconds

#: Precision in the branches -> that of products, and the type of their factors.
PRODUCTS = {
    "bfloat16": ("default", jnp.bfloat16),
    "tensorfloat32": ("tensorfloat32", jnp.float32),
    "float32": ("highest", jnp.float32),
}
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "chex", "numpy", "torch")


def measure(record: Record, settings: Settings) -> None:
    """The machine, and its best rates on random numbers."""
    device = jax.devices()[0]
    found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    record.add(
        "machine",
        device=device.device_kind,
        platform=device.platform,
        devices=jax.device_count(),
        python=platform.python_version(),
        **{name: found[name] for name in _PACKAGES if name in found},
    )
    side = 256 if settings.tiny else 8192
    for name, (precision, dtype) in PRODUCTS.items():
        a = jax.random.normal(jax.random.key(0), (side, side), dtype)
        product = jax.jit(partial(jnp.matmul, precision=precision))
        best = _best(partial(product, a, a))
        record.add(name, tflop_per_second=2.0 * side**3 / best / 1e12)
    x = jax.random.normal(jax.random.key(1), (side * side,), jnp.float32)
    best = _best(lambda: _plus_one(x))
    record.add("memory", gigabytes_per_second=2.0 * x.nbytes / best / 1e9)


@jax.jit
def _plus_one(x: jax.Array) -> jax.Array:
    return x + 1.0


def _best(call: Callable[[], Any], calls: int = 10) -> float:
    """Seconds of one of several calls in flight, in the best of three turns."""
    jax.block_until_ready(call())

    def turn() -> None:
        jax.block_until_ready([call() for _ in range(calls)])

    return min(seconds(turn) for _ in range(3)) / calls
