"""Densities of points in the plane, on a grid and as a picture."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from iresnet_jax import Flow
from train import figures
from train.data import Dataset
from train.points import SAMPLERS

#: The region of the built-in sets, (left, right, low, high).
EXTENT = (-4.5, 4.5, -4.5, 4.5)


def draw_points(
    path: Path, flow: Flow, dataset: Dataset, samples: np.ndarray, most: int | None = None
) -> None:
    """Draw ``most`` test data and samples, with the density between where they lie in the plane."""
    test = dataset.test[:most]
    if dataset.dim != 2:
        figures.points_beside_data(path, test, samples)
        return
    extent = extent_of(dataset)
    figures.density_beside_data(path, density_grid(flow, extent), extent, test, samples)


def extent_of(dataset: Dataset) -> tuple[float, float, float, float]:
    """Return the region to draw, (left, right, low, high): of the built-in sets, or of the data."""
    if dataset.name in SAMPLERS:
        return EXTENT
    data = np.concatenate([dataset.train, dataset.test])
    low, high = data.min(axis=0), data.max(axis=0)
    margin = 0.1 * (high - low) + 1e-6 * (1.0 + np.abs(high))
    (left, low_y), (right, high_y) = (low - margin).tolist(), (high + margin).tolist()
    return left, right, low_y, high_y


def density_grid(flow: Flow, extent, resolution: int = 300) -> np.ndarray:
    """Evaluate p(x) on a grid, [resolution, resolution], rows from low to high y."""
    left, right, low, high = extent
    xs = np.linspace(left, right, resolution, dtype=np.float32)
    ys = np.linspace(low, high, resolution, dtype=np.float32)
    grid = np.stack(np.meshgrid(xs, ys), axis=-1)
    log_prob = jax.jit(lambda flow, x: flow.log_prob(x))
    return np.exp(np.stack([np.asarray(log_prob(flow, jnp.asarray(row))) for row in grid]))
