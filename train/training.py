"""A run from set-up to report: training, validation, checkpoints, Ctrl-C, a stop on NaN."""

import contextlib
import dataclasses
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from functools import partial
from types import FrameType
from typing import Any, NoReturn

import jax
import numpy as np

from train.batches import Batches, batch_iterator
from train.checkpoints import CheckpointError, Checkpoints, Saved
from train.configs.base import TrainingConfig
from train.data import check_batch_size
from train.failures import ProgramError, Stopped, answered, naming, terminable
from train.identity import (
    CONTINUED,
    WARM,
    Content,
    continued,
    described,
    example_of,
    identity,
)
from train.metrics import MetricsLog
from train.optim import describe_schedule
from train.origin import first_of, tell_of_more_steps, warm_start
from train.parallel import (
    Devices,
    broadcast,
    broadcast_text,
    is_primary,
    on_primary,
    wait_for_all,
)
from train.processes import (
    ask_for_common_stop,
    reached_common_stop,
    with_num_devices,
    without_num_devices,
)
from train.progress import TrainingProgress, summary_table
from train.report import Trained, common_rows, run_report
from train.steps import FirstState, TrainState, training_step
from train.task import Task
from train.terminal import tell
from train.workdir import WorkdirError, claimed_workdir, write_json

_LOG_EVERY = 10
_FIRST_BATCH = 512


class TrainingError(ProgramError):
    """A run that cannot continue."""


def run(task: Task) -> dict[str, Any]:
    """Train or resume, evaluate, write and print the report; return it in the first process.

    Raises:
      ValueError: for settings that do not fit the data or the devices, before anything is written.
      WorkdirError: for a workdir that cannot be written, or holds a run of another config or of
        other data; if another process trains there.
      CheckpointError: if there are checkpoints, and none can be read.
      TrainingError: if the loss or its gradient is not finite; earlier checkpoints are kept.
      Stopped: after Ctrl-C or SIGTERM; the steps so far are saved, and the test set is not
        evaluated.
    """
    started = time.perf_counter()
    config, (first, devices, batches) = task.config, _refuse_early(task)
    with ExitStack() as held:
        data = task.dataset.fingerprint if is_primary() else ""
        held.enter_context(naming(config.workdir))
        warm = warm_start(task, first.template())
        about = described(config, data, example_of(task.dataset), warm and warm.record)
        claim = claimed_workdir(config, about)
        on_primary(lambda: held.enter_context(claim), WorkdirError)
        keep, best = config.keep_checkpoints, task.best
        kept = held.enter_context(
            closing(Checkpoints(config.workdir, keep=keep, best=best, run=identity(about)))
        )
        saved = _resumed(first, kept, batches, devices.count)
        state = first_of(first, warm, config) if saved is None else saved.state
        seconds = 0.0 if saved is None else saved.seconds
        origin = _origin(config, about, saved, kept)
        del first, warm  # and the memory of the compiled program
        log = held.enter_context(closing(MetricsLog(config.workdir, int(state.step))))
        trained = _Training(task, kept, log, seconds).fit(state, batches, devices)
        if trained.interrupted:
            _stop(task, trained, log, time.perf_counter() - started + seconds, origin)
        with terminable():  # by now no other process would stop with this one
            report = _report(task, trained, log, started - seconds, origin) if is_primary() else {}
            wait_for_all("end")
    return report


def _refuse_early(task: Task) -> tuple[FirstState, Devices, Batches]:
    """Prepare training, and raise what can be raised before anything is written."""
    config, data = task.config, task.dataset
    check_batch_size(len(data.train), config.batch_size)
    first = FirstState(task.init, config, task.inputs(data.train[:_FIRST_BATCH]))
    first.template()
    devices = Devices(config.parallel, config.batch_size, task.devices())
    processes = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    labels = task.with_labels
    batches = batch_iterator(data, config.batch_size, config.seed, with_labels=labels, **processes)
    return first, devices, batches


def _resumed(
    first: FirstState, checkpoints: Checkpoints, batches: Batches, num_devices: int
) -> Saved | None:
    """Read the newest checkpoint; None without any. Batches continue from there."""
    saved = on_primary(lambda: checkpoints.restore(first.template()), CheckpointError)
    found = bool(broadcast(np.array(saved is not None)))
    if not found:
        return None
    if saved is None:  # not the first process: the values come from there
        saved = Saved(first.values(), {})
    state = broadcast(saved.state)
    data = json.loads(broadcast_text(json.dumps(saved.data)))
    print(f"Resuming from step {int(state.step)}.")
    batches.set_state(without_num_devices(data, num_devices))
    return saved._replace(state=state)


