"""The clock of a cell, and the points of time at which its likelihood is taken."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator

import numpy as np

from benchmarks.accelerator.records import Record
from benchmarks.likelihood.problems import Bits, Problem

#: Part of a record that holds what training ended with.
LAST = "last"
_POINTS, _FIRST = 15, 0.05


class Clock:
    """Seconds since a process was asked for, without those for which the clock was stopped.

    Args:
      started: of ``now``, in the process that asked; ``time.monotonic`` is the same in all.
      now: seconds.
    """

    def __init__(self, started: float, now: Callable[[], float] = time.monotonic):
        self._started, self._now = started, now
        self._stopped_at: float | None = None

    @property
    def seconds(self) -> float:
        """Seconds that count."""
        at = self._now() if self._stopped_at is None else self._stopped_at
        return at - self._started

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Let nothing count meanwhile.

        Raises:
          RuntimeError: if the clock stands still already.
        """
        if self._stopped_at is not None:
            raise RuntimeError("The clock stands still already.")
        self._stopped_at = self._now()
        try:
            yield
        finally:
            self._started += self._now() - self._stopped_at
            self._stopped_at = None


def points_of_time(seconds: float) -> np.ndarray:
    """Return 15 points from a twentieth of the seconds to all of them, each 1.24 times the last."""
    return np.geomspace(_FIRST * seconds, seconds, _POINTS)


class Watch:
    """Takes a cell's likelihood when it is due; each value is on disk as soon as it is known.

    Args:
      record: of the cell.
      clock: of the cell.
      problem: the data.
      seconds: after which training is to end.
      most_steps: likewise; None: as many as come.
      enough: bits per dimension at or below which training may end.
    """

    def __init__(
        self,
        record: Record,
        clock: Clock,
        problem: Problem,
        *,
        seconds: float,
        most_steps: int | None = None,
        enough: float = -math.inf,
    ):
        self.clock = clock
        self._record, self._problem = record, problem
        self._times, self._seconds = points_of_time(seconds), seconds
        self._most_steps, self._enough = most_steps, enough
        self._steps, self._due, self._found_enough = 0, 0, False

    @property
    def over(self) -> bool:
        """Whether training is to end."""
        done = self._most_steps is not None and self._steps >= self._most_steps
        return done or self._found_enough or self.clock.seconds >= self._seconds

    def note(self, **figures: object) -> None:
        """Record what is known of a method before its first step."""
        self._record.add("method", **figures)

    def step(self, bits: Bits, ready: Callable[[], object] = lambda: None) -> None:
        """Count a training step, and evaluate what it led to where a point of time has come.

        Args:
          bits: of the parameters at hand.
          ready: waits for what is still computed; the clock goes on meanwhile.

        Raises:
          FloatingPointError: for a likelihood that is not finite.
        """
        self._steps += 1
        if self._due < len(self._times) and self.clock.seconds >= self._times[self._due]:
            ready()
            self._due = int(np.searchsorted(self._times, self.clock.seconds, side="right"))
            self._take(f"point {self._due:02d}", bits, whole=False)

    def finish(self, bits: Bits, by: str = "exact") -> None:
        """Evaluate what training ended with, on the whole test set.

        Args:
          bits: of what training ended with.
          by: how log-determinants are taken.

        Raises:
          FloatingPointError: for a likelihood that is not finite.
        """
        self._take(LAST, bits, whole=True, by=by)

    def _take(self, name: str, bits: Bits, *, whole: bool, **about: str) -> None:
        seconds = self.clock.seconds
        with self.clock.stopped():
            found = {**self._problem.judged(bits, whole=whole), **about}
            if not (math.isfinite(found["test"]) and math.isfinite(found["validation"])):
                raise FloatingPointError(f"The likelihood is not finite after {self._steps} steps.")
            self._found_enough |= found["test"] <= self._enough
            enough = self._found_enough
            self._record.add(name, seconds=seconds, steps=self._steps, enough=enough, **found)
