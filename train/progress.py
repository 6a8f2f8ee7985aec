"""How training is going, in the terminal; plain lines where there is no terminal."""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from iresnet_jax import Certificate

_WINDOW_SECONDS = 30.0
_SECONDS_BETWEEN_LINES = 10.0


class TrainingProgress:
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

    def __init__(
        self,
        total_steps: int,
        description: str,
        *,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if total_steps < 1:
            raise ValueError(f"total_steps must be ≥ 1; got {total_steps}.")
        self._total = total_steps
        self._description = description
        self._console = console or Console()
        self._clock = clock
        self._speed = _Speed()
        self._step: int | None = None
        self._metrics: dict[str, float] = {}
        self._started = clock()
        self._last_line: tuple[float, int] | None = None
        self._live: Live | None = None

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
        elif self._step is not None and (self._last_line or (0.0, -1))[1] != self._step:
            self._print_line()

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
        if self._live is None and self._line_is_due():
            self._print_line()

    def _line_is_due(self) -> bool:
        return (
            self._last_line is None or self._clock() - self._last_line[0] >= _SECONDS_BETWEEN_LINES
        )

    def _print_line(self) -> None:
        step = self._step or 0
        self._last_line = (self._clock(), step)
        line = Text("  ").join(
            [
                Text(self._description),
                Text(f"step {step:,}/{self._total:,} ({step / self._total:.0%})"),
                *self._metric_texts(),
                Text(f"elapsed {self._elapsed()}"),
                Text(f"left {self._left()}"),
            ]
        )
        self._console.print(line, soft_wrap=True)

    def _render(self) -> RenderableType:
        step = self._step or 0
        top = Table.grid(padding=(0, 2), expand=True)
        for _ in range(5):
            top.add_column(no_wrap=True)
        top.columns[1].ratio = 1
        top.add_row(
            Text(self._description, style="bold"),
            ProgressBar(
                total=self._total, completed=step, complete_style="blue", finished_style="green"
            ),
            Text(f"{step:,}/{self._total:,}"),
            Text(f"{self._elapsed()} elapsed", style="dim"),
            Text(f"{self._left()} left", style="dim"),
        )
        return Group(
            top,
            Text("  ").join(self._metric_texts() or [Text("waiting for the first step", "dim")]),
        )

    def _metric_texts(self) -> list[Text]:
        texts = [_metric_text(name, value) for name, value in self._metrics.items()]
        rate = self._speed.steps_per_second
        return texts if rate is None else [*texts, Text(f"{_significant(rate)} steps/s")]

    def _elapsed(self) -> str:
        return format_duration(self._clock() - self._started)

    def _left(self) -> str:
        rate = self._speed.steps_per_second
        if not rate:
            return "-:--:--"
        return format_duration((self._total - (self._step or 0)) / rate)


class _Speed:
    """Steps per second over the last seconds; None until two updates at different times."""

    def __init__(self) -> None:
        self._updates: deque[tuple[float, int]] = deque()
        self.steps_per_second: float | None = None

    def add(self, now: float, step: int) -> None:
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
    """Print a certificate: its blocks, the whole network, the verdict."""
    table = Table(box=box.SIMPLE, pad_edge=False)
    for title in ("", "layers: estimate ≤ norm ≤ bound", "L", "Lip ≤", "inverse's Lip ≤"):
        table.add_column(
            title, justify="left" if title == "" or title.startswith("layers") else "right"
        )
    for block in certificate.blocks:
        style = "" if block.certified else "bold red"
        layers = "  ".join(f"{layer.sigma:.4f} {layer.upper_bound:.4f}" for layer in block.layers)
        bounds = (f"{value:.4g}" for value in (block.lipschitz, block.forward, block.inverse))
        table.add_row(block.name, layers, *bounds, style=style)
    whole = (f"{value:.4g}" for value in (certificate.forward, certificate.inverse))
    table.add_section()
    table.add_row("network", "", "", *whole, style="bold")
    console = console or Console()
    console.print(table)
    names = ", ".join(block.name for block in certificate.failures)
    verdict = "Certified invertible." if certificate.certified else f"NOT certified: {names}."
    console.print(Text(verdict, style="bold green" if certificate.certified else "bold red"))


def format_metric(value: float) -> str:
    """A number at a width that stays steady: 1.234, 123.4, 1.2e-05, nan."""
    size = abs(value)
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if size < 0.01 or size >= 100_000:
        return f"{value:.1e}"
    return f"{value:.3f}" if size < 100 else f"{value:.1f}"


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
