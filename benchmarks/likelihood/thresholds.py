"""The likelihoods whose time is told; those that were not set beforehand are the peers' own."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

Thresholds = tuple[float, float, float]

#: How far below the last threshold, in bits per dimension, training may end.
ROOM = 0.05
_FILE = Path(__file__).with_name("thresholds.json")


def thresholds() -> dict[str, Thresholds]:
    """Return the thresholds that are fixed, in bits per dimension, the easiest first, by data."""
    return {name: tuple(values) for name, values in json.loads(_FILE.read_text("utf-8")).items()}


def from_peers(finals: Sequence[float]) -> Thresholds:
    """Return the worst, the middle and the best final value of peers, rounded to 0.01 upwards.

    Args:
      finals: bits per dimension of each peer, tuned; the middle one is the median, or the worse of
        the two in the middle.

    Raises:
      ValueError: for none, or values that are not finite.
    """
    values = np.sort(np.asarray(finals, np.float64))[::-1]
    if not values.size or not np.isfinite(values).all():
        raise ValueError(f"Thresholds are of finite values, at least one; got {list(finals)}.")
    chosen = values[[0, (values.size - 1) // 2, -1]]
    worst, middle, best = (float(np.ceil(round(100.0 * v, 6)) / 100.0) for v in chosen)
    return worst, middle, best
