"""What a trained network achieves: likelihood with its error bars, and how well it inverts."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from iresnet_jax import Flow, exact, truncated_series, truncation_error_bound
from iresnet_jax.logdet import Estimator
from train.configs.base import DensityConfig
from train.networks import ModelFunctions
from train.parallel import LocalDevices
from train.steps import density_bits, example_keys

_MAX_TERMS = 1000
_MIN_DRAWS = 2  # the standard error pools the variances of all examples
_RECONSTRUCTED_AT_ONCE = 64


class Likelihood(NamedTuple):
    """Bits per dimension of a fixed set of examples.

    Attributes:
      bits_per_dim: mean over examples and draws.
      stderr: standard error of that mean, of probes and dequantisation, the examples fixed.
      sampling_stderr: spread over the examples, as a standard error of their mean.
      bias_bound: certified bound on the truncation bias of the log-determinants.
      num_terms: terms of the series; 0 for exact log-determinants.
      num_draws: independent draws of probes and dequantisation.
    """

    bits_per_dim: float
    stderr: float
    sampling_stderr: float
    bias_bound: float
    num_terms: int
    num_draws: int


class Reconstruction(NamedTuple):
    """Examples sent to latents and back.

    Attributes:
      x: what came back.
      max_error: largest absolute difference.
      steps_max: most branch evaluations that any block needed for any example.
      all_converged: whether every example met its tolerance in every block.
      residual_max: largest residual of a block's inverse.
      error_bound_max: largest certified error of a single block's inverse.
    """

    x: np.ndarray
    max_error: float
    steps_max: int
    all_converged: bool
    residual_max: float
    error_bound_max: float


def bias_bound(flow: Flow, lipschitz: Sequence[float], num_terms: int) -> float:
    """Certified bound on the truncation bias of a flow's log-determinant, in bits per dimension."""
    pairs = zip(lipschitz, flow.block_dims(), strict=True)
    nats = sum(float(truncation_error_bound(bound, dim, num_terms)) for bound, dim in pairs)
    return nats / (flow.dim * math.log(2.0))


def terms_for_bias(flow: Flow, lipschitz: Sequence[float], target: float) -> int:
    """The fewest terms whose certified bias is at most ``target`` bits/dim, 1000 at the most."""
    low, high = 0, _MAX_TERMS
    while high - low > 1:
        middle = (low + high) // 2
        if bias_bound(flow, lipschitz, middle) <= target:
            high = middle
        else:
            low = middle
    return high


def evaluate_likelihood(
    flow: Flow,
    examples: np.ndarray,
    num_levels: int | None,
    config: DensityConfig,
    lipschitz: Sequence[float],
    batch_size: int = 500,
) -> Likelihood:
    """Bits per dimension of ``examples`` under the flow.

    The series takes the terms that ``config.target_bias`` needs; draws are added until the standard
    error is below ``config.target_stderr``.

    Args:
      flow: the network.
      examples: integer images or points.
      num_levels: grey levels of images, None for points.
      config: of the run.
      lipschitz: rigorous bounds of the flow's blocks.
      batch_size: examples evaluated at once.
    """
    use_series = config.eval_estimator == "series"
    terms = terms_for_bias(flow, lipschitz, config.target_bias) if use_series else 0
    estimator = truncated_series(terms) if use_series else exact()
    noisy = use_series or num_levels is not None
    draws: list[np.ndarray] = []
    for draw in _draw_bits(flow, examples, num_levels, estimator, config.seed, batch_size):
        draws.append(draw)
        done = len(draws) >= _MIN_DRAWS and draw_stderr(np.stack(draws)) <= config.target_stderr
        if done or not noisy or len(draws) == config.max_draws:
            break
    bits = np.stack(draws)
    per_example = bits.mean(axis=0)
    return Likelihood(
        float(per_example.mean()),
        draw_stderr(bits) if noisy else 0.0,
        float(per_example.std(ddof=1) / math.sqrt(len(per_example))),
        bias_bound(flow, lipschitz, terms) if use_series else 0.0,
        terms,
        len(draws),
    )


def draw_stderr(bits: np.ndarray) -> float:
    """Standard error over draws of the mean of ``bits`` [draws, examples], the examples fixed."""
    num_draws, num_examples = bits.shape
    if num_draws < 2:
        return math.inf
    return float(np.sqrt(bits.var(axis=0, ddof=1).sum() / num_draws) / num_examples)


def reconstruct(functions: ModelFunctions, flow: Flow, x: np.ndarray) -> Reconstruction:
    """Send ``x`` (floats) through the network and back."""
    devices = LocalDevices()
    flow = devices.replicate(flow)
    outputs, infos = [], []
    with jax.default_matmul_precision("highest"):
        for batch, count in padded_batches(x, _RECONSTRUCTED_AT_ONCE, devices.count, fill=True):
            out, info = functions.there_and_back(flow, devices.split(batch))
            outputs.append(np.asarray(out)[:count])
            infos.append(jax.tree.map(lambda leaf, count=count: np.asarray(leaf)[:, :count], info))
    back = np.concatenate(outputs)
    return Reconstruction(
        back,
        float(np.abs(back - x).max()),
        int(max(info.num_steps.max() for info in infos)),
        bool(all(info.converged.all() for info in infos)),
        float(max(info.residual.max() for info in infos)),
        float(np.max([info.error_bound.max() for info in infos])),
    )


def _draw_bits(
    flow, examples, num_levels, estimator: Estimator, seed, batch_size
) -> Iterator[np.ndarray]:
    @jax.jit
    def bits(flow, batch, keys):
        return density_bits(flow, batch, num_levels, estimator, keys)

    devices = LocalDevices()
    flow = devices.replicate(flow)
    draw = 0
    while True:
        keys = example_keys(seed + 1_000_003, jnp.int32(draw), jnp.arange(len(examples)))
        parts = []
        with jax.default_matmul_precision("highest"):
            for start, (batch, count) in enumerate(
                padded_batches(examples, batch_size, devices.count)
            ):
                size = len(batch)
                indices = np.minimum(np.arange(size) + start * size, len(examples) - 1)
                out = bits(flow, devices.split(batch), devices.split(keys[indices]))
                parts.append(np.asarray(out)[:count])
        yield np.concatenate(parts).astype(np.float64)
        draw += 1


def padded_batches(
    x: np.ndarray, batch_size: int, multiple: int, *, fill: bool = False
) -> Iterator[tuple[np.ndarray, int]]:
    """Batches of one size, the last filled up with its last example, and how many count.

    The size is a multiple of ``multiple``; without ``fill``, no more than ``x`` needs.
    """
    size = batch_size if fill else min(batch_size, len(x))
    size = -(-size // multiple) * multiple
    for start in range(0, len(x), size):
        batch = x[start : start + size]
        count = len(batch)
        filling = np.repeat(batch[-1:], size - count, axis=0)
        yield np.concatenate([batch, filling]), count
