"""What a measurement has found so far, in a JSON file that is whole at every moment."""

import json
import math
from pathlib import Path
from typing import Any

Figures = dict[str, Any]

COMPLETE = "complete"


class Record:
    """The figures of one measurement, by part; each is on disk as soon as it is added.

    Args:
      path: of the file. What an earlier, interrupted process added stays.
    """

    def __init__(self, path: Path):
        self._path = path
        self.parts: dict[str, Figures] = read(path)

    def __contains__(self, part: str) -> bool:
        return part in self.parts and "error" not in self.parts[part]

    def add(self, part: str, **figures: Any) -> None:
        """Add the figures of a part, and show them."""
        self.parts[part] = figures
        self._write()
        told = ", ".join(f"{name} {shown(value)}" for name, value in figures.items())
        print(f"{part}: {told}", flush=True)

    def complete(self) -> None:
        """Say that nothing is missing."""
        if all(part in self for part in self.parts):
            self.parts[COMPLETE] = {}
            self._write()

    def _write(self) -> None:
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(self.parts, indent=1) + "\n", encoding="utf-8")
        partial.replace(self._path)


def read(path: Path) -> dict[str, Figures]:
    """Read the parts of a measurement; none where there is no file yet."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def shown(value: Any) -> str:
    """Write a figure with four digits."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4g}" if math.isfinite(value) else str(value)
