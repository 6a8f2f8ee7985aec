"""Curves of a page, as SVG within it: readable on a phone, in the page's own colours."""

import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from train import figures
from train.metrics import series_of
from train.page_parts import Html, figure, joined

_SIZE = (4.6, 2.9)
_MOST_POINTS = 2000
#: Another one once the five colours are used up.
_LINES = ("-", "--", ":", "-.")
_VALIDATION = "Score on the validation set."
#: Colours of :mod:`train.figures` -> what the page calls them in light, dark and print.
_COLOURS = {
    "#ffffff": "var(--paper)",
    "#1f2933": "var(--ink)",
    "#000000": "var(--ink)",
    "#66717d": "var(--muted)",
    "#e4e7eb": "var(--rule)",
    "#0072b2": "var(--blue)",
    "#d55e00": "var(--orange)",
    "#009e73": "var(--green)",
    "#cc79a7": "var(--pink)",
    "#e69f00": "var(--yellow)",
}

Records = Sequence[Mapping[str, Any]]
#: A name, and the steps and values of its curve.
Curve = tuple[str, np.ndarray, np.ndarray]


def drawn(draw: Callable[[Path], Any], name: str, alt: str) -> Html:
    """Return what ``draw`` writes to a file as an SVG element.

    ``name`` keeps its ids apart from those of other pictures; ``alt`` is read to who cannot see it.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "curve.svg"
        draw(path)
        return _inline(path.read_text(encoding="utf-8"), name, alt)


def _inline(svg: str, name: str, alt: str) -> Html:
    """Make matplotlib's file a part of a page: no addresses, no ids that another one may have."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    head, rest = svg.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None
    head = f'<svg {box[0]} role="img" aria-label="{escape(alt)}"'
    rest = rest.replace("xlink:href", "href")
    rest = re.sub(r'\bid="', f'id="{name}-', rest)
    rest = re.sub(r'(url\(|href=")#', rf"\1#{name}-", rest)
    for colour, variable in _COLOURS.items():
        rest = rest.replace(colour, variable)
    return Html(f"{head}>{rest.strip()}")


def thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keep every k-th point, and the last, of a curve with more than a picture can show."""
    every = max(1, len(steps) // _MOST_POINTS)
    kept = np.unique(np.append(np.arange(0, len(steps), every), len(steps) - 1))
    return (steps[kept], values[kept]) if len(steps) else (steps, values)


def loss_curve(
    records: Records, metric: str, name: str, references: Mapping[str, float], *, validated: bool
) -> Html:
    """Draw the loss and, where it is in the same unit, the validation score."""
    steps, loss = thinned(*series_of(records, metric))
    if not len(steps):
        return Html()
    validation = series_of(records if validated else [], "validation")

    def draw(path: Path) -> None:
        figures.training_curve(path, steps, loss, *validation, name, references, size=_SIZE)

    alt = f"{name} over training steps; last logged {loss[-1]:.4g} at step {steps[-1]:,}"
    return figure(drawn(draw, "loss", alt), f"{name.capitalize()}, raw and smoothed.")


def metric_curve(
    records: Records,
    metric: str,
    ylabel: str,
    caption: str,
    *,
    line: float | None = None,
    log: bool = False,
) -> Html:
    """Draw one metric over steps, with a dashed ``line``; nothing where none is logged."""
    steps, values = thinned(*series_of(records, metric))
    if not np.isfinite(values).any():
        return Html()

    def draw(path: Path) -> None:
        with figures.sheet(path, size=_SIZE) as axes:
            panel = axes[0, 0]
            panel.plot(steps, values, "o-" if len(steps) < 50 else "-", markersize=3.5)
            if line is not None:
                panel.axhline(line, color=figures.MUTED, linestyle=figures.DASHED)
            _label(panel, ylabel, log=log and bool((values > 0).all()))

    alt = f"{caption} Last: {values[-1]:.4g} at step {steps[-1]:,}."
    return figure(drawn(draw, metric.replace("_", "-"), alt), caption)


def beside(curves: Sequence[Curve], ylabel: str, name: str, caption: str) -> Html:
    """Draw the curves of several runs in one picture."""
    curves = [curve for curve in curves if np.isfinite(curve[2]).any()]
    if not curves:
        return Html()

    def draw(path: Path) -> None:
        with figures.sheet(path, size=_SIZE) as axes:
            panel = axes[0, 0]
            for number, (label, steps, values) in enumerate(curves):
                colour, line = f"C{number % 5}", _LINES[number // 5 % len(_LINES)]
                marker = "o" if len(steps) < 50 else ""
                panel.plot(
                    *thinned(steps, values), color=colour, linestyle=line, marker=marker,
                    markersize=3, linewidth=1.2, label=literal(label),
                )  # fmt: skip
            _label(panel, ylabel)
            panel.set_ylim(*_settled(curves))
            figures.legend_below(panel, 1)

    alt = f"{caption} " + "; ".join(f"{label}: {y[-1]:.4g}" for label, _, y in curves)
    return figure(drawn(draw, name, alt), caption)


def literal(label: str) -> str:
    """Keep matplotlib from setting mathematics, and from hiding what begins with an underscore."""
    return label.replace("$", r"\$") if label[:1] != "_" else f"\u200a{literal(label[1:])}"


def _settled(curves: Sequence[Curve]) -> tuple[float, float]:
    """Fit all but the first twentieth of each run and rare spikes, which would flatten the rest."""
    late = [y[x > x[-1] / 20] if len(x) > 1 else y for _, x, y in curves]
    ends = [np.quantile(y[np.isfinite(y)], (0.01, 0.99)) for y in late if np.isfinite(y).any()]
    if not ends:
        return 0.0, 1.0
    low, high = np.min(ends), np.max(ends)
    margin = 0.06 * (high - low) or 0.5
    return float(low - margin), float(high + margin)


def _label(panel: Any, ylabel: str, *, log: bool = False) -> None:
    panel.set(xlabel="training step", ylabel=ylabel, yscale="log" if log else "linear")
    panel.margins(x=0.02)
    panel.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    panel.xaxis.set_major_formatter("{x:,.0f}")


def curves(
    records: Records,
    metric: str,
    name: str,
    references: Mapping[str, float],
    target: float | None,
    told: str,
    *,
    validated: bool,
) -> Html:
    """Return the curves of a run: loss, validation, norms, residuals, learning rate.

    A dashed line, of which ``told`` says what it is, shows the norm that layers may have.
    """
    return joined(
        [
            loss_curve(records, metric, name, references, validated=validated),
            Html() if validated else metric_curve(records, "validation", "score", _VALIDATION),
            metric_curve(
                records, "sigma", "norm", f"Largest norm of a layer as used in training.{told}",
                line=target,
            ),
            metric_curve(
                records, "inverse_residual", "residual",
                "Largest residual of a block's inverse, on validation examples.", log=True,
            ),
            metric_curve(records, "learning_rate", "learning rate", "Learning rate."),
        ]
    )  # fmt: skip
