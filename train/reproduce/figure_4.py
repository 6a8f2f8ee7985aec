"""Figure 4: bias and standard deviation of the truncated series; Theorem 4: its gradient's error.

On 8×8 crops the Jacobian can be written out, which gives log|det(I + J)|, every tr Jᵏ, and so the
series' expectation without noise. The standard deviation is that of the library's estimator over
its probes.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.ticker import MaxNLocator

from iresnet_jax import truncated_series, truncation_error_bound
from train.reproduce import plots
from train.reproduce.crops import Site, first_scale_sites, jacobians
from train.reproduce.published import NOT_QUOTED
from train.reproduce.result import Context, Result, Row

_SMALLEST = 1e-16  # float64 rounds here


class Measured(NamedTuple):
    """Of one branch, for n = 1, 2, …; log-determinants in nats per dimension.

    Attributes:
      bias: largest over the inputs.
      bound: certified, on it.
      deviation: standard deviation over single probes, root mean square over the inputs.
      gradient: largest entry of the gradient's error, over the largest of the gradient.
      lipschitz: L, certified.
      jacobian: the largest ‖J‖₂ at any input: what L is at these inputs.
    """

    bias: np.ndarray
    bound: np.ndarray
    deviation: np.ndarray
    gradient: np.ndarray
    lipschitz: float
    jacobian: float


def run(context: Context) -> Result:
    """Measure a trained branch, and a random one of the same shape, and draw both."""
    terms = context.by_scale(smoke=6, cpu=20, paper=30)
    probes = context.by_scale(smoke=8, cpu=200, paper=1000)
    count = context.by_scale(smoke=2, cpu=8, paper=16)
    saved = context.trainings.density("cifar10").load(max_examples=max(count, 512))
    images, _ = saved.program.network_images(saved.config, saved.dataset, saved.dataset.test[:512])
    trained, _ = saved.functions.shipped_flow(saved.state)
    variables = saved.functions.model.init(jax.random.key(1), images)
    random = saved.functions.flow(saved.functions.converge(variables))
    measured = {}
    for name, flow in (("trained", trained), ("random", random)):
        site = max(first_scale_sites(flow, images[:count]), key=lambda site: site.lipschitz)
        measured[name] = measure(site, terms, probes)
    rows = [_row(name, n, m) for name, m in measured.items() for n in (1, 5, 10, 20) if n <= terms]
    curves = [
        {"branch": name, "n": n + 1, **_at(m, n)}
        for name, m in measured.items()
        for n in range(terms)
    ]
    note = (
        f"The branch with the largest L of the CIFAR-10 density model's first scale, on {count} "
        f"8×8 crops ({site.dim} dimensions); nats per dimension; {probes} probes. "
        "Theorem 4: the gradient's error is O(Lⁿ)."
    )
    return Result(rows, [_draw(context.folder / "figure-4.png", measured)], curves, note)


def measure(site: Site, terms: int, probes: int) -> Measured:
    """Bias, deviation and gradient error of the series with 1 … ``terms`` terms on a branch."""
    jacobian = jacobians(site)
    exact = np.linalg.slogdet(np.eye(site.dim) + jacobian)[1]
    bias = np.abs(_series(jacobian, terms) - exact[:, None]).max(axis=0) / site.dim
    ns = np.arange(1, terms + 1)
    bound = np.array([truncation_error_bound(site.lipschitz, site.dim, n) for n in ns.tolist()])
    return Measured(
        bias,
        bound / site.dim,
        _deviation(site, terms, probes) / site.dim,
        _gradient_errors(site, terms),
        site.lipschitz,
        float(np.linalg.norm(jacobian, 2, axis=(1, 2)).max()),
    )


def _series(jacobian: np.ndarray, terms: int) -> np.ndarray:
    """Σ_{k=1}^{n} (−1)^{k+1}/k tr Jᵏ for n = 1 … terms, [inputs, terms]."""
    power, traces = np.eye(jacobian.shape[-1]), []
    for k in range(1, terms + 1):
        power = power @ jacobian
        traces.append((-1.0) ** (k + 1) / k * np.trace(power, axis1=-2, axis2=-1))
    return np.cumsum(np.stack(traces, axis=-1), axis=-1)


def _deviation(site: Site, terms: int, probes: int) -> np.ndarray:
    """Standard deviation of the library's estimator over single probes, for n = 1 … terms."""
    with jax.enable_x64(True):
        x = jnp.asarray(site.inputs)
        keys = jax.random.split(jax.random.key(0), probes)
        deviations = []
        for n in range(1, terms + 1):
            estimator = truncated_series(n)
            draws = jax.lax.map(lambda key, e=estimator: e(site.block.branch, x, key)[1], keys)
            deviations.append(float(jnp.sqrt(jnp.mean(jnp.var(draws, axis=0, ddof=1)))))
    return np.array(deviations)


