"""The share of its Lipschitz constant that a branch uses, against its depth.

The paper bounds a branch by the product of its layers' norms, and asks for control of the block
itself. Here one number bounds dense branches of one to several hidden layers, once by their layers
(each of norm L^(1/layers)) and once as a whole (:class:`iresnet_jax.MonLip`), in flows of the
checkerboard. In the plane a grid of inputs finds the largest ‖J‖ of a block.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from iresnet_jax import certify
from paper.blocks import Site, first_scale_sites, jacobians
from paper.branches import distance_to_scaling
from paper.pieces import Context, Result, Row
from paper.trainings import density_config
from train.configs import DensityConfig
from train.figures import DASHED, legend_below, sheet

Normalised = Literal["by layers", "as a whole"]
Weights = Literal["initial", "trained"]

_LIPSCHITZ = 0.9
_REACH = 8.0  # of the grid, beyond the data and the latents


class Measured(NamedTuple):
    """Of the blocks of a flow, all relative to L, each the mean over the blocks.

    Attributes:
      used: largest min over a of ‖J − aI‖ at test data.
      slope: largest ‖J‖ on the grid.
      bound: certified for the branch as a whole.
    """

    used: float
    slope: float
    bound: float


def run(context: Context) -> Result:
    """Measure flows of each depth, as initialised and trained, and plot both."""
    depths = context.by_scale(smoke=(1, 2), cpu=range(1, 7), paper=range(1, 9))
    rows = [
        _row(context, hidden, normalised, weights)
        for weights in ("initial", "trained")
        for normalised in ("by layers", "as a whole")
        for hidden in depths
    ]
    note = (
        f"Checkerboard, dense branches of 32 channels, ELU, L = {_LIPSCHITZ} by the product or "
        "as a whole; one seed. Means over the blocks, relative to L. Used: the largest of min over "
        "a of ‖J − aI‖ at test points. Largest ‖J‖: on a grid of the plane. Bound: certified, "
        "of the branch as a whole."
    )
    context.record(rows)
    return Result(rows, [_draw(context.folder / "budget.png", rows)], note=note)


def config_of(
    context: Context, hidden: int, normalised: Normalised, weights: Weights
) -> DensityConfig:
    """Return the settings of a flow; workdir and seed are still open."""
    config = density_config(context.scale, "checkerboard")
    whole = normalised == "as a whole"
    steps = context.by_scale(smoke=config.steps, cpu=1000, paper=6000)
    changes = {
        "features": (32,) * hidden,
        "depths": context.by_scale(smoke=config.depths, cpu=(8,), paper=(16,)),
        "activation": "elu",
        "branch": "monlip" if whole else "bottleneck",
        "coeff": _LIPSCHITZ if whole else _LIPSCHITZ ** (1.0 / (hidden + 1)),
        "steps": steps if weights == "trained" else 1,
        "ema_decay": config.ema_decay if weights == "trained" else 0.0,
    }
    return dataclasses.replace(config, **changes)


def _row(context: Context, hidden: int, normalised: Normalised, weights: Weights) -> Row:
    config = config_of(context, hidden, normalised, weights)
    name = f"budget-{hidden}-{normalised.replace(' ', '-')}-{weights}"
    training = context.trainings.density_of(config, name)
    network = training.network(context.by_scale(smoke=16, cpu=200, paper=1000))
    proved = [branch.lipschitz for branch in certify(network.flow).branches]
    measured = measure(first_scale_sites(network.flow, network.x), proved)
    return {
        "weights": weights,
        "normalised": normalised,
        "hidden layers": hidden,
        "bits/dim": round(training.report["bits_per_dim"], 3),
        "used": round(measured.used, 3),
        "largest ‖J‖": round(measured.slope, 3),
        "bound": round(measured.bound, 3),
        "bound over largest ‖J‖": round(measured.bound / measured.slope, 2),
    }


def measure(sites: Sequence[Site], proved: Sequence[float]) -> Measured:
    """Measure blocks in the plane, whose bounds are ``proved``."""
    axis = np.linspace(-_REACH, _REACH, 65)
    grid = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    used = [distance_to_scaling(jacobians(site)) for site in sites]
    slopes = [
        np.linalg.norm(jacobians(site._replace(inputs=grid)), 2, axis=(1, 2)).max()
        for site in sites
    ]
    values = np.array([used, slopes, proved]) / _LIPSCHITZ
    return Measured(*map(float, values.mean(axis=1)))


def _draw(path: Path, rows: Sequence[Row]) -> Path:
    lines = {"used": "-", "largest ‖J‖": DASHED, "bound": (0, (1, 2))}
    with sheet(path, 1, 2, size=(4.4, 4.2)) as axes:
        for panel, weights in zip(axes[0], ("initial", "trained"), strict=True):
            for i, normalised in enumerate(("by layers", "as a whole")):
                own = [r for r in rows if (r["weights"], r["normalised"]) == (weights, normalised)]
                depths = [row["hidden layers"] for row in own]
                for column, style in lines.items():
                    values = [row[column] for row in own]
                    told = f"{normalised}: {column}"
                    panel.plot(
                        depths,
                        values,
                        color=f"C{i}",
                        ls=style,
                        marker="o",
                        markersize=3,
                        label=told,
                    )
            panel.set(title=f"{weights} weights", xlabel="hidden layers", ylim=(0.0, 1.05))
            panel.set_xticks(depths)
            legend_below(panel, columns=2)
        axes[0, 0].set_ylabel("share of L")
    return path
