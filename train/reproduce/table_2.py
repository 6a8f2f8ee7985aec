"""Table 2: the test error of classifiers against the norm c that is allowed to their layers."""

import math
from collections.abc import Sequence

import numpy as np
from scipy.special import stdtrit

from train.reproduce import plots
from train.reproduce.figure_3 import name_of
from train.reproduce.published import MEMORY, NOT_QUOTED, TABLE_2
from train.reproduce.result import Context, Result, Row

_ALL = (None, 0.9, 0.8, 0.7, 0.6, 0.5)


def run(context: Context) -> Result:
    """Train every classifier with several seeds; mean error and its interval."""
    datasets = context.by_scale(
        smoke=("mnist",), cpu=("mnist", "cifar10"), paper=("mnist", "cifar10", "cifar100")
    )
    coeffs = context.by_scale(smoke=(None, 0.9), cpu=(None, 0.9, 0.5), paper=_ALL)
    seeds = context.by_scale(smoke=2, cpu=3, paper=1)
    rows, measured = [], {}
    for dataset in datasets:
        for coeff in coeffs:
            reports = [
                context.trainings.classifier(dataset, coeff, seed).report for seed in range(seeds)
            ]
            errors = [100.0 * (1.0 - report["accuracy"]) for report in reports]
            measured[reports[0]["config"]["dataset"], coeff] = errors
            rows.append(_row(context, dataset, coeff, errors, reports))
    note = (
        f"Test errors in %. Published: {MEMORY}; 54 blocks on CIFAR and 21 on MNIST, 200 epochs. "
        "Intervals: 95%, Student's t over the seeds; they hold the seeds' spread, not the test "
        "set's."
    )
    curves = [
        {"data": data, "model": name_of(coeff), "seed": seed, "error": error}
        for (data, coeff), errors in measured.items()
        for seed, error in enumerate(errors)
    ]
    return Result(rows, [_draw(context, measured)], curves, note)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95% interval by Student's t (NaN for one value)."""
    n = len(values)
    if n < 2:
        return float(np.mean(values)), math.nan
    half = stdtrit(n - 1, 0.975) * np.std(values, ddof=1) / math.sqrt(n)
    return float(np.mean(values)), float(half)


def spread(half: float) -> float | str:
    """Half an interval as the tables show it."""
    return "–" if math.isnan(half) else round(half, 2)


def comparable(context: Context) -> str:
    """What the tables say of the scale."""
    if context.scale == "paper":
        return "the published set-up"
    return "not comparable with the published scale"


def _row(context: Context, dataset, coeff, errors, reports) -> Row:
    mean, half = interval(errors)
    published = TABLE_2[dataset][coeff] if context.scale != "smoke" else NOT_QUOTED
    return {
        "data": reports[0]["config"]["dataset"],
        "model": name_of(coeff),
        "published error": published,
        "measured error": round(mean, 2),
        "± 95%": spread(half),
        "seeds": len(errors),
        "steps": reports[0]["steps"],
        "parameters": reports[0]["num_parameters"],
        "certified": all(report["certified"] for report in reports),
        "scale": comparable(context),
    }


def _draw(context: Context, measured):
    datasets = list(dict.fromkeys(dataset for dataset, _ in measured))
    figure, axes = plots.sheet(len(datasets), size=(3.6, 3.3))
    for panel, dataset in zip(axes[0], datasets, strict=True):
        series = {coeff: errors for (name, coeff), errors in measured.items() if name == dataset}
        ordered = sorted(series, key=lambda c: math.inf if c is None else c)
        for place, coeff in enumerate(ordered):
            mean, half = interval(series[coeff])
            panel.errorbar(
                place, mean, yerr=None if math.isnan(half) else half, fmt="o",
                color=plots.COLOURS[1 if coeff is None else 0], capsize=4, markersize=6,
                label=None if place else "mean, 95% interval",
            )  # fmt: skip
            places = np.full(len(series[coeff]), place + 0.12)
            label = None if place else "seeds"
            panel.plot(places, series[coeff], ".", color=plots.MUTED, markersize=4, label=label)
        names = ["vanilla" if c is None else f"c = {c:g}" for c in ordered]
        panel.set_xticks(range(len(ordered)), names)
        panel.set_xlim(-0.5, len(ordered) - 0.5)
        plots.style(panel, dataset, "norm allowed to each layer", "test error, %")
        panel.set_ylim(0.0, min(panel.get_ylim()[1], 100.0))
        plots.legend_below(panel, columns=2)
    return plots.save(figure, context.folder / "table-2.png")
