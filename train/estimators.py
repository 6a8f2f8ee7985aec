"""Which estimator of the log-determinants a config asks for, and what is certified of it."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from iresnet_jax import (
    Estimator,
    Exact,
    Flow,
    Roulette,
    TruncatedSeries,
    truncation_error_bound,
)
from train.configs.density import DensityConfig, LogDetEstimator
from train.data import Dataset

MAX_TERMS = 1000
_EXACT_UP_TO_DIM, _VALIDATION_TERMS = 128, 20
_ROULETTE_TERMS = 20  # those of Chen et al. 2019 in evaluation
_CONTINUATION_RANGE = (0.5, 0.9999)
_CONVOLUTIONS = 3


class LogDet(NamedTuple):
    """How a network's log-determinants are evaluated.

    Attributes:
      name: "series", "roulette" or "exact".
      estimator: of the library.
      description: in a few words.
      num_terms: of the series; those that the roulette always takes; 0 for Exact.
      continuation: of the roulette, the probability of each further term; 0 without.
      bias_bound: certified bound on the truncation bias, in bits per dimension.
    """

    name: LogDetEstimator
    estimator: Estimator
    description: str
    num_terms: int = 0
    continuation: float = 0.0
    bias_bound: float = 0.0


#: Told of every number of terms that is tried, and of its bias bound in bits per dimension.
Tell = Callable[[int, float], None]


def evaluation_log_det(
    flow: Flow, config: DensityConfig, lipschitz: Sequence[float], tell: Tell | None = None
) -> LogDet:
    """The evaluation's estimator, by rigorous ``lipschitz`` bounds of the flow's blocks.

    The series takes the fewest terms whose certified bias meets ``config.target_bias``, 1000 at the
    most: the bias bound is that of the terms taken. The roulette goes on with probability L, the
    largest of the blocks', at least ½: no weighted term of any block then exceeds its unweighted
    bound.

    Raises:
      ValueError: for the roulette on a block that is not certified to be a contraction.
    """
    if config.eval_estimator == "series":
        terms = terms_for_bias(flow, lipschitz, config.target_bias, tell)
        bound = bias_bound(flow, lipschitz, terms)
        estimator = TruncatedSeries(terms)
        return LogDet("series", estimator, f"{terms} terms", terms, bias_bound=bound)
    if config.eval_estimator == "roulette":
        largest = float(np.max(lipschitz))  # NaN wherever one is
        continuation = _continuation(largest)
        estimator = Roulette(continuation, lipschitz=largest, min_terms=_ROULETTE_TERMS)
        further = continuation / (1.0 - continuation)
        told = f"roulette of {_ROULETTE_TERMS} + {further:.1f} terms on average"
        return LogDet("roulette", estimator, told, _ROULETTE_TERMS, continuation)
    return LogDet("exact", Exact(), "exact log-determinants")


def training_estimator(config: DensityConfig, dataset: Dataset) -> Estimator:
    """The estimator of a training step.

    The roulette goes on with the probability L that the layers' coeff amount to. Power iteration
    lets norms exceed coeff while they train, so that nothing is certified there, finite variance
    neither.
    """
    if config.train_estimator == "series":
        return TruncatedSeries(config.num_terms)
    if config.train_estimator == "roulette":
        layers = _CONVOLUTIONS if dataset.is_image else len(config.features) + 1
        continuation = _continuation((config.coeff or 1.0) ** layers)
        return Roulette(continuation, lipschitz=None, min_terms=config.num_terms)
    return Exact()


def validation_estimator(dataset: Dataset) -> Estimator:
    """The estimator of the validation score."""
    return Exact() if dataset.dim <= _EXACT_UP_TO_DIM else TruncatedSeries(_VALIDATION_TERMS)


def bias_bound(flow: Flow, lipschitz: Sequence[float], num_terms: int) -> float:
    """Certified bound on the truncation bias of a flow's log-determinant, in bits per dimension."""
    pairs = zip(lipschitz, flow.block_dims(), strict=True)
    nats = sum(float(truncation_error_bound(bound, dim, num_terms)) for bound, dim in pairs)
    return nats / (flow.dim * math.log(2.0))


def terms_for_bias(
    flow: Flow, lipschitz: Sequence[float], target: float, tell: Tell | None = None
) -> int:
    """The fewest terms whose certified bias is at most ``target`` bits/dim; 1000 if none are.

    They are doubled from 1 until the bias is met, then halved in between. ``tell`` hears of each
    number that is the largest so far, or meets the target with fewer: its bounds fall until one
    does.
    """

    def meets(terms: int) -> bool:
        bound = bias_bound(flow, lipschitz, terms)
        if tell and (terms > low or bound <= target):
            tell(terms, bound)
        return bound <= target

    low, high = 0, 1
    while high < MAX_TERMS and not meets(high):
        low, high = high, min(2 * high, MAX_TERMS)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if meets(middle) else (middle, high)
    return high


def _continuation(lipschitz: float) -> float:
    low, high = _CONTINUATION_RANGE
    return min(max(lipschitz, low), high)
