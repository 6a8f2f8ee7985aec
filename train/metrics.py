"""The metrics of a run: ``metrics.jsonl`` and TensorBoard, in the workdir."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from train.parallel import is_primary
from train.workdir import finite, replace_text


class MetricsLog:
    """The metrics of a run, kept across resumptions; only the first process writes.

    Args:
      workdir: folder of the run.
      start_step: records of later steps, which an interrupted run left, are dropped.
    """

    def __init__(self, workdir: Path, start_step: int):
        self._path = workdir / "metrics.jsonl"
        self._writes, self._board = is_primary(), None
        if self._writes:
            kept = [record for record in self.records() if record["step"] <= start_step]
            replace_text(self._path, "".join(json.dumps(record) + "\n" for record in kept))
            self._board = _board(workdir / "tensorboard", start_step + 1)

    def write(self, step: int, **values: float) -> None:
        """Append a record, with infinity and NaN as the strings "inf" and "nan"."""
        if not self._writes:
            return
        with self._path.open("a") as file:
            file.write(json.dumps(finite({"step": step, **values}), allow_nan=False) + "\n")
        for name, value in values.items():
            if self._board is not None and math.isfinite(value):  # TensorBoard shows no other
                self._board.add_scalar(name, value, step)

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Show a picture [height, width, channels], floats in [0, 1], in TensorBoard."""
        if self._board is not None:
            self._board.add_image(name, image, step, dataformats="HWC")

    def records(self) -> list[dict[str, float]]:
        """Return all records so far, without a line that a kill cut off."""
        records = []
        for line in self._path.read_text().splitlines() if self._path.exists() else ():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return records

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the steps and values of one metric."""
        found = [(r["step"], float(r[name])) for r in self.records() if name in r]
        return np.array([step for step, _ in found]), np.array([value for _, value in found])

    def close(self) -> None:
        """Flush the buffers."""
        if self._board is not None:
            self._board.close()


def _board(folder: Path, purge_step: int) -> Any:
    """Return a writer of TensorBoard's files; None, and say so, where its package is missing."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        print("tensorboardX is not installed: this run writes metrics.jsonl, and no TensorBoard.")
        return None
    return SummaryWriter(str(folder), purge_step=purge_step)
