"""The protocol of a program: data, model, loss, validation, evaluation, report."""

import abc
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, NamedTuple

import jax
import numpy as np

from iresnet_jax import Certificate, Flow
from iresnet_jax.nn import FlowModel, num_parameters
from train import figures
from train.configs.base import Config
from train.data import Dataset, load_dataset
from train.evaluation import Reconstruction, reconstruct
from train.metrics import MetricsLog
from train.networks import ModelFunctions, training_model
from train.output import optionally
from train.page import Page, write_page
from train.page_verdict import stopped
from train.steps import Metrics, TrainState
from train.terminal import tell
from train.workdir import write_json

_INVERTED = 64

Report = dict[str, Any]
#: (path, function of a path and more, more): see :meth:`Task.conclude`.
Picture = tuple[Any, ...]


class Shipped(NamedTuple):
    """The network that a run ships, and how it inverts the test set.

    Attributes:
      flow: the network, with its bounds attached.
      certificate: its certificate.
      test: test examples as the network takes them.
      back: their reconstructions.
    """

    flow: Flow
    certificate: Certificate
    test: np.ndarray
    back: Reconstruction


class Task(abc.ABC, Generic[Config]):
    """What a program trains; :func:`train.programs.register` makes a subclass a program.

    Attributes:
      experiments: configs by name; the first is the default.
      purpose: what the program does, in a few words.
      shown_metrics: the further metrics of its loss that the terminal shows.
      shown_at_validation: what its validation finds beside a score, and the terminal shows.
      with_labels: whether a batch is (examples, labels), or examples alone.
      best: whether the best validation score is the smallest or the largest.
      loss_name: name of the loss in the terminal.
      curve_metric: the metric in the picture of the training curve.
      curve_name: its name there; the validation score and the test set's bits are drawn beside one
        that begins with "bits".
      config: the settings.
      dataset: the data.
      model: the model, untrained, for evaluation.
      training_model: the model as a mapped training step applies it.

    Args:
      config: the settings.
      dataset: the data; those that the config names by default.
      model: the model; the one that the config describes by default.
    """

    experiments: ClassVar[Mapping[str, Any]]
    purpose: ClassVar[str]
    with_labels: ClassVar[bool] = False
    shown_metrics: ClassVar[tuple[str, ...]] = ()
    shown_at_validation: ClassVar[tuple[str, ...]] = ()
    best: ClassVar[Literal["min", "max"]] = "min"
    loss_name: str = "loss"
    curve_metric: ClassVar[str] = "loss"
    curve_name: str = "loss"

    def __init__(
        self, config: Config, dataset: Dataset | None = None, model: FlowModel | None = None
    ):
        self.config = config
        self.dataset = self.load(config) if dataset is None else dataset
        self.model: Any = self.build_model() if model is None else model
        self.training_model: Any = training_model(self.model, config)

    # Data

    @classmethod
    def load(cls, config: Config) -> Dataset:
        """Load the data set that a config names.

        Raises:
          ValueError: if it cannot be read, or does not fit the settings.
        """
        tell(f"Reading {config.dataset} …")
        return load_dataset(
            config.dataset,
            data_dir=config.data_dir,
            max_examples=config.max_examples,
            margin=config.pixels_added,
        )

    @abc.abstractmethod
    def inputs(self, examples: np.ndarray) -> np.ndarray:
        """Return examples as the network takes them, with one fixed draw of any noise."""

    def shown(self, x: np.ndarray) -> np.ndarray:
        """Return the network's inputs or reconstructions as images in [0, 1]."""
        return np.clip(x, 0.0, 1.0)

    # Training

    @abc.abstractmethod
    def build_model(self) -> FlowModel:
        """Build the untrained model for the data set."""

    def init(self, key: jax.Array, x: jax.Array) -> dict[str, Any]:
        """Initialise the variables; parameters beside the model's go into "params" too."""
        return self.model.init(key, x)

    @abc.abstractmethod
    def loss(
        self, variables: Any, batch: Any, keys: jax.Array
    ) -> tuple[jax.Array, dict[str, Any], Metrics]:
        """Compute the loss on one device's part of a batch, to be differentiated by the parameters.

        Args:
          variables: the parameters and all other collections.
          batch: examples, or (examples, labels).
          keys: one per example.

        Returns:
          The mean loss, the changed collections, and further metrics.
        """

    def devices(self) -> Sequence[jax.Device] | None:
        """Return the devices to map a step over; None: all."""
        return None

    # Validation

    @cached_property
    def functions(self) -> ModelFunctions:
        """The model's compiled functions."""
        return ModelFunctions(self.model, self.config)

    def validate(self, state: TrainState) -> dict[str, float]:
        """Evaluate the averaged parameters; "validation" ranks checkpoints."""
        variables = self.functions.converge(state.averaged_variables)
        back = self._reconstruct_few(variables)
        found = {
            "validation": self.score(variables),
            **self.functions.norm_metrics(state.variables),
            "inverse_residual": back.residual_max,
        }
        return found | self.validate_further(variables, found)

    def validate_further(self, variables: Any, found: dict[str, float]) -> dict[str, float]:
        """Return what a task finds beside a score; power iterations have converged."""
        return {}

    @abc.abstractmethod
    def score(self, variables: Any) -> float:
        """Return the score of these variables on the validation set."""

    def pictures(self, state: TrainState) -> dict[str, np.ndarray]:
        """Return pictures [height, width, channels] for TensorBoard, by name."""
        if not self.dataset.is_image:
            return {}
        grid = optionally("The picture of reconstructions", self._picture_few, state)
        return {} if grid is None else {"reconstructions": grid}

    def _picture_few(self, state: TrainState) -> np.ndarray:
        back = self._reconstruct_few(self.functions.converge(state.averaged_variables))
        pairs = self.shown(np.concatenate([self._few[:16], back.x[:16]]))
        return figures.in_colours(figures.image_grid(pairs, 16))

    @cached_property
    def _few(self) -> np.ndarray:
        return self.inputs(self.dataset.validation[:_INVERTED])

    def _reconstruct_few(self, variables: Any) -> Reconstruction:
        return reconstruct(self.functions, self.functions.invertible(variables), self._few)

    # Evaluation

    @abc.abstractmethod
    def evaluate(self, state: TrainState, folder: Path) -> Report:
        """Evaluate a state on the test set; also write its certificate and pictures.

        The numbers are to be safe before anything is drawn: see :meth:`conclude`.
        """

    def conclude(self, folder: Path, report: Report, *pictures: Picture) -> Report:
        """Write the numbers to evaluation.json, then draw; return the report.

        A picture (path, draw, arguments) is drawn by ``draw(path, *arguments)``. One that fails
        costs a line in the terminal, and nothing else. Names of those that were drawn are added to
        the report as ``pictures``: a file of another name there is of an earlier evaluation.
        """
        write_json(folder / "evaluation.json", report)
        drawn = [optionally(f"The picture {path}", _drawn, path, *rest) for path, *rest in pictures]
        names = [name for name in drawn if name is not None]
        return report | {"pictures": names} if names else report

    def ship(self, variables: Any, folder: Path) -> Shipped:
        """Certify the network of these variables, write the certificate, invert the test set."""
        tell(f"Certifying the network of {num_parameters(variables):,} parameters …")
        flow, certificate = self.functions.certified_flow(variables)
        write_json(folder / "certificate.json", certificate.as_dict())
        test = self.inputs(self.dataset.test[: self.config.num_reconstructed])
        tell(f"Mapping {len(test):,} test examples to latents and back …")
        back = reconstruct(self.functions, flow, test, in_double=True)
        back.report["block_lipschitz_max"] = float(np.max(certificate.lipschitz))
        back.report["certified"] = certificate.certified
        return Shipped(flow, certificate, test, back)

    @abc.abstractmethod
    def rows(self, report: Report) -> list[tuple[str, str]]:
        """Return rows (what, value) of the final table, beside those on the inverse."""

    def write_page(self, folder: Path, report: Report, records: Sequence[Any]) -> None:
        """Write report.html beside what was evaluated into a folder; one that fails costs a line.

        ``records`` are those of :meth:`train.metrics.MetricsLog.records`.
        """
        optionally(f"The page {folder / 'report.html'}", self._write_page, folder, report, records)

    def _write_page(self, folder: Path, report: Report, records: Sequence[Any]) -> None:
        path = folder / "certificate.json"
        certified = "certified" in report  # or not: in both cases there is a certificate
        page = Page(
            self.config,
            report,
            [] if stopped(report) else self.rows(report),
            records,
            json.loads(path.read_text(encoding="utf-8")) if certified else None,
            folder,
            what="images" if self.dataset.is_image else "points",
            curve_metric=self.curve_metric,
            curve_name=self.curve_name,
        )
        write_page(folder / "report.html", page)

    def draw_curve(self, path: Path, log: MetricsLog, report: Report) -> None:
        """Draw the loss over training steps; a picture that fails costs a line."""
        nothing = np.array([])
        values = *log.series(self.curve_metric), nothing, nothing, self.curve_name
        optionally(f"The picture {path}", figures.training_curve, path, *values)


def _drawn(path: Path, draw: Callable[..., Any], *arguments: Any) -> str:
    draw(path, *arguments)
    return path.name
