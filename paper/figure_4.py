"""Figure 4: bias and standard deviation of the truncated series. Theorem 4: error of its gradient.

On 8×8 crops the full Jacobian gives log|det(I + J)| and every tr Jᵏ, and so the expectation of the
series without noise. The standard deviation is that of the library's estimator over its probes.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.ticker import MaxNLocator

from iresnet_jax import TruncatedSeries, truncation_error_bound
from paper.blocks import Site, jacobians, largest_norm, strongest
from paper.pieces import Context, Result
from paper.tables import NOT_QUOTED
from train.figures import DASHED, legend_below, sheet

_SMALLEST = 1e-16  # float64 rounds here


class Measured(NamedTuple):
    """Measurements of a branch.

    Attributes:
      series: column of the table -> values for 1, 2, … terms; nats per dimension.
      lipschitz: L, certified.
      jacobian: the largest ‖J‖₂ over the inputs: the best possible L at these.
    """

    series: dict[str, np.ndarray]
    lipschitz: float
    jacobian: float

    def at(self, n: int) -> dict[str, float]:
        """Return the values of n terms."""
        return {name: float(values[n - 1]) for name, values in self.series.items()}


def run(context: Context) -> Result:
    """Measure a trained branch and a random one of the same shape, and plot both."""
    terms = context.by_scale(smoke=6, cpu=20, paper=30)
    probes = context.by_scale(smoke=8, cpu=200, paper=1000)
    count = context.by_scale(smoke=2, cpu=8, paper=16)
    network = context.trainings.density("cifar10").network(512)
    functions = network.functions
    variables = functions.model.init(jax.random.key(1), network.x)
    flows = {"trained": network.flow, "random": functions.flow(functions.converge(variables))}
    sites = {name: strongest(flow, network.x[:count]) for name, flow in flows.items()}
    measured = {name: measure(site, terms, probes) for name, site in sites.items()}
    rows = [
        {
            "branch": name,
            "L": round(m.lipschitz, 4),
            "largest ‖J‖": round(m.jacobian, 4),
            "terms": n,
            "published": NOT_QUOTED,
            **{key: f"{value:.2e}" for key, value in m.at(n).items()},
        }
        for name, m in measured.items()
        for n in (1, 5, 10, 20)
        if n <= terms
    ]
    curves = [
        {"branch": name, "n": n, **m.at(n)}
        for name, m in measured.items()
        for n in range(1, terms + 1)
    ]
    note = (
        f"The branch with the largest L of the CIFAR-10 density model's first scale, on {count} "
        f"8×8 crops ({sites['trained'].dim} dimensions); nats per dimension; {probes} probes. "
        "Theorem 4: the gradient's error is O(Lⁿ)."
    )
    context.record(rows, curves)
    return Result(rows, [_draw(context.folder / "figure-4.png", measured)], curves, note)


def measure(site: Site, terms: int, probes: int) -> Measured:
    """Measure bias, deviation and gradient of the series with 1 … ``terms`` terms on a branch.

    The bias is the largest over inputs. The deviation over single probes is the root mean square.
    The error of the gradient is that of its largest entry, relative to the largest entry.
    """
    ns, shape = range(1, terms + 1), (1, *site.inputs.shape[1:])

    def log_dets(branch: Any, x: jax.Array) -> jax.Array:
        """Return Σ_{k=1}^{n} (−1)^{k+1}/k tr Jᵏ for n = 1 … terms, then log|det(I + J)|."""
        jacobian = jax.jacfwd(lambda x: branch(x.reshape(shape)).reshape(-1))(x)

        def term(power, k):
            power = power @ jacobian
            return power, -((-1.0) ** k) / k * jnp.trace(power)

        identity = jnp.eye(site.dim)
        _, parts = jax.lax.scan(term, identity, jnp.arange(1.0, terms + 1.0))
        return jnp.append(jnp.cumsum(parts), jnp.linalg.slogdet(identity + jacobian)[1])

    with jax.enable_x64(True):
        branch, inputs = site.block.branch, jnp.asarray(site.inputs)
        flat = inputs.reshape(-1, site.dim)
        values = np.asarray(jax.jit(jax.vmap(log_dets, (None, 0)))(branch, flat))
        gradients = jax.jit(jax.jacrev(log_dets))(branch, flat[0])
        keys = jax.random.split(jax.random.key(0), probes)
        deviations = [_deviation(branch, inputs, keys, n) for n in ns]
    leaves = [np.asarray(leaf).reshape(terms + 1, -1) for leaf in jax.tree.leaves(gradients)]
    gradient = np.concatenate(leaves, axis=1)
    bounds = np.array([truncation_error_bound(site.lipschitz, site.dim, n) for n in ns])
    series = {
        "bias": np.abs(values[:, :-1] - values[:, -1:]).max(axis=0) / site.dim,
        "certified bound": bounds / site.dim,
        "standard deviation": np.array(deviations) / site.dim,
        "gradient error": np.abs(gradient[:-1] - gradient[-1]).max(1) / np.abs(gradient[-1]).max(),
        "L^n": site.lipschitz ** np.array(ns, float),
    }
    return Measured(series, site.lipschitz, largest_norm(jacobians(site)))


def _deviation(branch: Any, x: jax.Array, keys: jax.Array, terms: int) -> float:
    """Return the standard deviation of the library's estimator over single probes."""
    estimator = TruncatedSeries(terms)
    draws = jax.lax.map(lambda key: estimator(branch, x, key)[1], keys)
    return float(jnp.sqrt(jnp.mean(jnp.var(draws, axis=0, ddof=1))))


def _draw(path: Path, measured: dict[str, Measured]) -> Path:
    with sheet(path, 1, 3, size=(3.8, 4.0)) as axes:
        value, deviation, gradient = axes[0]
        for i, (name, m) in enumerate(measured.items()):
            ns, errors = np.arange(1, len(m.series["bias"]) + 1), m.series["gradient error"]
            solid = {"color": f"C{i}", "marker": "o", "markersize": 3, "lw": 1.3, "label": name}
            value.semilogy(ns, m.series["bias"], **solid)
            bound = m.series["certified bound"]
            value.semilogy(ns, bound, color=f"C{i}", ls=DASHED, lw=1.1, label="certified bound")
            deviation.plot(ns, m.series["standard deviation"], **solid)
            gradient.semilogy(ns, errors, **solid)
            rates = ((m.lipschitz, "L", DASHED), (m.jacobian, "‖J‖", (0, (1, 2))))
            for rate, sign, dashes in rates:
                powers, label = errors[0] * rate ** (ns - 1.0), f"∝ {sign}ⁿ = {rate:.2f}ⁿ"
                gradient.semilogy(ns, powers, color=f"C{i}", ls=dashes, lw=1.3, label=label)
        value.set(title="Bias", ylabel="nats per dimension")
        deviation.set(title="Standard deviation", ylabel="nats per dimension, one probe")
        gradient.set(title="Gradient (Theorem 4)", ylabel="relative error, largest entry")
        for panel in (value, gradient):
            panel.set_ylim(bottom=max(panel.get_ylim()[0], _SMALLEST))
        deviation.set_ylim(bottom=0.0)
        for panel in axes[0]:
            panel.set_xlabel("terms n")
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
            legend_below(panel, columns=2)
    return path
