"""Figures and tables: the context that makes them, their parts, and their folder."""

import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from paper.trainings import Scale, Trainings
from train.workdir import replace_text, write_json

Row = dict[str, Any]


class Context(NamedTuple):
    """What a piece may use: its own folder, the shared trainings, and settings."""

    scale: Scale
    folder: Path
    trainings: Trainings
    temperatures: tuple[float, ...] = (1.0,)

    def by_scale(self, *, smoke: Any, cpu: Any, paper: Any) -> Any:
        """Return the setting for this scale."""
        return {"smoke": smoke, "cpu": cpu, "paper": paper}[self.scale]

    def record(self, rows: Sequence[Row], curves: Sequence[Row] = ()) -> None:
        """Write the numbers of a piece; call it before anything is drawn, which may fail."""
        for name, table in (("table.csv", rows), ("curves.csv", curves)):
            if table:
                _write_csv(self.folder / name, table)


class Result(NamedTuple):
    """A figure or table.

    Attributes:
      rows: the printed table, "published" beside "measured"; all with the same keys.
      pictures: PNG files.
      curves: the plotted points; all with the same keys.
      note: what a reader of the table must know.
    """

    rows: Sequence[Row]
    pictures: Sequence[Path] = ()
    curves: Sequence[Row] = ()
    note: str = ""

    def markdown(self, title: str) -> str:
        """Write the table and the note under a title, in Markdown."""
        header = list(self.rows[0])
        lines = [header, ["---"] * len(header), *(list(row.values()) for row in self.rows)]
        cells = [[str(value).replace("|", "\\|") for value in line] for line in lines]
        table = "\n".join(f"| {' | '.join(line)} |" for line in cells)
        return "\n\n".join([f"## {title}", table, self.note]).rstrip()


class Piece(NamedTuple):
    """A figure or table to make.

    Attributes:
      title: what it shows.
      run: makes it.
      settings: the fields of the context that change it.
      by_default: whether it is made where no names are given.
    """

    title: str
    run: Callable[[Context], Result]
    settings: tuple[str, ...] = ()
    by_default: bool = True

    def save(self, context: Context, result: Result, **about: Any) -> None:
        """Write the tables, then the marker of a finished piece."""
        context.record(result.rows, result.curves)
        content = {
            "settings": self._settings(context),
            "rows": list(result.rows),
            "pictures": [path.name for path in result.pictures],
            "note": result.note,
            **about,
        }
        write_json(_marker(context), content)

    def load(self, context: Context) -> Result | None:
        """Read the finished piece; None without one of these settings."""
        try:
            content = json.loads(_marker(context).read_text())
        except (OSError, json.JSONDecodeError):
            return None
        pictures = [context.folder / name for name in content["pictures"]]
        same = content["settings"] == self._settings(context)
        if not same or not all(path.exists() for path in pictures):
            return None
        return Result(content["rows"], pictures, note=content["note"])

    def _settings(self, context: Context) -> Row:
        return {field: list(getattr(context, field)) for field in self.settings}


def _marker(context: Context) -> Path:
    return context.folder / "done.json"


def _write_csv(path: Path, rows: Sequence[Row]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    replace_text(path, text.getvalue())
