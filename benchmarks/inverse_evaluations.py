"""How many evaluations of the branch does an inverse take, plain and by Anderson acceleration?

``python -m benchmarks.inverse_evaluations`` trains small flows on the digits at several Lipschitz
coefficients, then inverts every block at the latents of test images and of samples, both ways from
the same start, and prints the distribution over blocks and samples. The goal: half of the plain
iteration's evaluations where that takes more than 15, and never more than one above it. Beside it
stands what the best combination of evaluations would take there (:mod:`benchmarks.krylov`).
``--workdirs`` counts on finished density runs instead.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks.krylov import optimal_evaluations
from iresnet_jax import (
    Anderson,
    Chain,
    FixedPointIteration,
    Flow,
    Residual,
    Stack,
    fixed_point_inverse,
)
from train.configs import DENSITY
from train.saved import load_run
from train.short_training import set_up

_SLOW = 15


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to train, and what to count."""

    coeffs: tuple[float, ...] = (0.5, 0.7, 0.9, 0.97, 0.99)
    """Norm allowed to each layer."""
    workdirs: tuple[Path, ...] = ()
    """Finished density runs to take instead of training."""
    depths: tuple[int, ...] = (3, 3, 3)
    """Blocks of each scale."""
    features: int = 32
    """Channels inside the branches."""
    steps: int = 300
    """Training steps."""
    tolerance: float = 1e-5
    """Of the residual's norm, absolute."""
    max_steps: int = 1000
    """Evaluations at which the count ends."""
    count: int = 128
    """Test images, and as many samples."""
    optimum_count: int = 32
    """Of the slow samples of a block, those on which the optimum is counted."""
    json: Path | None = None
    """Where the result goes, beside the terminal."""


def main(options: Options) -> list[dict[str, Any]]:
    """Train, count, print, return and write the distributions."""
    rows = []
    head = (
        f"{'c':>5} {'L':>11} {'plain':>20} {'Anderson':>20} {'ratio':>6} {'best':>6} {'worst':>6}"
    )
    print(head)
    for coeff, flow, images in _models(options):
        row = {"coeff": coeff, **counts(flow, images, options)}
        rows.append(row)
        plain, fast = (
            " ".join(f"{row[name][q]:>4}" for q in ("min", "median", "p95", "max"))
            for name in ("plain", "anderson")
        )
        low, high = row["lipschitz"]
        ratio, best = (
            "-" if row[name] is None else f"{row[name]:.2f}"
            for name in ("ratio_where_plain_above_15", "optimal_ratio_there")
        )
        shown = f"{plain} {fast} {ratio:>6} {best:>6} {row['worst_excess']:>+6}"
        print(f"{coeff:>5} {low:.3f}-{high:.3f} {shown}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    return rows


def _models(options: Options) -> Iterator[tuple[float | None, Flow, np.ndarray]]:
    """Coefficient, flow with its bounds attached, test images as it takes them."""
    for workdir in options.workdirs:
        run = load_run(workdir, "best")
        flow, _ = run.functions.shipped_flow(run.state)
        yield run.config.coeff, flow, run.task.inputs(run.dataset.test[: options.count])
    for coeff in () if options.workdirs else options.coeffs:
        yield coeff, *trained(coeff, options)


def trained(coeff: float, options: Options) -> tuple[Flow, np.ndarray]:
    """A flow after training, its bounds attached, and test images as it takes them."""
    config = dataclasses.replace(
        DENSITY["digits"],
        coeff=coeff,
        depths=options.depths,
        features=(options.features,) * len(options.depths),
        steps=options.steps,
    )
    run = set_up(config)
    state = run.state
    for _ in range(config.steps):
        state, _ = run.step(state, run.devices.split(next(run.batches)))
    flow, _ = run.task.functions.shipped_flow(run.devices.one(state))
    return flow, run.task.inputs(run.task.dataset.test[: options.count])


def counts(flow: Flow, images: np.ndarray, options: Options) -> dict[str, Any]:
    """The distributions of evaluations over blocks and examples."""
    plain, fast, best, lipschitz = [], [], [], []
    for block, y in block_outputs(flow, images, options):
        steps, converged = _both(block, y, options.tolerance, options.max_steps)
        assert converged.all(), f"L = {block.lipschitz}: not solved in {options.max_steps} steps"
        plain.append(steps[0])
        fast.append(steps[1])
        best.append(_optimum(block, y, steps[0], options))
        lipschitz.append(float(np.asarray(block.lipschitz)))
    before, after = np.concatenate(plain), np.concatenate(fast)
    slow = before > _SLOW
    return {
        "lipschitz": [min(lipschitz), max(lipschitz)],
        "plain": _summary(before),
        "anderson": _summary(after),
        "mean_ratio": float(after.sum() / before.sum()),
        "ratio_where_plain_above_15": float(np.mean(after[slow] / before[slow]))
        if slow.any()
        else None,
        "optimal_ratio_there": float(np.mean(np.concatenate(best))) if slow.any() else None,
        "share_above_15": float(slow.mean()),
        "worst_excess": int((after - before).max()),
        "share_slower": float((after > before).mean()),
        "share_faster": float((after < before).mean()),
    }


def _optimum(block: Residual, y: jax.Array, plain: np.ndarray, options: Options) -> np.ndarray:
    """Optimal over plain evaluations, of the first samples on which plain is slow."""
    slow = np.flatnonzero(np.asarray(plain) > _SLOW)[: options.optimum_count]
    if not slow.size:
        return np.zeros(0)
    optimal = optimal_evaluations(block, y[slow], options.tolerance, options.max_steps)
    return optimal / np.asarray(plain)[slow]


def block_outputs(
    flow: Flow, images: np.ndarray, options: Options
) -> Iterator[tuple[Residual, jax.Array]]:
    """Every block with outputs to invert: of the images, and of samples on their way back."""
    key, solver = jax.random.key(0), FixedPointIteration(max_steps=1000)
    samples, _ = jax.jit(lambda flow: flow.sample(key, options.count, solver=solver))(flow)
    x = jnp.concatenate([images, samples])
    forward = jax.jit(lambda link, x: link.forward(x))
    for level in flow.levels:
        for link in cast(Chain, level).links:
            for block in link.unstacked() if isinstance(link, Stack) else ():
                actnorm, residual = cast(Any, block).links
                x = forward(residual, actnorm.forward(x))
                yield residual, x
            x = x if isinstance(link, Stack) else link.forward(x)
        x = x[..., x.shape[-1] // 2 :]


@jax.jit(static_argnums=(2, 3))
def _both(block: Residual, y: jax.Array, tolerance: float, max_steps: int):
    solvers = [kind(0.0, tolerance, max_steps) for kind in (FixedPointIteration, Anderson)]
    infos = [
        fixed_point_inverse(block.branch, y, solver, lipschitz=block.lipschitz)[1]
        for solver in solvers
    ]
    steps = [info.num_steps for info in infos]
    return steps, infos[0].converged & infos[1].converged


def _summary(steps: np.ndarray) -> dict[str, int]:
    quantiles = {"min": 0, "median": 50, "p95": 95, "p99": 99, "max": 100}
    return {name: int(np.percentile(steps, q)) for name, q in quantiles.items()}


if __name__ == "__main__":
    main(tyro.cli(Options))
