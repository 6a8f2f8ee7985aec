"""Estimators of log-determinants, as a config asks for them, and their certified bias."""

import math

import numpy as np

from iresnet_jax import (
    BoundedSeries,
    Certificate,
    Estimator,
    Exact,
    Roulette,
    TruncatedSeries,
)
from train.configs.density import DensityConfig
from train.data import Dataset

MAX_TERMS = 1000
_EXACT_UP_TO_DIM = 128
_ROULETTE_TERMS = 20  # those of Chen et al. 2019 in evaluation
_VALIDATION_CONTINUATION = 0.8
_CONTINUATION_RANGE = (0.5, 0.9999)
_CONVOLUTIONS = 3


def evaluation_estimator(config: DensityConfig, certificate: Certificate, dim: int) -> Estimator:
    """Return the estimator for evaluation, by the certificate of a network on ``dim`` dimensions.

    The series takes in each block the fewest terms that its bound needs to keep the sum of all
    biases within ``config.target_bias``, at most 1000. The roulette continues with probability L,
    the largest of the blocks', at least ½. Then no weighted term of any block exceeds its
    unweighted bound.

    Raises:
      ValueError: for the roulette on a block that is not certified to be a contraction.
    """
    if config.eval_estimator == "series":
        log_dets = sum(branch.log_dets for branch in certificate.branches)
        allowed = config.target_bias * dim * math.log(2.0) / log_dets
        return BoundedSeries(allowed * (1.0 - 1e-9), MAX_TERMS)
    if config.eval_estimator == "roulette":
        largest = float(np.max(certificate.lipschitz))  # NaN wherever one is
        continuation = _continuation(largest)
        return Roulette(continuation, lipschitz=largest, min_terms=_ROULETTE_TERMS)
    return Exact()


def training_estimator(config: DensityConfig, dataset: Dataset) -> Estimator:
    """Return the estimator for a training step.

    The roulette continues as it is told to; by default with probability L, of the branch whose
    layers have norm coeff. Power iteration lets norms exceed coeff during training, so nothing is
    certified, not even a finite variance.
    """
    if config.train_estimator == "series":
        return TruncatedSeries(config.num_terms)
    if config.train_estimator == "roulette":
        return Roulette(
            config.continuation or _continuation(_lipschitz(config, dataset, config.coeff or 1.0)),
            lipschitz=None,
            min_terms=config.num_terms,
            shared_length=config.shared_length,
        )
    return Exact()


def validation_estimator(config: DensityConfig, dataset: Dataset) -> Estimator:
    """Return the estimator for the validation score, without bias.

    The roulette continues with probability L where that is more than 0.8, so that the variance is
    finite as far as the layers' norms are coeff.
    """
    if dataset.dim <= _EXACT_UP_TO_DIM:
        return Exact()
    lipschitz = _lipschitz(config, dataset, config.coeff or 1.0)
    continuation = max(_VALIDATION_CONTINUATION, _continuation(lipschitz))
    return Roulette(continuation, lipschitz=None, min_terms=_ROULETTE_TERMS)


def training_bias_bound(config: DensityConfig, dataset: Dataset, sigma: float) -> float:
    """Bound the bias of the loss in training, in bits per dimension, for layers of norm ``sigma``.

    A network whose norms are estimated, and lag, is bounded as far as these are: nothing is proved.
    """
    lipschitz = _lipschitz(config, dataset, max(sigma, config.coeff or 1.0))
    if not lipschitz < 1.0:
        return math.inf
    log_dets = sum(config.depths) * (2 if config.block == "monotone" else 1)
    nats = training_estimator(config, dataset).bias_bound(lipschitz, dataset.dim)
    return log_dets * nats / (dataset.dim * math.log(2.0))


def bias_bound(certificate: Certificate, estimator: Estimator, dim: int) -> float:
    """Bound the bias of a network's log-determinant rigorously, in bits per dimension."""
    return certificate.bias_bound(estimator) / (dim * math.log(2.0))


def terms_taken(certificate: Certificate, estimator: Estimator) -> list[int]:
    """Return the terms that each branch takes, or that the roulette always takes; none if exact."""
    if isinstance(estimator, BoundedSeries):
        branches = certificate.branches
        return [int(estimator.num_terms(branch.lipschitz, branch.dim)) for branch in branches]
    terms = getattr(estimator, "num_terms", getattr(estimator, "min_terms", 0))
    return [terms] * len(certificate.branches) if terms else []


def description(certificate: Certificate, estimator: Estimator) -> str:
    """Say in a few words how a network's log-determinants are estimated."""
    if not isinstance(estimator, BoundedSeries):
        return estimator.describe()
    few, *_, many = sorted(terms_taken(certificate, estimator) * 2)
    return f"{few} terms" if few == many else f"{few} to {many} terms a block"


def _lipschitz(config: DensityConfig, dataset: Dataset, norm: float) -> float:
    """L of a branch, by the norm of its layers, or of itself where it is normalised as a whole.

    A dense concatenation keeps its input, so that its own L comes up to 1 (or to ``norm`` beyond);
    what is left is the last layer's.
    """
    if config.branch.startswith("monlip"):
        return config.coeff or 1.0
    if config.branch == "concatenation":
        return norm
    return norm ** (_CONVOLUTIONS if dataset.is_image else len(config.features) + 1)


def _continuation(lipschitz: float) -> float:
    low, high = _CONTINUATION_RANGE
    return min(max(lipschitz, low), high)
