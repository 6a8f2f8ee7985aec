"""Appendix: the error of the fixed-point inverse against its iterations.

Left, the whole network: error of recovered images after n iterations in every block, for several c
and the vanilla ResNet. Right, one block of each i-ResNet in float64, where rounding is far: by
Banach's theorem ‖xₙ − x*‖ ≤ Lⁿ ‖x₀ − x*‖, with L the branch's certified bound. Beside it Anderson's
acceleration, which is no part of the paper.
"""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.ticker import MaxNLocator

from iresnet_jax import fixed_point_inverse
from train.reproduce import plots
from train.reproduce.crops import Site, first_scale_sites, jacobians
from train.reproduce.figure_3 import COEFFS, name_of
from train.reproduce.published import A_PICTURE
from train.reproduce.result import Context, Result
from train.saved import SavedRun

_LARGEST = 1e4
_ROUNDING = 1e-14  # of relative errors in float64: below it nothing is drawn
_NEVER_MET = 1e-30
_ANDERSON_ERROR = "Anderson's error / the plain one's, after 4"
_ANDERSON = (1, 2, 3, 4, 6, 8, 10, 12, 16)


class Decay(NamedTuple):
    """How one block's iteration converges.

    Attributes:
      errors: ‖xₙ − x*‖ / ‖x₀ − x*‖ for n = 0, 1, …: the largest over the inputs.
      anderson: n -> the same with Anderson's acceleration, n evaluations before the last.
      lipschitz: L, certified.
      jacobian: the largest ‖J‖₂ at any input: the rate close to the solution.
    """

    errors: np.ndarray
    anderson: dict[int, float]
    lipschitz: float
    jacobian: float


def run(context: Context) -> Result:
    """Follow the iterations of figure 3's classifiers, and draw them."""
    iterations = context.by_scale(
        smoke=(1, 4), cpu=(1, 2, 3, 4, 6, 8, 12, 16, 24), paper=(1, 2, 3, 5, 8, 12, 16, 24, 32, 50)
    )
    terms = context.by_scale(smoke=8, cpu=24, paper=40)
    count = context.by_scale(smoke=4, cpu=32, paper=64)
    whole, blocks, rows = {}, {}, []
    for coeff in COEFFS:
        saved = context.trainings.classifier("cifar10", coeff).load(max_examples=count)
        name = name_of(coeff)
        whole[name] = network_errors(saved, iterations)
        row = {
            "model": name,
            "published": A_PICTURE,
            f"measured max |error| after {iterations[-1]}": f"{whole[name][-1]:.2g}",
        }
        if coeff is not None:
            flow, _ = saved.functions.shipped_flow(saved.state)
            sites = first_scale_sites(flow, _network_input(saved)[:4])
            blocks[name] = block_decay(max(sites, key=lambda s: s.lipschitz), terms)
        rows.append({**row, **_rates(blocks.get(name))})
    picture = _draw(context.folder / "convergence.png", iterations, whole, blocks)
    curves = [
        {"part": "network", "model": name, "n": n, "error": error}
        for name, errors in whole.items()
        for n, error in zip(iterations, errors, strict=True)
    ] + [
        {"part": "block", "model": name, "n": n, "error": error}
        for name, decay in blocks.items()
        for n, error in enumerate(decay.errors.tolist())
    ]
    curves += [
        {"part": "block, Anderson", "model": name, "n": n, "error": error}
        for name, decay in blocks.items()
        for n, error in decay.anderson.items()
    ]
    note = (
        "L: the certified bound of the block with the largest L in the first scale; measured rate: "
        "(last error / first error)^(1/n), float64, 8×8 crops."
    )
    return Result(rows, [picture], curves, note)


def network_errors(saved: SavedRun, iterations: tuple[int, ...]) -> list[float]:
    """Largest error of recovered inputs after so many iterations in every block."""
    flow, _ = saved.functions.shipped_flow(saved.state)
    x = _network_input(saved)
    errors = []
    for n in iterations:
        # The last evaluation measures the residual, so n updates take n + 1 of them.
        back, _ = jax.jit(lambda flow, x, n=n: _there_and_back(flow, x, n + 1))(flow, x)
        error = np.abs(np.asarray(back, np.float64) - x).max()
        errors.append(float(np.nan_to_num(error, nan=np.inf)))
    return errors


