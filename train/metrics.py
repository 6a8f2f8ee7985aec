"""The metrics of a run: ``metrics.jsonl`` and TensorBoard, in the workdir."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from train.board import Board
from train.failures import naming
from train.parallel import is_primary
from train.workdir import finite, replace_text


class MetricsLog:
    """The metrics of a run, kept across resumptions; only the first process writes.

    Args:
      workdir: folder of the run.
      start_step: records of later steps, which an interrupted run left, are dropped, and so are
        damaged lines.
    """

    def __init__(self, workdir: Path, start_step: int):
        self._path = workdir / "metrics.jsonl"
        self._writes = is_primary()
        self._board: Board | None = None
        if self._writes:
            records, damaged = self._read()
            if damaged:
                self._put_aside(damaged)
            kept = [record for record in records if record["step"] <= start_step]
            replace_text(self._path, "".join(json.dumps(record) + "\n" for record in kept))
            self._board = Board(workdir / "tensorboard", start_step + 1)

    def write(self, step: int, **values: float) -> None:
        """Append a record, with infinity and NaN as the strings "inf" and "nan"."""
        if not self._writes:
            return
        with naming(self._path), self._path.open("a") as file:
            file.write(json.dumps(finite({"step": step, **values}), allow_nan=False) + "\n")
        for name, value in values.items():
            if self._board is not None and math.isfinite(value):  # TensorBoard shows no other
                self._board.scalar(name, value, step)

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Show a picture [height, width, channels], floats in [0, 1], in TensorBoard."""
        if self._board is not None:
            self._board.picture(name, image, step)

    def records(self) -> list[dict[str, float]]:
        """Return all records so far, without a line that a kill cut off."""
        return read_records(self._path.parent)

    def _read(self) -> tuple[list[dict[str, float]], list[bytes]]:
        return _records_and_damaged(self._path)

    def _put_aside(self, damaged: list[bytes]) -> None:
        """Append lines that are no records to a file of their own, and say so."""
        aside = self._path.with_name(f"{self._path.name}.damaged")
        with naming(aside), aside.open("ab") as file:
            file.writelines(line + b"\n" for line in damaged)
        told = f"{len(damaged)} damaged lines were moved from {self._path} to {aside.name}"
        print(f"Warning: {told}.", file=sys.stderr)

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the steps and values of one metric."""
        return series_of(self.records(), name)

    def close(self) -> None:
        """Flush the buffers."""
        if self._board is not None:
            self._board.close()


def read_records(workdir: Path) -> list[dict[str, float]]:
    """Return the records of the run in a workdir, without damaged lines; nothing is written."""
    return _records_and_damaged(workdir / "metrics.jsonl")[0]


def series_of(records: Sequence[Mapping[str, float]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps and values of one metric."""
    found = [(r["step"], float(r[name])) for r in records if name in r]
    return np.array([step for step, _ in found]), np.array([value for _, value in found])


def _records_and_damaged(path: Path) -> tuple[list[dict[str, float]], list[bytes]]:
    """Return the records of a file, and the lines that are none."""
    found = path.read_bytes().splitlines() if path.exists() else []
    pairs = [(line, _record(line)) for line in found]
    records = [record for _, record in pairs if record is not None]
    return records, [line for line, record in pairs if record is None]


def _record(line: bytes) -> dict[str, float] | None:
    """Read a line of metrics; None if it is damaged, or of another program."""
    try:
        record = json.loads(line)
        if type(record["step"]) is int and [float(value) for value in record.values()]:
            return dict(record)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        pass
    return None
