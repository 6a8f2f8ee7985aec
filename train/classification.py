"""``python -m train classification``: an invertible residual network as a classifier."""

import math
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from iresnet_jax import InvertibleClassifier, feature_moments, recalibrated
from train import figures
from train.configs.base import ClassificationConfig
from train.data import Dataset, load_dataset
from train.evaluation import padded_batches, reconstruct
from train.metrics import MetricsLog
from train.networks import ModelFunctions
from train.parallel import LocalDevices, is_primary
from train.progress import summary_table
from train.report import common_rows, inversion_report, run_report
from train.steps import TrainState, classification_step, denormalize, normalize
from train.training import train_model
from train.workdir import write_json

_INVERTED, _CLASSIFIED_AT_ONCE = 64, 500
# images whose features give the head its statistics, at most
_RECALIBRATED_BY = 2000


def build_model(config: ClassificationConfig, dataset: Dataset) -> InvertibleClassifier:
    """The untrained classifier for a data set."""
    return InvertibleClassifier(
        image_shape=dataset.image_shape,
        depths=config.depths,
        features=config.features,
        coeff=config.coeff,
        activation=config.activation,
        num_steps=config.power_steps,
        normalize=config.layer_normalize,
        padding=config.padding,
        num_classes=dataset.num_classes,
    )


def run(config: ClassificationConfig) -> dict[str, Any]:
    """Train, evaluate, invert the features, and write the report; returns it."""
    started = time.perf_counter()
    dataset = load(config)
    model = build_model(config, dataset)
    with train_model(
        model,
        config,
        dataset,
        first_batch=as_floats(config, dataset, dataset.train[:512]),
        step=classification_step(model, config, _num_levels(dataset)),
        with_labels=True,
        validation=lambda functions: _Validation(functions, config, dataset),
        best="max",
        loss_name="loss",
    ) as trained:
        if not is_primary():
            return {}
        result = evaluate(config, dataset, trained.functions, trained.result.state, trained.workdir)
        _draw_curve(trained.workdir, trained.log)
        report = {**result, **run_report(config, trained, time.perf_counter() - started)}
        write_json(trained.workdir / "report.json", report)
    path = config.workdir / "report.json"
    summary_table(f"{config.dataset}: {path}", [*accuracy_rows(report), *common_rows(report)])
    return report


def load(config: ClassificationConfig) -> Dataset:
    """The data set that a config names; it must have labels, and as many channels as ``mean``.

    Raises:
      ValueError: if it has not.
    """
    dataset = load_dataset(
        config.dataset,
        data_dir=config.data_dir,
        max_examples=config.max_examples,
        margin=config.margin,
    )
    dataset.labels("train")
    channels = dataset.image_shape[-1]
    for name in ("mean", "std"):
        if len(getattr(config, name)) not in (1, channels):
            raise ValueError(
                f"{name} must be one number or one for each of {channels} channels; "
                f"got {getattr(config, name)}."
            )
    return dataset


def evaluate(
    config: ClassificationConfig,
    dataset: Dataset,
    functions: ModelFunctions,
    state: TrainState,
    workdir: Path,
) -> dict[str, Any]:
    """Accuracy and inversion of a state on the test set, with a picture in a folder."""
    classify = Classify(functions, config, dataset)
    recalibrate = Recalibrate(functions, config, dataset)
    labels = dataset.labels("test")
    before = classify(recalibrate(functions.converge(state.averaged_variables)), dataset.test)
    variables = recalibrate(functions.shipped_variables(state))
    predictions = classify(variables, dataset.test)
    accuracy = float(np.mean(predictions == labels))
    flow, certificate = functions.certified_flow(variables)
    write_json(workdir / "certificate.json", certificate.as_dict())
    test = as_floats(config, dataset, dataset.test[: config.num_reconstructed])
    back = reconstruct(functions, flow, test, in_double=True)
    images, recovered = (np.asarray(denormalize(x, config)) for x in (test, back.x))
    back = back._replace(max_error=float(np.abs(recovered - images).max()))
    figures.classifier_inversion(
        workdir / "inversion.png",
        images,
        np.clip(np.nan_to_num(recovered), 0.0, 1.0),
        predictions[: len(test)],
        back.max_error,
    )
    return {
        "accuracy": accuracy,
        "accuracy_stderr": math.sqrt(accuracy * (1.0 - accuracy) / len(dataset.test)),
        "accuracy_before_certification": float(np.mean(before == labels)),
        **inversion_report(back, certificate),
    }


