"""Figure 1: the dynamics of a standard and of an invertible residual network, in one dimension.

Both map [−2, 2] to a noisy x³ at half depth and to a noisy identity at full depth. A block of an
i-ResNet is strictly monotone in one dimension, so its paths cannot cross.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes

from iresnet_jax import Flow, VectorFlow
from train.reproduce import plots
from train.reproduce.fit import fit
from train.reproduce.result import Context, Result

_LOW, _HIGH, _NOISE, _BATCH = -2.0, 2.0, 0.3, 512
_AXIS = "activation (log scale beyond ±2)"
_COEFF = 0.97
_START = 0.85  # of the kernels' usual size: with more, 20 free blocks do not train
_EVERY = 10  # of the paths is drawn


def run(context: Context) -> Result:
    """Train both, count the crossings of their paths, and draw them."""
    depth = context.by_scale(smoke=2, cpu=20, paper=20)
    steps = context.by_scale(smoke=20, cpu=5000, paper=20_000)
    starts = np.linspace(_LOW, _HIGH, 401, dtype=np.float32)
    networks = {"standard ResNet": None, "i-ResNet": _COEFF}
    paths = {
        name: paths_of(train_dynamics(coeff, depth, steps), starts)
        for name, coeff in networks.items()
    }
    rows = [
        {
            "network": name,
            "crossings published": "shown, not counted" if coeff is None else "none",
            "crossings measured": count_crossings(paths[name]),
            "rms error of x³ at half depth": round(_rms(paths[name][depth // 2], starts**3), 3),
            "rms error of x at full depth": round(_rms(paths[name][depth], starts), 3),
        }
        for name, coeff in networks.items()
    ]
    curves = [
        {"network": name, "start": start, "layer": layer, "activation": float(value)}
        for name in networks
        for start, path in zip(starts[::_EVERY].tolist(), paths[name].T[::_EVERY], strict=True)
        for layer, value in enumerate(path)
    ]
    note = (
        f"Pairs of {len(starts)} paths that change their order between two layers, over {depth} "
        f"blocks. Noise on the targets: standard deviation {_NOISE}."
    )
    return Result(rows, [_draw(context, paths, starts)], curves, note)


def count_crossings(paths: np.ndarray) -> int:
    """How often two paths change their order from one layer to the next.

    Args:
      paths: [layers, n]; straight lines join the layers, so a change of order is a crossing.
    """
    upper = np.triu_indices(paths.shape[1], 1)
    order = np.sign(paths[:, upper[1]] - paths[:, upper[0]])
    return int(np.sum(order[1:] * order[:-1] < 0))


def paths_of(flow: Flow, starts: np.ndarray) -> np.ndarray:
    """The activations [layers, n] of inputs [n], the inputs first."""
    return np.stack([np.asarray(h)[:, 0] for h in activations(flow, jnp.asarray(starts)[:, None])])


def activations(flow: Flow, x: jax.Array) -> list[jax.Array]:
    """The input of a vector flow, and what every block makes of it."""
    states = [x]
    for block in flow.blocks():
        states.append(block.forward(states[-1]))
    return states


def train_dynamics(coeff: float | None, depth: int, steps: int) -> Flow:
    model = VectorFlow(dim=1, depth=depth, features=(32,), coeff=coeff, actnorm=False)

    def loss(params, state, key):
        flow, updates = model.apply(
            {"params": params, **state}, method="network", mutable=["spectral"]
        )
        draw, middle, end = jax.random.split(key, 3)
        x = jax.random.uniform(draw, (_BATCH, 1), minval=_LOW, maxval=_HIGH)
        states = activations(flow, x)
        noise = functools.partial(jax.random.normal, shape=x.shape)
        cubic = x**3 + _NOISE * noise(middle)
        same = x + _NOISE * noise(end)
        errors = (states[depth // 2] - cubic) ** 2 + (states[depth] - same) ** 2
        return jnp.mean(errors), updates

    variables = dict(model.init(jax.random.key(0), jnp.zeros((1, 1))))
    variables["params"] = jax.tree.map(
        lambda leaf: leaf * (_START if leaf.ndim > 2 else 1.0), variables["params"]
    )
    params, state = fit(loss, variables, steps=steps, learning_rate=1e-3)
    return model.flow(model.converge({"params": params, **state}))


def _rms(values: np.ndarray, target: np.ndarray) -> float:
    return float(np.sqrt(np.mean((values - target) ** 2)))


def _magnify(panel: Axes, path: np.ndarray) -> None:
    """The layers with the most crossings once more, in a frame of their own."""
    counts = [count_crossings(path[i : i + 2]) for i in range(len(path) - 1)]
    first = int(np.argmax(counts))
    last = min(first + 2, len(path) - 1)
    low, high = path[first : last + 1].min(), path[first : last + 1].max()
    frame = panel.inset_axes((0.07, 0.64, 0.36, 0.33), xlim=(first, last), ylim=(low, high))
    for line in panel.lines:
        frame.plot(*line.get_data(), color=line.get_color(), linewidth=0.7)
    frame.set(xticks=range(first, last + 1), yticks=[])
    frame.tick_params(labelsize=7, colors=plots.MUTED, length=2)
    frame.spines[:].set_color(plots.MUTED)
    panel.indicate_inset_zoom(frame, edgecolor=plots.MUTED)


def _draw(context: Context, paths: dict[str, np.ndarray], starts: np.ndarray):
    figure, axes = plots.sheet(2, size=(4.6, 3.8))
    colours = plots.shades(len(starts[::_EVERY]))
    for panel, (name, path) in zip(axes[0], paths.items(), strict=True):
        layers = np.arange(len(path))
        for colour, line in zip(colours, path.T[::_EVERY], strict=True):
            panel.plot(layers, line, color=colour, linewidth=0.9)
        half = len(path) // 2
        panel.axvline(half, color=plots.MUTED, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
        count = count_crossings(path)
        plots.style(panel, f"{name}: {count:,} crossings", "block", _AXIS)
        panel.margins(x=0.02)
        last = len(path) - 1
        panel.set_xticks([0, half, last], ["0\ninput", f"{half}\n≈ x³", f"{last}\n≈ x"])
    low = min(path.min() for path in paths.values())
    high = max(path.max() for path in paths.values())
    for panel in axes[0]:
        panel.set_yscale("symlog", linthresh=2.0)
        panel.set_ylim(1.15 * low, 1.15 * high)
        panel.yaxis.set_major_formatter("{x:g}")
    for panel, path in zip(axes[0], paths.values(), strict=True):
        if count_crossings(path):
            _magnify(panel, path)
    return plots.save(figure, context.folder / "figure-1.png")
