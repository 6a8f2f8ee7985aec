"""How a program ends early: what the operating system refused, and signals."""

import contextlib
import errno
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import jax

_FULL = "Free some space there; the same command, without --restart, resumes a run."
_NEXT = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EACCES: "Choose a place that this user may write to.",
    errno.EPERM: "Choose a place that this user may write to.",
    errno.EROFS: "Choose a place that can be written to.",
    errno.EEXIST: "Move what is there, or choose another place.",
    errno.ENOTDIR: "Move the file that is there, or choose another place.",
    errno.EISDIR: "Move the folder that is there, or choose another place.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
}


class Stopped(KeyboardInterrupt):
    """A run that a signal ended: Ctrl-C (SIGINT), or SIGTERM."""

    def __init__(self, signum: int, told: str = "Stopped."):
        super().__init__(told)
        self.status = 128 + signum


def reason(error: OSError) -> str:
    """Say in a sentence which file the system refused, why, and what to do."""
    where = f"{error.filename}: " if error.filename else ""
    return " ".join([f"{where}{error.strerror or error}.", _NEXT.get(error.errno or 0, "")]).strip()


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name ``path`` in errors of the system that name no file, such as those of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def unused(path: Path) -> Path:
    """Return ``path``, or the first of ``path``.1, .2 and so on where nothing is yet."""
    number, free = 0, path
    while free.exists() or free.is_symlink():
        number += 1
        free = path.with_name(f"{path.name}.{number}")
    return free


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM raise :class:`Stopped`, so that what is begun is closed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: Any = signal.signal(signal.SIGTERM, _stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop(signum: int, frame: FrameType | None) -> NoReturn:
    if jax.distributed.is_initialized():  # the others would wait for this one to leave
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)
    raise Stopped(signum)
