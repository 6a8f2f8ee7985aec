"""What was found of a cell, as a curve; when it crossed a threshold, and what it ended with."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np

from benchmarks.accelerator.records import COMPLETE, Figures, read

#: Part of a record that says why a cell ended early.
FAILED = "failed"
_Floats = np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Curve:
    """The likelihood of one cell over time.

    Attributes:
      seconds: of the clock, increasing, [points].
      test, stderr, validation: bits per dimension, [points].
      whole: whether a value is of the whole test set, [points].
      parameters: how many the method trains; None if it came to nothing.
      failed: why the cell failed; None if it did not.
      by: how log-determinants of the last value are taken.
      enough: whether training ended early, since the last threshold was passed with room.
    """

    seconds: _Floats
    test: _Floats
    stderr: _Floats
    validation: _Floats
    whole: _Floats
    parameters: int | None = None
    failed: str | None = None
    enough: bool = False
    by: str = "exact"

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """Read what a cell has found; None where it was not run to its end."""
        return cls.of(parts) if COMPLETE in (parts := read(path)) else None

    @classmethod
    def of(cls, parts: dict[str, Figures]) -> Self:
        """Return the curve of a record's parts."""
        rows = sorted((p for p in parts.values() if "test" in p), key=lambda p: p["seconds"])
        columns = ("seconds", "test", "stderr", "validation")
        values = [np.array([row[name] for row in rows], np.float64) for name in columns]
        whole = np.array([row["whole"] for row in rows], bool)
        parameters = parts.get("method", {}).get("parameters")
        failed = parts.get(FAILED, {}).get("reason")
        seconds, test, stderr, validation = values
        enough = any(row["enough"] for row in rows)
        by = next((row["by"] for row in rows if "by" in row), "exact")
        return cls(seconds, test, stderr, validation, whole, parameters, failed, enough, by)

    def __len__(self) -> int:
        return len(self.seconds)

    def time_to(self, threshold: float, limit: float = math.inf) -> float:
        """Return the seconds at the first point at or below a threshold; infinite without one.

        Points after the limit count for no one: what a method does then, others were not given.
        """
        below = np.flatnonzero((self.test <= threshold) & (self.seconds <= limit))
        return float(self.seconds[below[0]]) if below.size else math.inf

    @property
    def final(self) -> tuple[float, float]:
        """Test value and its standard error at the least validation loss; NaN without a point.

        Only values of the whole test set count.
        """
        places = np.flatnonzero(self.whole)
        if not places.size:
            return math.nan, math.nan
        best = places[np.argmin(self.validation[places])]
        return float(self.test[best]), float(self.stderr[best])


def median_and_range(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the median, the least and the largest value; infinite ones count, and may be these.

    Of an even number it is the larger one in the middle, so that no mean of ∞ is taken.
    """
    ordered = sorted(values)
    return ordered[len(ordered) // 2], ordered[0], ordered[-1]


def on_common_times(curves: Sequence[Curve], count: int = 200) -> tuple[_Floats, _Floats]:
    """Return times that all curves span, [count], and the values there, [curves, count].

    Between points, values are interpolated linearly in the logarithm of time.

    Raises:
      ValueError: where the curves have no time in common.
    """
    low = max(curve.seconds[0] for curve in curves)
    high = min(curve.seconds[-1] for curve in curves)
    if low > high:
        raise ValueError("The curves have no time in common.")
    times = np.geomspace(low, high, count)
    times[0], times[-1] = low, high  # which rounding may have left
    at = np.log(times)
    return times, np.stack([np.interp(at, np.log(curve.seconds), curve.test) for curve in curves])
