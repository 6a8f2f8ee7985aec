"""The lock of a workdir, which one process holds while it trains there."""

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

LOCK = ".run.lock"


class Locked(Exception):
    """A folder in which another process trains."""


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder; the system releases it when the process ends, however it does.

    Where the system has no locks, as on some network file systems, there is none.

    Raises:
      Locked: if another process holds it, naming that.
    """
    with (folder / LOCK).open("a+") as file:
        if not _taken(file.fileno()):
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise Locked(
                f"{holder} trains in {folder}. Wait until it ends, or choose another --workdir."
            )
        file.truncate(0)
        file.write(f"Process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def _taken(descriptor: int) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True
