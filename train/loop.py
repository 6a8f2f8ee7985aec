"""The training loop: progress, metrics, validation, checkpoints, Ctrl-C, and a stop on NaN."""

import math
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any, NamedTuple, Protocol, Self

import jax
from grain import DatasetIterator

from train.checkpoints import Checkpoints
from train.configs.base import TrainingConfig
from train.metrics import MetricsLog
from train.parallel import Devices, is_primary
from train.progress import TrainingProgress
from train.steps import Step, TrainState

_LOG_EVERY = 10


class TrainingError(Exception):
    """A run that cannot go on."""


class FitResult(NamedTuple):
    """How training ended.

    Attributes:
      state: the last train state.
      interrupted: whether Ctrl-C ended it before its last step.
      loss: the last that was logged, by an earlier run where this one had no step left to take.
      examples_per_second: between the last two logged steps.
    """

    state: TrainState
    interrupted: bool
    loss: float
    examples_per_second: float


class Validation(Protocol):
    """How a state does on the validation set.

    Attributes:
      score: the last one, by which checkpoints are compared.
    """

    score: float

    def evaluate(self, state: TrainState, log: MetricsLog) -> dict[str, float]:
        """Log how a state does; returns what the terminal shows."""
        ...

    def draw(self, state: TrainState, log: MetricsLog) -> None:
        """Show what a state can do in pictures."""
        ...


def fit(
    step: Step,
    state: TrainState,
    batches: DatasetIterator,
    config: TrainingConfig,
    *,
    devices: Devices,
    checkpoints: Checkpoints,
    log: MetricsLog,
    validation: Validation,
    loss_name: str,
) -> FitResult:
    """Train until ``config.steps`` steps are completed, or Ctrl-C.

    Args:
      step: from :mod:`train.steps`; it is compiled here for all devices, and its state donated.
      state: where to start.
      batches: endless, standing before the batch of the state's step.
      config: of the run.
      devices: what the step is mapped over.
      checkpoints: where states are saved.
      log: where metrics go.
      validation: how a state does on the validation set.
      loss_name: what the loss is called in terminal and log.

    Raises:
      TrainingError: when the loss is not finite; the checkpoints before it are kept.
    """
    mapped = devices.map(step)
    completed = int(state.step)
    replicated = devices.replicate(state)
    shown: dict[str, float] = {}
    loss = next(iter(log.series("loss")[1][::-1]), math.nan)
    clock = _Clock(completed)
    with (
        _StopOnInterrupt() as interrupt,
        TrainingProgress(config.steps, f"{config.dataset}, {config.workdir}") as progress,
    ):
        while completed < config.steps and not interrupt.requested:
            replicated, metrics = mapped(replicated, devices.split(next(batches)))
            completed += 1
            due = _due(config, completed)
            if due.log:
                values = {k: float(v) for k, v in devices.one(metrics).items()}
                loss = _checked(values["loss"], completed)
                rate = clock.per_second(completed) * config.batch_size
                log.write(completed, **values, examples_per_second=rate)
                shown |= {loss_name: loss}
                shown |= {k: values[k] for k in ("accuracy",) if k in values}
                progress.update(completed, **shown)
            if due.validate and is_primary():
                shown |= validation.evaluate(devices.one(replicated), log)
                progress.update(completed, **shown)
            if due.picture and is_primary():
                validation.draw(devices.one(replicated), log)
            if due.checkpoint:
                state = devices.one(replicated)
                checkpoints.save(completed, state, batches.get_state(), validation.score)
    state, interrupted = devices.one(replicated), completed < config.steps
    if interrupted and completed not in checkpoints.steps():
        validation.evaluate(state, log)
        checkpoints.save(completed, state, batches.get_state(), validation.score)
    return FitResult(state, interrupted, float(loss), clock.last_rate * config.batch_size)


class _Due(NamedTuple):
    log: bool
    validate: bool
    picture: bool
    checkpoint: bool


def _due(config: TrainingConfig, completed: int) -> _Due:
    ends = completed in (1, config.steps)
    last = completed == config.steps
    checkpoint = last or completed % config.checkpoint_every == 0
    return _Due(
        log=ends or completed % _LOG_EVERY == 0,
        validate=ends or checkpoint or completed % config.validate_every == 0,
        picture=last or completed % (config.picture_every or config.steps) == 0,
        checkpoint=checkpoint,
    )


class _Clock:
    """Steps a second since it was last asked."""

    def __init__(self, step: int):
        self._step, self._time = step, time.perf_counter()
        self.last_rate = 0.0

    def per_second(self, step: int) -> float:
        now = time.perf_counter()
        self.last_rate = (step - self._step) / (now - self._time)
        self._step, self._time = step, now
        return self.last_rate


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
