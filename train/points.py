"""Densities in the plane: sampled, not stored; every call returns the same points."""

from collections.abc import Callable

import numpy as np

Sampler = Callable[[np.random.Generator, int], np.ndarray]

_COUNTS = (50_000, 2_000, 10_000)


def draw_splits(name: str) -> list[np.ndarray]:
    """Sample training, validation and test points [n, 2] of a set in :data:`SAMPLERS`, float32."""
    streams = np.random.default_rng(0).spawn(len(_COUNTS))
    return [SAMPLERS[name](rng, n) for rng, n in zip(streams, _COUNTS, strict=True)]


def eight_gaussians(rng: np.random.Generator, n: int) -> np.ndarray:
    """Eight equal Gaussians of standard deviation 0.3, evenly spaced on a circle of radius 3."""
    angle = rng.integers(8, size=n) * (np.pi / 4)
    return _points(3 * _on_circle(angle) + 0.3 * rng.standard_normal((n, 2)))


def moons(rng: np.random.Generator, n: int) -> np.ndarray:
    """Two interleaved half circles of radius 2, with Gaussian noise of 0.2.

    Angles are uniform; scikit-learn's ``make_moons`` spaces them evenly: not an i.i.d. sample.
    """
    side = rng.choice((-1.0, 1.0), size=(n, 1))
    half_circle = 2 * _on_circle(rng.uniform(0, np.pi, n)) - (1.0, 0.5)
    return _points(side * half_circle + 0.2 * rng.standard_normal((n, 2)))


def checkerboard(rng: np.random.Generator, n: int) -> np.ndarray:
    """Uniform on the 8 squares of a 4×4 board over [−4, 4]² whose row + column is even.

    The density there is 1/32: the entropy is exactly 5 bits, 2.5 bits per dimension.
    """
    column = rng.integers(4, size=n)
    row = 2 * rng.integers(2, size=n) + column % 2
    corner = np.stack([column, row], axis=1)
    return _points(2 * (corner + rng.random((n, 2))) - 4)


def spirals(rng: np.random.Generator, n: int) -> np.ndarray:
    """Two arms of one and a half turns out to radius 3.6, with Gaussian noise of 0.1."""
    side = rng.choice((-1.0, 1.0), size=(n, 1))
    way = np.sqrt(rng.random(n))  # the root keeps the density along the arm nearly even
    arm = 3.6 * way[:, None] * _on_circle(3 * np.pi * way)
    return _points(side * arm + 0.1 * rng.standard_normal((n, 2)))


def rings(rng: np.random.Generator, n: int) -> np.ndarray:
    """Four concentric rings of equal weight: radii 0.9, 1.8, 2.7, 3.6, radial noise of 0.08."""
    radius = 0.9 * rng.integers(1, 5, size=n) + 0.08 * rng.standard_normal(n)
    return _points(radius[:, None] * _on_circle(rng.uniform(0, 2 * np.pi, n)))


def pinwheel(rng: np.random.Generator, n: int) -> np.ndarray:
    """Five Gaussian blades, sheared by an angle that grows with the radius."""
    radius = 2 + 0.6 * rng.standard_normal(n)
    across = 0.2 * rng.standard_normal(n)
    angle = rng.integers(5, size=n) * (2 * np.pi / 5) + 0.25 * np.exp(radius / 2)
    return _points(
        radius[:, None] * _on_circle(angle) + across[:, None] * _on_circle(angle + np.pi / 2)
    )


SAMPLERS: dict[str, Sampler] = {
    "8gaussians": eight_gaussians,
    "moons": moons,
    "checkerboard": checkerboard,
    "spirals": spirals,
    "rings": rings,
    "pinwheel": pinwheel,
}


def _on_circle(angle):
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _points(x):
    return x.astype(np.float32)
