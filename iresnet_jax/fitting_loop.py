"""The training loop of a fit: epochs, validations, and what ends it; nothing trained is lost."""

import dataclasses
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from iresnet_jax.fitted import EndedBy, History
from iresnet_jax.fitting_data import check_count
from iresnet_jax.fitting_steps import Evaluate, FittingState, Step
from iresnet_jax.nn.variables import Variables
from iresnet_jax.progress_bar import Report
from iresnet_jax.tables import Weights, mean_and_stderr

_STEPS, _VALIDATIONS = 2000, 40


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How long to train, in epochs; validations come every so many of them.

    Attributes:
      epochs: at most.
      steps: of one epoch.
      batch_size: examples a step.
      patience: validations without improvement after which training ends.
    """

    epochs: int
    steps: int
    batch_size: int
    patience: int

    @classmethod
    def of(cls, count: int, batch_size: int, max_epochs: int | None, patience: int) -> "Schedule":
        """Return the schedule for ``count`` examples; arguments as of :func:`iresnet_jax.fit`."""
        size = min(check_count("batch_size", batch_size, 1), count)
        steps = count // size
        epochs = max(1, round(_STEPS / steps)) if max_epochs is None else max_epochs
        return cls(
            check_count("max_epochs", epochs, 1), steps, size, check_count("patience", patience, 1)
        )

    @property
    def every(self) -> int:
        """Epochs from one validation to the next."""
        return max(1, self.epochs // _VALIDATIONS)

    @property
    def total(self) -> int:
        """Steps of all epochs."""
        return self.epochs * self.steps


class Course(NamedTuple):
    """Where training stands; replaced as a whole, so that an interruption finds it complete.

    Attributes:
      rows: (epoch, mean training loss, validation loss) of each validation.
      best: the averaged variables of the least validation loss.
    """

    rows: tuple[tuple[int, float, float], ...]
    best: Variables

    def then(
        self, epoch: int, losses: Sequence[Array], validation: float, averaged: Variables
    ) -> "Course":
        """Return where it stands after a validation, of losses of the steps since the last one."""
        train = float(np.mean(jax.device_get(list(losses)))) if losses else math.nan
        better = all(validation < row[2] for row in self.rows)
        rows = (*self.rows, (epoch, train, validation))
        return Course(rows, averaged if better else self.best)

    @property
    def since_best(self) -> int:
        """Validations since the best one."""
        return len(self.rows) - 1 - self._best_row

    @property
    def _best_row(self) -> int:
        return int(np.argmin([row[2] for row in self.rows]))

    def history(self, ended_by: EndedBy) -> History:
        """Return the history, without what only the shipped network tells."""
        epoch, train, validation = map(np.asarray, zip(*self.rows, strict=True))
        early = ended_by != "max_epochs"
        best = int(epoch[self._best_row])
        return History(epoch, train, validation, best, early, math.nan, math.nan, 0.0, ended_by)


def train(
    key: PRNGKeyArray,
    state: FittingState,
    step: Step,
    evaluate: Evaluate,
    count: int,
    weights: Weights,
    schedule: Schedule,
    report: Report,
) -> tuple[Variables, History]:
    """Train until the epochs end, validations no longer improve, or it is interrupted or diverges.

    Ctrl-C validates the parameters as they stand, and ends training; before the first step it is
    raised.

    Args:
      key: of the order of the data and all noise.
      state: where training starts.
      step, evaluate: as of :mod:`~iresnet_jax.fitting_steps`.
      count: of examples to train on.
      weights: of the examples held out.
      schedule: how long to train.
      report: is told how many steps are done.

    Returns:
      The averaged variables of the least validation loss, and the history.

    Raises:
      FloatingPointError: if no validation loss was finite.
    """
    course, epoch, losses = Course((), state.averaged), 0, []
    ended_by: EndedBy = "max_epochs"

    def validated() -> float:
        return mean_and_stderr(evaluate(state.averaged), weights)[0]

    try:
        for epoch, batches in enumerate(_batches(key, count, schedule), start=1):
            for indices, own_key in batches:
                state, loss = step(state, indices, own_key)
                losses.append(loss)
            if epoch % schedule.every and epoch != schedule.epochs:
                continue
            validation = validated()
            if not math.isfinite(validation):
                ended_by = "divergence"
                break
            course, losses = course.then(epoch, losses, validation, state.averaged), []
            report(epoch * schedule.steps, f"validation {validation:.4g} nats")
            if course.since_best >= schedule.patience and epoch < schedule.epochs:
                ended_by = "patience"
                break
    except KeyboardInterrupt:
        if not int(state.step):
            raise
        ended_by = "interrupt"
        seen = course.rows and not losses  # validated already, as it stands
        if not seen and math.isfinite(validation := validated()):
            course = course.then(epoch, losses, validation, state.averaged)
    if not course.rows:
        raise FloatingPointError(
            f"The validation loss is {validation} after epoch {epoch}: training diverged. Lower "
            "the learning rate."
        )
    history = course.history(ended_by)
    _warn(history, epoch)
    return course.best, history


def _warn(history: History, epoch: int) -> None:
    """Say what ended training, where it is not what was asked for."""
    told = {
        "interrupt": f"Training was interrupted in epoch {epoch}.",
        "divergence": f"Training diverged by epoch {epoch}: lower the learning rate.",
    }.get(history.ended_by)
    if told is not None:
        warnings.warn(
            f"{told} The parameters are those of the best validation, of epoch "
            f"{history.best_epoch}.",
            stacklevel=4,
        )


def _batches(
    key: PRNGKeyArray, count: int, schedule: Schedule
) -> Iterator[Iterator[tuple[np.ndarray, PRNGKeyArray]]]:
    """For each epoch, its batches: indices of one shape, and a key."""
    for epoch in range(schedule.epochs):
        order_key, noise_key = jax.random.split(jax.random.fold_in(key, epoch))
        order = np.asarray(jax.random.permutation(order_key, count))
        rows = order[: schedule.steps * schedule.batch_size].reshape(schedule.steps, -1)
        yield zip(rows, jax.random.split(noise_key, schedule.steps), strict=True)
