"""Paired timings: A B A B …, since machines drift."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


def seconds(step: Callable[[], Any]) -> float:
    """How long one call takes."""
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def alternate(
    steps: Mapping[str, Callable[[], Any]], rounds: int, calls: int = 1
) -> dict[str, list[float]]:
    """Seconds a call of each contestant, one entry a round, the contestants taking turns.

    Args:
      steps: by name; each call runs to its end.
      rounds: how often everyone has a turn.
      calls: calls in a turn.
    """
    for step in steps.values():
        step(), step()  # the second finds its own results as arguments, perhaps compiling anew
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            taken[name].append(sum(seconds(step) for _ in range(calls)) / calls)
    return taken


def ratio(peer: list[float], ours: list[float]) -> dict[str, Any]:
    """The peer's time over ours, pair by pair, and its median, quartiles and the median times."""
    ratios = np.array(peer) / np.array(ours)
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    return {
        "ratio": float(np.median(peer) / np.median(ours)),
        "ratios": ratios.round(4).tolist(),
        "median_of_ratios": float(middle),
        "quartiles": [float(low), float(high)],
        "seconds_peer": float(np.median(peer)),
        "seconds_ours": float(np.median(ours)),
    }
