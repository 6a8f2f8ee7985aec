"""A walk through the latents: great circles between those of test examples, mapped back to data."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from iresnet_jax import Flow
from train import figures
from train.networks import ModelFunctions

FRAMES = 8
_PAIRS = 8
_PATHS, _STEPS = 4, 1000


def great_circles(start: np.ndarray, end: np.ndarray, frames: int) -> np.ndarray:
    """Interpolate between rows of two arrays along great circles, [rows, frames, d].

    The direction at t ∈ [0, 1] is (sin((1 − t)θ) u + sin(tθ) v)/sin θ, with u and v those of the
    ends and θ the angle between them; the length is (1 − t)|start| + t|end|. So a path keeps to
    where a Gaussian in many dimensions has its mass, which a straight line leaves. Rows that lie on
    one line through the origin have no great circle: theirs is straight.
    """
    start, end = (np.asarray(a, np.float64)[:, None] for a in (start, end))
    t = np.linspace(0.0, 1.0, frames)[None, :, None]
    lengths = [np.linalg.norm(a, axis=-1, keepdims=True) for a in (start, end)]
    straight = (1.0 - t) * start + t * end
    u, v = (a / np.maximum(n, 1e-300) for a, n in zip((start, end), lengths, strict=True))
    # arccos of u·v would lose half of the digits where u and v are near each other
    angle = 2.0 * np.arctan2(
        np.linalg.norm(u - v, axis=-1, keepdims=True), np.linalg.norm(u + v, axis=-1, keepdims=True)
    )
    on_a_line = (np.sin(angle) < 1e-6) | (np.minimum(*lengths) == 0.0)
    sine = np.where(on_a_line, 1.0, np.sin(angle))
    direction = (np.sin((1.0 - t) * angle) * u + np.sin(t * angle) * v) / sine
    return np.where(on_a_line, straight, direction * ((1.0 - t) * lengths[0] + t * lengths[1]))


def walk(
    functions: ModelFunctions, flow: Flow, latents: Any, pairs: int, frames: int
) -> tuple[np.ndarray, int]:
    """Map paths between the latents of pairs of examples back, [pairs·frames, …].

    The great circles are those of the whole latent, in units of its prior where there is one. Also
    return how many inverses missed their tolerance or are not finite.
    """
    centres = [(np.asarray(p.mean), np.exp(np.asarray(p.log_std))) for p in flow.priors] or [
        (np.zeros(z.shape[1:], np.float32), 1.0) for z in latents
    ]
    units = [
        ((np.asarray(z)[: 2 * pairs] - mean) / std).reshape(2 * pairs, -1)
        for z, (mean, std) in zip(latents, centres, strict=True)
    ]
    sizes = np.cumsum([z.shape[1] for z in units])[:-1]
    joint = np.concatenate(units, axis=1)
    path = great_circles(joint[:pairs], joint[pairs:], frames).reshape(pairs * frames, -1)
    back = tuple(
        (part.reshape(-1, *mean.shape) * std + mean).astype(np.float32)
        for part, (mean, std) in zip(np.split(path, sizes, axis=1), centres, strict=True)
    )
    with jax.default_matmul_precision("highest"):
        x, info = functions.inverse(flow, back)
    finite = np.isfinite(x).reshape(len(x), -1).all(axis=1)
    good = np.asarray(info.converged).all(axis=0) & finite
    return x, int((~good).sum())


def draw_image_walk(
    path: Path,
    functions: ModelFunctions,
    flow: Flow,
    latents: Any,
    shown: Callable[[np.ndarray], np.ndarray],
    at_once: int = _PAIRS * FRAMES,
) -> None:
    """Draw rows of images, each from one test image to another.

    ``at_once`` is how many images the network has inverted before, if any: as many again compile
    nothing.
    """
    if len(latents[0]) < 2:
        raise ValueError("a walk leads from one test example to another; there is one.")
    pairs = max(1, min(_PAIRS, len(latents[0]) // 2, at_once // FRAMES))
    x, missed = walk(functions, flow, latents, pairs, FRAMES)
    figures.image_grids(path, [[(_told(missed), np.nan_to_num(shown(x)))]], FRAMES)


def draw_point_walk(
    path: Path,
    functions: ModelFunctions,
    flow: Flow,
    latents: Any,
    samples: np.ndarray,
) -> None:
    """Draw the paths over samples, by the first two of their two coordinates or more."""
    pairs = min(_PATHS, len(latents[0]) // 2)
    frames = max(FRAMES, min(_STEPS, len(samples) // pairs))
    x, missed = walk(functions, flow, latents, pairs, frames)
    with figures.sheet(path, size=(4.4, 4.2)) as axes:
        panel = axes[0, 0]
        panel.scatter(*samples.T[:2], s=2.0, alpha=0.35, color=figures.MUTED, linewidths=0)
        for number, way in enumerate(x.reshape(pairs, frames, -1)):
            panel.plot(*way.T[:2], color=f"C{number}", linewidth=1.6)
            panel.plot(*way[[0, -1]].T[:2], "o", color=f"C{number}", markersize=5)
        panel.set_title(_told(missed))
        if samples.shape[1] == 2:
            panel.set_aspect("equal", adjustable="datalim")


def _told(missed: int) -> str:
    return f"{missed} inverses missed their tolerance" if missed else ""
