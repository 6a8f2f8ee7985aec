"""TensorBoard's files of a run, which may fail without the run."""

import contextlib
import sys
from pathlib import Path
from typing import Any

import numpy as np


class Board:
    """Writes scalars and pictures for TensorBoard; where its package is missing, says so.

    What the system refuses, such as more on a full disk, ends TensorBoard's files alone.
    """

    def __init__(self, folder: Path, purge_step: int):
        self._folder, self._writer = folder, _writer(folder, purge_step)

    def scalar(self, name: str, value: float, step: int) -> None:
        """Add a point of a curve."""
        if self._alive():
            self._writer.add_scalar(name, value, step)

    def picture(self, name: str, image: np.ndarray, step: int) -> None:
        """Add a picture [height, width, channels], floats in [0, 1]."""
        if self._alive():
            self._writer.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        """Flush the buffers."""
        if self._writer is None:
            return
        try:
            self._writer.close()
        except OSError as error:
            self._abandon(error.strerror or str(error))

    def _alive(self) -> bool:
        """Return whether its thread still writes; a full queue would wait for ever otherwise."""
        if self._writer is None:
            return False
        if not self._events()._worker.is_alive():
            self._abandon("its thread has ended")
        return self._writer is not None

    def _events(self) -> Any:
        return self._writer.file_writer.event_writer

    def _abandon(self, why: str) -> None:
        """Go on without; tensorboardX would raise again when Python ends."""
        print(f"Warning: {self._folder} is not complete ({why}).", file=sys.stderr)
        with contextlib.suppress(AttributeError, OSError):
            events = self._events()
            events._closed = True
            if events._worker.is_alive():
                events._worker.stop()
            events._ev_writer.close()
        self._writer = None


def _writer(folder: Path, purge_step: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        print("tensorboardX is not installed: this run writes metrics.jsonl, and no TensorBoard.")
        return None
    try:
        return SummaryWriter(str(folder), purge_step=purge_step)
    except OSError as error:
        print(f"{folder} cannot be written: {error}. This run writes no TensorBoard.")
        return None