def _origin(
    config: TrainingConfig, about: Content, saved: Saved | None, checkpoints: Checkpoints
) -> Content:
    """Tell and record what the run goes on from; return what its report says of it."""
    history = []
    if saved is not None:
        step = int(saved.state.step)
        history = continued(saved.run, step, config.steps)
        before = (saved.run or {}).get("steps", config.steps)
        if before != config.steps:
            tell_of_more_steps(config, step, before)
    plans = {CONTINUED: [_with_schedule(config, plan) for plan in history]} if history else {}
    checkpoints.run = {**(checkpoints.run or {}), **plans}
    if is_primary():
        write_json(config.workdir / "config.json", about | plans)
    return plans | {name: about[name] for name in (WARM,) if name in about}


def _with_schedule(config: TrainingConfig, plan: Content) -> Content:
    before = dataclasses.replace(config, steps=plan["steps"])
    return {**plan, "schedule": describe_schedule(before)}


def _stop(
    task: Task, trained: Trained, log: MetricsLog, seconds: float, origin: Content
) -> NoReturn:
    """Report how far the training came, without an evaluation, and raise Stopped."""
    config = task.config
    if is_primary():
        report = run_report(config, trained, seconds, origin)
        write_json(config.workdir / "report.json", report)
        task.write_page(config.workdir, report, log.records())
    wait_for_all("stop")
    raise Stopped(
        trained.stopped_by or signal.SIGINT,
        f"Stopped after step {int(trained.state.step)} of {config.steps}, which is saved.",
    )


def _report(
    task: Task, trained: Trained, log: MetricsLog, since: float, origin: Content
) -> dict[str, Any]:
    """Evaluate and report; ``since`` is when the run would have started, had it never stopped."""
    config, workdir = task.config, task.config.workdir
    tell("Preparing the network for its evaluation …")
    report = task.evaluate(trained.state, workdir)
    report |= run_report(config, trained, time.perf_counter() - since, origin)
    write_json(workdir / "report.json", report)
    task.draw_curve(workdir / "training_curve.png", log, report)
    task.write_page(workdir, report, log.records())
    rows = [*task.rows(report), *common_rows(report)]
    summary_table(f"{config.dataset}: {workdir / 'report.json'}", rows)
    return report