def network_images(config: ClassificationConfig, dataset: Dataset, images: np.ndarray):
    """Integer images as the network takes them, and how to show what it gives back."""
    return (
        as_floats(config, dataset, images),
        lambda x: np.clip(np.nan_to_num(denormalize(x, config)), 0.0, 1.0),
    )


class Classify:
    """Predicted classes of integer images, in batches over this process's devices.

    Args:
      functions: of the model.
      config: of the run.
      dataset: where the images are from.
    """

    def __init__(self, functions: ModelFunctions, config: ClassificationConfig, dataset: Dataset):
        num_levels = _num_levels(dataset)

        def predict(variables, images):
            logits = functions.model.apply(variables, normalize(images, num_levels, config))
            return jnp.argmax(jnp.asarray(logits), axis=-1)

        self._predict = jax.jit(predict)
        self._devices = LocalDevices()

    def __call__(self, variables: Any, images: np.ndarray) -> np.ndarray:
        variables = self._devices.replicate(variables)
        parts = [
            np.asarray(self._predict(variables, self._devices.split(batch)))[:count]
            for batch, count in padded_batches(images, _CLASSIFIED_AT_ONCE, self._devices.count)
        ]
        return np.concatenate(parts)


class Recalibrate:
    """Variables -> the same with the head's statistics those of their own features.

    They are estimated on training images from all over the set, which may be in order of its
    classes, as they are (without crops or flips).

    Args:
      functions: of the model.
      config: of the run.
      dataset: where the images are from.
    """

    def __init__(self, functions: ModelFunctions, config: ClassificationConfig, dataset: Dataset):
        num_levels = _num_levels(dataset)

        def moments(variables, images):
            x = normalize(images, num_levels, config)
            return feature_moments(functions.model, variables, x)

        self._moments = jax.jit(moments)
        size = min(_CLASSIFIED_AT_ONCE, len(dataset.train))
        count = min(_RECALIBRATED_BY, len(dataset.train)) // size
        spread = np.arange(count * size) * len(dataset.train) // (count * size)
        self._batches = np.split(dataset.train[spread], count)

    def __call__(self, variables: Any) -> Any:
        return recalibrated(variables, (self._moments(variables, x) for x in self._batches))


def as_floats(config: ClassificationConfig, dataset: Dataset, images: np.ndarray) -> np.ndarray:
    """Integer images as the classifier sees them."""
    return np.asarray(normalize(jnp.asarray(images), _num_levels(dataset), config))


def _num_levels(dataset: Dataset) -> int:
    assert dataset.num_levels is not None
    return dataset.num_levels


class _Validation:
    """Accuracy on the validation set under the averaged parameters.

    Args:
      functions: of the model.
      config: of the run.
      dataset: whose validation set it is.
    """

    def __init__(self, functions: ModelFunctions, config: ClassificationConfig, dataset: Dataset):
        self.score = 0.0
        self._functions, self._config, self._dataset = functions, config, dataset
        self._images = as_floats(config, dataset, dataset.validation[:_INVERTED])
        self._classify = Classify(functions, config, dataset)
        self._recalibrate = Recalibrate(functions, config, dataset)

    def evaluate(self, state: TrainState, log: MetricsLog) -> dict[str, float]:
        variables = self._functions.converge(state.averaged_variables)
        predictions = self._classify(self._recalibrate(variables), self._dataset.validation)
        self.score = float(np.mean(predictions == self._dataset.labels("validation")))
        shown = {"validation": self.score, **self._functions.norm_metrics(state.variables)}
        back = reconstruct(
            self._functions,
            self._functions.invertible(self._functions.flow(variables)),
            self._images,
        )
        log.write(int(state.step), **shown, inverse_residual=back.residual_max)
        return shown

    def draw(self, state: TrainState, log: MetricsLog) -> None:
        flow = self._functions.averaged_flow(state)
        back = reconstruct(self._functions, flow, self._images)
        pairs = denormalize(np.concatenate([self._images[:16], back.x[:16]]), self._config)
        grid = figures.image_grid(np.asarray(pairs), 16)
        log.picture(int(state.step), "reconstructions", grid)


def _draw_curve(workdir: Path, log: MetricsLog) -> None:
    figures.training_curve(
        workdir / "training_curve.png",
        *log.series("loss"),
        np.array([]),
        np.array([]),
        "cross-entropy (nats)",
    )


def accuracy_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows of the table shown at the end."""
    accuracy = f"{report['accuracy']:.2%} ± {report['accuracy_stderr']:.2%}"
    before = f"{report['accuracy_before_certification']:.2%}"
    return [("test accuracy", accuracy), ("before kernels were scaled to bounds", before)]
