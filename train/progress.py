"""Progress of training and evaluation in the terminal; plain lines elsewhere."""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from decimal import ROUND_CEILING, Decimal
from typing import Any, Self

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.segment import Segments
from rich.table import Column, Table
from rich.text import Text

from iresnet_jax import Certificate
from train import legend
from train.legend import Term
from train.terminal import make_console, proceed, tell
from train.time_left import TimeLeft, TimeLeftColumn

_WINDOW_SECONDS = 30.0
_SECONDS_BETWEEN_LINES = 10.0
_WIDE = 100
#: What metrics are called in the terminal, where it is not their name.
_LABELS = {
    "sigma": "layer norm while training",
    "flattery": "loss flatters by",
    "loss_bias_bound": "of at most",
}


class _Bar(Progress):
    """One bar, with a line of text below."""

    below = Text()

    def get_renderables(self):
        yield from super().get_renderables()
        yield self.below


class _Display:
    """A live display of a long computation, as a context manager.

    In a terminal it shows a bar, the count, elapsed and remaining time, and a line of text.
    Elsewhere (CI, a log file) it prints a plain line every 10 seconds at most, and one at the end.

    Speed comes from the last 30 seconds of updates. Compilation, which precedes the first update,
    does not distort it. The clock counts seconds from any origin.
    """

    _usually = ""  # how long compilation takes, in words

    def __init__(
        self,
        description: str,
        total: float,
        *,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console or make_console()
        self._clock = clock
        self._last_line = self._last_update = -math.inf
        self._has_news = False
        self._bar = _Bar(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(None, complete_style="blue", table_column=Column(ratio=1)),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            "elapsed ",
            TimeLeftColumn(self._left),
            "left",
            console=self._console,
            get_time=clock,
            refresh_per_second=4,
            disable=not self._console.is_interactive,
            expand=True,
        )
        self._bar.add_task(description, total=total)
        (self._task,) = self._bar.tasks

    def _count(self) -> str:
        """Say how much is done."""
        raise NotImplementedError

    def _texts(self) -> list[Text]:
        """Return the texts below the bar."""
        raise NotImplementedError

    def _seconds_left(self) -> float | None:
        """Seconds left as of the last update, as far as they are known."""
        return self._task.time_remaining

    def _left(self) -> float | None:
        seconds, since = self._seconds_left(), self._clock() - self._last_update
        return None if seconds is None else max(0.0, seconds - since)

    def __enter__(self) -> Self:
        self._show()
        proceed()
        if self._bar.disable:
            tell(f"{self._task.description}: compiling{self._usually} …")
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        if self._has_news:
            self._print_line()

    def _advance(self, completed: float, total: float) -> None:
        """Move the bar, or print a line if one is due."""
        proceed()
        now = self._clock()
        # Updates may be rarer than the window: the last two always count.
        self._bar.speed_estimate_period = max(_WINDOW_SECONDS, now - self._last_update)
        self._last_update = now
        self._task.total = total
        self._bar.update(self._task.id, completed=completed)
        self._show()
        self._has_news = self._bar.disable
        if self._has_news and now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._print_line()

    def _show(self) -> None:
        self._task.fields["count"] = self._count()
        self._bar.below = Text("  ").join(self._texts())
        self._bar.refresh()

    def _explain(self, terms: Iterable[Term]) -> None:
        """Print what terms mean: above the bar, or as lines of their own."""
        for term in terms:
            self._console.print(Text(term.line, "dim"), soft_wrap=self._bar.disable)

    def _print_line(self) -> None:
        self._last_line, self._has_news = self._clock(), False
        elapsed = Text.assemble("elapsed ", TimeElapsedColumn().render(self._task))
        left = Text.assemble("left ", TimeLeftColumn(self._left).render(self._task))
        parts = [Text(self._task.description), Text(self._count()), *self._texts(), elapsed, left]
        self._console.print(Text("  ").join(parts), soft_wrap=True)


class TrainingProgress(_Display):
    """A live display of a training run, as a context manager; see :class:`_Display`.

    The time left is that of the whole run; see :class:`~train.time_left.TimeLeft`, also for
    ``planned`` and ``evaluates``.
    """

    _usually = " (often half a minute)"

    def __init__(
        self,
        total_steps: int,
        description: str,
        *,
        planned: Mapping[str, Sequence[int]] | None = None,
        evaluates: bool = False,
        clock: Callable[[], float] = time.monotonic,
        **options: Any,
    ) -> None:
        self._total = total_steps
        self._metrics: dict[str, float] = {}
        self._time = TimeLeft(total_steps, planned, evaluates=evaluates, clock=clock)
        super().__init__(description, total_steps, clock=clock, **options)

    def timed(self, part: str) -> AbstractContextManager[None]:
        """Time one of the planned parts."""
        return self._time.timed(part)

    def update(self, step: int, **metrics: float) -> None:
        """Show the state after ``step`` steps.

        Metrics are converted to Python floats, which waits for the device. Underscores in names
        show as spaces, ``_per_`` as a slash: ``bits_per_dim`` becomes "bits/dim".
        """
        self._explain(legend.of_metrics(name for name in metrics if name not in self._metrics))
        self._metrics = {name: float(value) for name, value in metrics.items()}
        self._time.advance(step)
        self._advance(step, self._total)

    def _seconds_left(self) -> float | None:
        return self._time.seconds

    def _count(self) -> str:
        done = self._task.completed
        return f"step {done:,}/{self._total:,} ({done / self._total:.0%})"

    def _texts(self) -> list[Text]:
        texts = [_metric_text(name, value) for name, value in self._metrics.items()]
        rate = self._task.speed
        if rate:
            texts.append(Text(f"{rate:,.0f} steps/s" if rate >= 100 else f"{rate:.3g} steps/s"))
        return texts or [Text("compiling the first step", "dim")]


class LikelihoodProgress(_Display):
    """A live display of a likelihood while it is estimated; see :class:`_Display`.

    The bar counts draws, up to the number that the standard error is expected to need. Below are
    the value, its standard error and the bias bound, each with its target in bits/dim. While the
    terms of the series are chosen, the bias bound shrinks; its first value stays in view.
    ``needed`` is the number of draws to make, as far as it is known before the first.
    """

    def __init__(
        self,
        description: str,
        needed: int,
        *,
        target_stderr: float,
        target_bias: float,
        **options: Any,
    ) -> None:
        self._target_stderr, self._target_bias = target_stderr, target_bias
        self._bound: float | None = None
        self._method = "choosing the terms"
        self._needed = needed
        self._value = Text("compiling the first draw", "dim")
        super().__init__(description, needed, **options)

    def __enter__(self) -> Self:
        super().__enter__()
        self._explain(legend.LIKELIHOOD)
        return self

    def choose(self, method: str, bias_bound: float) -> None:
        """Show how log-determinants are estimated, in a few words, and their bias bound."""
        self._method, self._bound = method, bias_bound
        self._show()

    def update(
        self, draws: float, needed: int, value: float | None = None, stderr: float = math.inf
    ) -> None:
        """Show how many draws are made, an unfinished one as a fraction, out of those needed.

        After a whole draw, ``value`` and ``stderr`` are the estimate, in bits/dim.
        """
        self._needed = needed
        if value is not None:
            spread = "?" if math.isinf(stderr) else f"{stderr:.4f}"
            quoted = f"{value:.4f} ± {spread} (target {self._target_stderr:g})"
            self._value = Text.assemble(("bits/dim ", "dim"), quoted)
        self._advance(draws, max(draws, needed))

    def _count(self) -> str:
        return f"draw {math.ceil(self._task.completed)} of ~{self._needed}"

    def _texts(self) -> list[Text]:
        return [self._value, self._bias(), Text(self._method, "dim")]

    def _bias(self) -> Text:
        if self._bound is None:
            return Text(f"bias: target {self._target_bias:g}", "dim")
        style = "" if self._bound <= self._target_bias else "bold red"
        return Text(f"bias ≤ {format_bound(self._bound)} (target {self._target_bias:g})", style)


def summary_table(
    title: str, rows: Sequence[tuple[str, str]], *, console: Console | None = None
) -> None:
    """Print (what, value) rows as a compact table, as plain text, and what their words mean."""
    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False, title_justify="left")
    table.title = Text(title, style="bold")
    table.add_column(style="dim", overflow="fold")
    table.add_column(overflow="fold")
    for what, value in rows:
        table.add_row(Text(what), Text(value))
    console = console or make_console()
    proceed()
    _print_whole(table, console, wrap=True)
    for term in legend.of_rows(rows):
        console.print(Text(f" {term.line}", "dim"), soft_wrap=not console.is_terminal)


