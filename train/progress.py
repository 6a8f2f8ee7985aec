"""How training and evaluation are going, in the terminal; plain lines where there is none."""

import abc
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from decimal import ROUND_CEILING, Decimal
from types import TracebackType
from typing import Any, Self

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from iresnet_jax import Certificate

_WINDOW_SECONDS = 30.0
_SECONDS_BETWEEN_LINES = 10.0
_WIDE = 100


class _Progress(abc.ABC):
    """A live display of something long, as a context manager; plain lines without a terminal.

    Args:
      description: what is running, in a few words.
      console: where to write; standard output by default.
      clock: seconds, from an arbitrary origin.
    """

    def __init__(
        self,
        description: str,
        *,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._description = description
        self._console = console or Console()
        self._clock = clock
        self._speed = _Speed()
        self._started = clock()
        self._last_line: float | None = None
        self._has_news = False
        self._live: Live | None = None

    @abc.abstractmethod
    def _render(self) -> RenderableType:
        """What a terminal shows."""

    @abc.abstractmethod
    def _line(self) -> list[Text]:
        """The parts of a plain line, without the description."""

    def __enter__(self) -> Self:
        self._started = self._clock()
        if self._console.is_interactive:
            self._live = Live(
                console=self._console, get_renderable=self._render, refresh_per_second=4
            )
            self._live.start(refresh=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()
        elif self._has_news:
            self._print_line()

    def _changed(self) -> None:
        """Print a line, if one is due and there is no terminal."""
        self._has_news = True
        due = self._last_line is None or self._clock() - self._last_line >= _SECONDS_BETWEEN_LINES
        if self._live is None and due:
            self._print_line()

    def _print_line(self) -> None:
        self._last_line, self._has_news = self._clock(), False
        line = Text("  ").join([Text(self._description), *self._line()])
        self._console.print(line, soft_wrap=True)

    def _bar(self, completed: float, total: float, count: str) -> Table:
        top = Table.grid(padding=(0, 2), expand=True)
        for _ in range(5):
            top.add_column(no_wrap=True)
        top.columns[1].ratio = 1
        top.add_row(
            Text(self._description, style="bold"),
            ProgressBar(
                total=total, completed=completed, complete_style="blue", finished_style="green"
            ),
            Text(count),
            Text(f"{self._elapsed()} elapsed", style="dim"),
            Text(f"{self._left(total - completed)} left", style="dim"),
        )
        return top

    def _elapsed(self) -> str:
        return format_duration(self._clock() - self._started)

    def _left(self, remaining: float) -> str:
        rate = self._speed.steps_per_second
        return format_duration(remaining / rate) if rate else "-:--:--"


class TrainingProgress(_Progress):
    """A live display of a training run, as a context manager.

    In a terminal: a bar, step/total, elapsed and remaining time, and a line of metrics. Elsewhere
    (CI, a log file): one plain line at most every 10 seconds, and one at the end.

    Speed and remaining time come from the last 30 seconds of updates, so that compilation, which
    precedes the first update, does not spoil them.

    Args:
      total_steps: at which the bar is full, ≥ 1.
      description: what is running, in a few words.
      console: where to write; standard output by default.
      clock: seconds, from an arbitrary origin.

    Raises:
      ValueError: if ``total_steps`` is below 1.
    """

    def __init__(self, total_steps: int, description: str, **options: Any) -> None:
        if total_steps < 1:
            raise ValueError(f"total_steps must be ≥ 1; got {total_steps}.")
        super().__init__(description, **options)
        self._total = total_steps
        self._step = 0
        self._metrics: dict[str, float] = {}

    def update(self, step: int, **metrics: float) -> None:
        """Show the state after ``step`` steps.

        Metrics are converted to Python floats, which waits for a device to finish. An underscore
        in a name shows as a space, ``_per_`` as a slash: ``bits_per_dim`` is "bits/dim".

        Raises:
          ValueError: if ``step`` is outside [0, total_steps].
        """
        if not 0 <= step <= self._total:
            raise ValueError(f"step must lie in [0, total_steps = {self._total}]; got {step}.")
        self._metrics = {name: float(value) for name, value in metrics.items()}
        self._step = step
        self._speed.add(self._clock(), step)
        self._changed()

    def _line(self) -> list[Text]:
        return [
            Text(f"step {self._step:,}/{self._total:,} ({self._step / self._total:.0%})"),
            *self._metric_texts(),
            Text(f"elapsed {self._elapsed()}"),
            Text(f"left {self._left(self._total - self._step)}"),
        ]

    def _render(self) -> RenderableType:
        return Group(
            self._bar(self._step, self._total, f"{self._step:,}/{self._total:,}"),
            Text("  ").join(self._metric_texts() or [Text("waiting for the first step", "dim")]),
        )

    def _metric_texts(self) -> list[Text]:
        texts = [_metric_text(name, value) for name, value in self._metrics.items()]
        rate = self._speed.steps_per_second
        return texts if rate is None else [*texts, Text(f"{_significant(rate)} steps/s")]


class LikelihoodProgress(_Progress):
    """A live display of a likelihood as it is drawn, as a context manager.

    Like :class:`TrainingProgress`: the bar is of draws, as many as the standard error is expected
    to need; below it the value, its standard error and the bias bound, each with its target. While
    the terms of the series are chosen, the bias bound is seen to shrink, and its way stays in view.

    Args:
      description: what is evaluated, in a few words.
      needed: draws to make, as far as is known before the first.
      target_stderr: standard error, bits/dim, at which drawing ends.
      target_bias: bits/dim, for which the number of terms is chosen.
      **options: console and clock, as for :class:`TrainingProgress`.
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
        super().__init__(description, **options)
        self._target_stderr, self._target_bias = target_stderr, target_bias
        self._bounds: list[float] = []
        self._method = "choosing the terms"
        self._draws, self._needed = 0.0, needed
        self._value: Text | None = None

    def add_terms(self, num_terms: int, bias_bound: float) -> None:
        """Show the bias bound of a number of terms that is tried."""
        self.choose(f"{num_terms} terms", bias_bound)

    def choose(self, method: str, bias_bound: float) -> None:
        """Show how log-determinants are evaluated, in a few words, and their bias bound."""
        self._method = method
        if [bias_bound] != self._bounds[-1:]:
            self._bounds.append(bias_bound)
        if self._live is not None:
            self._live.refresh()

    def update(self, draws: float, needed: int, **estimate: float) -> None:
        """Show how many draws are made, a begun one in part, of how many that will be needed.

        Args:
          draws: made so far.
          needed: in all.
          **estimate: ``value`` and ``stderr``, bits/dim, after a whole draw.
        """
        self._draws, self._needed = draws, needed
        if estimate:
            self._value = self._quoted(**estimate)
        self._speed.add(self._clock(), draws)
        self._changed()

    def _quoted(self, value: float, stderr: float) -> Text:
        spread = "?" if math.isinf(stderr) else f"{stderr:.4f}"
        quoted = f"{value:.4f} ± {spread} (target {self._target_stderr:g})"
        return Text.assemble(("bits/dim ", "dim"), quoted)

    def _line(self) -> list[Text]:
        return [Text(self._count()), *self._texts(), Text(f"elapsed {self._elapsed()}")]

    def _render(self) -> RenderableType:
        bar = self._bar(self._draws, max(self._needed, self._draws), self._count())
        return Group(bar, Text("  ").join(self._texts()))

    def _count(self) -> str:
        return f"draw {math.ceil(self._draws)} of ~{self._needed}"

    def _texts(self) -> list[Text]:
        value = self._value or Text("waiting for the first draw", "dim")
        return [value, self._bias(), Text(self._method, "dim")]

    def _bias(self) -> Text:
        """The bound of the fewest terms, and that of those reached by now."""
        if not self._bounds:
            return Text(f"bias: target {self._target_bias:g}", "dim")
        started, reached = self._bounds[0], self._bounds[-1]
        shown = [started, reached] if started > reached else [reached]
        way = " → ".join(map(format_bound, shown))
        style = "" if reached <= self._target_bias else "bold red"
        return Text(f"bias ≤ {way} (target {self._target_bias:g})", style)


class _Speed:
    """Steps per second over the last seconds; None until two updates at different times."""

    def __init__(self) -> None:
        self._updates: deque[tuple[float, float]] = deque()
        self.steps_per_second: float | None = None

    def add(self, now: float, step: float) -> None:
        if self._updates and step < self._updates[-1][1]:
            self._updates.clear()
        self._updates.append((now, step))
        while len(self._updates) > 2 and self._updates[0][0] < now - _WINDOW_SECONDS:
            self._updates.popleft()
        first_time, first_step = self._updates[0]
        elapsed = now - first_time
        self.steps_per_second = (step - first_step) / elapsed if elapsed > 0 else None


def summary_table(
    title: str, rows: Sequence[tuple[str, str]], *, console: Console | None = None
) -> None:
    """Print (what, value) rows as a compact table; text is shown as it is, brackets included."""
    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False, title_justify="left")
    table.title = Text(title, style="bold")
    table.add_column(style="dim")
    table.add_column()
    for what, value in rows:
        table.add_row(Text(what), Text(value))
    (console or Console()).print(table)


def certificate_table(certificate: Certificate, *, console: Console | None = None) -> None:
    """Print a certificate: its blocks, the whole network, the verdict.

    A narrow terminal shows the layers' bounds alone, a wide one (100 columns) the power iteration's
    estimates, too.
    """
    console = console or Console()
    both = console.width >= _WIDE
    table = Table(box=box.SIMPLE, pad_edge=False)
    for title in ("block", *["layers: norm ≈"] * both, "layers: norm ≤"):
        table.add_column(title, no_wrap=True)
    for title in ("L ≤", "Lip ≤", "inverse ≤"):
        table.add_column(title, justify="right", no_wrap=True)
    for block in certificate.blocks:
        estimates = [" ".join(f"{layer.sigma:.4f}" for layer in block.layers)] * both
        proved = " ".join(_rounded_up(layer.upper_bound) for layer in block.layers)
        numbers = (format_bound(x, 4) for x in (block.lipschitz, block.forward, block.inverse))
        style = "" if block.certified else "bold red"
        table.add_row(block.name, *estimates, proved, *numbers, style=style)
    whole = (format_bound(value, 4) for value in (certificate.forward, certificate.inverse))
    table.add_section()
    table.add_row("network", *[""] * both, "", "", *whole, style="bold")
    console.print(table)
    if certificate.certified:
        console.print(Text("Certified invertible.", style="bold green"))
        console.print("The network's bounds are products over its blocks: the worst case of all.")
        return
    console.print(Text("NOT certified invertible:", style="bold red"))
    for block in certificate.failures:
        console.print(Text(f"  {block.name}: {block.problem}", style="red"), soft_wrap=True)


def _rounded_up(bound: float) -> str:
    """Four decimals, never below the bound."""
    return f"{math.ceil(bound * 1e4) / 1e4:.4f}" if math.isfinite(bound) else f"{bound:g}"


def format_metric(value: float) -> str:
    """A number at a width that stays steady: 1.234, 123.4, 1.2e-05, nan."""
    size = abs(value)
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if size < 0.01 or size >= 100_000:
        return f"{value:.1e}"
    return f"{value:.3f}" if size < 100 else f"{value:.1f}"


def format_bound(value: float, digits: int = 2) -> str:
    """An upper bound with so many significant digits, rounded up: 0.00098, 0, inf."""
    if value <= 0 or not math.isfinite(value):
        return f"{value:g}"
    unit = digits - 1 - math.floor(math.log10(value))
    units = Decimal(value).scaleb(unit).to_integral_value(ROUND_CEILING)
    return f"{float(units.scaleb(-unit)):.{digits}g}"


def format_duration(seconds: float) -> str:
    """Seconds, rounded, as h:mm:ss."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}"


def _metric_text(name: str, value: float) -> Text:
    label = name.replace("_per_", "/").replace("_", " ")
    return Text.assemble(
        (f"{label} ", "dim"), (format_metric(value), "" if math.isfinite(value) else "bold red")
    )


def _significant(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
