"""Table 3: a Glow-style coupling network as a classifier, beside an i-ResNet of equal size."""

import numpy as np

from train.reproduce.published import NOT_QUOTED
from train.reproduce.result import Context, Result, Row
from train.reproduce.table_2 import comparable, interval, spread

_COEFF = 0.9


def run(context: Context) -> Result:
    """Train both on CIFAR-10 with the same steps, batches and seeds."""
    seeds = range(context.by_scale(smoke=1, cpu=3, paper=1))
    ours = [context.trainings.classifier("cifar10", _COEFF, seed).report for seed in seeds]
    size = ours[0]["num_parameters"]
    coupling = [context.trainings.coupling("cifar10", size, seed).report for seed in seeds]
    rows = [
        _row(context, "coupling (Glow-style)", coupling),
        _row(context, f"i-ResNet, c = {_COEFF}", ours),
    ]
    scales = ", ".join(f"{report['smallest_scale']:.2g}" for report in coupling)
    note = (
        "Affine couplings with 1×1 convolutions, as many as the i-ResNet has blocks, widths chosen "
        "for an equal number of parameters; the same optimiser, steps and batches. Inversion of "
        "test images: closed form for the couplings, fixed-point iteration for the i-ResNet. The "
        f"couplings divide by their scales, on those images at least {scales} (by seed): where one "
        "underflows to 0, the inverse is NaN."
    )
    return Result(rows, note=note)


def _row(context: Context, name: str, reports: list[dict]) -> Row:
    mean, half = interval([100.0 * (1.0 - report["accuracy"]) for report in reports])
    return {
        "data": reports[0]["config"]["dataset"],
        "architecture": name,
        "published error, %": NOT_QUOTED,
        "measured error, %": round(mean, 2),
        "± 95%": spread(half),
        "seeds": len(reports),
        "parameters": reports[0]["num_parameters"],
        "steps": reports[0]["steps"],
        "inversion, max |error|": f"{np.max([r['reconstruction_max_error'] for r in reports]):.2g}",
        "scale": comparable(context),
    }
