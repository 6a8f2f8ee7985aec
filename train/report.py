"""The parts of a report that all programs share."""

import hashlib
import math
from typing import Any, NamedTuple

import jax
import numpy as np

from iresnet_jax.nn import num_parameters
from train.configs.base import TrainingConfig
from train.identity import CONTINUED, WARM, Content
from train.optim import describe_schedule
from train.progress import format_bound
from train.steps import TrainState
from train.workdir import environment, jsonable


class Trained(NamedTuple):
    """How training ended.

    Attributes:
      state: the last train state.
      interrupted: whether Ctrl-C or SIGTERM ended it.
      loss: the last that was logged, by an earlier run if this one had no step left.
      examples_per_second: speed between the last two logged steps.
      seconds: time spent training, by all processes that trained it one after another.
      stopped_by: the signal that ended it.
    """

    state: TrainState
    interrupted: bool
    loss: float
    examples_per_second: float
    seconds: float
    stopped_by: int | None = None


def run_report(
    config: TrainingConfig, trained: Trained, total_seconds: float, origin: Content
) -> dict[str, Any]:
    """Report what ran, from which ``origin``, for how long, and on which device.

    ``origin`` has what config.json says beside the settings of earlier plans and of a warm start.
    """
    state = trained.state
    return {
        **origin,
        "schedule": describe_schedule(config),
        "steps": int(state.step),
        "interrupted": trained.interrupted,
        "num_parameters": num_parameters(state.variables),
        "parameters_sha256": parameters_sha256(state.params),
        "train_loss": trained.loss,
        "examples_per_second": trained.examples_per_second,
        "train_seconds": trained.seconds,
        "total_seconds": total_seconds,
        "config": jsonable(config),
        "seed": config.seed,
        **environment(),
    }


def parameters_sha256(params: Any) -> str:
    """Hash all parameters, bit for bit, in the order of their names."""
    return tree_sha256(params)


def tree_sha256(tree: Any) -> str:
    """Hash all arrays of a pytree, bit for bit, in the order of their names."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def inversion_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the rows on how the network inverts; none where the report has nothing on it."""
    if "certified" not in report:
        return []
    converged = "all converged" if report["all_converged"] else "NOT all converged"
    return [
        ("certified invertible", "yes" if report["certified"] else "NO: see certificate.json"),
        ("largest Lipschitz bound of a block", format_bound(report["block_lipschitz_max"], 4)),
        ("reconstruction, max |error|", f"{report['reconstruction_max_error']:.2g}, {converged}"),
        *inverse_error_rows(
            report["inverse_error_in_double_guaranteed"],
            report["inverse_error_bound_guaranteed"],
            report["data_diameter"],
            report.get("inverse_error_in_double_examples"),
        ),
        ("‖F(x) − z‖, measured", f"{report['latent_residual_estimate_max']:.2g}"),
        ("inverse, max steps", str(report["inverse_steps_max"])),
    ]


def inverse_error_rows(
    in_double: float, in_single: float, diameter: float, examples: int | None = None
) -> list[tuple[str, str]]:
    """Return what is proved of the inverse of the whole network, ‖x − x*‖₂ at the data.

    Args:
      in_double: bound through an inverse in double precision.
      in_single: bound from float32 alone, which grows exponentially with depth.
      diameter: of the data; a bound that is not below it is vacuous, and not shown.
      examples: how many ``in_double`` is of, the first; all by default.
    """
    of = "" if examples is None else f", first {examples:,} examples"
    sharp = f"≤ {format_bound(in_double)} (by double precision{of})"
    if not in_double < diameter:
        deep = math.isfinite(in_double)  # else a block is not certified, or was not inverted
        sharp = f"none: {'vacuous at this depth' if deep else 'the bound is infinite'}"
    rows = [("error of the inverse, proved", sharp)]
    if in_single < diameter:
        rows.append(("the same from float32 alone", f"≤ {format_bound(in_single)}"))
    return rows


def common_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the rows that every program shows at the end of training."""
    seconds = f"{report['train_seconds']:.0f} s training, {report['total_seconds']:.0f} s in total"
    stopped = [("stopped by Ctrl-C", f"after step {report['steps']}")] * report["interrupted"]
    parameters = ("parameters", f"{report['num_parameters']:,}")
    rows = [*stopped, *inversion_rows(report), *origin_rows(report)]
    return [*rows, parameters, ("time", seconds)]


def origin_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Return rows on the run that another went on from, and on earlier numbers of steps."""
    rows = []
    if warm := report.get(WARM):
        rows.append(("started from", f"{warm['workdir']}, averages of step {warm['step']:,}"))
    for plan in report.get(CONTINUED, ()):
        told = f"step {plan['step']:,}, by a schedule for {plan['steps']:,} steps"
        rows.append(("trained first up to", told))
    return rows
