"""Estimators of log-determinants, as a config asks for them, and their certified bias."""

import math
from collections.abc import Callable

import numpy as np

from iresnet_jax import Certificate, Estimator, Exact, Roulette, TruncatedSeries
from train.configs.density import DensityConfig
from train.data import Dataset

MAX_TERMS = 1000
_EXACT_UP_TO_DIM, _VALIDATION_TERMS = 128, 20
_ROULETTE_TERMS = 20  # those of Chen et al. 2019 in evaluation
_CONTINUATION_RANGE = (0.5, 0.9999)
_CONVOLUTIONS = 3

#: Called with every number of terms that is tried, and its bias bound in bits per dimension.
Tell = Callable[[int, float], None]


def evaluation_estimator(
    config: DensityConfig, certificate: Certificate, dim: int, tell: Tell | None = None
) -> Estimator:
    """Return the estimator for evaluation, by the certificate of a network on ``dim`` dimensions.

    The series takes the fewest terms whose certified bias meets ``config.target_bias``, at most
    1000. The roulette continues with probability L, the largest of the blocks', at least ½. Then no
    weighted term of any block exceeds its unweighted bound.

    Raises:
      ValueError: for the roulette on a block that is not certified to be a contraction.
    """
    if config.eval_estimator == "series":
        return TruncatedSeries(terms_for_bias(certificate, dim, config.target_bias, tell))
    if config.eval_estimator == "roulette":
        largest = float(np.max(certificate.lipschitz))  # NaN wherever one is
        continuation = _continuation(largest)
        return Roulette(continuation, lipschitz=largest, min_terms=_ROULETTE_TERMS)
    return Exact()


def training_estimator(config: DensityConfig, dataset: Dataset) -> Estimator:
    """Return the estimator for a training step.

    The roulette continues with probability L, the product of the layers' coeff. Power iteration
    lets norms exceed coeff during training, so nothing is certified, not even a finite variance.
    """
    if config.train_estimator == "series":
        return TruncatedSeries(config.num_terms)
    if config.train_estimator == "roulette":
        layers = _CONVOLUTIONS if dataset.is_image else len(config.features) + 1
        continuation = _continuation((config.coeff or 1.0) ** layers)
        return Roulette(continuation, lipschitz=None, min_terms=config.num_terms)
    return Exact()


def validation_estimator(dataset: Dataset) -> Estimator:
    """Return the estimator for the validation score."""
    return Exact() if dataset.dim <= _EXACT_UP_TO_DIM else TruncatedSeries(_VALIDATION_TERMS)


def bias_bound(certificate: Certificate, estimator: Estimator, dim: int) -> float:
    """Bound the bias of a network's log-determinant rigorously, in bits per dimension."""
    return certificate.bias_bound(estimator) / (dim * math.log(2.0))


def terms_for_bias(
    certificate: Certificate, dim: int, target: float, tell: Tell | None = None
) -> int:
    """Find the fewest terms whose certified bias is at most ``target`` bits/dim, or 1000.

    The number is doubled from 1 until it meets the target, then bisected. ``tell`` is called with
    each number that is the largest so far, or meets the target with fewer terms: the bounds that it
    sees fall until one meets the target.
    """

    def meets(terms: int) -> bool:
        bound = bias_bound(certificate, TruncatedSeries(terms), dim)
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