class _Training:
    """The loop of a run, with what it shows, logs and saves."""

    def __init__(self, task: Task, checkpoints: Checkpoints, log: MetricsLog, seconds: float):
        self._task, self._config = task, task.config
        self._checkpoints, self._log = checkpoints, log
        self._shown: dict[str, float] = {}
        self._loss = _last(log, "loss", math.nan)
        self._rate, self._score = _last(log, "examples_per_second", 0.0), math.nan
        self._since = time.perf_counter() - seconds

    def fit(self, state: TrainState, batches: Batches, devices: Devices) -> Trained:
        """Train for ``config.steps`` steps in all, or until Ctrl-C."""
        config = self._config
        step = devices.map(training_step(self._task.loss, config))
        completed, replicated = int(state.step), devices.replicate(state)
        self._logged, self._num_devices = (completed, time.perf_counter()), devices.count
        what = f"{config.dataset}, {config.workdir}"
        progress = TrainingProgress(config.steps, what, planned=self._planned(), evaluates=True)
        self._timed = progress.timed
        if completed >= config.steps:  # nothing to stop: Ctrl-C is for what comes after
            state = devices.one(replicated)
            return Trained(state, False, self._loss, self._rate, self._seconds(), None)
        with _stop_on_interrupt() as interrupted, progress:
            while completed < config.steps and not interrupted:
                replicated, metrics = step(replicated, devices.split(next(batches)))
                completed += 1
                if reached_common_stop(completed):
                    interrupted.append(signal.SIGTERM)
                if self._due(completed, _LOG_EVERY, first=True):
                    self._log_metrics(completed, devices.one(metrics))
                if is_primary():
                    self._judge(completed, partial(devices.one, replicated))
                if self._due(completed, config.checkpoint_every):
                    with self._timed("checkpoint"):
                        self._save(devices.one(replicated), batches)
                if self._due(completed, _LOG_EVERY, first=True) or self._validates(completed):
                    progress.update(completed, **self._shown)
            state = devices.one(replicated)
            if interrupted and completed not in self._checkpoints.steps():
                if is_primary():
                    self._validate(state)
                self._save(state, batches)
        by = interrupted[0] if interrupted else None
        return Trained(state, by is not None, self._loss, self._rate, self._seconds(), by)

    def _seconds(self) -> float:
        return time.perf_counter() - self._since

    def _due(self, completed: int, every: int, *, first: bool = False) -> bool:
        """Return whether an action is due that repeats ``every`` so many steps, or at the end."""
        ends = (1, self._config.steps) if first else (self._config.steps,)
        return completed in ends or completed % every == 0

    def _planned(self) -> dict[str, list[int]]:
        """The steps after which something else is due, by what it is."""
        config, last = self._config, self._config.steps

        def due(*often: int) -> list[int]:
            return sorted({last}.union(*(range(every, last + 1, every) for every in often)))

        return {
            "validation": sorted({1, *due(config.validate_every, config.checkpoint_every)}),
            "picture": due(config.picture_every or last),
            "checkpoint": due(config.checkpoint_every),
        }

    def _draws(self, completed: int) -> bool:
        return self._due(completed, self._config.picture_every or self._config.steps)

    def _validates(self, completed: int) -> bool:
        config = self._config
        saves = self._due(completed, config.checkpoint_every)
        return saves or self._due(completed, config.validate_every, first=True)

    def _log_metrics(self, completed: int, metrics: Any) -> None:
        values = {name: float(value) for name, value in metrics.items()}
        self._loss = values["loss"]
        for what, name in {"loss": "loss", "norm of the gradient": "gradient"}.items():
            _refuse_not_finite(what, values.get(name, 0.0), completed)
        (step, then), now = self._logged, time.perf_counter()
        self._rate = (completed - step) / (now - then) * self._config.batch_size
        self._logged = completed, now
        self._log.write(completed, **values, examples_per_second=self._rate)
        self._shown |= {self._task.loss_name: self._loss}
        self._shown |= {k: values[k] for k in self._task.shown_metrics}

    def _judge(self, completed: int, state: Callable[[], TrainState]) -> None:
        if self._validates(completed):
            with self._timed("validation"):
                self._validate(state())
        if self._draws(completed):
            with self._timed("picture"):
                for name, picture in self._task.pictures(state()).items():
                    self._log.picture(completed, name, picture)

    def _validate(self, state: TrainState) -> None:
        found = self._task.validate(state)
        self._score = found["validation"]
        self._log.write(int(state.step), **found)
        shown = ("validation", "sigma", *self._task.shown_at_validation)
        self._shown |= {k: found[k] for k in shown if k in found}

    def _save(self, state: TrainState, batches: Batches) -> None:
        now = self._seconds()
        data = with_num_devices(batches.get_state(), self._num_devices)
        self._checkpoints.save(int(state.step), state, data, self._score, now)


def _last(log: MetricsLog, name: str, otherwise: float) -> float:
    """Return the last value of a metric that an earlier process logged."""
    return float(next(iter(log.series(name)[1][::-1]), otherwise))


def _refuse_not_finite(what: str, value: float, step: int) -> None:
    if not math.isfinite(value):
        raise TrainingError(
            f"The {what} is {value} at step {step}. "
            "Training stopped; earlier checkpoints are kept. "
            "A smaller --learning-rate, --clip-gradient, or more --power-steps, may help."
        )


@contextlib.contextmanager
def _stop_on_interrupt() -> Iterator[list[int]]:
    """Let the first Ctrl-C end the loop after its step; a second one interrupts at once.

    SIGTERM, which a cluster sends before it takes the machine back, counts as Ctrl-C. The list that
    it yields takes the signal. Of several processes, either stops all after a common step: see
    :func:`train.processes.reached_common_stop`, where SIGTERM is heard.
    """
    asked: list[int] = []
    previous: dict[signal.Signals, Any] = {}
    alone = jax.process_count() == 1

    def restore() -> None:
        for stop, handler in previous.items():
            signal.signal(stop, handler)

    def handle(signum: int, frame: FrameType | None) -> None:
        restore()
        answered()
        if alone:
            asked.append(signum)
        else:
            ask_for_common_stop()
        told = "this step" if alone else "a step common to all processes"
        print(f"Stopping after {told}; Ctrl-C again stops at once.", file=sys.stderr)

    stops = (signal.SIGINT, signal.SIGTERM) if alone else (signal.SIGINT,)
    if threading.current_thread() is threading.main_thread():
        previous = {stop: signal.signal(stop, handle) for stop in stops}
    try:
        yield asked
    finally:
        restore()
