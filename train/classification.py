"""``python -m train classification``: an invertible residual network as a classifier."""

import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from iresnet_jax import InvertibleClassifier
from train import figures
from train.configs.base import ClassificationConfig
from train.data import Dataset, load_dataset
from train.evaluation import reconstruct
from train.networks import ModelFunctions
from train.progress import summary_table
from train.report import common_rows, inversion_report, run_report
from train.steps import TrainState, classification_step, make_optimizer
from train.training import train_model
from train.workdir import write_json


def build_model(config: ClassificationConfig, dataset: Dataset) -> InvertibleClassifier:
    """The untrained classifier for a data set."""
    return InvertibleClassifier(
        image_shape=dataset.image_shape,
        depths=config.depths,
        features=config.features,
        coeff=config.coeff,
        activation=config.activation,
        num_steps=config.power_steps,
        padding=config.padding,
        num_classes=int(dataset.labels("train").max()) + 1,
        domain="centered",
    )


def run(config: ClassificationConfig) -> dict[str, Any]:
    """Train, evaluate, invert the features, and write the report; returns it."""
    started = time.perf_counter()
    dataset = load_dataset(config.dataset)
    model = build_model(config, dataset)
    images, labels = images_in_unit_interval(dataset, dataset.train), dataset.labels("train")
    trained = train_model(
        model,
        config,
        dataset,
        first_batch=images[:512],
        step=classification_step(model, make_optimizer(config), config),
        batch=lambda indices: (jnp.asarray(images[indices]), jnp.asarray(labels[indices])),
        validation=lambda functions: _validation(model, functions, dataset),
        loss_name="loss",
    )
    state, workdir = trained.result.state, trained.workdir

    variables = trained.functions.converge(state.averaged_variables)
    test = images_in_unit_interval(dataset, dataset.test)
    predictions = np.argmax(jax.jit(model.apply)(variables, test), axis=-1)
    accuracy = float(np.mean(predictions == dataset.labels("test")))
    flow, lipschitz = trained.functions.shipped_flow(state)
    back = reconstruct(flow, test, config.inverse_tolerance, config.inverse_max_steps)
    figures.classifier_inversion(
        workdir / "inversion.png", test, np.clip(back.x, 0.0, 1.0), predictions, back.max_error
    )
    report = {
        "accuracy": accuracy,
        "accuracy_stderr": math.sqrt(accuracy * (1.0 - accuracy) / len(test)),
        **inversion_report(back, lipschitz),
        **run_report(config, trained, time.perf_counter() - started),
    }
    write_json(workdir / "report.json", report)
    summary_table(f"{config.dataset}: {workdir / 'report.json'}", _summary(report))
    return report


def images_in_unit_interval(dataset: Dataset, examples: np.ndarray) -> np.ndarray:
    """Integer grey levels as floats from 0 to 1."""
    assert dataset.num_levels is not None
    return examples.astype(np.float32) / (dataset.num_levels - 1)


def _validation(model: InvertibleClassifier, functions: ModelFunctions, dataset: Dataset):
    images = images_in_unit_interval(dataset, dataset.validation)
    logits = jax.jit(model.apply)

    def validate(state: TrainState) -> dict[str, float]:
        variables = functions.converge(state.averaged_variables)
        predictions = np.argmax(logits(variables, images), axis=-1)
        accuracy = float(np.mean(predictions == dataset.labels("validation")))
        return {"validation": accuracy, "sigma": functions.largest_norm(state.variables)}

    return validate


def _summary(report: dict[str, Any]) -> list[tuple[str, str]]:
    accuracy = f"{report['accuracy']:.2%} ± {report['accuracy_stderr']:.2%}"
    return [("test accuracy", accuracy), *common_rows(report)]