def _gradient_errors(site: Site, terms: int) -> np.ndarray:
    """max |∇(series) − ∇ log|det|| / max |∇ log|det||, by the branch's weights, first input."""
    shape = (1, *site.inputs.shape[1:])

    def log_dets(branch: Any) -> jax.Array:
        """The series for n = 1 … terms, then log|det(I + J)|."""
        jacobian = jax.jacfwd(lambda x: branch(x.reshape(shape)).reshape(-1))(x)

        def term(power, k):
            power = power @ jacobian
            return power, -((-1.0) ** k) / k * jnp.trace(power)

        identity = jnp.eye(site.dim)
        _, parts = jax.lax.scan(term, identity, jnp.arange(1.0, terms + 1.0))
        exact = jnp.linalg.slogdet(identity + jacobian)[1]
        return jnp.append(jnp.cumsum(parts), exact)

    with jax.enable_x64(True):
        x = jnp.asarray(site.inputs[0]).reshape(-1)
        gradients = jax.jit(jax.jacrev(log_dets))(site.block.branch)
        leaves = [np.asarray(leaf).reshape(terms + 1, -1) for leaf in jax.tree.leaves(gradients)]
    gradient = np.concatenate(leaves, axis=1)
    return np.abs(gradient[:-1] - gradient[-1]).max(axis=1) / np.abs(gradient[-1]).max()


def _at(m: Measured, n: int) -> Row:
    return {
        "bias": float(m.bias[n]),
        "certified bound": float(m.bound[n]),
        "standard deviation": float(m.deviation[n]),
        "gradient error": float(m.gradient[n]),
        "L^n": m.lipschitz ** (n + 1),
    }


def _row(name: str, n: int, m: Measured) -> Row:
    values = {key: f"{value:.2e}" for key, value in _at(m, n - 1).items()}
    norms = {"L": round(float(m.lipschitz), 4), "largest ‖J‖": round(m.jacobian, 4)}
    about = {"branch": name, **norms, "terms": n}
    return {**about, "published": NOT_QUOTED, **values}


def _draw(path: Path, measured: dict[str, Measured]) -> Path:
    figure, axes = plots.sheet(3, size=(3.8, 4.0))
    value, deviation, gradient = axes[0]
    for colour, (name, m) in zip(plots.COLOURS, measured.items(), strict=False):
        ns = np.arange(1, len(m.bias) + 1)
        solid = {"color": colour, "marker": "o", "markersize": 3, "linewidth": 1.3, "label": name}
        dashed = {"color": colour, "linestyle": (0, (4, 3)), "linewidth": 1.1}
        dotted = {"color": colour, "linestyle": (0, (1, 2)), "linewidth": 1.4}
        value.semilogy(ns, m.bias, **solid)
        value.semilogy(ns, m.bound, label="certified bound", **dashed)
        deviation.plot(ns, m.deviation, **solid)
        gradient.semilogy(ns, m.gradient, **solid)
        for line, rate, sign in ((dashed, m.lipschitz, "L"), (dotted, m.jacobian, "‖J‖")):
            powers = m.gradient[0] * rate ** (ns - 1.0)
            gradient.semilogy(ns, powers, label=f"∝ {sign}ⁿ = {rate:.2f}ⁿ", **line)
    plots.style(value, "Bias", "terms n", "nats per dimension")
    plots.style(deviation, "Standard deviation", "terms n", "nats per dimension, one probe")
    plots.style(gradient, "Gradient (Theorem 4)", "terms n", "relative error, largest entry")
    for panel in (value, gradient):
        panel.set_ylim(bottom=max(panel.get_ylim()[0], _SMALLEST))
    deviation.set_ylim(bottom=0.0)
    for panel in axes[0]:
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        plots.legend_below(panel, columns=2)
    return plots.save(figure, path)
