"""How long a run has left: its steps, what it does between them, and its evaluation."""

import bisect
import contextlib
import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
from rich.progress import ProgressColumn, Task
from rich.text import Text

_WINDOW_SECONDS = 30.0


class Compilations:
    """Counts the seconds that JAX traces and compiles; what is reported within another, once."""

    def __init__(self) -> None:
        self._spans: list[tuple[float, float]] = []

    def listen(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        """Count an event that has just ended, if it is one of tracing or compiling."""
        if event.startswith("/jax/core/compile/"):
            self.add(time.monotonic(), duration_secs)

    def add(self, end: float, seconds: float) -> None:
        """Count what began so many seconds before ``end``; ends come in order."""
        begin = end - seconds
        while self._spans and self._spans[-1][0] >= begin:
            self._spans.pop()
        if self._spans:
            begin = max(begin, self._spans[-1][1])
        self._spans.append((begin, end))

    @property
    def seconds(self) -> float:
        """All of them so far."""
        return sum(end - begin for begin, end in self._spans)


_compilations = Compilations()
jax.monitoring.register_event_duration_secs_listener(_compilations.listen)


class TimeLeftColumn(ProgressColumn):
    """Shows the seconds that a function returns as H:MM:SS, rounded up; None as unknown."""

    def __init__(self, seconds: Callable[[], float | None]) -> None:
        super().__init__()
        self._seconds = seconds

    def render(self, task: Task) -> Text:
        seconds = self._seconds()
        if seconds is None:
            return Text("-:--:--", "progress.remaining")
        minutes, rest = divmod(math.ceil(seconds), 60)
        return Text(f"{minutes // 60}:{minutes % 60:02}:{rest:02}", "progress.remaining")


class TimeLeft:
    """An estimate of the seconds that a run has left, from those that its parts took.

    It is steps left × seconds a step + Σ over what is planned: times left × seconds each, and the
    evaluation at the end. Seconds a step are of the last 30 s, without what came between them.
    Other parts count without their compilation, which happens once; one that has not happened yet
    is taken to be as long as those that have, on average. The evaluation is taken to be as long as
    all was before the first step ended: it compiles as much.

    Args:
      total: steps of the run.
      planned: name of a part -> the steps after which it is due, in order.
      evaluates: whether an evaluation follows.
      clock: counts seconds from any origin.
      compiled: counts the seconds of compilation so far.
    """

    def __init__(
        self,
        total: int,
        planned: Mapping[str, Sequence[int]] | None = None,
        *,
        evaluates: bool = False,
        clock: Callable[[], float] = time.monotonic,
        compiled: Callable[[], float] = lambda: _compilations.seconds,
    ) -> None:
        self._total, self._planned, self._evaluates = total, planned or {}, evaluates
        self._clock, self._compiled, self._started = clock, compiled, clock()
        self._setup, self._between = 0.0, 0.0
        self._took: dict[str, list[float]] = defaultdict(list)
        self._steps: deque[tuple[float, int]] = deque()

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Time one of the planned parts."""
        begin, compiled = self._clock(), self._compiled()
        yield
        seconds = self._clock() - begin
        self._between += seconds
        self._took[name].append(max(0.0, seconds - (self._compiled() - compiled)))

    def advance(self, step: int) -> None:
        """Note that ``step`` steps are done."""
        if not self._steps:
            self._setup = self._clock() - self._started
        now = self._clock() - self._between  # of the steps alone
        self._steps.append((now, step))
        while len(self._steps) > 2 and self._steps[1][0] <= now - _WINDOW_SECONDS:
            self._steps.popleft()

    @property
    def seconds(self) -> float | None:
        """The estimate; None before the second update."""
        if not self._steps:
            return None
        (then, first), (now, step) = self._steps[0], self._steps[-1]
        if step >= self._total:
            return self._after()
        if step == first:
            return None
        steps = (self._total - step) * (now - then) / (step - first)
        return steps + self._parts(step) + self._after()

    def _parts(self, step: int) -> float:
        means = {name: sum(took) / len(took) for name, took in self._took.items()}
        unknown = sum(means.values()) / len(means) if means else 0.0
        return math.fsum(
            (len(due) - bisect.bisect_right(due, step)) * means.get(name, unknown)
            for name, due in self._planned.items()
        )

    def _after(self) -> float:
        return self._setup if self._evaluates else 0.0
