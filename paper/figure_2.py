"""Figure 2: densities in the plane, by a coupling flow (Glow's layer) and by an i-ResNet.

The coupling flow is FlowJAX's, with as many affine couplings as the i-ResNet has blocks. Both are
trained for the same number of steps, on batches of the same size.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from paper.pieces import Context, Result, Row
from paper.tables import A_PICTURE
from train.figures import sheet, show_density
from train.plane import EXTENT, density_grid

_NAMES = ("checkerboard", "spirals", "8gaussians", "rings")
_LEARNING_RATE = 1e-3

LogProb = Callable[[np.ndarray], jax.Array]


def run(context: Context) -> Result:
    """Train both on every data set, and plot data and densities side by side."""
    resolution = context.by_scale(smoke=40, cpu=200, paper=300)
    rows: list[Row] = []
    panels = []
    for name in context.by_scale(smoke=_NAMES[:1], cpu=_NAMES, paper=_NAMES):
        ours = context.trainings.density(name)
        flow, points, _, config, _ = ours.network()
        layers = config.depths[0]
        log_prob, size = coupling_flow(points.train, layers, config.steps, config.batch_size)
        measured = {
            "coupling flow": (bits_per_dim(log_prob, points.test), size),
            "i-ResNet": (ours.report["bits_per_dim"], ours.report["num_parameters"]),
        }
        rows += [
            {
                "data": name,
                "model": model,
                "published": A_PICTURE,
                "measured bits/dim": round(bits, 4),
                "parameters": parameters,
            }
            for model, (bits, parameters) in measured.items()
        ]
        densities = grid_of(log_prob, resolution), density_grid(flow, EXTENT, resolution)
        panels.append((name, points.train, *densities))
    note = (
        f"Bits per dimension of 10,000 held-out points; the checkerboard's entropy is 2.5. "
        f"{layers} couplings or blocks, {config.steps:,} steps of {config.batch_size}."
    )
    context.record(rows)
    return Result(rows, [_draw(context.folder / "figure-2.png", panels)], note=note)


def coupling_flow(
    points: np.ndarray, layers: int, steps: int, batch_size: int
) -> tuple[LogProb, int]:
    """Fit FlowJAX's flow of affine couplings to points [n, dim] by maximum likelihood.

    Return its log density and its number of parameters; raise a ValueError without FlowJAX.
    """
    try:
        import equinox
        from flowjax.distributions import Normal
        from flowjax.flows import coupling_flow
        from flowjax.train import fit_to_key_based_loss
        from flowjax.train.losses import MaximumLikelihoodLoss
    except ImportError as error:
        raise ValueError("figure-2 needs FlowJAX: .venv/bin/pip install -e '.[paper]'.") from error
    data, key = jnp.asarray(points), jax.random.key(0)
    base = Normal(jnp.zeros(points.shape[1]))
    flow = coupling_flow(key, base_dist=base, flow_layers=layers, nn_width=64, nn_depth=2)

    def loss(params: Any, static: Any, key: jax.Array) -> jax.Array:
        batch = jax.random.choice(key, data, (batch_size,))
        return MaximumLikelihoodLoss()(params, static, batch)

    schedule = optax.cosine_decay_schedule(_LEARNING_RATE, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    flow, _ = fit_to_key_based_loss(
        key, flow, loss_fn=loss, steps=steps, optimizer=optimizer, show_progress=False
    )
    leaves = jax.tree.leaves(equinox.filter(flow, equinox.is_inexact_array))
    return jax.jit(lambda x: flow.log_prob(x)), sum(leaf.size for leaf in leaves)


def bits_per_dim(log_prob: LogProb, points: np.ndarray) -> float:
    """Return the mean bits per dimension of points [n, dim]."""
    return float(-jnp.mean(log_prob(points)) / (points.shape[1] * math.log(2.0)))


def grid_of(log_prob: LogProb, resolution: int) -> np.ndarray:
    """Evaluate p(x) on a grid over :data:`train.plane.EXTENT`, rows from low to high y."""
    left, right, low, high = EXTENT
    axes = np.linspace(left, right, resolution), np.linspace(low, high, resolution)
    return np.exp(np.asarray(log_prob(np.stack(np.meshgrid(*axes), axis=-1).astype(np.float32))))


def _draw(path: Path, panels) -> Path:
    bins = np.linspace(*EXTENT[:2], 91)
    with sheet(path, 3, len(panels), size=(2.3, 2.4), layout="compressed") as axes:
        for column, (name, points, coupling, ours) in zip(axes.T, panels, strict=True):
            counts, _, _ = np.histogram2d(points[:, 1], points[:, 0], bins=bins)
            show_density(column[0], counts, EXTENT)
            for axis, density in zip(column[1:], (coupling, ours), strict=True):
                show_density(axis, density, EXTENT, brightest=float(np.quantile(ours, 0.995)))
            column[0].set_title(name)
        for axis, label in zip(axes[:, 0], ("data", "coupling flow", "i-ResNet"), strict=True):
            axis.set_ylabel(label)
    return path
