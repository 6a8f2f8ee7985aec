"""The likelihood of a test set, with a certified bias and an estimated standard error."""

import math
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from iresnet_jax import BoundedSeries, Certificate, Estimator, Exact, Flow
from train.configs.density import DensityConfig
from train.estimators import bias_bound, description, evaluation_estimator, terms_taken
from train.evaluation import padded_batches
from train.parallel import LocalDevices, devices_for_determinants
from train.progress import LikelihoodProgress
from train.steps import example_keys

_EXAMPLES_AT_ONCE = 500
_JACOBIAN_ENTRIES_AT_ONCE = 2_000_000
_DEGREES_OF_FREEDOM = 100

#: (network, examples, estimator, one key per example) -> bits per dimension of each.
Bits = Callable[[Flow, Any, Estimator, jax.Array], jax.Array]


class Likelihood(NamedTuple):
    """Bits per dimension of a fixed set of examples.

    For images it is an upper bound, in expectation over the dequantisation, on the bits of the
    discrete data. With importance weights, log p is bounded by the mean over groups of K draws of
    log(1/K Σ p(x + u_k)), per example: a tighter bound (Burda et al. 2016; Ho et al. 2019).

    Attributes:
      bits_per_dim: mean over examples and draws.
      stderr: its standard error over probes and dequantisation, with the examples fixed.
      sampling_stderr: standard error of the mean over examples; infinite for a single one.
      num_draws: number of independent draws of probes and dequantisation.
      estimator: of the log-determinants.
      terms: of the series, of each branch.
      description: of how log-determinants were estimated.
      bias_bound: certified bound on its bias, in bits per dimension.
      importance_weighted: mean over examples and groups, or None.
      importance_weighted_stderr: its standard error, with the examples fixed, or None.
    """

    bits_per_dim: float
    stderr: float
    sampling_stderr: float
    num_draws: int
    estimator: Estimator
    terms: list[int]
    description: str
    bias_bound: float
    importance_weighted: float | None = None
    importance_weighted_stderr: float | None = None

    def report(self, config: DensityConfig) -> dict[str, Any]:
        """Return its part of the report."""
        report: dict[str, Any] = {
            "bits_per_dim": self.bits_per_dim,
            "bits_per_dim_stderr": self.stderr,
            "bits_per_dim_target_stderr": config.target_stderr,
            "bits_per_dim_bias_bound": self.bias_bound,
            "bits_per_dim_target_bias": config.target_bias,
            "bits_per_dim_sampling_stderr": self.sampling_stderr,
            "bits_per_dim_estimator": config.eval_estimator,
            "log_det_terms": self.terms,
            "log_det_continuation": getattr(self.estimator, "continuation", 0.0),
            "log_det_description": self.description,
            "likelihood_draws": self.num_draws,
        }
        if self.importance_weighted is not None:
            report |= {
                "bits_per_dim_importance_weighted": self.importance_weighted,
                "bits_per_dim_importance_weighted_stderr": self.importance_weighted_stderr,
                "importance_samples": config.importance_samples,
            }
        return report


def evaluate_likelihood(
    bits_of: Bits,
    flow: Flow,
    examples: np.ndarray,
    config: DensityConfig,
    certificate: Certificate,
    *,
    noisy: bool,
) -> Likelihood:
    """Estimate bits per dimension of ``examples`` under the flow, with a live display.

    The numbers of terms follow from the network's certificate. draws are added until
    the standard error reaches ``config.target_stderr`` (see :func:`draws_needed`), or there are
    ``config.max_draws``. ``noisy`` says whether ``bits_of`` draws noise beside the estimator's.

    Raises:
      ValueError: as :func:`evaluation_estimator`.
    """
    noisy = noisy or config.eval_estimator != "exact"
    bits = np.zeros((0, len(examples)))
    needed = _draws_to_make(bits, config, noisy)
    targets = {"target_stderr": config.target_stderr, "target_bias": config.target_bias}
    with LikelihoodProgress(f"{config.dataset}, test set", needed, **targets) as progress:
        estimator = evaluation_estimator(config, certificate, flow.dim)
        bias, told = (
            bias_bound(certificate, estimator, flow.dim),
            description(certificate, estimator),
        )
        progress.choose(told, bias)
        if isinstance(estimator, BoundedSeries):
            flow = flow.with_bounds(certificate)
        parts_of = _draw_function(bits_of, flow, examples, estimator, config.seed)
        while len(bits) < needed:
            draw = np.zeros(0)
            for part in parts_of(len(bits)):
                draw = np.concatenate([draw, part])
                if len(draw) < len(examples):
                    progress.update(len(bits) + len(draw) / len(examples), needed)
            bits = np.concatenate([bits, draw[None]])
            stderr = draw_stderr(bits) if noisy else 0.0
            needed = _draws_to_make(bits, config, noisy)
            progress.update(len(bits), needed, value=float(bits.mean()), stderr=stderr)
    spread, draws = _sampling_stderr(bits), len(bits)
    terms = terms_taken(certificate, estimator)
    likelihood = Likelihood(float(bits.mean()), stderr, spread, draws, estimator, terms, told, bias)
    if config.importance_samples == 1:
        return likelihood
    weighted = importance_weighted_bits(bits, flow.dim, config.importance_samples)
    found = float(weighted.mean()), draw_stderr(weighted)
    return likelihood._replace(importance_weighted=found[0], importance_weighted_stderr=found[1])


