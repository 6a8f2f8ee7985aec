"""Figure 2: densities in the plane, by a coupling flow (Glow's layer) and by an i-ResNet.

The coupling flow is FlowJAX's, with as many affine couplings as the i-ResNet has blocks. Both take
the same number of steps on batches of the same size.
"""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from train.density import EXTENT, density_grid
from train.reproduce import plots
from train.reproduce.published import A_PICTURE
from train.reproduce.result import Context, Result, Row

_NAMES = ("checkerboard", "spirals", "8gaussians", "rings")
_LEARNING_RATE = 1e-3


def run(context: Context) -> Result:
    """Train both on every data set, and draw data and densities side by side."""
    names = context.by_scale(smoke=_NAMES[:1], cpu=_NAMES, paper=_NAMES)
    resolution = context.by_scale(smoke=40, cpu=200, paper=300)
    rows: list[Row] = []
    panels = []
    for name in names:
        ours = context.trainings.density(name)
        saved = ours.load()
        config, points = saved.config, saved.dataset
        flow, _ = saved.functions.shipped_flow(saved.state)
        coupling = CouplingFlow(points.train, config.depths[0], config.steps, config.batch_size)
        report = ours.report
        rows += [
            _row(name, "coupling flow", coupling.bits(points.test), coupling.num_parameters),
            _row(name, "i-ResNet", report["bits_per_dim"], report["num_parameters"]),
        ]
        densities = coupling.density_grid(resolution), density_grid(flow, EXTENT, resolution)
        panels.append((name, points.train, *densities))
    note = (
        f"Bits per dimension of 10,000 held-out points; checkerboard's entropy is 2.5. "
        f"{config.depths[0]} couplings or blocks, {config.steps:,} steps of {config.batch_size}."
    )
    return Result(rows, [_draw(context.folder / "figure-2.png", panels)], note=note)


class CouplingFlow:
    """FlowJAX's flow of affine couplings, fitted by maximum likelihood.

    Args:
      points: [n, dim], trained on.
      layers: couplings.
      steps: of Adam, its rate on a cosine.
      batch_size: points in a step.

    Raises:
      ValueError: where FlowJAX is not installed.
    """

    def __init__(self, points: np.ndarray, layers: int, steps: int, batch_size: int):
        try:
            import equinox
            import paramax
            from flowjax.distributions import Normal
            from flowjax.flows import coupling_flow
            from flowjax.train import fit_to_key_based_loss
        except ImportError as error:
            raise ValueError(
                "figure-2 needs FlowJAX: .venv/bin/pip install -e '.[paper]'."
            ) from error
        data, key = jnp.asarray(points), jax.random.key(0)
        base = Normal(jnp.zeros(points.shape[1]))
        flow = coupling_flow(key, base_dist=base, flow_layers=layers, nn_width=64, nn_depth=2)

        def loss(params: Any, static: Any, key: jax.Array) -> jax.Array:
            batch = jax.random.choice(key, data, (batch_size,))
            return -jnp.mean(paramax.unwrap(equinox.combine(params, static)).log_prob(batch))

        schedule = optax.cosine_decay_schedule(_LEARNING_RATE, steps)
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
        self._flow, _ = fit_to_key_based_loss(
            key, flow, loss_fn=loss, steps=steps, optimizer=optimizer, show_progress=False
        )
        density = paramax.unwrap(self._flow)
        self._log_prob = jax.jit(lambda x: density.log_prob(x))
        leaves = jax.tree.leaves(equinox.filter(self._flow, equinox.is_inexact_array))
        self.num_parameters = sum(leaf.size for leaf in leaves)

    def bits(self, points: np.ndarray) -> float:
        """Bits per dimension of points [n, dim]."""
        return float(-jnp.mean(self._log_prob(points)) / (points.shape[1] * math.log(2.0)))

    def density_grid(self, resolution: int) -> np.ndarray:
        """p(x) on a grid over :data:`train.density.EXTENT`, rows from low to high y."""
        left, right, low, high = EXTENT
        axes = np.linspace(left, right, resolution), np.linspace(low, high, resolution)
        grid = np.stack(np.meshgrid(*axes), axis=-1).astype(np.float32)
        return np.exp(np.asarray(self._log_prob(grid)))


def _row(name: str, model: str, bits: float, size: int) -> Row:
    return {
        "data": name,
        "model": model,
        "published": A_PICTURE,
        "measured bits/dim": round(bits, 4),
        "parameters": size,
    }


def _draw(path: Path, panels) -> Path:
    figure, axes = plots.sheet(len(panels), 3, size=(2.3, 2.4))
    for column, (name, points, coupling, ours) in zip(axes.T, panels, strict=True):
        bins = np.linspace(EXTENT[0], EXTENT[1], 91)
        counts, _, _ = np.histogram2d(points[:, 1], points[:, 0], bins=bins)
        brightest = float(np.quantile(ours, 0.995))
        options = {"origin": "lower", "cmap": "inferno", "interpolation": "bilinear"}
        plots.show(column[0], counts, name, **options, vmax=float(np.quantile(counts, 0.995)))
        for axis, density in zip(column[1:], (coupling, ours), strict=True):
            plots.show(axis, density, **options, vmin=0.0, vmax=brightest)
    for axis, label in zip(axes[:, 0], ("data", "coupling flow", "i-ResNet"), strict=True):
        axis.set_ylabel(label, fontsize=9.5, color=plots.INK)
    return plots.save(figure, path)
