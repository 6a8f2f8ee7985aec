"""Experiments: what ``--dataset`` selects. One file each, with the result to expect."""

from train.configs import classification_digits, density_digits, density_points
from train.configs.base import ClassificationConfig, DensityConfig
from train.data import dataset_names, unknown_dataset

DENSITY: dict[str, DensityConfig] = {"digits": density_digits.CONFIG} | density_points.CONFIGS
CLASSIFICATION: dict[str, ClassificationConfig] = {"digits": classification_digits.CONFIG}


def density_config(dataset: str) -> DensityConfig:
    """The density experiment on a data set.

    Raises:
      ValueError: for an unknown data set, listing the known ones.
    """
    if dataset not in DENSITY:
        raise ValueError(unknown_dataset(dataset, dataset_names()))
    return DENSITY[dataset]


def classification_config(dataset: str) -> ClassificationConfig:
    """The classification experiment on a data set.

    Raises:
      ValueError: for a data set without labels or unknown, listing those that can be classified.
    """
    if dataset not in CLASSIFICATION:
        raise ValueError(unknown_dataset(dataset, CLASSIFICATION))
    return CLASSIFICATION[dataset]
