"""What a figure or table consists of, and the folder that it is kept in."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from train.reproduce.trainings import Scale, Trainings
from train.workdir import write_json

Row = dict[str, Any]

_MARKER = "done.json"


class Context(NamedTuple):
    """What a piece may use.

    Attributes:
      scale: "smoke", "cpu" or "paper".
      folder: of this piece alone; it exists.
      trainings: image models and densities, shared by all pieces.
      temperatures: that samples are drawn at.
    """

    scale: Scale
    folder: Path
    trainings: Trainings
    temperatures: tuple[float, ...] = (1.0,)

    def by_scale(self, *, smoke: Any, cpu: Any, paper: Any) -> Any:
        """The setting of this scale."""
        return {"smoke": smoke, "cpu": cpu, "paper": paper}[self.scale]


class Result(NamedTuple):
    """A figure or table.

    Attributes:
      rows: the table that is printed, "published" beside "measured"; all with the same keys.
      pictures: PNG files.
      curves: the points that are drawn; all with the same keys.
      note: what a reader of the table must know.
    """

    rows: Sequence[Row]
    pictures: Sequence[Path] = ()
    curves: Sequence[Row] = ()
    note: str = ""


def save_result(folder: Path, result: Result, settings: Row, **about: Any) -> None:
    """Write the tables, then the marker that says that the piece is done."""
    write_csv(folder / "table.csv", result.rows)
    if result.curves:
        write_csv(folder / "curves.csv", result.curves)
    content = {
        "settings": settings,
        "rows": list(result.rows),
        "pictures": [path.name for path in result.pictures],
        "note": result.note,
        **about,
    }
    write_json(folder / _MARKER, content)


def load_result(folder: Path, settings: Row) -> Result | None:
    """The finished piece in a folder, or None where there is none with these settings."""
    try:
        content = json.loads((folder / _MARKER).read_text())
    except (OSError, json.JSONDecodeError):
        return None
    pictures = [folder / name for name in content["pictures"]]
    if content["settings"] != settings or not all(path.exists() for path in pictures):
        return None
    return Result(content["rows"], pictures, note=content["note"])


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write rows with the same keys, whole or not at all."""
    partial = path.with_suffix(".csv.partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)
