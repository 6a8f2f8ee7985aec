"""A run from set-up to its report: training, validation, checkpoints, Ctrl-C, a stop on NaN."""

import json
import math
import signal
import sys
import threading
import time
from contextlib import closing
from types import FrameType
from typing import Any, Self

import jax
import numpy as np
from grain import DatasetIterator

from train.batches import batch_iterator
from train.checkpoints import CheckpointError, Checkpoints, Saved
from train.data import check_batch_size
from train.metrics import MetricsLog
from train.parallel import (
    Devices,
    broadcast,
    broadcast_text,
    is_primary,
    on_primary,
    wait_for_all,
)
from train.progress import TrainingProgress, summary_table
from train.report import Trained, common_rows, run_report
from train.steps import FirstState, TrainState, training_step
from train.task import Task
from train.workdir import WorkdirError, prepare_workdir, write_json

_LOG_EVERY = 10
_FIRST_BATCH = 512


class TrainingError(Exception):
    """A run that cannot go on."""


def run(task: Task) -> dict[str, Any]:
    """Train or resume, evaluate, write and show the report; returns it in the first process.

    Raises:
      ValueError: for settings that do not fit the data or the devices, before anything is written.
      WorkdirError: for a workdir that cannot be written, or holds a run of another config.
      CheckpointError: if there are checkpoints, and none can be read.
      TrainingError: when the loss is not finite; the checkpoints before it are kept.
    """
    started = time.perf_counter()
    config, first, devices = task.config, _first_state(task), _devices(task)
    on_primary(lambda: prepare_workdir(config), WorkdirError)
    with closing(Checkpoints(config.workdir, keep=config.keep_checkpoints, best=task.best)) as kept:
        batches = _batches(task)
        state = _start(first, kept, batches)
        del first  # with its program, and the memory which that takes
        with closing(MetricsLog(config.workdir, int(state.step))) as log:
            trained = _Training(task, devices, kept, log).fit(state, batches)
            report = _report(task, trained, log, started) if is_primary() else {}
        wait_for_all("end")
    return report


def _first_state(task: Task) -> FirstState:
    check_batch_size(len(task.dataset.train), task.config.batch_size)
    first = FirstState(task.init, task.config, task.inputs(task.dataset.train[:_FIRST_BATCH]))
    first.template()  # refuses before anything is written
    return first


def _devices(task: Task) -> Devices:
    return Devices(task.config.parallel, task.config.batch_size, task.devices())


