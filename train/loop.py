"""The training loop: progress, metrics, validation, checkpoints, Ctrl-C, and a stop on NaN."""

import json
import math
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Self

import jax
import numpy as np

from train.checkpoints import Checkpoints
from train.configs.base import TrainingConfig
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
    """

    state: TrainState
    interrupted: bool


class MetricsLog:
    """``metrics.jsonl`` in the workdir: one line for each record, kept across resumed runs.

    Args:
      path: the file.
      start_step: records of later steps, left by an interrupted run, are dropped.
    """

    def __init__(self, path: Path, start_step: int):
        self._path = path
        kept = [record for record in self.records() if record["step"] <= start_step]
        partial = path.with_suffix(".jsonl.partial")
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
        partial.replace(path)

    def write(self, step: int, **values: float) -> None:
        """Append one record."""
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def records(self) -> list[dict[str, float]]:
        """All records so far; a line that a kill cut off is left out."""
        if not self._path.exists():
            return []
        parsed = map(_parse_record, self._path.read_text().splitlines())
        return [record for record in parsed if record is not None]

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of one metric."""
        pairs = [(record["step"], record[name]) for record in self.records() if name in record]
        return np.array([step for step, _ in pairs]), np.array([value for _, value in pairs])


def fit(
    step: Step,
    state: TrainState,
    batches: Iterator[Any],
    config: TrainingConfig,
    *,
    checkpoints: Checkpoints,
    log: MetricsLog,
    validate: Callable[[TrainState], dict[str, float]],
    loss_name: str,
) -> FitResult:
    """Train until ``config.steps`` steps are completed, or Ctrl-C.

    Args:
      step: from :mod:`train.steps`; it is jitted here, and its state donated.
      state: where to start; ``batches`` begins with the batch of its step.
      batches: endless.
      config: of the run.
      checkpoints: where states are saved.
      log: where metrics go.
      validate: metrics of a state on the validation set.
      loss_name: what the loss is called in terminal and log.

    Raises:
      TrainingError: when the loss is not finite; the checkpoints before it are kept.
    """
    jitted = jax.jit(step, donate_argnums=0)
    shown: dict[str, float] = {}
    completed = int(state.step)
    with (
        _StopOnInterrupt() as interrupt,
        TrainingProgress(config.steps, f"{config.dataset}, {config.workdir}") as progress,
    ):
        while completed < config.steps and not interrupt.requested:
            state, metrics = jitted(state, next(batches))
            completed += 1
            if completed % _LOG_EVERY == 0 or completed in (1, config.steps):
                shown |= {loss_name: _finite_loss(metrics, completed)}
                shown |= {k: float(v) for k, v in metrics.items() if k not in ("loss", "gradient")}
                log.write(completed, **{k: float(v) for k, v in metrics.items()})
                progress.update(completed, **shown)
            if completed % config.validate_every == 0 or completed in (1, config.steps):
                validation = validate(state)
                log.write(completed, **validation)
                shown |= validation
                progress.update(completed, **shown)
            if completed % config.checkpoint_every == 0:
                checkpoints.save(completed, state)
        checkpoints.save(completed, state)
    return FitResult(state, completed < config.steps)


def _parse_record(line: str) -> dict[str, float] | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def _finite_loss(metrics: dict[str, Any], step: int) -> float:
    loss = float(metrics["loss"])
    if not math.isfinite(loss):
        raise TrainingError(
            f"The loss is {loss} at step {step}. Training stopped; earlier checkpoints are kept. "
            "A smaller --learning-rate, or more --power-steps, may help."
        )
    return loss


class _StopOnInterrupt:
    """Within it, the first Ctrl-C asks the loop to end; a second one interrupts at once."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: Any = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._handle)
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
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None
