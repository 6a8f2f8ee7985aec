"""Experiments by name: ``--config`` selects one, or ``--dataset`` where that is not given."""

from train.configs.base import TrainingConfig, find_config
from train.configs.classification import CLASSIFICATION, ClassificationConfig
from train.configs.density import DENSITY, DensityConfig

__all__ = [
    "CLASSIFICATION",
    "DENSITY",
    "ClassificationConfig",
    "DensityConfig",
    "TrainingConfig",
    "find_config",
]
