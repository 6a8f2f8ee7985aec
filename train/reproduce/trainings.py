"""The trained models that figures and tables share, each trained once and resumed if interrupted.

At smoke scale every image data set is scikit-learn's 8×8 digits.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax

from train import classification, density
from train.configs import CLASSIFICATION, DENSITY
from train.configs.base import ClassificationConfig, DensityConfig, TrainingConfig
from train.reproduce import coupling
from train.saved import SavedRun, load_run
from train.workdir import WorkdirError, prepare_workdir

#: Of the classifiers' first scale at cpu scale, padded ones included.
_CHANNELS = 8

Scale = Literal["smoke", "cpu", "paper"]


class Training(NamedTuple):
    """A finished run.

    Attributes:
      report: what its program reported.
      workdir: its folder.
    """

    report: dict[str, Any]
    workdir: Path

    def load(self, **changes: Any) -> SavedRun:
        """The run with its data; see :func:`train.saved.load_run`."""
        return load_run(self.workdir, "newest", **changes)


class Trainings(NamedTuple):
    """Where trained models are kept, and how large they are.

    Attributes:
      folder: with one folder a run.
      scale: "smoke", "cpu" or "paper".
      data_dir: where TFDS keeps its data sets; None: its own default.
    """

    folder: Path
    scale: Scale
    data_dir: Path | None = None

    def classifier(self, dataset: str, coeff: float | None, seed: int = 0) -> Training:
        """The classifier of a data set, trained unless it was; ``coeff`` None is vanilla."""
        name = "vanilla" if coeff is None else f"c{coeff:g}"
        config = dataclasses.replace(
            classifier_config(self.scale, dataset),
            coeff=coeff,
            **self._place(f"classifier-{dataset}-{name}", seed),
        )
        return _train(classification.run, config)

    def coupling(self, dataset: str, parameters: int, seed: int = 0) -> Training:
        """A coupling classifier of about so many parameters, trained as :meth:`classifier`."""
        place = self._place(f"coupling-{dataset}", seed)
        config = dataclasses.replace(classifier_config(self.scale, dataset), **place)
        return _train(lambda config: coupling.run(config, parameters), config)

    def density(self, dataset: str, seed: int = 0) -> Training:
        """The density model of a data set, images or points, trained unless it was."""
        config = dataclasses.replace(
            density_config(self.scale, dataset), **self._place(f"density-{dataset}", seed)
        )
        return _train(density.run, config)

    def _place(self, name: str, seed: int) -> dict[str, Any]:
        folder = self.folder / f"{name}-seed{seed}"
        return {"workdir": folder, "seed": seed, "data_dir": self.data_dir}


def classifier_config(scale: Scale, dataset: str) -> ClassificationConfig:
    """The classifier that a scale affords; its workdir and seed are still open."""
    if scale == "smoke":
        return CLASSIFICATION["digits"].smoke_variant()
    name = f"{dataset}-paper"
    published = CLASSIFICATION[name if name in CLASSIFICATION else dataset]
    if scale == "paper":
        return published
    return dataclasses.replace(
        published,
        padding=_CHANNELS - len(published.mean),
        depths=(2, 2, 2),
        features=(16, 32, 64),
        optimizer="nesterov",
        schedule="cosine",
        warmup_steps=50,
        steps=300,
        batch_size=64,
        ema_decay=0.98,
        validate_every=300,
        checkpoint_every=300,
        num_reconstructed=64,
        inverse_max_steps=100,
    )


def density_config(scale: Scale, dataset: str) -> DensityConfig:
    """The density model that a scale affords; its workdir and seed are still open."""
    is_image = dataset in ("mnist", "cifar10")
    if scale == "smoke":
        config = DENSITY["digits" if is_image else dataset].smoke_variant()
        return dataclasses.replace(config, features=(16, 16)) if not is_image else config
    if scale == "paper":
        return DENSITY[f"{dataset}-paper"]
    if not is_image:
        return dataclasses.replace(DENSITY[dataset], steps=1500)
    scales = len(DENSITY[dataset].depths)
    return dataclasses.replace(
        DENSITY[dataset],
        depths=(3,) * scales,
        features=(32,) * scales,
        domain="logit",
        augment=False,
        power_steps=1,
        optimizer="adamw",
        schedule="cosine",
        learning_rate=4e-3,
        warmup_steps=50,
        steps=1000 if dataset == "mnist" else 500,
        batch_size=64,
        ema_decay=0.99,
        validate_every=250,
        picture_every=None,
        checkpoint_every=250,
        target_bias=5e-3,
        target_stderr=5e-3,
        max_draws=2,
        num_reconstructed=64,
    )


def _train(program: Callable[[Any], dict[str, Any]], config: TrainingConfig) -> Training:
    """The report of a finished run in the config's workdir; else train, or resume.

    Raises:
      KeyboardInterrupt: where Ctrl-C ended the training before its last step.
      WorkdirError: where the folder cannot be written, or holds a run of another config.
    """
    try:
        prepare_workdir(config)
    except WorkdirError as error:
        raise WorkdirError(
            f"{config.workdir} is in the way: delete it, or choose another --workdir. {error}"
        ) from error
    path = config.workdir / "report.json"
    report = json.loads(path.read_text()) if path.is_file() else {"interrupted": True}
    if report["interrupted"]:
        report = program(config)
        jax.clear_caches()  # of twenty trainings, compiled programs exhaust the memory mappings
    if report["interrupted"]:
        raise KeyboardInterrupt
    return Training(report, config.workdir)
