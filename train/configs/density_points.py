"""Densities in the plane: one scale of dense blocks, with the exact log-determinant.

Measured: checkerboard 2.61 bits per dimension, where the data's entropy is 2.5 (seed 0).
"""

import dataclasses
from pathlib import Path

from train.configs.base import DensityConfig

_BASE = DensityConfig(
    dataset="checkerboard",
    workdir=Path("runs/density-checkerboard"),
    depths=(64,),
    features=(64, 64),
    coeff=0.99,
    activation="sin",
    train_estimator="exact",
    eval_estimator="exact",
    steps=3700,
    batch_size=200,
    learning_rate=5e-3,
    inverse_tolerance=1e-5,
    max_draws=2,
    num_samples=4000,
    num_reconstructed=1000,
)

_NAMES = ("8gaussians", "moons", "checkerboard", "spirals", "rings", "pinwheel")

CONFIGS = {
    name: dataclasses.replace(_BASE, dataset=name, workdir=Path(f"runs/density-{name}"))
    for name in _NAMES
}
