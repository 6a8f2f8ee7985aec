"""How a program ends early: what the operating system refused, and signals."""

import contextlib
import errno
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

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


class ProgramError(Exception):
    """What a program tells its user in a sentence, and ends."""


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
    """Let SIGTERM raise :class:`Stopped`, so that what is begun is closed.

    Python hears of a signal when native code, such as a compilation, returns. Where that takes more
    than a second, a line says that the signal was seen.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with _watching():
        before: Any = signal.signal(signal.SIGTERM, _stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)


#: Set when the program has answered a signal.
_answered = threading.Event()


def answered() -> None:
    """Say that a signal has been heard, by a handler that tells so itself."""
    _answered.set()


@contextlib.contextmanager
def _watching(patience: float = 1.0) -> Iterator[None]:
    """Let a thread hear of signals at once, whatever the main thread is in."""
    hears, tells = socket.socketpair()
    tells.setblocking(False)
    before = signal.set_wakeup_fd(tells.fileno(), warn_on_full_buffer=False)
    _answered.clear()
    thread = threading.Thread(target=_watch, args=(hears, patience), daemon=True)
    thread.start()
    try:
        yield
    finally:
        _answered.set()
        signal.set_wakeup_fd(before)
        tells.close()
        thread.join()
        hears.close()


def _watch(hears: socket.socket, patience: float) -> None:
    while heard := hears.recv(1):
        if heard[0] not in (signal.SIGINT, signal.SIGTERM) or _answered.wait(patience):
            continue
        name = signal.Signals(heard[0]).name
        told = "it takes effect when what is being compiled or computed now has ended"
        with contextlib.suppress(OSError):
            print(f"{name} is seen: {told}.", file=sys.stderr, flush=True)


def _stop(signum: int, frame: FrameType | None) -> NoReturn:
    answered()
    if _has_others():  # they would wait for this one to leave
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)
    raise Stopped(signum)


@contextlib.contextmanager
def leaving_others(patience: float = 10.0) -> Iterator[None]:
    """Let a process that fails end soon, although others of its run have not failed.

    At exit JAX waits for all processes, for five minutes, while the others wait in a collective
    that this one never joins. Where all fail alike, they leave within ``patience`` seconds. Else
    this one ends, which ends them: see :mod:`train.processes`. A stop that all agreed on, with
    status 143, is no failure.
    """
    try:
        yield
    except BaseException as error:
        status = error.code if isinstance(error, SystemExit) else 1
        if not _has_others() or status in (None, 0, 128 + signal.SIGTERM):
            raise
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        leaving = threading.Thread(target=sys.modules["jax"].distributed.shutdown, daemon=True)
        leaving.start()
        leaving.join(patience)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)


def _has_others() -> bool:
    """Return whether this is one of several processes, without importing JAX."""
    jax: Any = sys.modules.get("jax")
    return hasattr(jax, "distributed") and jax.distributed.is_initialized()
