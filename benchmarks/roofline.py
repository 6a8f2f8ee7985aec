"""How near a training step comes to what the machine's convolutions, or matrix products, reach.

The fraction is the step's counted convolution FLOPs (:meth:`Spec.step_flops`) over its time, over
the best rate of a plain 3×3 64→64 forward convolution in the same process (CPU; by the faster of
XLA's two libraries, which jax 0.10.2 chooses by the rows), or of a large matrix product in the same
precision (GPU).
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import ours
from benchmarks.specs import SPECS
from benchmarks.timing import seconds
from benchmarks.training import REMAT, Remat
from iresnet_jax.stages import Precision


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roofline:
    """A training step's convolution FLOP/s as a fraction of the machine's best."""

    config: str = "D2"
    """See benchmarks/specs.py."""
    terms: int = 5
    """Of the log-determinant's series."""
    remat: Remat = "default"
    """Whether ours recomputes blocks in the backward pass; default: where densities are trained."""
    precision: Precision = "float32"
    """Inside the branches, and of the reference on a GPU."""
    rounds: int = 9
    """Turns of the step and the references."""
    json: Path | None = None
    """Where the result goes, beside the terminal."""


def run(options: Roofline) -> dict[str, Any]:
    """Rates and their ratio; the reference's is its best, the step's its median."""
    spec = SPECS[options.config]
    remat = REMAT[options.remat]
    training = ours.Training(spec, options.terms, remat=remat, precision=options.precision)
    references = _references(options.precision)
    for _ in range(2):
        training.step()
    for call, _ in references:
        call()
    peak, taken = 0.0, []
    for _ in range(options.rounds):
        for call, flops in references:
            peak = max(peak, flops / min(seconds(call) for _ in range(10)))
        taken.append(seconds(training.step))
    counted = spec.step_flops(options.terms)
    rate = counted / float(np.median(taken))
    return {
        "fraction": rate / peak,
        "gflop": counted / 1e9,
        "gflop_per_second": rate / 1e9,
        "reference_gflop_per_second": peak / 1e9,
        "seconds": float(np.median(taken)),
    }


def _references(precision: Precision) -> list[tuple[Callable[[], Any], float]]:
    """What can be reached: calls, and the FLOPs of each."""
    if jax.default_backend() == "cpu":
        return [_convolution(more) for more in (0, 1)]
    side = 8192
    names = {"float32": "highest", "tensorfloat32": "tensorfloat32", "bfloat16": "default"}
    dtype = jnp.bfloat16 if precision == "bfloat16" else jnp.float32
    a = jnp.ones((side, side), dtype)
    product = jax.jit(lambda a: jnp.matmul(a, a, precision=names[precision]))
    return [(lambda: product(a).block_until_ready(), 2.0 * side**3)]


def _convolution(more_rows: int) -> tuple[Callable[[], Any], float]:
    """Of 64→64 channels; where more rows come out than go in, XLA takes another library for it."""
    x, kernel = jnp.ones((16, 32, 32, 64)), jnp.ones((3, 3, 64, 64))
    padding = ((1, 1 + more_rows), (1, 1))
    convolve = jax.jit(
        lambda x, kernel: jax.lax.conv_general_dilated(
            x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    )
    flops = 2.0 * 9 * 64 * 64 * 16 * (32 + more_rows) * 32
    return lambda: convolve(x, kernel).block_until_ready(), flops
