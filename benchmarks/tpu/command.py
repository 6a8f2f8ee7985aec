"""The command: rows in turn, each in a process of its own; what is known is not compiled again."""

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.accelerator.records import Record, read, shown
from benchmarks.tpu.rows import RECORD, SIZES, rows

#: libtpu then looks for no chip, and several processes may load it.
_NO_CHIP = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_COLUMNS = {
    "chips": "chips",
    "batch": "images",
    "compile_seconds": "compile, s",
    "flops": "GFLOP",
    "compilers_flops": "XLA's count",
    "matrix_share": "on the matrix unit",
    "float32_share": "of it float32",
    "hbm_bytes": "HBM, GB",
    "temporary_bytes": "temporaries, MB",
    "argument_bytes": "arguments, MB",
    "collectives": "collectives",
    "bound_seconds": "step ≥, ms",
    "bound_by": "bound by",
}
_UNITS = {
    **dict.fromkeys(("flops", "compilers_flops", "hbm_bytes"), 1e9),
    **dict.fromkeys(("temporary_bytes", "argument_bytes"), 1e6),
    "bound_seconds": 1e-3,
}


def main(arguments: Sequence[str]) -> int:
    """Compile what is not compiled yet; 1 if anything failed, 2 without libtpu."""
    options = _parser().parse_args(list(arguments))
    if importlib.util.find_spec("libtpu") is None:
        told = "pip install -e '.[tpu]' brings it, on Linux"
        print(f"error: the TPU compiler, libtpu, is not installed: {told}.", file=sys.stderr)
        return 2
    known = rows(options.size)
    unknown = set(options.only or ()) - known.keys()
    if unknown:
        print(f"error: no row {sorted(unknown)}; there are {list(known)}.", file=sys.stderr)
        return 2
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    asked = options.only or list(known)
    for name in asked:
        if name in Record(out / RECORD):
            print(f"{name}: compiled before", flush=True)
        else:
            _compile(name, out, options.size)
    table = markdown(read(out / RECORD))
    (out / "table.md").write_text(table, encoding="utf-8")
    print(f"\n{table}")
    return int(any(name not in Record(out / RECORD) for name in asked))


def markdown(found: dict[str, dict[str, Any]]) -> str:
    """The rows as a table, and what compiled them; all but chips and images are of one chip."""
    lines = [f"| program | {' | '.join(_COLUMNS.values())} |", f"| --- |{' --- |' * len(_COLUMNS)}"]
    for name, figures in found.items():
        cells = [error] if (error := figures.get("error")) else map(_cell(figures), _COLUMNS)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    compilers = dict.fromkeys(figures.get("compiled_by") for figures in found.values())
    told = "; ".join(name for name in compilers if name)
    return "\n".join([*lines, *(["", f"Compiled by {told}."] if told else []), ""])


def _cell(figures: dict[str, Any]):
    def of(column: str) -> str:
        if column == "collectives":
            calls, moved = figures["collective_calls"], figures["collective_bytes"]
            told = (f"{int(n)} {kind}, {moved[kind] / 1e6:.3g} MB" for kind, n in calls.items())
            return "; ".join(told) or "none"
        value = figures[column]
        if column.endswith("_share"):
            return f"{value:.1%}"
        if column == "bound_seconds" and figures["open_loops"]:
            return f"{value / _UNITS[column]:.3g} a turn"
        return f"{value / _UNITS[column]:.3g}" if column in _UNITS else shown(value)

    return of


def _compile(name: str, out: Path, size: str) -> None:
    """Compile a row in a process of its own, which adds its figures; or note why it could not."""
    command = [sys.executable, "-m", "benchmarks.tpu.child", name, str(out), size]
    log, started = out / "log.txt", time.monotonic()
    with log.open("a", encoding="utf-8") as file:
        before = file.tell()
        code = subprocess.run(
            command, stdout=file, stderr=file, env=os.environ | _NO_CHIP
        ).returncode
    if code:
        last = log.read_bytes()[before:].decode(errors="replace").splitlines()[-1:]
        Record(out / RECORD).add(name, error=f"exit status {code}: {''.join(last)[:300]}")
    print(f"{name}: {'failed' if code else 'done'}, {time.monotonic() - started:.0f} s", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks tpu",
        description="Compile the programs for TPUs that need not be there, and count what they "
        "cost; the same command resumes.",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--size", choices=SIZES, default="full", help="tiny: to see that it runs")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="these rows alone")
    return parser
