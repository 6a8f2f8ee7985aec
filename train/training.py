"""Training from set-up to the last step: what the programs share before they evaluate."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from grain import DatasetIterator
from iresnet_jax.models import FlowModel

from train.batches import batch_iterator
from train.checkpoints import CheckpointError, Checkpoints, Saved
from train.configs.base import TrainingConfig
from train.data import Dataset, check_batch_size
from train.loop import FitResult, Validation, fit
from train.metrics import MetricsLog
from train.networks import FirstState, ModelFunctions
from train.parallel import (
    Devices,
    broadcast,
    broadcast_text,
    on_primary,
    process_index_and_count,
    wait_for_all,
)
from train.steps import Step, TrainState
from train.workdir import WorkdirError, prepare_workdir


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


@contextlib.contextmanager
def train_model(
    model: FlowModel,
    config: TrainingConfig,
    dataset: Dataset,
    *,
    first_batch: np.ndarray,
    step: Step,
    with_labels: bool,
    validation: Callable[[ModelFunctions], Validation],
    best: str,
    loss_name: str,
    devices: Sequence[jax.Device] | None = None,
) -> Iterator[Trained]:
    """Refuse what cannot run, prepare the workdir, train or resume; evaluate within the context.

    Args:
      model: the untrained model.
      config: of the run.
      dataset: what it trains on.
      first_batch: what a fresh model is initialised from.
      step: from :mod:`train.steps`.
      with_labels: whether a batch is (examples, labels) or examples alone.
      validation: makes the validation.
      best: "min" or "max": which validation score is the best.
      loss_name: what the loss is called in terminal and log.
      devices: that a step is mapped over; all by default.
    """
    check_batch_size(len(dataset.train), config.batch_size)
    first = FirstState(model, config, first_batch)
    first.template()  # refuses before anything is written
    mapped_over = Devices(config.parallel, config.batch_size, devices)
    on_primary(lambda: prepare_workdir(config), WorkdirError)
    functions = ModelFunctions(model, config)
    index, count = process_index_and_count()
    with contextlib.ExitStack() as stack:
        checkpoints = Checkpoints(config.workdir, keep=config.keep_checkpoints, best=best)
        stack.callback(checkpoints.close)
        batches = batch_iterator(
            dataset,
            config.batch_size,
            config.seed,
            with_labels=with_labels,
            process_index=index,
            process_count=count,
        )
        state = _start(first, checkpoints, batches)
        del first  # with its program, and the memory which that takes
        log = MetricsLog(config.workdir, int(state.step))
        stack.callback(log.close)
        started = time.perf_counter()
        result = fit(
            step,
            state,
            batches,
            config,
            devices=mapped_over,
            checkpoints=checkpoints,
            log=log,
            validation=validation(functions),
            loss_name=loss_name,
        )
        seconds = time.perf_counter() - started
        yield Trained(result, functions, log, config.workdir, seconds)
        wait_for_all("end")


def _start(first: FirstState, checkpoints: Checkpoints, batches: DatasetIterator) -> TrainState:
    """The newest checkpoint's state, or a fresh one; the batches then go on from there."""
    saved = on_primary(lambda: checkpoints.restore(first.template()), CheckpointError)
    found = bool(broadcast(np.array(saved is not None)))
    if not found:
        return first.values()
    if saved is None:  # not the first process: the values come from there
        saved = Saved(first.values(), {})
    state = broadcast(saved.state)
    batches.set_state(json.loads(broadcast_text(json.dumps(saved.data))))
    print(f"Resuming from step {int(state.step)}.")
    return state
