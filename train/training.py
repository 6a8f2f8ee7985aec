"""Training from set-up to the last step: what the programs share before they evaluate."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from iresnet_jax.models import FlowModel
from train.checkpoints import Checkpoints
from train.configs.base import TrainingConfig
from train.data import Dataset, check_batch_size, epoch_batches
from train.loop import FitResult, MetricsLog, fit
from train.networks import ModelFunctions, check_model, start_state
from train.steps import Step, TrainState
from train.workdir import prepare_workdir

Validate = Callable[[TrainState], dict[str, float]]


class Trained(NamedTuple):
    """A run whose training has ended.

    Attributes:
      result: how it ended, with the last state.
      functions: the model's compiled functions.
      log: its metrics.
      workdir: its folder.
      seconds: time spent training.
    """

    result: FitResult
    functions: ModelFunctions
    log: MetricsLog
    workdir: Path
    seconds: float


def train_model(
    model: FlowModel,
    config: TrainingConfig,
    dataset: Dataset,
    *,
    first_batch: np.ndarray,
    step: Step,
    batch: Callable[[np.ndarray], Any],
    validation: Callable[[ModelFunctions], Validate],
    loss_name: str,
) -> Trained:
    """Refuse what cannot run, then prepare the workdir and train, or resume, to the last step.

    Args:
      model: the untrained model.
      config: of the run.
      dataset: what it trains on.
      first_batch: what a fresh model is initialised from.
      step: from :mod:`train.steps`.
      batch: the batch of given indices.
      validation: makes the validation function.
      loss_name: what the loss is called in terminal and log.
    """
    check_batch_size(len(dataset.train), config.batch_size)
    check_model(model, dataset)
    workdir = prepare_workdir(config)
    functions = ModelFunctions(model)
    checkpoints = Checkpoints(workdir)
    try:
        state, start_step = start_state(model, config, first_batch, checkpoints)
        log = MetricsLog(workdir / "metrics.jsonl", start_step)
        indices = epoch_batches(
            len(dataset.train), config.batch_size, config.seed, start_step=start_step
        )
        started = time.perf_counter()
        result = fit(
            step,
            state,
            map(batch, indices),
            config,
            checkpoints=checkpoints,
            log=log,
            validate=validation(functions),
            loss_name=loss_name,
        )
    finally:
        checkpoints.close()
    return Trained(result, functions, log, workdir, time.perf_counter() - started)