def certificate_table(certificate: Certificate, *, console: Console | None = None) -> None:
    """Print a certificate: the blocks, the whole network, and the verdict.

    A terminal of 100 columns or more shows the power iteration's estimates beside the layers'
    bounds, and the product of those beside the bound L of the whole branch.
    """
    console = console or make_console()
    both = console.width >= _WIDE
    table = Table(box=box.SIMPLE, pad_edge=False)
    for title in ("block", *["layers: norm ≈"] * both, "layers: norm ≤"):
        table.add_column(title, no_wrap=True)
    for title in (*["product ≤"] * both, "L ≤", "Lip ≤", "inverse ≤"):
        table.add_column(title, justify="right", no_wrap=True)
    for block in certificate.blocks:
        estimates = [" ".join(f"{layer.sigma:.4f}" for layer in block.layers)] * both
        proved = " ".join(_rounded_up(layer.upper_bound) for layer in block.layers)
        bounds = [*[block.product] * both, block.lipschitz, block.forward, block.inverse]
        numbers = (format_bound(x, 4) for x in bounds)
        style = "" if block.certified else "bold red"
        table.add_row(block.name, *estimates, proved, *numbers, style=style)
    whole = (format_bound(value, 4) for value in (certificate.forward, certificate.inverse))
    table.add_section()
    table.add_row("network", *["", ""] * both, "", "", *whole, style="bold")
    _print_whole(table, console, wrap=False)
    if certificate.certified:
        console.print(Text("Certified invertible.", style="bold green"))
        console.print("The network's bounds are products over its blocks: a worst case.")
        return
    console.print(Text("NOT certified invertible:", style="bold red"))
    for block in certificate.failures:
        console.print(Text(f"  {block.name}: {block.problem}", style="red"), soft_wrap=True)


