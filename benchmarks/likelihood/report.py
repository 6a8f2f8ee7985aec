"""What was found: for each data set a table in Markdown, and a picture of the curves."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.likelihood.cells import DEFAULT, SECONDS, TUNED, Cell, Size, folder
from benchmarks.likelihood.curves import Curve, median_and_range, on_common_times
from benchmarks.likelihood.methods import METHODS, methods_on
from benchmarks.likelihood.thresholds import Thresholds, from_peers, thresholds

#: (method, setting) -> the curves of its seeds.
Found = Mapping[tuple[str, str], Sequence[Curve]]

_MOST_SEEDS = 100
_LATEST = 1.02  # of the seconds: the last step may end after them


def write_report(out: Path, data: Sequence[str], size: Size = "full") -> None:
    """Write ``table.md`` and ``curves.png`` of each data set of which something is known.

    Where its thresholds are not fixed, those of the peers' tuned runs go to ``thresholds.json``.
    """
    for name in data:
        if not (found := found_in(out, name, size)):
            continue
        place = folder(out, name, size)
        levels = thresholds().get(name)
        if levels is None and (levels := proposed(found)) is not None:
            text = json.dumps({name: levels}) + "\n"
            (place / "thresholds.json").write_text(text, encoding="utf-8")
        (place / "table.md").write_text(table(name, found, levels), encoding="utf-8")
        draw(place / "curves.png", name, found, levels)


def found_in(out: Path, data: str, size: Size = "full") -> Found:
    """Read what is known of a data set, of seeds from 0 on."""
    found: dict[tuple[str, str], list[Curve]] = {}
    for method in methods_on(data):
        for setting in (DEFAULT, TUNED):
            for seed in range(_MOST_SEEDS):
                cell = Cell(data=data, method=method, setting=setting, seed=seed, size=size)
                if (curve := Curve.read(cell.record(out))) is None:
                    break
                found.setdefault((method, setting), []).append(curve)
    return found


def proposed(found: Found) -> Thresholds | None:
    """Return thresholds by the peers' tuned runs; None where there are none."""
    finals = []
    for (method, setting), curves in found.items():
        if setting == TUNED and not METHODS[method].ours:
            values = [value for value in _finals(curves) if math.isfinite(value)]
            finals += [median_and_range(values)[0]] if values else []
    return from_peers(finals) if finals else None


def table(data: str, found: Found, levels: Thresholds | None) -> str:
    """Return one row for each method and setting; the least time to a threshold is bold."""
    heads = ["method", "setting", *(f"s to {level:.2f}" for level in levels or ())]
    heads += ["final, bits/dim", "seeds", "parameters"]
    lines = [_row(heads), _row(["---"] * len(heads))]
    limit = _LATEST * SECONDS[data]
    times = {
        row: [median_and_range([c.time_to(level, limit) for c in curves]) for level in levels or ()]
        for row, curves in found.items()
    }
    columns = zip(*times.values(), strict=True) if times else ()
    least = [min(median for median, _, _ in column) for column in columns]
    for (method, setting), curves in found.items():
        own = times[method, setting]
        cells = [method, setting]
        cells += [_time(t, best, SECONDS[data]) for t, best in zip(own, least, strict=True)]
        parameters = next((c.parameters for c in curves if c.parameters is not None), None)
        count = "–" if parameters is None else f"{parameters:,}"
        cells += [_final(curves), str(len(curves)), count]
        lines.append(_row(cells))
    return "\n".join([*lines, "", *_estimators(found), *_failures(found)]).rstrip() + "\n"


def draw(path: Path, data: str, found: Found, levels: Thresholds | None) -> None:
    """Draw median and range over the seeds of each method, against seconds on a log axis.

    Lines of this library's methods are thick, those of defaults dotted.
    """
    import matplotlib

    from train import figures

    with figures.sheet(path, size=(9.0, 5.0)) as axes:
        axis = axes[0, 0]
        colours = dict(zip(methods_on(data), matplotlib.color_sequences["tab10"], strict=False))
        lowest, highest = [], []
        for (method, setting), curves in found.items():
            if not (drawn := [curve for curve in curves if len(curve)]):
                continue
            try:
                times, values = on_common_times(drawn)
            except ValueError:
                continue
            dashes = "-" if setting == TUNED else ":"
            width = 2.0 if METHODS[method].ours else 1.2
            style: dict[str, Any] = {"color": colours[method], "ls": dashes, "lw": width}
            ranked = np.sort(values, axis=0)
            axis.plot(times, ranked[len(ranked) // 2], label=f"{method}, {setting}", **style)
            axis.fill_between(times, ranked[0], ranked[-1], color=colours[method], alpha=0.15, lw=0)
            lowest.append(ranked[0].min())
            highest.append(ranked[-1][-1])
        for level in levels or ():
            axis.axhline(level, color=figures.MUTED, ls=figures.DASHED, lw=0.8)
        if lowest:
            bottom, top = min([*lowest, *(levels or ())]), max([*highest, *(levels or ())])
            room = 0.1 * (top - bottom) or 0.1
            axis.set_ylim(bottom - room, top + 8.0 * room)  # where curves begin is far above
            axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        axis.set_xscale("log")
        for which in (axis.xaxis.set_major_formatter, axis.xaxis.set_minor_formatter):
            which("{x:g}")
        axis.set_xlabel("seconds from the start of the process, evaluations aside")
        axis.set_ylabel("held-out bits/dim")
        axis.set_title(data)


def _finals(curves: Sequence[Curve]) -> list[float]:
    return [curve.final[0] for curve in curves]


def _final(curves: Sequence[Curve]) -> str:
    """Median over the seeds, its range, and the largest standard error."""
    values = [value for value in _finals(curves) if math.isfinite(value)]
    if not values:
        return "–"
    median, low, high = median_and_range(values)
    spread = f" ({low:.3f} to {high:.3f})" if len(values) > 1 else ""
    error = max(curve.final[1] for curve in curves if math.isfinite(curve.final[0]))
    told = f"{median:.3f}{spread}" + (f" ± {error:.4f}" if error else "")
    return told + ", ended early" * any(curve.enough for curve in curves)


def _time(found: tuple[float, float, float], least: float, limit: float) -> str:
    median, low, high = found
    if math.isinf(low):
        return f"not in {limit:.0f} s"
    text = f"not in {limit:.0f} s" if math.isinf(median) else f"{median:.1f}"
    text = f"**{text}**" if median == least and math.isfinite(median) else text
    if low == high:
        return text
    return f"{text} ({low:.1f} to {'not' if math.isinf(high) else f'{high:.1f}'})"


def _estimators(found: Found) -> list[str]:
    """One line for each method whose final value is not by exact log-determinants."""
    told = {
        f"- {method}: final log-determinants by {curve.by}."
        for (method, _), curves in found.items()
        for curve in curves
        if curve.by != "exact"
    }
    return sorted(told)


def _failures(found: Found) -> list[str]:
    """One line for each cell that ended early."""
    return [
        f"- {method}, {setting}, seed {seed}: {curve.failed}"
        for (method, setting), curves in found.items()
        for seed, curve in enumerate(curves)
        if curve.failed is not None
    ]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
