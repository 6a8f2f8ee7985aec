"""Trained models that figures and tables share, each trained once and resumed if interrupted.

At smoke scale every image data set is scikit-learn's 8×8 digits.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from iresnet_jax import Flow
from paper.coupling import Coupling
from train.classification import Classification
from train.configs import (
    CLASSIFICATION,
    DENSITY,
    ClassificationConfig,
    DensityConfig,
    TrainingConfig,
)
from train.data import Dataset
from train.density import Density
from train.networks import ModelFunctions
from train.saved import load_run
from train.task import Task
from train.training import run
from train.workdir import WorkdirError, prepare_workdir

Scale = Literal["smoke", "cpu", "paper"]

_ON_TWO_CORES: dict[str, Any] = {
    "optimizer": "nesterov",
    "schedule": "cosine",
    "warmup_steps": 50,
    "batch_size": 64,
    "num_reconstructed": 64,
}


class Network(NamedTuple):
    """A shipped network, its data, and ``x``, the test examples as it takes them."""

    flow: Flow
    dataset: Dataset
    x: np.ndarray
    config: Any
    functions: ModelFunctions


class Training(NamedTuple):
    """A finished run: its report and its folder."""

    report: dict[str, Any]
    workdir: Path

    def network(self, count: int | None = None) -> Network:
        """Load the network, and ``count`` examples of each split; all by default."""
        fewer = {} if count is None else {"max_examples": count}
        task, config, dataset, functions, state = load_run(self.workdir, "newest", **fewer)
        flow, _ = functions.shipped_flow(state)
        return Network(flow, dataset, task.inputs(dataset.test), config, functions)


class Trainings(NamedTuple):
    """The trained models of a scale, in one folder, named by the data that they were trained on.

    At scale smoke all images are digits, so that several data sets have one model.
    """

    folder: Path
    scale: Scale
    data_dir: Path | None = None

    def classifier(self, dataset: str, coeff: float | None, seed: int = 0) -> Training:
        """Train a data set's classifier, unless it is trained; ``coeff`` None is vanilla."""
        name = "vanilla" if coeff is None else f"c{coeff:g}"
        config = dataclasses.replace(classifier_config(self.scale, dataset), coeff=coeff)
        return self._train(Classification, config, f"classifier-{config.dataset}-{name}", seed)

    def coupling(self, dataset: str, parameters: int, seed: int = 0) -> Training:
        """Train a coupling classifier of about so many parameters, as in :meth:`classifier`."""
        config = classifier_config(self.scale, dataset)
        return self._train(
            lambda config: Coupling(config, parameters), config, f"coupling-{dataset}", seed
        )

    def density(self, dataset: str, seed: int = 0) -> Training:
        """Train the density model of a data set, images or points, unless it is trained."""
        config = density_config(self.scale, dataset)
        return self.density_of(config, f"density-{config.dataset}", seed)

    def density_of(self, config: DensityConfig, name: str, seed: int = 0) -> Training:
        """Train a density model by its config, unless it is trained under this name."""
        return self._train(Density, config, name, seed)

    def _train(
        self,
        task: Callable[[Any], Task],
        config: TrainingConfig,
        name: str,
        seed: int,
    ) -> Training:
        """Read the report of a finished run; otherwise train, or resume.

        Raises:
          KeyboardInterrupt: where Ctrl-C ended the training before its last step.
          WorkdirError: where the folder cannot be written, or holds a run of another config.
        """
        workdir = self.folder / f"{name}-seed{seed}"
        config = dataclasses.replace(config, workdir=workdir, seed=seed, data_dir=self.data_dir)
        try:
            prepare_workdir(config)
        except WorkdirError as error:
            raise WorkdirError(
                f"{workdir} is in the way: delete it, or choose another --workdir. {error}"
            ) from error
        path = workdir / "report.json"
        report = json.loads(path.read_text()) if path.is_file() else {"interrupted": True}
        if report["interrupted"] or report.get("steps", config.steps) < config.steps:
            report = run(task(config))
            jax.clear_caches()  # the programs of twenty trainings exhaust the memory mappings
        if report["interrupted"]:
            raise KeyboardInterrupt
        return Training(report, workdir)


def classifier_config(scale: Scale, dataset: str) -> ClassificationConfig:
    """Return the classifier's config at a scale; workdir and seed are still open."""
    if scale == "smoke":
        return CLASSIFICATION["digits"].smoke_variant()
    published = CLASSIFICATION.get(f"{dataset}-paper") or CLASSIFICATION[dataset]
    if scale == "paper":
        return published
    return dataclasses.replace(
        published,
        padding=8 - len(published.mean),  # eight channels in the first scale
        depths=(2, 2, 2),
        features=(16, 32, 64),
        steps=300,
        ema_decay=0.98,
        validate_every=300,
        checkpoint_every=300,
        inverse_max_steps=100,
        **_ON_TWO_CORES,
    )


def density_config(scale: Scale, dataset: str) -> DensityConfig:
    """Return the density model's config at a scale; workdir and seed are still open."""
    is_image = dataset in ("mnist", "cifar10")
    if scale == "paper":
        return DENSITY[f"{dataset}-paper"]
    if not is_image:
        config = DENSITY[dataset]
        smoke = dataclasses.replace(config.smoke_variant(), features=(16, 16))
        return smoke if scale == "smoke" else dataclasses.replace(config, steps=1500)
    if scale == "smoke":
        return DENSITY["digits"].smoke_variant()
    scales = len(DENSITY[dataset].depths)
    own = {
        "depths": (3,) * scales,
        "features": (32,) * scales,
        "domain": "logit",
        "augment": False,
        "power_steps": 1,
        "optimizer": "adamw",
        "learning_rate": 4e-3,
        "steps": 1000 if dataset == "mnist" else 500,
        "ema_decay": 0.99,
        "validate_every": 250,
        "picture_every": None,
        "checkpoint_every": 250,
        "target_bias": 5e-3,
        "target_stderr": 5e-3,
        "max_draws": 2,
    }
    return dataclasses.replace(DENSITY[dataset], **(_ON_TWO_CORES | own))