def _batches(task: Task) -> DatasetIterator:
    return batch_iterator(
        task.dataset,
        task.config.batch_size,
        task.config.seed,
        with_labels=task.with_labels,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


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


def _report(task: Task, trained: Trained, log: MetricsLog, started: float) -> dict[str, Any]:
    config, workdir = task.config, task.config.workdir
    report = task.evaluate(trained.state, workdir)
    task.draw_curve(workdir / "training_curve.png", log, report)
    report |= run_report(config, trained, time.perf_counter() - started)
    write_json(workdir / "report.json", report)
    rows = [*task.rows(report), *common_rows(report)]
    summary_table(f"{config.dataset}: {workdir / 'report.json'}", rows)
    return report


class _Training:
    """The loop of a run, and what it shows, logs and saves on its way.

    Args:
      task: what is trained.
      devices: what its step is mapped over.
      checkpoints: where states are saved.
      log: where metrics go.
    """

    def __init__(self, task: Task, devices: Devices, checkpoints: Checkpoints, log: MetricsLog):
        self._task, self._config = task, task.config
        self._devices, self._checkpoints, self._log = devices, checkpoints, log
        self._shown: dict[str, float] = {}
        self._loss = next(iter(log.series("loss")[1][::-1]), math.nan)
        self._examples_per_second = 0.0
        self._score = math.nan

    def fit(self, state: TrainState, batches: DatasetIterator) -> Trained:
        """Train until ``config.steps`` steps are completed, or Ctrl-C."""
        config, devices, started = self._config, self._devices, time.perf_counter()
        step = devices.map(training_step(self._task.loss, config))
        completed, replicated = int(state.step), devices.replicate(state)
        self._logged = completed, started
        with (
            _StopOnInterrupt() as interrupt,
            TrainingProgress(config.steps, f"{config.dataset}, {config.workdir}") as progress,
        ):
            while completed < config.steps and not interrupt.requested:
                replicated, metrics = step(replicated, devices.split(next(batches)))
                completed += 1
                if self._look(completed, replicated, metrics):
                    progress.update(completed, **self._shown)
                if self._due(completed, config.checkpoint_every):
                    self._save(completed, devices.one(replicated), batches)
        state, interrupted = devices.one(replicated), completed < config.steps
        if interrupted and completed not in self._checkpoints.steps():
            self._validate(state)
            self._save(completed, state, batches)
        seconds = time.perf_counter() - started
        return Trained(state, interrupted, self._loss, self._examples_per_second, seconds)

    def _look(self, completed: int, replicated: Any, metrics: Any) -> bool:
        """Log, validate and draw what is due; returns whether there is something new to show."""
        logged = self._due(completed, _LOG_EVERY, first=True)
        if logged:
            self._log_step(completed, self._devices.one(metrics))
        validated = self._validation_due(completed) and is_primary()
        if validated:
            self._validate(self._devices.one(replicated))
        if self._due(completed, self._config.picture_every or self._config.steps) and is_primary():
            self._draw(completed, self._devices.one(replicated))
        return logged or validated

    def _due(self, completed: int, every: int, *, first: bool = False) -> bool:
        """Whether what is done every so many steps is due; after the last step, all is."""
        ends = (1, self._config.steps) if first else (self._config.steps,)
        return completed in ends or completed % every == 0

    def _validation_due(self, completed: int) -> bool:
        config = self._config
        saved = self._due(completed, config.checkpoint_every)
        return saved or self._due(completed, config.validate_every, first=True)

    def _log_step(self, completed: int, metrics: Any) -> None:
        values = {name: float(value) for name, value in metrics.items()}
        self._loss = _checked(values["loss"], completed)
        (step, then), now = self._logged, time.perf_counter()
        self._examples_per_second = (completed - step) / (now - then) * self._config.batch_size
        self._logged = completed, now
        self._log.write(completed, **values, examples_per_second=self._examples_per_second)
        self._shown |= {self._task.loss_name: self._loss}
        self._shown |= {k: values[k] for k in ("accuracy",) if k in values}

    def _validate(self, state: TrainState) -> None:
        found = self._task.validate(state)
        self._score = found["validation"]
        self._log.write(int(state.step), **found)
        self._shown |= {k: found[k] for k in ("validation", "sigma") if k in found}

    def _draw(self, completed: int, state: TrainState) -> None:
        for name, picture in self._task.pictures(state).items():
            self._log.picture(completed, name, picture)

    def _save(self, completed: int, state: TrainState, batches: DatasetIterator) -> None:
        self._checkpoints.save(completed, state, batches.get_state(), self._score)


def _checked(loss: float, step: int) -> float:
    if not math.isfinite(loss):
        raise TrainingError(
            f"The loss is {loss} at step {step}. Training stopped; earlier checkpoints are kept. "
            "A smaller --learning-rate, --clip-gradient, or more --power-steps, may help."
        )
    return loss


class _StopOnInterrupt:
    """Within it, the first Ctrl-C asks the loop to end; a second one interrupts at once.

    SIGTERM, by which a cluster announces that it takes the machine back, counts as Ctrl-C. One of
    several processes ends at once: the others could not know at which step it stopped.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        alone = jax.process_count() == 1
        if alone and threading.current_thread() is threading.main_thread():
            stops = signal.SIGINT, signal.SIGTERM
            self._previous = {stop: signal.signal(stop, self._handle) for stop in stops}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.requested:
            self._restore()
            raise KeyboardInterrupt
        self.requested = True
        print("Stopping after this step; Ctrl-C again stops at once.", file=sys.stderr)

    def _restore(self) -> None:
        for stop, handler in self._previous.items():
            signal.signal(stop, handler)
        self._previous = {}
