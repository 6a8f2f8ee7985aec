"""The command: cells in turn, each in a process of its own; what is known is not run again."""

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.accelerator.records import COMPLETE, Record, read
from benchmarks.likelihood.cells import GRID, GROUPS, TUNED, Cell, plan
from benchmarks.likelihood.clock import LAST
from benchmarks.likelihood.curves import FAILED, Curve
from benchmarks.likelihood.methods import METHODS, Options
from benchmarks.likelihood.problems import DATA
from benchmarks.likelihood.problems import read as read_problem
from benchmarks.likelihood.report import write_report
from train.failures import Stopped, terminable

#: What would make a second start quicker, or a library use other than all cores.
_WITHOUT = (
    *("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "XLA_FLAGS"),
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"),
)
_BUSY = 0.5
_WITH = {"JAX_ENABLE_COMPILATION_CACHE": "false", "JAX_PLATFORMS": "cpu"}


def main(arguments: Sequence[str]) -> int:
    """Run what is not known yet; 1 if a cell failed, 2 for what cannot be asked for.

    Ctrl-C or SIGTERM ends the cell that runs, too; the same command begins it anew.
    """
    options = _parser().parse_args(list(arguments))
    out = options.out.resolve()
    possible = [name for name in options.methods if _possible(name)]
    cells = list(plan(options.data, possible, options.settings, options.seeds, options.size))
    if not cells:
        print("error: none of these methods is run on these data.", file=sys.stderr)
        return 2
    for cell in cells:
        cell.folder(out).mkdir(parents=True, exist_ok=True)
    _tell_what_is_left(cells, out)
    try:
        with terminable():
            for count, cell in enumerate(cells, start=1):
                if not _known(cell, out):
                    print(f"{count}/{len(cells)} {cell}: {_run(cell, out)}", flush=True)
                    write_report(out, [cell.data], options.size)
            write_report(out, list(dict.fromkeys(cell.data for cell in cells)), options.size)
    except KeyboardInterrupt as stopped:
        print("Stopped; the same command goes on.", file=sys.stderr)
        return stopped.status if isinstance(stopped, Stopped) else 128 + signal.SIGINT
    return int(any(FAILED in read(cell.record(out)) for cell in cells))


def _tell_what_is_left(cells: Sequence[Cell], out: Path) -> None:
    waiting = [cell for cell in cells if not _known(cell, out)]
    hours = sum(cell.seconds for cell in waiting if not cell.smoke) / 3600.0
    print(f"{len(waiting)} of {len(cells)} cells, at most {hours:.1f} h without evaluations")
    if (load := os.getloadavg()[0]) > _BUSY:
        print(f"The load is {load:.1f}: times are to be taken on a machine that does nothing else.")


def chosen(out: Path, cell: Cell) -> int | None:
    """Return which setting of the grid has the least validation loss; None if none has any."""
    found = {}
    for number, setting in enumerate(GRID):
        grid = Cell(data=cell.data, method=cell.method, setting=setting, size=cell.size)
        curve = Curve.read(grid.record(out))
        if curve is not None and len(curve):
            found[number] = float(curve.validation.min())
    return min(found, key=lambda number: found[number]) if found else None


def _run(cell: Cell, out: Path) -> str:
    """Run a cell, or find out that it need not or cannot be run; returns what became of it."""
    number = None
    if cell.setting == TUNED:
        if (number := chosen(out, cell)) is None:
            return "left out, nothing of its grid is known"
        grid = Cell(data=cell.data, method=cell.method, setting=GRID[number], size=cell.size)
        if grid.share == 1.0 and cell.seed == grid.seed:
            shutil.copyfile(grid.record(out), cell.record(out))
            return f"the same as {grid.setting}"
    if not cell.data_file(out).exists():
        read_problem(cell.data, smoke=cell.smoke).save(cell.data_file(out))
    return _in_a_process(cell, cell.options(number), out)


def _in_a_process(cell: Cell, options: Options, out: Path) -> str:
    """Run a cell from its beginning, in a process of its own; note it where that fails."""
    path = cell.record(out)
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.likelihood.child", str(out), cell.to_json()]
    command.append(json.dumps(options))
    kept = {name: value for name, value in os.environ.items() if name not in _WITHOUT}
    with path.with_suffix(".log").open("w+", encoding="utf-8", errors="replace") as log:
        started = time.monotonic()
        code = subprocess.run(
            [*command, repr(started)],
            stdout=log,
            stderr=log,
            env=kept | _WITH,
            start_new_session=True,  # Ctrl-C is for this process, which then ends the other
        ).returncode
        seconds = time.monotonic() - started
        log.seek(0)
        last = "".join(log.read().splitlines()[-1:])
    record = Record(path)
    if COMPLETE not in record.parts:
        reason = "killed" if code < 0 else f"exit status {code}"
        record.parts[FAILED] = {"reason": f"{reason}: {last[:200]}"}
        record.complete()
    return _told(record, seconds)


def _told(record: Record, seconds: float) -> str:
    """One line on a cell."""
    if FAILED in record.parts:
        return f"FAILED, {record.parts[FAILED]['reason']}"
    last = record.parts[LAST]
    return (
        f"{last['test']:.4f} bits/dim after {last['seconds']:.1f} s and {last['steps']} steps "
        f"({seconds:.0f} s with evaluations)"
    )


def _known(cell: Cell, out: Path) -> bool:
    return COMPLETE in read(cell.record(out))


def _possible(method: str) -> bool:
    """Whether a method's packages are installed; else say so."""
    missing = [name for name in METHODS[method].packages if not importlib.util.find_spec(name)]
    if missing:
        print(f"{method}: left out, {' and '.join(missing)} not installed (extra: bench)")
    return not missing


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks to-likelihood",
        description="Measure the time to a held-out likelihood, ours and others'; the same command "
        "resumes. A cell that failed is not tried again, unless its .json file is removed.",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--data", nargs="+", choices=DATA, default=DATA, metavar="NAME",
                        help=f"of {', '.join(DATA)}")  # fmt: skip
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS),
                        metavar="NAME", help=f"of {', '.join(METHODS)}")  # fmt: skip
    parser.add_argument("--settings", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--seeds", type=_count, help="by default 3, of MNIST 1")
    parser.add_argument("--size", choices=("full", "smoke"), default="full",
                        help="smoke: a few steps, to see that all runs")  # fmt: skip
    return parser


def _count(text: str) -> int:
    if (count := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be ≥ 1; got {count}.")
    return count
