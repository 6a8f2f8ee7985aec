"""The program: which pieces to make, where, and what is printed of them."""

import dataclasses
import difflib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from train.checkpoints import CheckpointError
from train.loop import TrainingError
from train.parallel import use_cpu_devices
from train.reproduce.pieces import PIECES, Piece
from train.reproduce.result import Context, Result, load_result, save_result
from train.reproduce.trainings import Scale, Trainings
from train.workdir import WorkdirError, environment

_WIDTH = 180
_CORES = 2  # that the cpu scale is made for


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reproduce:
    """Regenerate figures and tables of "Invertible Residual Networks" (arXiv:1811.00995).

    Every piece has a folder in WORKDIR/SCALE, with its PNG and CSV files; what is done is kept,
    and an interrupted training resumes. Trained models are shared.
    """

    names: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="[NAME ...]", help=f"Pieces, all by default: {', '.join(PIECES)}."),
    ] = ()
    scale: Scale = "cpu"
    """smoke: minutes, on 8×8 digits; cpu: small networks, for two cores; paper: as published."""
    workdir: Path = Path("runs/reproduce")
    """Where results are kept."""
    data_dir: Path | None = None
    """Where TFDS keeps its data sets; its own variable TFDS_DATA_DIR by default."""
    temperatures: tuple[float, ...] = (0.5, 0.7, 1.0)
    """Figure 5: that samples are drawn at."""
    again: bool = False
    """Make the pieces again, from the models that are trained already."""

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
        if not self.temperatures or not all(0.0 < t < float("inf") for t in self.temperatures):
            raise ValueError(f"temperatures must lie in (0, inf); got {self.temperatures}.")


def main(arguments: Sequence[str]) -> int:
    """Run the program; the exit status is 1 where a piece failed."""
    options = tyro.cli(Reproduce, prog="python -m train reproduce", args=arguments)
    if options.scale == "cpu":
        use_cpu_devices(_CORES)
    return int(bool(reproduce(options)))


def reproduce(options: Reproduce) -> dict[str, str]:
    """Make the pieces that are not done yet; print and write all; returns what failed, and why."""
    options.check()
    folder = options.workdir / options.scale
    trainings = Trainings(folder / "trainings", options.scale, options.data_dir)
    names = options.names or tuple(PIECES)
    console, failed = _console(), dict[str, str]()
    for name in names:
        context = Context(options.scale, folder / name, trainings, options.temperatures)
        try:
            result = _make(name, PIECES[name], context, options.again)
        except (ValueError, WorkdirError, TrainingError, CheckpointError) as error:
            failed[name] = str(error)
            console.print(f"{name} failed: {error}", style="bold red", markup=False)
            continue
        console.print(_table(f"{name}: {PIECES[name].title}", result))
        if result.note:
            console.print(result.note, style="dim", markup=False)
        for picture in result.pictures:
            console.print(str(picture), markup=False, soft_wrap=True)
    write_report(folder, options)
    console.print(f"{len(names) - len(failed)} of {len(names)} done: {folder / 'report.md'}")
    return failed


def _make(name: str, piece: Piece, context: Context, again: bool) -> Result:
    """The finished piece in its folder, or a new one."""
    settings = {field: list(getattr(context, field)) for field in piece.settings}
    result = None if again else load_result(context.folder, settings)
    if result is None:
        context.folder.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        result = piece.run(context)
        seconds = round(time.perf_counter() - started, 1)
        save_result(context.folder, result, settings, name=name, seconds=seconds, **environment())
    return result


def write_report(folder: Path, options: Reproduce) -> None:
    """All finished pieces of a scale as one page, report.md."""
    lines = [f"# Invertible Residual Networks, scale {options.scale}", ""]
    for name, piece in PIECES.items():
        settings = {field: list(getattr(options, field)) for field in piece.settings}
        result = load_result(folder / name, settings)
        if result is not None:
            lines += [f"## {name}: {piece.title}", "", *_markdown(result), result.note, ""]
            lines += [f"![{name}]({name}/{picture.name})\n" for picture in result.pictures]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text("\n".join(lines))


def _markdown(result: Result) -> list[str]:
    header = list(result.rows[0])
    lines = [header, ["---"] * len(header), *(list(row.values()) for row in result.rows)]
    return [f"| {' | '.join(_cell(value) for value in line)} |" for line in lines] + [""]


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|")


def _console() -> Console:
    """As wide as the terminal; wide where there is none."""
    console = Console()
    return console if console.is_terminal else Console(width=_WIDTH)


def _table(title: str, result: Result) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for column in result.rows[0]:
        table.add_column(column, overflow="fold")
    for row in result.rows:
        table.add_row(*(str(value) for value in row.values()))
    return table