def block_decay(site: Site, iterations: int) -> Decay:
    """The errors of x ← y − g(x) from x = y, where y is the block's output at known x*."""
    with jax.enable_x64(True):
        solution = jnp.asarray(site.inputs)
        branch = site.block.branch
        target = solution + branch(solution)

        def update(x, _):
            return target - branch(x), _norms(x - solution)

        _, errors = jax.jit(lambda x: jax.lax.scan(update, x, length=iterations + 1))(target)
        relative = np.asarray(errors / errors[0]).max(axis=1)
        anderson = {
            n: float((_norms(_accelerated(site, target, n) - solution) / errors[0]).max())
            for n in _ANDERSON
            if n <= iterations
        }
    norms = np.linalg.norm(jacobians(site), 2, axis=(1, 2))
    return Decay(relative, anderson, site.lipschitz, float(norms.max()))


def _accelerated(site: Site, target: jax.Array, n: int) -> jax.Array:
    def solve(target):
        return fixed_point_inverse(
            site.block.branch,
            target,
            max_steps=n + 1,
            lipschitz=site.lipschitz,
            solver="anderson",
            rtol=0.0,
            atol=_NEVER_MET,
        )[0]

    return jax.jit(solve)(target)


def _there_and_back(flow, x, max_steps):
    return flow.inverse(flow.forward(x), rtol=0.0, atol=_NEVER_MET, max_steps=max_steps)


def _network_input(saved: SavedRun) -> np.ndarray:
    return saved.program.network_images(saved.config, saved.dataset, saved.dataset.test)[0]


def _norms(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(x**2, axis=tuple(range(1, x.ndim))))


def _rates(decay: Decay | None) -> dict[str, object]:
    if decay is None:
        return dict.fromkeys(("L", "largest ‖J‖", "measured rate", _ANDERSON_ERROR), "–")
    settled = decay.errors[decay.errors > _ROUNDING]
    rate = settled[-1] ** (1.0 / max(len(settled) - 1, 1))
    return {
        "L": round(decay.lipschitz, 4),
        "largest ‖J‖": round(decay.jacobian, 4),
        "measured rate": round(float(rate), 4),
        _ANDERSON_ERROR: f"{decay.anderson[4] / decay.errors[4]:.2g}",
    }


def _draw(path: Path, iterations, whole, blocks) -> Path:
    figure, axes = plots.sheet(2, size=(4.6, 3.6))
    left, right = axes[0]
    for colour, (name, errors) in zip(plots.COLOURS, whole.items(), strict=False):
        shown = np.minimum(errors, _LARGEST)
        left.semilogy(iterations, shown, "o-", color=colour, markersize=3.5, label=name)
    for colour, (name, decay) in zip(plots.COLOURS, blocks.items(), strict=False):
        ns = np.arange(len(decay.errors))
        seen = decay.errors > _ROUNDING
        label, rate = name.split(", ")[-1], decay.lipschitz
        right.semilogy(ns[seen], decay.errors[seen], "o-", color=colour, markersize=3, label=label)
        banach = {"linestyle": (0, (4, 3)), "linewidth": 1.1, "label": f"Banach: {rate:.2f}ⁿ"}
        right.semilogy(ns, rate**ns, color=colour, **banach)
        fast = {n: error for n, error in decay.anderson.items() if error > _ROUNDING}
        right.semilogy(
            list(fast), list(fast.values()), "^:", color=colour, markersize=4, label="Anderson"
        )
    right.set_ylim(bottom=_ROUNDING / 10)
    plots.style(left, "Whole network", "iterations in every block", "max |error| of inputs")
    plots.style(right, "One block, float64", "iterations n", "‖xₙ − x*‖ / ‖x₀ − x*‖")
    for panel, columns in ((left, 2), (right, 3)):
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        plots.legend_below(panel, columns)
    return plots.save(figure, path)
