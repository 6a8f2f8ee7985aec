"""Experiments, by name: what ``--config`` selects, or ``--dataset`` where that is not given."""

import dataclasses
import difflib
from collections.abc import Mapping

from train.configs import (
    classification_digits,
    classification_images,
    density_digits,
    density_images,
    density_points,
)
from train.configs.base import ClassificationConfig, DensityConfig
from train.data import unknown_dataset

DENSITY: dict[str, DensityConfig] = {
    "digits": density_digits.CONFIG,
    **density_points.CONFIGS,
    **density_images.CONFIGS,
}
CLASSIFICATION: dict[str, ClassificationConfig] = {
    "digits": classification_digits.CONFIG,
    **classification_images.CONFIGS,
}


def density_config(config: str | None, dataset: str | None) -> DensityConfig:
    """The density experiment of a name, or of a data set.

    Raises:
      ValueError: for an unknown one, listing those that are known.
    """
    return _find(DENSITY, config, dataset)


def classification_config(config: str | None, dataset: str | None) -> ClassificationConfig:
    """The classification experiment of a name, or of a data set.

    Raises:
      ValueError: for an unknown one, or a data set without labels, listing those that are known.
    """
    return _find(CLASSIFICATION, config, dataset)


def _find(experiments: Mapping, config: str | None, dataset: str | None):
    if config is not None:
        if config not in experiments:
            near = difflib.get_close_matches(config.lower(), experiments, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            names = ", ".join(experiments)
            raise ValueError(f"There is no config {config!r}.{hint} Known: {names}.")
        return experiments[config]
    name = dataset or "digits"
    if name.endswith(".npz"):
        return dataclasses.replace(experiments["npz"], dataset=name)
    if name not in experiments:
        known = {experiment.dataset: None for experiment in experiments.values()}
        raise ValueError(unknown_dataset(name, known))
    return experiments[name]
