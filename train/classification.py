"""``python -m train classification``: invertible residual networks as classifiers."""

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from iresnet_jax.nn import (
    FlowModel,
    InvertibleClassifier,
    feature_moments,
    recalibrated,
)
from train import figures
from train.catalogue import PROGRAMS
from train.configs.classification import CLASSIFICATION, ClassificationConfig
from train.data import Dataset, refuse_odd_sides
from train.evaluation import padded_batches
from train.networks import model_options
from train.page_walk import draw_image_walk
from train.parallel import LocalDevices
from train.preprocessing import crop_and_flip, denormalize, normalize
from train.steps import Metrics, TrainState
from train.task import Report, Task

_CLASSIFIED_AT_ONCE = 500
# training images that give the head its statistics, at most
_RECALIBRATED_BY = 2000
_TWO_SIDED_95 = 1.959964


class Classification(Task[ClassificationConfig]):
    """Cross-entropy of a head on the features of an invertible network."""

    experiments: ClassVar[Mapping[str, Any]] = CLASSIFICATION
    purpose: ClassVar[str] = PROGRAMS["classification"].purpose
    with_labels = True
    shown_metrics = ("accuracy",)
    best = "max"
    curve_name = "cross-entropy (nats)"

    @classmethod
    def load(cls, config: ClassificationConfig) -> Dataset:
        dataset = super().load(config)
        if not dataset.is_image:
            raise ValueError(
                f"a classifier needs images and labels; {config.dataset!r} holds points "
                f"{list(dataset.example_shape)}, for python -m train density."
            )
        dataset.labels("train")
        channels = dataset.image_shape[-1]
        refuse_odd_sides(dataset, len(config.depths) - 1)
        for name in ("mean", "std"):
            if len(getattr(config, name)) not in (1, channels):
                raise ValueError(
                    f"{name} must be one number or one for each of {channels} channels; "
                    f"got {getattr(config, name)}."
                )
        return dataset

    def inputs(self, examples: np.ndarray) -> np.ndarray:
        return np.asarray(self.normalize(jnp.asarray(examples)))

    def normalize(self, images: jax.Array) -> jax.Array:
        """Normalise integer images for the network."""
        assert self.dataset.num_levels is not None
        return normalize(images, self.dataset.num_levels, self.config.mean, self.config.std)

    def denormalize(self, x: np.ndarray) -> np.ndarray:
        """Undo :meth:`normalize`; reconstructions may lie outside [0, 1]."""
        return np.asarray(denormalize(x, self.config.mean, self.config.std))

    def shown(self, x: np.ndarray) -> np.ndarray:
        return np.clip(np.nan_to_num(self.denormalize(x)), 0.0, 1.0)

    def build_model(self) -> FlowModel:
        return InvertibleClassifier(
            image_shape=self.dataset.image_shape,
            depths=self.config.depths,
            features=self.config.features,
            padding=self.config.padding,
            num_classes=self.dataset.num_classes,
            **model_options(self.config, images=True),
        )

    def loss(self, variables: Any, batch: Any, keys: jax.Array) -> tuple[jax.Array, dict, Metrics]:
        images, labels = batch
        images = crop_and_flip(images, keys) if self.config.augment else images
        logits, updates = self.training_model.apply(
            variables, self.normalize(images), train=True, mutable=["spectral", "batch_stats"]
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        accuracy = jnp.mean(jnp.argmax(logits, -1) == labels)
        return jnp.mean(losses), dict(updates), {"accuracy": accuracy}

    def score(self, variables: Any) -> float:
        predictions = self.classify(self.recalibrate(variables), self.dataset.validation)
        return float(np.mean(predictions == self.dataset.labels("validation")))

    def classify(self, variables: Any, images: np.ndarray) -> np.ndarray:
        """Predict the classes of integer images, in batches over this process's devices."""
        devices = LocalDevices()
        variables = devices.replicate(variables)
        parts = [
            np.asarray(self._predict(variables, devices.split(batch)))[:count]
            for batch, count in padded_batches(images, _CLASSIFIED_AT_ONCE, devices.count)
        ]
        return np.concatenate(parts)

    @cached_property
    def _predict(self) -> Callable[[Any, Any], jax.Array]:
        def predict(variables, images):
            logits = self.model.apply(variables, self.normalize(images))
            return jnp.argmax(jnp.asarray(logits), axis=-1)

        return jax.jit(predict)

    def recalibrate(self, variables: Any) -> Any:
        """Replace the head's statistics by those of the features under these variables.

        They are estimated without crops or flips, on images spread over the whole training set,
        which may be sorted by class.
        """
        train = self.dataset.train
        size = min(_CLASSIFIED_AT_ONCE, len(train))
        count = min(_RECALIBRATED_BY, len(train)) // size
        spread = np.arange(count * size) * len(train) // (count * size)
        batches = np.split(train[spread], count)
        return recalibrated(variables, (self._moments(variables, x) for x in batches))

    @cached_property
    def _moments(self) -> Callable[[Any, Any], Any]:
        return jax.jit(lambda v, images: feature_moments(self.model, v, self.normalize(images)))

    def evaluate(self, state: TrainState, folder: Path) -> Report:
        """Evaluate accuracy and inversion."""
        test, labels = self.dataset.test, self.dataset.labels("test")
        before = self.recalibrate(self.functions.converge(state.averaged_variables))
        variables = self.recalibrate(self.functions.shipped_variables(state))
        predictions = self.classify(variables, test)
        accuracy = float(np.mean(predictions == labels))
        shipped = self.ship(variables, folder)
        images, recovered = self.denormalize(shipped.test), self.denormalize(shipped.back.x)
        error = float(np.abs(recovered - images).max())
        report = {
            **accuracy_report(accuracy, len(test)),
            "accuracy_before_certification": float(np.mean(self.classify(before, test) == labels)),
            **shipped.back.report,
            "reconstruction_max_error": error,
        }
        back, classes = self.shown(shipped.back.x), predictions[: len(images)]
        picture = folder / "inversion.png", figures.classifier_inversion, images, back
        inverted = shipped.flow, shipped.back.latents, self.shown
        walk = folder / "walk.png", draw_image_walk, self.functions, *inverted
        return self.conclude(folder, report, (*picture, classes, error), walk)

    def rows(self, report: Report) -> list[tuple[str, str]]:
        before = f"{report['accuracy_before_certification']:.2%}"
        return [accuracy_row(report), ("before shrinking kernels to bounds", before)]


def accuracy_report(accuracy: float, count: int) -> Report:
    """Report an accuracy over ``count`` examples, with error bars by Wilson's score interval.

    ``accuracy_stderr`` is half of the interval at one standard error, √(p(1 − p)/n) where n is
    large. It stays above 0 where all examples are right, or none.
    """
    low, high = wilson_interval(accuracy, count, 1.0)
    return {
        "accuracy": accuracy,
        "accuracy_stderr": (high - low) / 2.0,
        "accuracy_interval_95": list(wilson_interval(accuracy, count, _TWO_SIDED_95)),
        "accuracy_examples": count,
    }


def accuracy_row(report: Report) -> tuple[str, str]:
    """Return the row of the final table on what :func:`accuracy_report` reports."""
    accuracy = f"{report['accuracy']:.2%} ± {report['accuracy_stderr']:.2%}"
    if interval := report.get("accuracy_interval_95"):
        accuracy += f" (95%: {interval[0]:.2%} to {interval[1]:.2%}, Wilson)"
    return "test accuracy", accuracy


def wilson_interval(share: float, count: int, z: float) -> tuple[float, float]:
    """Return Wilson's score interval (1927) of a proportion: all p with |share − p| ≤ z·s(p).

    s(p) = √(p(1 − p)/count) is the standard error at p, not at the share that was found.
    """
    middle = (share + z * z / (2 * count)) / (1.0 + z * z / count)
    spread = share * (1.0 - share) / count + z * z / (4 * count * count)
    half = z / (1.0 + z * z / count) * spread**0.5
    return max(0.0, middle - half), min(1.0, middle + half)
