"""Which branch is worth having: the same flow with one branch after another.

All branches of a data set train with the same optimiser, batches and widths. Rows of equal steps
come first; those of equal time take as many steps as fit into the first row's time, by the times of
steps measured in turns. So other jobs may run beside it, and it may stop and resume.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy.optimize import minimize_scalar

from paper.blocks import first_scale_sites, jacobians
from paper.pieces import Context, Result, Row
from paper.step_times import step_ratio
from paper.tables import interval
from paper.trainings import Training, density_config
from train.configs import DENSITY, DensityConfig
from train.configs.density import UNBIASED
from train.workdir import write_json

Equal = Literal["steps", "time"]

_SETS = ("checkerboard", "spirals", "digits", "mnist")
_IMAGES = ("digits", "mnist")
_MNIST_STEPS = 3000
_LAYERS = 3  # of an image's branch


class Variant(NamedTuple):
    """A row of the table: its name, and what differs from the first one's settings."""

    name: str
    changes: Mapping[str, Any]


_ELU = {**UNBIASED, "activation": "elu"}
_LIPSWISH = {**UNBIASED, "activation": "lipswish"}

#: The paper's branch comes first: the others' time is measured by its.
VARIANTS = (
    Variant("the paper's, 5 terms", {"activation": "elu", "num_terms": 5}),
    Variant("the paper's, without bias", _ELU),
    Variant("learned lengths", {**UNBIASED, "activation": "learned_elu"}),
    Variant("LipSwish", _LIPSWISH),
    Variant("concatenation, LipSwish", {**_LIPSWISH, "branch": "concatenation"}),
    Variant("as a whole, one hidden layer", {**_ELU, "branch": "monlip-shallow"}),
    Variant("as a whole, two hidden layers", {**_ELU, "branch": "monlip"}),
    Variant("monotone", {**_ELU, "block": "monotone"}),
    Variant("mixing between blocks", {**_ELU, "mixing": True}),
    Variant("learned dequantisation", {**_ELU, "dequantization": "variational"}),
)
#: What differs from the first row in images alone.
_OF_IMAGES = ("the paper's, without bias", "learned dequantisation")


def run(context: Context) -> Result:
    """Train every branch on every data set, with equal steps, then in equal time."""
    rows: list[Row] = []
    for dataset in context.by_scale(smoke=["digits"], cpu=_SETS, paper=_SETS):
        for equal in context.by_scale(smoke=["steps"], cpu=["steps", "time"], paper=["steps"]):
            rows += _rows(context, dataset, equal)
            context.record(rows)
    note = (
        "Held-out likelihoods of the shipped, certified networks. Intervals: 95%, Student's t over "
        "the seeds. Step: its time over that of the first row's, timed in turns, compilation left "
        "out. Budget used: over test data and the blocks of the first scale (images: 8×8 crops), "
        "the largest of min over a of ‖J − aI‖/L. Settings: `paper/branches.py`."
    )
    return Result(rows, note=note)


def _rows(context: Context, dataset: str, equal: Equal) -> list[Row]:
    """Return the rows of a data set; of MNIST's, one seed each, and then three of the two best."""
    variants = list(variants_of(dataset))
    if context.scale == "smoke" or dataset != "mnist":
        seeds = 1 if context.scale == "smoke" else 3
        return [_row(context, dataset, variant, equal, seeds) for variant in variants]
    rows = [_row(context, dataset, variant, equal, 1) for variant in variants]
    for i in sorted(range(len(rows)), key=lambda i: rows[i]["bits/dim"])[:2]:
        rows[i] = _row(context, dataset, variants[i], equal, 3)
    return rows


def variants_of(dataset: str) -> Iterator[Variant]:
    for variant in VARIANTS:
        if dataset in _IMAGES or variant.name not in _OF_IMAGES:
            yield variant


def config_of(context: Context, dataset: str, variant: Variant) -> DensityConfig:
    """Return the settings of a row; steps, workdir and seed are still open.

    A branch that is normalised as a whole is allowed what the layers' product is. In the plane all
    log-determinants are exact.
    """
    config = _base(context, dataset)
    changes = dict(variant.changes)
    coeff = config.coeff or 1.0
    if changes.get("branch", "").startswith("monlip"):
        changes["coeff"] = coeff ** (_LAYERS if dataset in _IMAGES else len(config.features) + 1)
    if dataset not in _IMAGES:
        changes |= {"train_estimator": "exact"}
    return dataclasses.replace(config, **changes)


