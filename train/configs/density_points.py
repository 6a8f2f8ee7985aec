"""Densities in the plane: one scale of dense blocks, with the exact log-determinant."""

import dataclasses
from pathlib import Path

from train.configs.base import DensityConfig

_BASE = DensityConfig(
    dataset="checkerboard",
    workdir=Path("runs/density-checkerboard"),
    depths=(24,),
    features=(64, 64, 64),
    coeff=0.97,
    activation="sin",
    train_estimator="exact",
    eval_estimator="exact",
    steps=3000,
    batch_size=500,
    max_draws=2,
    num_samples=10000,
)

_NAMES = ("8gaussians", "moons", "checkerboard", "spirals", "rings", "pinwheel")

CONFIGS = {
    name: dataclasses.replace(_BASE, dataset=name, workdir=Path(f"runs/density-{name}"))
    for name in _NAMES
}
