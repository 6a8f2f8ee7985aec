"""Experiments by name: ``--config`` selects one, or ``--dataset`` where that is not given."""

from train.configs.base import TrainingConfig, find_config
from train.configs.classification import CLASSIFICATION, ClassificationConfig
from train.configs.density import DENSITY, DensityConfig
from train.configs.hybrid import HYBRID, HybridConfig

__all__ = [
    "CLASSIFICATION",
    "DENSITY",
    "HYBRID",
    "ClassificationConfig",
    "DensityConfig",
    "HybridConfig",
    "TrainingConfig",
    "find_config",
]