def _base(context: Context, dataset: str) -> DensityConfig:
    own = density_config(context.scale, dataset) if dataset != "digits" else DENSITY["digits"]
    config = dataclasses.replace(
        own, train_estimator="series", continuation=None, shared_length=False
    )
    if context.scale == "smoke":
        return config if config.smoke else config.smoke_variant()
    steps = context.by_scale(smoke=0, cpu=_MNIST_STEPS, paper=config.steps)
    steps = steps if dataset == "mnist" else config.steps
    return dataclasses.replace(config, dequantization="uniform", steps=steps)


def _row(context: Context, dataset: str, variant: Variant, equal: Equal, seeds: int) -> Row:
    trained = [_trained(context, dataset, variant, equal, seed) for seed in range(seeds)]
    reports = [training.report for training in trained]
    mean, half = interval([report["bits_per_dim"] for report in reports])
    return {
        "data": dataset,
        "branch": variant.name,
        "equal": equal,
        "bits/dim": round(mean, 4),
        "± 95%": "–" if math.isnan(half) else round(half, 4),
        "± probes and noise": round(max(r["bits_per_dim_stderr"] for r in reports), 4),
        "bias ≤": round(max(r["bits_per_dim_bias_bound"] for r in reports), 4),
        "seeds": len(reports),
        "steps": reports[0]["steps"],
        "step": round(_ratio(context, dataset, variant), 2),
        "parameters": reports[0]["num_parameters"],
        "largest L": round(max(r["block_lipschitz_max"] for r in reports), 4),
        "budget used": _budget(trained[0], context.by_scale(smoke=2, cpu=8, paper=32)),
        "certified": all(r["certified"] for r in reports),
    }


def _trained(context: Context, dataset: str, variant: Variant, equal: Equal, seed: int) -> Training:
    config = config_of(context, dataset, variant)
    name = f"branches-{dataset}-{_slug(variant)}"
    if equal == "time" and variant != VARIANTS[0]:
        steps = max(1, round(config.steps / _ratio(context, dataset, variant)))
        warmup = min(steps, config.warmup_steps)
        config = dataclasses.replace(config, steps=steps, warmup_steps=warmup)
        name += "-equal-time"
    return context.trainings.density_of(config, name, seed)


def _ratio(context: Context, dataset: str, variant: Variant) -> float:
    """Return the time of a step over that of the first row's; measured once, and kept."""
    if variant == VARIANTS[0]:
        return 1.0
    path = context.folder / "step-times.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    name = f"{dataset}: {variant.name}"
    if name not in known:
        data_dir = context.trainings.data_dir
        first, other = (
            dataclasses.replace(config_of(context, dataset, each), data_dir=data_dir)
            for each in (VARIANTS[0], variant)
        )
        known[name] = step_ratio(first, other, context.by_scale(smoke=1, cpu=11, paper=11))
        write_json(path, known)
    return known[name]


def _slug(variant: Variant) -> str:
    return variant.name.replace(", ", "-").replace(" ", "-").replace("'", "")


def _budget(training: Training, count: int) -> float | str:
    """The share of L that the blocks use at test data; – for blocks of another kind."""
    network = training.network(count)
    if training.report["config"].get("block") == "monotone" or training.report["config"]["mixing"]:
        return "–"
    sites = first_scale_sites(network.flow, network.x)
    used = [distance_to_scaling(jacobians(site)) / site.lipschitz for site in sites]
    return round(max(used), 3)


def distance_to_scaling(matrices: np.ndarray) -> float:
    """max over matrices J of min over a of ‖J − aI‖₂, convex in a."""
    identity = np.eye(matrices.shape[-1])

    def least(matrix: np.ndarray) -> float:
        def norm(a: float) -> float:
            return float(np.linalg.norm(matrix - a * identity, 2))

        return float(minimize_scalar(norm, bounds=(-1.0, 1.0), method="bounded").fun)

    return max(map(least, matrices))
