"""All measurements of docs/PERFORMANCE.md, one process each, and the table made of them."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.starting import DIGITS_SAMPLED, HELP

Result = Mapping[str, Any]

_BEGIN, _END = "<!-- measured: begin -->", "<!-- measured: end -->"


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
      what: in words.
      command: arguments of ``python -m benchmarks``; rows with equal commands share one run.
      goal: in words.
      measured: the figure, in words, from the command's JSON.
    """

    what: str
    command: str
    goal: str
    measured: Callable[[Result], str]

    @property
    def file(self) -> str:
        """Where the command's result is kept."""
        return "-".join(self.command.replace("--", "").split()) + ".json"


def _ratio(result: Result) -> str:
    low, high = result["quartiles"]
    return f"{result['median_of_ratios']:.2f} ({low:.2f} to {high:.2f})"


def _temporaries(who: str) -> Callable[[Result], str]:
    return lambda result: f"{result['megabytes'][0][who]['temporaries']:.0f} MB"


def _memory_ratios(result: Result) -> str:
    (peaks,) = result["megabytes"]
    torch = peaks["torch"]["peak"]
    return f"{result['ratio']:.2f}; without remat {torch / peaks['ours-keeping']['peak']:.2f}"


def _last_over_first(result: Result) -> str:
    rows = result["megabytes"]
    parts = [
        f"{who} {rows[-1][who]['peak'] / rows[0][who]['peak']:.2f}"
        for who in rows[0]
        if isinstance(rows[0][who], dict)
    ]
    return ", ".join(parts)


def _compile(kind: str) -> Callable[[Result], str]:
    def seconds(result: Result) -> str:
        times = [turn[0][kind]["seconds"] for turn in result["turns"]]
        low, median, high = np.percentile(times, [25, 50, 75])
        return f"{median:.1f} s ({low:.1f} to {high:.1f})"

    return seconds


def _start(what: str) -> Callable[[Result], str]:
    def seconds(result: Result) -> str:
        (found,) = [row for row in result["starts"] if row["what"] == what]
        return f"{found['cold']:.1f} s; {found['warm']:.1f} s"

    return seconds


_TRAIN, _MEMORY, _COMPILE = "train --config D2 --terms 5", "memory --config D2", "compile"

ROWS = [
    Row("D2 step, n = 5: PyTorch through the series / ours", _TRAIN, "≥ 3.0", _ratio),
    Row("the same, n = 10", "train --config D2 --terms 10", "≥ 3.5", _ratio),
    Row("D1 step, n = 5", "train --config D1 --terms 5", "≥ 3.0", _ratio),
    Row("C step (classification): PyTorch / ours", "train --config C", "≥ 1.2", _ratio),
    Row("D2: normflows / ours", f"{_TRAIN} --peer normflows", "≥ 1.8", _ratio),
    Row("D2: with remat / without", f"{_TRAIN} --remat no --peer remat", "≤ 1.35", _ratio),
    Row(
        "D2 memory above imports: PyTorch / ours",
        _MEMORY,
        "≥ 2.5",
        _memory_ratios,
    ),
    Row("D2, XLA's temporaries without remat", _MEMORY, "≤ 500 MB", _temporaries("ours-keeping")),
    Row("the same with remat", _MEMORY, "≤ 150 MB", _temporaries("ours")),
    Row(
        "D2 memory, n = 20 over n = 1",
        "memory --config D2 --terms 1 20 --who ours torch",
        "ours ≤ 1.05",
        _last_over_first,
    ),
    Row(
        "D1 memory, 48 blocks over 12",
        "memory --config D1 --depths 1 4 --who ours ours-keeping torch",
        "",
        _last_over_first,
    ),
    Row("D2 compile, cold", _COMPILE, "≤ 8 s", _compile("cold")),
    Row("the same, from the cache", _COMPILE, "≤ 2 s", _compile("cached")),
    Row(
        "D2 compile, 3 times the depth over once",
        _COMPILE,
        "≤ 1.3",
        lambda result: f"{result['deepest_over_first']:.2f}",
    ),
    Row("Cold; warm: `python -m train --help`", "start", "≤ 1 s", _start(HELP)),
    Row(
        "the first step of the demo",
        "start",
        "",
        _start("first step of density --dataset digits"),
    ),
    Row('`ir.load("digits")` and 16 samples', "start", "", _start(DIGITS_SAMPLED)),
    Row("D2 inverse to 1e-5: 100 plain PyTorch steps / ours", "inverse", "≥ 8", _ratio),
    Row("D2 sampling, likewise", "sample", "", _ratio),
    Row(
        "roofline fraction of D2",
        "roofline",
        "≥ 0.6",
        lambda result: (
            f"{result['fraction']:.2f} ({result['gflop_per_second']:.0f} of "
            f"{result['reference_gflop_per_second']:.0f} GFLOP/s)"
        ),
    ),
    Row(
        "step with fresh data / on a cached batch (needs CIFAR-10)",
        "data",
        "≤ 1.05",
        lambda result: f"{result['ratio']:.3f}; reader alone {result['images_per_second']:.0f}/s",
    ),
    Row(
        "certify the authors' CIFAR-10 model (D3)",
        "certify --config D3 --rounds 1",
        "≤ 60 s",
        lambda result: f"{result['seconds']:.0f} s",
    ),
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class All:
    """Every measurement of docs/PERFORMANCE.md, one after the other; what is there is kept."""

    results: Path = Path("runs/benchmarks")
    """Where the results lie, a JSON file each; remove one to measure it again."""
    only: tuple[str, ...] = ()
    """Commands to run, by their first word; all by default."""
    write: Path | None = None
    """A Markdown file whose table is to be replaced, between its two marks."""


def run(options: All) -> dict[str, Any]:
    """Measure what is missing, print the table; the commands that failed."""
    options.results.mkdir(parents=True, exist_ok=True)
    failed = []
    for command in dict.fromkeys(row.command for row in ROWS):
        if not options.only or command.split()[0] in options.only:
            failed += [] if _measured(command, options.results) else [command]
    table = markdown(options.results)
    print(table)
    if options.write is not None:
        text = options.write.read_text(encoding="utf-8")
        options.write.write_text(with_table(text, table), encoding="utf-8")
    return {"failed": failed}


def _measured(command: str, results: Path) -> bool:
    path = results / Row("", command, "", str).file
    if path.exists():
        return True
    print(f"python -m benchmarks {command}", file=sys.stderr, flush=True)
    arguments = [sys.executable, "-m", "benchmarks", *command.split(), "--json", str(path)]
    return subprocess.run(arguments, stdout=subprocess.DEVNULL).returncode == 0


def markdown(results: Path) -> str:
    """The table of what has been measured; a dash where nothing has."""
    lines = ["| what | goal | measured |", "| --- | --- | --- |"]
    for row in ROWS:
        path = results / row.file
        found = row.measured(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else "–"
        lines.append(f"| {row.what} | {row.goal} | {found} |")
    return "\n".join(lines)


def with_table(text: str, table: str) -> str:
    """``text`` with what stands between its marks replaced by ``table``.

    Raises:
      ValueError: where the marks are missing.
    """
    if _BEGIN not in text or _END not in text:
        raise ValueError(f"The file needs the lines {_BEGIN!r} and {_END!r} around its table.")
    before, rest = text.split(_BEGIN, 1)
    after = rest.split(_END, 1)[1]
    return f"{before}{_BEGIN}\n{table}\n{_END}{after}"
