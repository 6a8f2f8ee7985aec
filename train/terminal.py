"""What a terminal can show: characters that it cannot encode are replaced, and what is going on."""

import codecs
import contextlib
import dataclasses
import logging
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console

_OFTEN_SECONDS, _SELDOM_SECONDS = 5.0, 60.0  # within the first minute, and after it

_PLAIN = {
    "±": "+/-", "≤": "<=", "≥": ">=", "≈": "~", "−": "-", "–": "-", "—": "-", "…": "...",
    "×": "x", "·": "*", "‖": "||", "→": "->", "σ": "sigma", "²": "^2", "³": "^3",
    "₂": "2", "√": "sqrt",
    "━": "-", "─": "-", "•": "*", "’": "'", "“": '"', "”": '"',
}  # fmt: skip


def _in_plain_characters(error: UnicodeError) -> tuple[str, int]:
    """Handle an encoding error: ± becomes +/-, ≤ becomes <=, anything unknown a question mark."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    unknown = error.object[error.start : error.end]
    return "".join(_PLAIN.get(character, "?") for character in unknown), error.end


codecs.register_error("in_plain_characters", _in_plain_characters)


def degrade_characters() -> None:
    """Let standard output and error replace what their encoding lacks, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        degrade_characters_of(stream)


def degrade_characters_of(stream: Any) -> None:
    """Let one stream replace what its encoding lacks, if it can be set."""
    encoding = str(getattr(stream, "encoding", None) or "utf-8").lower()
    if hasattr(stream, "reconfigure") and not encoding.startswith("utf"):
        stream.reconfigure(errors="in_plain_characters")


def make_console(**options: Any) -> Console:
    """Return a console on standard output that writes whatever its encoding lacks as plain text."""
    degrade_characters()
    return Console(**options)


class _Counting(logging.Handler):
    """Counts messages, and says every few seconds how far that is of the total."""

    def __init__(self, what: str, total: int, seconds: float) -> None:
        super().__init__(logging.DEBUG)
        self._what, self._total, self._seconds = what, total, seconds
        self._count, self._last = 0, time.monotonic()

    def emit(self, record: logging.LogRecord) -> None:
        self._count += 1
        if (now := time.monotonic()) - self._last >= self._seconds:
            self._last = now
            tell(f"{self._what} {self._count:,} of {self._total:,} …")


@contextlib.contextmanager
def counting(logger: str, what: str, total: int, seconds: float = 2.0) -> Iterator[None]:
    """Say, every ``seconds``, which of ``total`` things that a logger speaks of is due."""
    log, handler = logging.getLogger(logger), _Counting(what, total, seconds)
    level, propagate = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagate


@dataclasses.dataclass
class _Wait:
    """What was told last, when, and when it was last said."""

    what: str
    since: float
    said: float


_waits: list[_Wait] = []  # one at most


def tell(what: str) -> None:
    """Say what goes on, on standard error: what takes long and has no progress of its own.

    What ends in an ellipsis lasts until the next one, or :func:`proceed`; see :func:`repeating`.
    """
    degrade_characters()
    print(what, file=sys.stderr, flush=True)
    now = time.monotonic()
    _waits[:] = [_Wait(what, now, now)] if what.endswith("…") else _waits


def proceed() -> None:
    """End what :func:`tell` said is going on."""
    _waits.clear()


@contextlib.contextmanager
def repeating(every: float = _OFTEN_SECONDS) -> Iterator[None]:
    """Meanwhile say again what :func:`tell` said is going on, and for how long it has been.

    That is every 5 seconds, and after a minute every minute, so that nothing seems to hang.
    """
    over = threading.Event()
    thread = threading.Thread(target=_repeat, args=(every, over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        proceed()


def _repeat(every: float, over: threading.Event) -> None:
    while not over.wait(every / 10):
        for wait in list(_waits):
            now = time.monotonic()
            pause = every if now - wait.since < _SELDOM_SECONDS else _SELDOM_SECONDS
            if now - wait.said >= pause:
                wait.said = now
                with contextlib.suppress(OSError, ValueError):  # nobody reads any more
                    print(f"{wait.what} {now - wait.since:.0f} s", file=sys.stderr, flush=True)
