"""Appendix: the error of the fixed-point inverse against its iterations.

Left, the whole network: error of recovered images after n iterations in every block, for several c
and the vanilla ResNet. Right, one block of each i-ResNet in float64, where rounding is negligible:
by Banach's theorem ‖xₙ − x*‖ ≤ Lⁿ ‖x₀ − x*‖, with L the branch's certified bound. Beside it,
Anderson acceleration, which is not in the paper.
"""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from iresnet_jax import Anderson, FixedPointIteration, fixed_point_inverse
from paper.blocks import Site, jacobians, largest_norm, strongest
from paper.images import COEFFS
from paper.pieces import Context, Result, Row
from paper.tables import A_PICTURE, name_of
from paper.trainings import Network
from train.figures import DASHED, legend_below, sheet

_LARGEST = 1e4
_ROUNDING = 1e-14  # of relative errors in float64; smaller ones are not drawn
_NEVER_MET = 1e-30  # a tolerance that no residual meets
_ANDERSON = (1, 2, 3, 4, 6, 8, 10, 12, 16)


class Decay(NamedTuple):
    """Convergence of one block's iteration: n -> ‖xₙ − x*‖ / ‖x₀ − x*‖, the largest over inputs.

    ``anderson`` is the same with Anderson acceleration, n evaluations before the last. L is
    certified; ``jacobian`` is the largest ‖J‖₂, the rate close to the solution.
    """

    plain: dict[int, float]
    anderson: dict[int, float]
    lipschitz: float
    jacobian: float


def run(context: Context) -> Result:
    """Track the iterations of figure 3's classifiers, and plot them."""
    iterations = context.by_scale(
        smoke=(1, 4), cpu=(1, 2, 3, 4, 6, 8, 12, 16, 24), paper=(1, 2, 3, 5, 8, 12, 16, 24, 32, 50)
    )
    terms = context.by_scale(smoke=8, cpu=24, paper=40)
    count = context.by_scale(smoke=4, cpu=32, paper=64)
    whole: dict[str, dict[int, float]] = {}
    blocks: dict[str, Decay] = {}
    rows = []
    for coeff in COEFFS:
        network = context.trainings.classifier("cifar10", coeff).network(count)
        name, last = name_of(coeff), iterations[-1]
        whole[name] = {n: network_error(network, n) for n in iterations}
        if coeff is not None:
            blocks[name] = block_decay(strongest(network.flow, network.x[:4]), terms)
        rows.append(
            {
                "model": name,
                "published": A_PICTURE,
                f"measured max |error| after {last}": f"{whole[name][last]:.2g}",
                **_rates(blocks.get(name)),
            }
        )
    parts = {
        "network": whole,
        "block": {name: decay.plain for name, decay in blocks.items()},
        "block, Anderson": {name: decay.anderson for name, decay in blocks.items()},
    }
    curves = [
        {"part": part, "model": name, "n": n, "error": error}
        for part, of_models in parts.items()
        for name, errors in of_models.items()
        for n, error in errors.items()
    ]
    note = (
        "L: the certified bound of the block with the largest L in the first scale; measured rate: "
        "(last error / first error)^(1/n), float64, 8×8 crops."
    )
    context.record(rows, curves)
    return Result(rows, [_draw(context.folder / "convergence.png", whole, blocks)], curves, note)


def network_error(network: Network, iterations: int) -> float:
    """Return the largest error of recovered inputs after ``iterations`` in every block."""

    @jax.jit
    def there_and_back(flow, x):
        # The last evaluation measures the residual, so n updates take n + 1 evaluations.
        return flow.inverse(flow.forward(x), FixedPointIteration(0.0, _NEVER_MET, iterations + 1))[
            0
        ]

    back = np.asarray(there_and_back(network.flow, network.x), np.float64)
    return float(np.nan_to_num(np.abs(back - network.x).max(), nan=np.inf))


def block_decay(site: Site, iterations: int) -> Decay:
    """Measure the errors of x ← y − g(x) from x = y, where y is the block's output at known x*."""
    branch = site.block.branch

    def accelerated(target, n):
        solver = Anderson(0.0, _NEVER_MET, n + 1)
        return fixed_point_inverse(branch, target, solver, lipschitz=site.lipschitz)[0]

    with jax.enable_x64(True):
        solution = jnp.asarray(site.inputs)
        target = solution + branch(solution)

        def error(x):
            return jnp.sqrt(jnp.sum((x - solution) ** 2, axis=tuple(range(1, x.ndim))))

        def update(x, _):
            return target - branch(x), error(x)

        _, errors = jax.jit(lambda x: jax.lax.scan(update, x, length=iterations + 1))(target)
        solve = jax.jit(accelerated, static_argnums=1)
        anderson = {
            n: float((error(solve(target, n)) / errors[0]).max())
            for n in _ANDERSON
            if n <= iterations
        }
    plain = dict(enumerate(np.asarray(errors / errors[0]).max(axis=1).tolist()))
    return Decay(plain, anderson, site.lipschitz, largest_norm(jacobians(site)))


def _rates(decay: Decay | None) -> Row:
    faster = "Anderson's error / the plain one's, after 4"
    if decay is None:
        return dict.fromkeys(("L", "largest ‖J‖", "measured rate", faster), "–")
    settled = [error for error in decay.plain.values() if error > _ROUNDING]
    rate = settled[-1] ** (1.0 / max(len(settled) - 1, 1))
    return {
        "L": round(decay.lipschitz, 4),
        "largest ‖J‖": round(decay.jacobian, 4),
        "measured rate": round(rate, 4),
        faster: f"{decay.anderson[4] / decay.plain[4]:.2g}",
    }


def _draw(path: Path, whole: dict[str, dict[int, float]], blocks: dict[str, Decay]) -> Path:
    with sheet(path, 1, 2) as axes:
        left, right = axes[0]
        for name, errors in whole.items():
            shown = np.minimum(list(errors.values()), _LARGEST)
            left.semilogy(list(errors), shown, "o-", markersize=3.5, label=name)
        for i, (name, decay) in enumerate(blocks.items()):
            ns, rate, colour = np.arange(len(decay.plain)), decay.lipschitz, f"C{i}"
            _draw_above_rounding(right, decay.plain, f"o-{colour}", name.split(", ")[-1])
            right.semilogy(ns, rate**ns, colour, ls=DASHED, lw=1.1, label=f"Banach: {rate:.2f}ⁿ")
            _draw_above_rounding(right, decay.anderson, f"^:{colour}", "Anderson")
        right.set_ylim(bottom=_ROUNDING / 10)
        left.set(title="Whole network", ylabel="max |error| of inputs")
        left.set_xlabel("iterations in every block")
        right.set(title="One block, float64", ylabel="‖xₙ − x*‖ / ‖x₀ − x*‖")
        right.set_xlabel("iterations n")
        for panel, columns in ((left, 2), (right, 3)):
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
            legend_below(panel, columns)
    return path


def _draw_above_rounding(panel: Axes, errors: dict[int, float], style: str, label: str) -> None:
    shown = {n: error for n, error in errors.items() if error > _ROUNDING}
    panel.semilogy(list(shown), list(shown.values()), style, markersize=3, label=label)
