"""The metrics of a run: ``metrics.jsonl`` and TensorBoard, in the workdir."""

import json
import math
from pathlib import Path

import numpy as np
from tensorboardX import SummaryWriter

from train.parallel import is_primary
from train.workdir import finite


class MetricsLog:
    """Where the metrics of a run go, kept across resumed runs; the first process alone writes.

    Args:
      workdir: folder of the run.
      start_step: records of later steps, left by an interrupted run, are dropped.
    """

    def __init__(self, workdir: Path, start_step: int):
        self._path = workdir / "metrics.jsonl"
        self._board: SummaryWriter | None = None
        if not is_primary():
            return
        kept = [record for record in self.records() if record["step"] <= start_step]
        partial = self._path.with_suffix(".jsonl.partial")
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
        partial.replace(self._path)
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1)

    def write(self, step: int, **values: float) -> None:
        """Append one record; infinite values and NaN as the strings "inf" and "nan"."""
        if self._board is None:
            return
        with self._path.open("a") as file:
            record = finite({"step": step, **values})
            file.write(json.dumps(record, allow_nan=False) + "\n")
        for name, value in values.items():
            if math.isfinite(value):  # TensorBoard shows no other
                self._board.add_scalar(name, value, step)

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Show a picture [height, width, channels], floats in [0, 1], in TensorBoard."""
        if self._board is not None:
            self._board.add_image(name, image, step, dataformats="HWC")

    def records(self) -> list[dict[str, float]]:
        """All records so far; a line that a kill cut off is left out."""
        if not self._path.exists():
            return []
        parsed = map(_parse_record, self._path.read_text().splitlines())
        return [record for record in parsed if record is not None]

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of one metric."""
        pairs = [
            (record["step"], float(record[name])) for record in self.records() if name in record
        ]
        return np.array([step for step, _ in pairs]), np.array([value for _, value in pairs])

    def close(self) -> None:
        """Write what is still buffered."""
        if self._board is not None:
            self._board.close()


def _parse_record(line: str) -> dict[str, float] | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None
