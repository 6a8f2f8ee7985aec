"""What a report says in a line, and which of its figures a reader should doubt."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from train.progress import format_bound

Report = Mapping[str, Any]
_SHOWN_PROBLEMS = 3


def verdict(report: Report, certificate: Mapping[str, Any] | None, *, what: str) -> str:
    """Return the verdict on a run: certificate, likelihood, accuracy; ``what`` are its examples."""
    if stopped(report):
        return f"Not evaluated: {_how_far(report)}"
    quality = "; ".join(figures_of(report, what=what))
    tail = f"; {quality}" if quality else ""
    if "certified" not in report:
        return f"Evaluated without a certificate{tail}"
    if report["certified"]:
        return f"Certified invertible{tail}"
    return f"NOT certified: {problems(certificate)}{tail}"


def figures_of(report: Report, *, what: str = "examples") -> Iterator[str]:
    """Yield what was measured, each with its error."""
    if "bits_per_dim" in report:
        on = _on(report, "likelihood_examples", what)
        yield f"{likelihood(report)} bits/dim{on}{_bias(report)}"
    if "accuracy" in report:
        on = _on(report, "accuracy_examples", what)
        yield f"{accuracy(report)} classified correctly{on}"


def likelihood(report: Report) -> str:
    """Format bits per dimension with their standard error."""
    value, stderr = (float(report[f"bits_per_dim{end}"]) for end in ("", "_stderr"))
    return f"{value:.4f} ± {stderr:.4f}" if math.isfinite(stderr) else f"{value:.4f} ± ?"


def accuracy(report: Report) -> str:
    """Format an accuracy with its standard error."""
    return f"{float(report['accuracy']):.2%} ± {float(report['accuracy_stderr']):.2%}"


def _bias(report: Report) -> str:
    return f" (bias ≤ {format_bound(float(report['bits_per_dim_bias_bound']))})"


def _on(report: Report, name: str, what: str) -> str:
    return f" on {report[name]:,} held-out {what}" if name in report else ""


def problems(certificate: Mapping[str, Any] | None) -> str:
    """Say why a network is not certified."""
    if certificate is None:
        return "its certificate is missing"
    blocks = [f"{b['name']}: {b['problem']}" for b in certificate["blocks"] if b["problem"]]
    found = [*blocks, *certificate["problems"]]
    rest = len(found) - _SHOWN_PROBLEMS
    shown = "; ".join(found[:_SHOWN_PROBLEMS])
    return f"{shown}; and {rest} more" if rest > 0 else shown or "no reason is stated"


def warnings(report: Report) -> Iterator[str]:
    """Yield what speaks against figures of a report."""
    if report.get("all_converged") is False:
        yield "Not every inverse of a test example met its tolerance."
    if report.get("samples_converged", True) is None:
        yield "Samples could not be drawn."
    elif report.get("samples_converged") is False:
        yield "Not every inverse of a sample met its tolerance."
    for end, what in {"stderr": "standard error", "bias": "bound on the bias"}.items():
        name = {"stderr": "bits_per_dim_stderr", "bias": "bits_per_dim_bias_bound"}[end]
        found, target = report.get(name), report.get(f"bits_per_dim_target_{end}")
        if found is not None and target is not None and not float(found) <= float(target):
            yield f"The {what} of the likelihood missed its target, {target:g} bits/dim."


def stopped(report: Report) -> bool:
    """Return whether training was stopped, so that nothing was evaluated."""
    return bool(report.get("interrupted", False))


def _how_far(report: Report) -> str:
    planned = report.get("config", {}).get("steps")
    of = f" of {planned:,}" if planned else ""
    return f"training was stopped after step {report.get('steps', 0):,}{of}."
