"""What power iteration hides: the layers' true norms along a training run, beside the estimates.

``python -m benchmarks.norms_along_training`` trains the digits model and draws, for the weights as
each step uses them, the norms by dense SVD, the power iteration's estimates and the rigorous
bounds; the picture is in docs/GUARANTEES.md.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from iresnet_jax import (
    Affine,
    Flow,
    gram_upper_bound,
    layer_upper_bound,
    layers_by_path,
    to_matrix,
)
from train.configs import DENSITY, find_config
from train.short_training import set_up

_INK, _ESTIMATE, _BOUND, _EACH = "#1f2933", "#d9622b", "#2f6fb3", "#c3c9d0"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to train, for how long, and where the picture goes."""

    config: str = "digits"
    """A config of the density program, with layers small enough for a dense SVD."""
    steps: int = 500
    """Training steps."""
    power_steps: int = 1
    """Power-iteration steps per training step."""
    output: Path = Path("docs/images/norms_along_training.png")
    """The picture."""
    json: Path | None = None
    """Where the numbers go, beside the terminal."""


class Norms(NamedTuple):
    """Norms of all layers as a step uses them, over coeff; [layers].

    Attributes:
      true: by dense SVD.
      estimate: by the power iteration that they were divided by.
      host_bound: :func:`iresnet_jax.layer_upper_bound`.
      traced_bound: :func:`iresnet_jax.gram_upper_bound`.
    """

    true: np.ndarray
    estimate: np.ndarray
    host_bound: np.ndarray
    traced_bound: np.ndarray


def main(options: Options) -> dict[str, Any]:
    """Train, measure, draw; returns the numbers of the worst layers."""
    config = dataclasses.replace(
        find_config(DENSITY, options.config, None),
        steps=options.steps,
        power_steps=options.power_steps,
        normalize="estimate",
        shrink=False,
    )
    run = set_up(config)
    state = run.state
    # as the next training step uses it: power iterations advanced once more
    network = jax.jit(lambda variables: run.task.model.advance(variables)[0])
    logged = _logged_steps(options.steps)
    history = []
    for completed in range(options.steps + 1):
        if completed in logged:
            flow = network(run.devices.one(state).variables)
            history.append(_norms(flow, config.coeff))
        state, _ = run.step(state, run.devices.split(next(run.batches)))
    norms = Norms(*(np.stack(values) for values in zip(*history, strict=True)))
    _draw(options.output, logged, norms, options.power_steps)
    above = (norms.true > 1.001).sum(axis=1)
    result = {
        "steps": logged.tolist(),
        "layers": norms.true.shape[1],
        "layers_above_by_0.1_percent": above.tolist(),
        **{name: np.round(values.max(1), 5).tolist() for name, values in norms._asdict().items()},
    }
    print(json.dumps(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return result


def _logged_steps(steps: int) -> np.ndarray:
    """0 … steps, closer together at the beginning."""
    return np.unique(np.r_[0, np.geomspace(1, steps, 40).round().astype(int)])


def _norms(flow: Flow, coeff: float | None) -> Norms:
    assert coeff is not None
    layers = [layer for block in flow.blocks() for layer in layers_by_path(block).values()]
    rows = [_layer(layer, coeff) for layer in layers]
    return Norms(*(np.array(values) / coeff for values in zip(*rows, strict=True)))


def _layer(layer: Affine, coeff: float) -> tuple[float, ...]:
    assert layer.sigma is not None
    matrix = np.asarray(_matrix(layer.operator), np.float64)
    return (
        float(np.linalg.norm(matrix, 2)),
        min(float(layer.sigma), coeff),
        layer_upper_bound(layer.operator),
        float(_traced_bound(layer.operator)),
    )


_matrix = jax.jit(to_matrix)
_traced_bound = jax.jit(gram_upper_bound)


def _draw(path: Path, steps: np.ndarray, norms: Norms, power_steps: int) -> None:
    figure = Figure(figsize=(8.0, 6.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    x = steps + 1  # the first training step is step 1
    top.plot(x, norms.true, color=_EACH, linewidth=0.6)
    top.plot([], [], color=_EACH, label="true norm of each layer")
    top.plot(x, norms.traced_bound.max(1), color=_BOUND, linestyle=":", label="bound, traced")
    top.plot(x, norms.host_bound.max(1), color=_BOUND, linewidth=3.0, label="rigorous bound")
    top.plot(x, norms.true.max(1), color=_INK, linewidth=1.2, label="true norm (dense SVD)")
    top.plot(x, norms.estimate.max(1), color=_ESTIMATE, label="power iteration's estimate")
    top.set_ylabel("norm / coeff")
    top.set_ylim(0.9, None)
    top.legend(frameon=False, title="largest of all layers")
    word = "step" if power_steps == 1 else "steps"
    top.set_title(f"Layers as trained, {power_steps} power-iteration {word} a training step")
    bottom.fill_between(x, (norms.true > 1.001).sum(1), color=_INK, step="mid", linewidth=0)
    bottom.set_ylabel(f"layers above\n(of {norms.true.shape[1]})")
    bottom.set_ylim(0, norms.true.shape[1])
    bottom.set_xlabel("training step")
    bottom.set_xscale("log")
    bottom.set_xlim(1, x[-1])
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e4e7eb")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


if __name__ == "__main__":
    main(tyro.cli(Options))
