"""Which modules of this library a model calls, as it is traced."""

import contextlib
import contextvars
from collections.abc import Iterator

Path = tuple[str, ...]

_calls: contextvars.ContextVar[set[Path] | None] = contextvars.ContextVar("calls", default=None)


def record_call(path: Path) -> None:
    """Note that the module at ``path`` is called, where somebody listens."""
    calls = _calls.get()
    if calls is not None:
        calls.add(path)


@contextlib.contextmanager
def recorded_calls() -> Iterator[set[Path]]:
    """Collect the paths of modules that are called within."""
    calls: set[Path] = set()
    token = _calls.set(calls)
    try:
        yield calls
    finally:
        _calls.reset(token)


@contextlib.contextmanager
def unrecorded_calls() -> Iterator[None]:
    """Within it nothing is collected: a foreign module is applied by itself."""
    token = _calls.set(None)
    try:
        yield
    finally:
        _calls.reset(token)
