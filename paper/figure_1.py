"""Figure 1: dynamics of a standard and of an invertible residual network, in one dimension.

Both map [−2, 2] to a noisy x³ at half depth and to a noisy identity at full depth. A block of an
i-ResNet is strictly monotone in one dimension, so its paths cannot cross.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib import colormaps
from matplotlib.axes import Axes

from iresnet_jax import Flow
from iresnet_jax.nn import VectorFlow, converge
from paper.pieces import Context, Result
from train.figures import DASHED, MUTED, sheet

_LOW, _HIGH, _NOISE, _BATCH = -2.0, 2.0, 0.3, 512
_NETWORKS = {"standard ResNet": None, "i-ResNet": 0.97}
_START = 0.85  # of the kernels' usual size; with more, 20 unconstrained blocks do not train
_EVERY = 10  # one path in so many is drawn


def run(context: Context) -> Result:
    """Train both networks, count the crossings of their paths, and plot them."""
    depth = context.by_scale(smoke=2, cpu=20, paper=20)
    steps = context.by_scale(smoke=20, cpu=5000, paper=20_000)
    starts = np.linspace(_LOW, _HIGH, 401, dtype=np.float32)
    rows, curves, paths = [], [], {}
    for name, coeff in _NETWORKS.items():
        states = activations(train_dynamics(coeff, depth, steps), jnp.asarray(starts)[:, None])
        path = paths[name] = np.stack([np.asarray(h)[:, 0] for h in states])
        rows.append(
            {
                "network": name,
                "crossings published": "shown, not counted" if coeff is None else "none",
                "crossings measured": count_crossings(path),
                "rms error of x³ at half depth": _rms(path[depth // 2] - starts**3),
                "rms error of x at full depth": _rms(path[depth] - starts),
            }
        )
        curves += [
            {"network": name, "start": start, "layer": layer, "activation": float(value)}
            for start, line in zip(starts[::_EVERY].tolist(), path.T[::_EVERY], strict=True)
            for layer, value in enumerate(line)
        ]
    note = (
        f"Crossings: pairs of {len(starts)} paths that change their order between two layers, over "
        f"{depth} blocks. Noise on the targets: standard deviation {_NOISE}."
    )
    context.record(rows, curves)
    return Result(rows, [_draw(context.folder / "figure-1.png", paths)], curves, note)


def count_crossings(paths: np.ndarray) -> int:
    """Count how often two of the paths [layers, n] change their order between layers.

    Straight lines join the layers, so a change of order is a crossing.
    """
    upper = np.triu_indices(paths.shape[1], 1)
    order = np.sign(paths[:, upper[1]] - paths[:, upper[0]])
    return int(np.sum(order[1:] * order[:-1] < 0))


def activations(flow: Flow, x: jax.Array) -> list[jax.Array]:
    """Return the input of a vector flow, and the output of every block."""
    states = [x]
    for block in flow.blocks():
        states.append(block.forward(states[-1]))
    return states


def train_dynamics(coeff: float | None, depth: int, steps: int) -> Flow:
    """Train a network in one scan, by Adam with a cosine schedule."""
    model = VectorFlow(dim=1, depth=depth, features=(32,), coeff=coeff, actnorm=False)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(1e-3, steps))
    )

    def loss(params, state, key):
        flow, state = model.advance({"params": params, **state})
        draw, middle, end = jax.random.split(key, 3)
        x = jax.random.uniform(draw, (_BATCH, 1), minval=_LOW, maxval=_HIGH)
        states = activations(flow, x)
        cubic = x**3 + _NOISE * jax.random.normal(middle, x.shape)
        same = x + _NOISE * jax.random.normal(end, x.shape)
        errors = (states[depth // 2] - cubic) ** 2 + (states[depth] - same) ** 2
        return jnp.mean(errors), state

    def step(carry, key):
        params, state, opt_state = carry
        grads, state = jax.grad(loss, has_aux=True)(params, state, key)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), state, opt_state), None

    @jax.jit
    def train(params, state):
        keys = jax.random.split(jax.random.key(0), steps)
        return jax.lax.scan(step, (params, state, optimizer.init(params)), keys)[0][:2]

    state = dict(model.init(jax.random.key(0), jnp.zeros((1, 1))))
    params = jax.tree.map(lambda x: x * (_START if x.ndim > 2 else 1.0), state.pop("params"))
    params, state = train(params, state)
    return model.flow(converge(model, {"params": params, **state}))


def _rms(errors: np.ndarray) -> float:
    return round(float(np.sqrt(np.mean(errors**2))), 3)


def _draw(path: Path, paths: dict[str, np.ndarray]) -> Path:
    low = min(lines.min() for lines in paths.values())
    high = max(lines.max() for lines in paths.values())
    with sheet(path, 1, 2, size=(4.6, 3.8)) as axes:
        for panel, (name, lines) in zip(axes[0], paths.items(), strict=True):
            shown = lines[:, ::_EVERY]
            panel.set_prop_cycle(color=colormaps["viridis"](np.linspace(0, 0.92, shown.shape[1])))
            panel.plot(shown, linewidth=0.9)
            last, half = len(lines) - 1, len(lines) // 2
            panel.axvline(half, color=MUTED, linewidth=0.8, linestyle=DASHED, zorder=0)
            panel.set_xticks([0, half, last], ["0\ninput", f"{half}\n≈ x³", f"{last}\n≈ x"])
            panel.set_yscale("symlog", linthresh=2.0)
            panel.yaxis.set_major_formatter("{x:g}")
            panel.margins(x=0.02)
            crossings = count_crossings(lines)
            panel.set(
                title=f"{name}: {crossings:,} crossings", xlabel="block",
                ylabel="activation (log scale beyond ±2)", ylim=(1.15 * low, 1.15 * high),
            )  # fmt: skip
            if crossings:
                magnify(panel, lines)
    return path


def magnify(panel: Axes, paths: np.ndarray) -> None:
    """Show the layers with the most crossings again, in an inset."""
    counts = [count_crossings(paths[i : i + 2]) for i in range(len(paths) - 1)]
    first = int(np.argmax(counts))
    last = min(first + 2, len(paths) - 1)
    seen = paths[first : last + 1]
    frame = panel.inset_axes((0.07, 0.64, 0.36, 0.33))
    frame.set(xlim=(first, last), ylim=(seen.min(), seen.max()))
    for line in panel.lines:
        frame.plot(*line.get_data(), color=line.get_color(), linewidth=0.7)
    frame.set(xticks=range(first, last + 1), yticks=[])
    frame.tick_params(labelsize=7, length=2)
    frame.spines[:].set_visible(True)
    panel.indicate_inset_zoom(frame, edgecolor=MUTED)
