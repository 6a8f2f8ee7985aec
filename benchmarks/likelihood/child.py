"""``python -m benchmarks.likelihood.child OUT CELL OPTIONS STARTED``: one cell, in this process."""

import importlib
import importlib.metadata
import json
import math
import sys
from pathlib import Path

from benchmarks.accelerator.records import Record
from benchmarks.likelihood.cells import Cell
from benchmarks.likelihood.clock import Clock, Watch
from benchmarks.likelihood.methods import METHODS, Options
from benchmarks.likelihood.problems import Problem
from benchmarks.likelihood.thresholds import ROOM, thresholds


def main(out: Path, cell: Cell, options: Options, started: float) -> None:
    """Train, and record the likelihood on the way."""
    clock = Clock(started)
    record = Record(cell.record(out))
    fixed = thresholds().get(cell.data)
    problem = Problem.load(cell.data_file(out))
    watch = Watch(
        record,
        clock,
        problem,
        seconds=cell.seconds,
        most_steps=cell.most_steps,
        enough=fixed[-1] - ROOM if fixed and not cell.smoke else -math.inf,
    )
    method = METHODS[cell.method]
    module = importlib.import_module(f"benchmarks.likelihood.{method.module}")
    module.run(options, cell, problem, watch)
    packages = (*method.packages, "jax", "numpy")
    record.add("options", **options)
    record.add("packages", **{name: importlib.metadata.version(name) for name in packages})
    record.complete()


if __name__ == "__main__":
    folder, text, settings, asked_at = sys.argv[1:]
    main(Path(folder), Cell.from_json(text), json.loads(settings), float(asked_at))
