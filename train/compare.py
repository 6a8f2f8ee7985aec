"""``python -m train compare RUN RUN…``: saved runs side by side, in the terminal and in a page."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro
from rich import box
from rich.table import Table
from rich.text import Text

from train.configs.base import TrainingConfig
from train.identity import DATA, NoRunError, read_settings
from train.legend import ACCURACY, BIAS, BITS, DIFFERENCE, STDERR
from train.metrics import read_records, series_of
from train.output import optionally, page_path
from train.page_curves import beside
from train.page_parts import (
    Html,
    element,
    figure,
    joined,
    legend,
    picture,
    section,
    table,
    write_html,
)
from train.page_settings import changed, written
from train.page_verdict import accuracy, likelihood, stopped
from train.progress import format_bound
from train.saved import read_config
from train.terminal import make_console
from train.workdir import WorkdirError

_NOTHING = "—"
#: What reading a value raises that a report lacks, or of another version has otherwise.
_UNREADABLE = (KeyError, TypeError, ValueError, OverflowError)
_PICTURES = ("samples.png", "density.png", "inversion.png")
#: Of where a run was, not of what it is.
_NOT_SHOWN = ("workdir", "data_dir", "dataset")
_LEGEND = [term.entry for term in (BITS, STDERR, ACCURACY, BIAS, DIFFERENCE)]


class Run(NamedTuple):
    """A run to compare.

    Attributes:
      label: the shortest name that tells it from the others.
      workdir: its folder.
      config: its settings.
      data: the SHA-256 of its data, if its config.json has it.
      report: as report.json holds it.
      records: as metrics.jsonl holds them.
    """

    label: str
    workdir: Path
    config: TrainingConfig
    data: str | None
    report: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]

    @property
    def score(self) -> str:
        """What its validation score is, by its program."""
        return "bits/dim" if hasattr(self.config, "train_estimator") else "accuracy"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compare:
    """Put saved runs side by side, in the terminal and in a page.

    Differences of likelihood and accuracy are to the first run, and are said to be within or beyond
    their errors.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN RUN …")]
    """Folders of the runs, two or more."""
    output: Annotated[Path, tyro.conf.arg(aliases=["--out"])] = Path("compare.html")
    """File of the page. A file that is no page is never written over."""

    def run(self) -> int:
        path = page_path(self.output)
        runs = read_runs(self.runs)
        found, told = rows(runs), [*notes(runs), *differences(runs)]
        _print(runs, found, told)
        _write(path, runs, found, told)
        print(path)
        return 0


def read_runs(workdirs: Sequence[Path]) -> list[Run]:
    """Read the runs in these folders.

    Raises:
      ValueError: for fewer than two.
      WorkdirError: naming all folders that hold no run, or one that is damaged, and why.
    """
    if len(workdirs) < 2:
        raise ValueError(f"compare takes the folders of two runs or more; got {len(workdirs)}.")
    found, bad = [], []
    for label, workdir in zip(labels(workdirs), workdirs, strict=True):
        try:
            found.append(_read(label, workdir))
        except WorkdirError as error:
            bad.append(str(error).removeprefix("--workdir "))  # which is no option here
    if bad:
        raise WorkdirError(" ".join(bad))
    return found


def _read(label: str, workdir: Path) -> Run:
    config = read_config(workdir)
    path = workdir / "report.json"
    try:
        data = read_settings(workdir / "config.json").get(DATA)
        report = json.loads(path.read_text(encoding="utf-8"))
        records = read_records(workdir)
    except FileNotFoundError as error:
        raise WorkdirError(
            f"{workdir} has no report.json: its training has not ended, or was killed."
        ) from error
    except (OSError, ValueError, RecursionError, NoRunError) as error:
        raise WorkdirError(f"{path} cannot be read: {error}.") from error
    if not isinstance(report, dict):
        raise WorkdirError(f"{path} is not the report of a run.")
    return Run(label, workdir, config, data, report, records)


def labels(workdirs: Sequence[Path]) -> list[str]:
    """Return the shortest ends of paths that tell them apart; the whole paths where none does."""
    whole = [path.resolve().parts for path in workdirs]
    for count in range(1, max(map(len, whole)) + 1):
        ends = [str(Path(*parts[-count:])) for parts in whole]
        if len(set(ends)) == len(ends):
            return ends
    return [f"{path} ({number})" for number, path in enumerate(workdirs, 1)]


