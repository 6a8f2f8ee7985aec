"""Figure 3: images recovered from a classifier's features, by i-ResNets and by a vanilla ResNet.

All go through the same fixed-point iteration, which converges for Lip(g) < 1 and fails without.
"""

from typing import Any

import numpy as np

from train.reproduce import plots
from train.reproduce.result import Context, Result
from train.reproduce.trainings import Training

COEFFS: tuple[float | None, ...] = (0.9, 0.7, 0.5, None)
_SHOWN = 10


def run(context: Context) -> Result:
    """Reconstruct test images with every classifier, and draw them in rows."""
    trained = {coeff: context.trainings.classifier("cifar10", coeff) for coeff in COEFFS}
    images: list[tuple[str, np.ndarray]] = []
    rows = []
    for coeff, training in trained.items():
        original, recovered, converged = _there_and_back(training)
        images = images or [("original", original)]
        images.append((name_of(coeff), recovered))
        error = np.abs(recovered - original)
        rows.append(
            {
                "model": name_of(coeff),
                "published": "fails" if coeff is None else "reconstructs",
                "measured max |error|": _plain(error.max()),
                "images within half a grey level": f"{_within(error, original)} of {len(error)}",
                "inverses converged": f"{converged} of {len(error)}",
                "certified": training.report["certified"],
            }
        )
    shown = [(label, np.nan_to_num(part[:_SHOWN])) for label, part in images]
    pictures = [plots.image_rows(context.folder / "figure-3.png", shown)]
    note = "Images in [0, 1]; half a grey level is 1/510. Shown clipped to [0, 1]."
    return Result(rows, pictures, note=note)


def name_of(coeff: float | None) -> str:
    """What a classifier is called in the figures."""
    return "vanilla ResNet" if coeff is None else f"i-ResNet, c = {coeff:g}"


def _there_and_back(training: Training) -> tuple[np.ndarray, np.ndarray, int]:
    saved: Any = training.load(max_examples=64)
    x, _ = saved.program.network_images(saved.config, saved.dataset, saved.dataset.test)
    flow, _ = saved.functions.shipped_flow(saved.state)
    there = saved.functions.there_and_back(flow, x)
    mean, std = np.array(saved.config.mean), np.array(saved.config.std)
    converged = int(np.asarray(there.info.converged).all(axis=0).sum())
    return x * std + mean, np.asarray(there.x, np.float64) * std + mean, converged


def _within(error: np.ndarray, original: np.ndarray) -> int:
    return int((error.reshape(len(original), -1).max(axis=1) < 0.5 / 255).sum())


def _plain(error: float) -> float:
    return float(f"{error:.3g}")