def draw_stderr(bits: np.ndarray) -> float:
    """Return the standard error of the mean of ``bits`` [draws, examples], examples fixed.

    It is √(Σᵢ sᵢ²/m)/n with sᵢ² the variance of example i over its m draws, which are independent
    of those of the others; infinite for a single draw.
    """
    num_draws, num_examples = bits.shape
    if num_draws < 2:
        return math.inf
    return float(np.sqrt(bits.var(axis=0, ddof=1).sum() / num_draws) / num_examples)


def draws_needed(bits: np.ndarray, target: float) -> int:
    """Estimate from ``bits`` [draws, examples] how many draws bring the s.e. to ``target``.

    Stopping at the first standard error below a target favours those that are too low by chance.
    Its square has up to n(m − 1) degrees of freedom with n examples and m draws; with at least 100,
    its own relative error is 7% at equal variances. So two draws suffice for 100 examples or more,
    and a single example takes 101. Where ``bits`` are not finite, more draws would not help.
    """
    num_draws, num_examples = bits.shape
    least = max(2, 1 + math.ceil(_DEGREES_OF_FREEDOM / num_examples))
    if num_draws < least:
        return least
    stderr = draw_stderr(bits)
    if not math.isfinite(stderr):
        return num_draws
    ratio = stderr / target
    needed = num_draws * ratio * ratio  # infinite, where ratio**2 would raise
    return max(least, math.ceil(needed)) if math.isfinite(needed) else sys.maxsize


def importance_weighted_bits(bits: np.ndarray, dim: int, samples: int) -> np.ndarray:
    """Compute −log₂(1/K Σ_k p(x + u_k)) per dimension, from −log₂ p(x + u_k) per dimension.

    K = ``samples`` consecutive draws of ``bits`` [draws, examples] make a group; an incomplete last
    group is left out. Log-determinants must be exact: noise in them would raise the mean of p, and
    with it the likelihood.
    """
    groups = bits[: len(bits) // samples * samples].reshape(-1, samples, bits.shape[1])
    log_probs = -groups * (dim * math.log(2.0))
    log_mean = np.logaddexp.reduce(log_probs, axis=1) - math.log(samples)
    return -log_mean / (dim * math.log(2.0))


def _draws_to_make(bits: np.ndarray, config: DensityConfig, noisy: bool) -> int:
    """Return the draws to make in all: whole groups of importance samples, at least two."""
    if not noisy:
        return 1
    group = config.importance_samples
    needed = max(draws_needed(bits, config.target_stderr), 2 * group)
    return min(-(-needed // group), config.max_draws // group) * group


def _sampling_stderr(bits: np.ndarray) -> float:
    per_example = bits.mean(axis=0)
    if len(per_example) < 2:
        return math.inf
    return float(per_example.std(ddof=1) / math.sqrt(len(per_example)))


def examples_at_once(estimator: Estimator, dim: int) -> int:
    """Return how many examples share a batch: fewer where each has its full Jacobian."""
    if not isinstance(estimator, Exact):
        return _EXAMPLES_AT_ONCE
    return max(1, min(_EXAMPLES_AT_ONCE, _JACOBIAN_ENTRIES_AT_ONCE // dim**2))


def _draw_function(
    bits_of: Bits, flow: Flow, examples: np.ndarray, estimator: Estimator, seed: int
) -> Callable[[int], Iterator[np.ndarray]]:
    """Return draw -> bits per dimension of the examples, batch by batch, in float64."""
    bits = jax.jit(lambda flow, batch, keys: bits_of(flow, batch, estimator, keys))
    devices, at_once = LocalDevices(), examples_at_once(estimator, flow.dim)
    if isinstance(estimator, Exact):
        devices = LocalDevices(devices_for_determinants(flow.dim))
    flow = devices.replicate(flow)

    def parts_of(draw: int) -> Iterator[np.ndarray]:
        keys = example_keys(seed + 1_000_003, jnp.int32(draw), jnp.arange(len(examples)))
        start = 0
        for batch, count in padded_batches(examples, at_once, devices.count):
            indices = np.minimum(start + np.arange(len(batch)), len(examples) - 1)
            with jax.default_matmul_precision("highest"):
                out = bits(flow, devices.split(batch), devices.split(keys[indices]))
            yield np.asarray(out, np.float64)[:count]
            start += count

    return parts_of
