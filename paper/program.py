"""The program: its pieces, where they are kept, and what it prints."""

import dataclasses
import difflib
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from rich import box
from rich.console import Console
from rich.table import Column, Table

from paper import (
    bounds,
    branches,
    budget,
    convergence,
    figure_1,
    figure_2,
    figure_4,
    images,
    tables,
)
from paper.pieces import Context, Piece, Result
from paper.trainings import Scale, Trainings
from train.failures import ProgramError, reason
from train.parallel import use_cpu_devices
from train.terminal import make_console
from train.workdir import environment, replace_text

_WIDTH = 180
_CORES = 2  # which the cpu scale is made for

#: In the order of production: what trains little comes first.
PIECES = {
    "figure-1": Piece("Dynamics of a standard and of an invertible network", figure_1.run),
    "table-1": Piece("Properties of invertible networks", tables.table_1),
    "figure-2": Piece("Densities in the plane, beside a coupling flow", figure_2.run),
    "figure-3": Piece("Images recovered from a classifier's features", images.figure_3),
    "convergence": Piece("Convergence of the fixed-point inverse", convergence.run),
    "table-2": Piece("Test error against c", tables.table_2),
    "table-3": Piece("A coupling network as a classifier", tables.table_3),
    "table-4": Piece("Bits per dimension", tables.table_4),
    "figure-4": Piece("The log-det estimator, and Theorem 4", figure_4.run),
    "figure-5": Piece("Samples", images.figure_5, ("temperatures",)),
    "bounds": Piece("Lemma 2 and the log-det bounds", bounds.run),
    "branches": Piece("Branches, beside the paper's", branches.run, by_default=False),
    "budget": Piece("Share of L that branches use, by depth", budget.run, by_default=False),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reproduce:
    """Regenerate figures and tables of "Invertible Residual Networks" (arXiv:1811.00995).

    Every piece has a folder in WORKDIR/SCALE with its PNG and CSV files. Finished pieces are kept,
    an interrupted training resumes, and pieces share trained models.
    """

    names: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(
            metavar="[NAME ...]",
            help=f"All but the last two by default: {', '.join(PIECES)}.",
        ),
    ] = ()
    scale: Scale = "cpu"
    """smoke: minutes, on 8×8 digits; cpu: small networks, for two cores; paper: as published."""
    workdir: Path = Path("runs/reproduce")
    """Folder for the results."""
    data_dir: Path | None = None
    """Folder of TFDS's data sets; TFDS_DATA_DIR by default."""
    temperatures: tuple[float, ...] = (0.5, 0.7, 1.0)
    """Figure 5: temperatures of the samples."""
    again: bool = False
    """Remake finished pieces, from the models that are already trained."""

    def check(self) -> None:
        """Refuse unknown pieces and temperatures out of range.

        Raises:
          ValueError: naming them.
        """
        for name in self.names:
            if name not in PIECES:
                near = difflib.get_close_matches(name, PIECES, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"There is no piece {name!r}.{hint} Known: {', '.join(PIECES)}.")
        if not self.temperatures or not all(0.0 < t < math.inf for t in self.temperatures):
            raise ValueError(f"temperatures must lie in (0, inf); got {self.temperatures}.")


def main(arguments: Sequence[str]) -> int:
    """Run the program; return 1 where a piece failed."""
    options = tyro.cli(Reproduce, prog="python -m train reproduce", args=arguments)
    if options.scale == "cpu":
        use_cpu_devices(_CORES)
    return int(not reproduce(options))


def reproduce(options: Reproduce) -> bool:
    """Make the missing pieces; print and write all; return whether all are done."""
    options.check()
    folder = options.workdir / options.scale
    trainings = Trainings(folder / "trainings", options.scale, options.data_dir)
    contexts = {
        name: Context(options.scale, folder / name, trainings, options.temperatures)
        for name in PIECES
    }
    console = _console()
    names = options.names or tuple(n for n, piece in PIECES.items() if piece.by_default)
    done = [_make(name, contexts[name], options.again, console) for name in names]
    _write_report(folder / "report.md", contexts)
    console.print(f"{sum(done)} of {len(names)} done: {folder / 'report.md'}")
    return all(done)


def _make(name: str, context: Context, again: bool, console: Console) -> bool:
    """Make a piece, unless it is done; print it, or why it failed."""
    piece = PIECES[name]
    result = None if again else piece.load(context)
    if result is None:
        started = time.perf_counter()
        try:
            context.folder.mkdir(parents=True, exist_ok=True)
            result = piece.run(context)
            seconds = round(time.perf_counter() - started, 1)
            piece.save(context, result, name=name, seconds=seconds, **environment())
        except BrokenPipeError:
            raise
        except (ValueError, ProgramError, OSError) as error:
            told = reason(error) if isinstance(error, OSError) else str(error)
            console.print(f"{name} failed: {told}", style="bold red", markup=False)
            return False
    _print(f"{name}: {piece.title}", result, console)
    return True


def _print(title: str, result: Result, console: Console) -> None:
    columns = (Column(name, overflow="fold") for name in result.rows[0])
    table = Table(*columns, title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for row in result.rows:
        table.add_row(*map(str, row.values()))
    console.print(table)
    if result.note:
        console.print(result.note, style="dim", markup=False)
    for picture in result.pictures:
        console.print(str(picture), markup=False, soft_wrap=True)


def _write_report(path: Path, contexts: dict[str, Context]) -> None:
    """Write all finished pieces of a scale to one page."""
    parts = [f"# Invertible Residual Networks, scale {path.parent.name}"]
    for name, piece in PIECES.items():
        result = piece.load(contexts[name])
        if result is not None:
            parts.append(result.markdown(f"{name}: {piece.title}"))
            parts += [f"![{name}]({name}/{picture.name})" for picture in result.pictures]
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, "\n\n".join(parts) + "\n")


def _console() -> Console:
    """Make a console as wide as the terminal; wide where there is none."""
    console = make_console()
    return console if console.is_terminal else make_console(width=_WIDTH)