def _print_whole(table: Table, console: Console, *, wrap: bool) -> None:
    """Print a table that loses no digit in a narrow terminal: its lines may be longer than that."""
    endless = console.options.update_width(10_000)
    needed = Measurement.get(console, endless, table)
    width = max(console.width, needed.minimum if wrap else needed.maximum)
    lines = console.render(table, console.options.update_width(width))
    console.print(Segments(lines), soft_wrap=True, end="")


def _rounded_up(bound: float) -> str:
    """Format with four decimals, never below the bound."""
    return f"{math.ceil(bound * 1e4) / 1e4:.4f}" if math.isfinite(bound) else f"{bound:g}"


def format_metric(value: float) -> str:
    """Format a number at a steady width: 1.234, 123.4, 1.2e-05, nan."""
    size = abs(value)
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if size < 0.01 or size >= 100_000:
        return f"{value:.1e}"
    return f"{value:.3f}" if size < 100 else f"{value:.1f}"


def format_bound(value: float, digits: int = 2) -> str:
    """Format an upper bound with so many significant digits, rounded up: 0.00098, 0, inf."""
    if value <= 0 or not math.isfinite(value):
        return f"{value:g}"
    unit = digits - 1 - math.floor(math.log10(value))
    units = Decimal(value).scaleb(unit).to_integral_value(ROUND_CEILING)
    return f"{float(units.scaleb(-unit)):.{digits}g}"


def _metric_text(name: str, value: float) -> Text:
    label = _LABELS.get(name) or name.replace("_per_", "/").replace("_", " ")
    return Text.assemble(
        (f"{label} ", "dim"), (format_metric(value), "" if math.isfinite(value) else "bold red")
    )