# What is compared


def rows(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Return rows (what, value in each run), without those that no run has."""
    found = [(what, [_value(tell, run) for run in runs]) for what, tell in _ROWS.items()]
    return [row for row in found if set(row[1]) != {_NOTHING}] + setting_rows(runs)


def _value(tell: Callable[[Run], str], run: Run) -> str:
    try:
        return tell(run)
    except _UNREADABLE:
        return _NOTHING


def _seconds(name: str) -> Callable[[Run], str]:
    return lambda run: f"{float(run.report[name]):,.0f} s"


def _error(name: str) -> Callable[[Run], str]:
    return lambda run: format_bound(float(run.report[name]))


_ROWS: dict[str, Callable[[Run], str]] = {
    "program": lambda run: run.config.program,
    "data": lambda run: run.config.dataset,
    "certified invertible": lambda run: "yes" if run.report["certified"] else "NO",
    "test bits/dim": lambda run: likelihood(run.report),
    "bias ≤": _error("bits_per_dim_bias_bound"),
    "spread over the test set": lambda run: (
        f"± {float(run.report['bits_per_dim_sampling_stderr']):.4f}"
    ),
    "importance-weighted": lambda run: (
        f"{float(run.report['bits_per_dim_importance_weighted']):.4f} ± "
        f"{float(run.report['bits_per_dim_importance_weighted_stderr']):.4f}"
    ),
    "test accuracy": lambda run: accuracy(run.report),
    "largest Lipschitz bound of a block": lambda run: format_bound(
        float(run.report["block_lipschitz_max"]), 4
    ),
    "reconstruction, max |error|": lambda run: (
        f"{float(run.report['reconstruction_max_error']):.2g}"
    ),
    "parameters": lambda run: f"{run.report['num_parameters']:,}",
    "steps": lambda run: f"{run.report['steps']:,}" + " (stopped)" * stopped(run.report),
    "training": _seconds("train_seconds"),
    "training and evaluation": _seconds("total_seconds"),
    "device": lambda run: f"{run.report['num_devices']} × {run.report['device']}",
}


def setting_rows(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Return the settings that differ, of programs that have them."""
    names: dict[str, None] = {}
    for run in runs[1:]:
        if type(run.config) is type(runs[0].config):
            names |= dict.fromkeys(changed(run.config, runs[0].config))
        else:
            shared = vars(run.config).keys() & vars(runs[0].config)
            unequal = (n for n in vars(runs[0].config) if n in shared)
            names |= {n: None for n in unequal if vars(run.config)[n] != vars(runs[0].config)[n]}
    return [
        (f"setting {name}", [_setting(run.config, name) for run in runs])
        for name in names
        if name not in _NOT_SHOWN
    ]


def _setting(config: TrainingConfig, name: str) -> str:
    return written(vars(config)[name]).replace("\n", " ") if name in vars(config) else _NOTHING


def same_data(one: Run, other: Run) -> bool:
    """Return whether two runs are evaluated on the same test examples, as far as it is known."""
    if None not in (one.data, other.data):
        return one.data == other.data
    names = "dataset", "max_examples", "margin", "margins"
    return all(getattr(one.config, n) == getattr(other.config, n) for n in names)


def notes(runs: Sequence[Run]) -> Iterator[str]:
    """Yield what keeps runs from being compared."""
    first, *others = runs
    for run in others:
        if not same_data(first, run):
            yield f"{run.label} has other data than {first.label}: their figures are not compared."
        if run.config.program != first.config.program:
            told = f"is of {run.config.program}, {first.label} of {first.config.program}"
            yield f"{run.label} {told}: what both report is compared."
    for run in runs:
        if stopped(run.report):
            yield f"{run.label} was stopped before its evaluation."
        elif (steps := _number(run.report, "steps")) < run.config.steps:
            told = f"step {steps:,.0f} of {run.config.steps:,}"
            yield f"{run.label} was continued after its report, of {told}."


def differences(runs: Sequence[Run]) -> Iterator[str]:
    """Yield sentences on likelihood and accuracy against the first run, on the same data."""
    first = runs[0]
    for run in runs[1:]:
        if not same_data(first, run):
            continue
        for name, unit, scale in (
            ("bits_per_dim", "bits/dim", 1),
            ("accuracy", "accuracy in %,", 100),
        ):
            if name in first.report and name in run.report:
                found = difference(first.report, run.report, name, scale)
                yield f"{unit} of {run.label} minus {first.label}: {found}"


def _number(report: Mapping[str, Any], name: str) -> float:
    """Read a number of a report; NaN where there is none."""
    try:
        return float(report[name])
    except _UNREADABLE:
        return math.nan


def difference(first: Mapping[str, Any], other: Mapping[str, Any], name: str, scale: int) -> str:
    """Say how large a difference is beside its errors.

    It is beyond them where |Δ| > 2·√(s² + t²) + b + c, with the standard errors s, t and the bounds
    b, c on the bias of the two. Without one of these, nothing is said. An accuracy has no bias.
    """
    ends = ["", "_stderr", *["_bias_bound"] * (name == "bits_per_dim")]
    values, errors, *bounds = (
        [scale * _number(report, f"{name}{end}") for report in (first, other)] for end in ends
    )
    biases = [bound for pair in bounds for bound in pair]
    apart, stderr, bias = values[1] - values[0], math.hypot(*errors), sum(biases)
    if not math.isfinite(apart + stderr + bias):
        return f"{apart:+.4f}, whose error is not known."
    within = abs(apart) <= 2.0 * stderr + bias
    told = f" and the bounds on the bias, {format_bound(bias)} together" if bias else ""
    beside = "is within" if within else "is beyond"
    return f"{apart:+.4f} ± {stderr:.4f} {beside} two standard errors{told}."


# How it is shown


def _print(
    runs: Sequence[Run], found: Sequence[tuple[str, list[str]]], told: Sequence[str]
) -> None:
    console = make_console()
    shown = Table(box=box.SIMPLE, pad_edge=False)
    shown.add_column("", style="dim", overflow="fold")
    for run in runs:
        shown.add_column(Text(run.label), overflow="fold")
    for what, values in found:
        shown.add_row(Text(what), *map(Text, values))
    console.print(shown)
    for line in told:
        console.print(Text(line))


def _write(
    path: Path,
    runs: Sequence[Run],
    found: Sequence[tuple[str, list[str]]],
    told: Sequence[str],
) -> None:
    names = [run.label for run in runs]
    columns = len(names) + 1
    title = f"{len(runs)} runs: {', '.join(names)}"
    write_html(
        path,
        title,
        element("header", element("h1", title), *(element("p", line) for line in told)),
        section(
            "Results and settings",
            table(["", *names], [[what, *values] for what, values in found], texts=columns),
            legend(_LEGEND),
            id_="results",
        ),
        section("Curves", _curves(runs), id_="curves"),
        section("Pictures", _pictures(runs), id_="pictures"),
    )


def _curves(runs: Sequence[Run]) -> Html:
    found = []
    for unit, name in {"bits/dim": "bits", "accuracy": "accuracy"}.items():
        own = [run for run in runs if run.score == unit]
        curves = [(run.label, *series_of(run.records, "validation")) for run in own]
        caption = f"Validation score, {unit}."
        found.append(beside(curves, unit, f"validation-{name}", caption))
    programs = dict.fromkeys(run.config.program for run in runs)
    for number, program in enumerate(programs):  # each has a loss of its own
        own = [run for run in runs if run.config.program == program]
        losses = [(run.label, *series_of(run.records, "loss")) for run in own]
        found.append(beside(losses, "loss", f"loss-{number}", f"Loss in training, {program}."))
    together = joined(found)
    return element("div", together, class_="curves") if together else Html()


def _pictures(runs: Sequence[Run]) -> Html:
    drawn = [optionally(f"The picture {path}", _picture, run, path) for run, path in _drawn(runs)]
    found = [shown for shown in drawn if shown is not None]
    return element("div", *found, class_="side") if found else Html()


def _drawn(runs: Sequence[Run]) -> Iterator[tuple[Run, Path]]:
    for run in runs:
        names = run.report.get("pictures", () if stopped(run.report) else _PICTURES)
        listed = names if isinstance(names, list | tuple) else ()
        paths = (run.workdir / name for name in _PICTURES if name in listed)
        yield from ((run, path) for path in paths if path.is_file())


def _picture(run: Run, path: Path) -> Html:
    shown = picture(path, f"{path.stem} of {run.label}")
    return figure(shown, f"{run.label}: {path.stem}, held-out data beside them")
