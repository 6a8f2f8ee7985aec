"""Memory that a setting would take, against that of the machine: refused before any work."""

import contextlib
import os
from pathlib import Path

_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_COPIES = 4  # latents, what they are inverted to, and both once more while they are copied


def refuse_beyond_memory(name: str, count: int, dim: int) -> None:
    """Refuse ``count`` float32 examples of ``dim`` dimensions that this machine cannot hold.

    Raises:
      ValueError: naming the setting, the memory that it takes, and the largest value that fits.
    """
    needed, there = 4 * _COPIES * count * dim, memory()
    if there is not None and needed > there:
        most = there // (4 * _COPIES * dim)
        raise ValueError(
            f"{name} must lie in [1, {most}], by this machine's memory of {_in_gb(there)}; got "
            f"{count}, which takes {_in_gb(needed)} at {dim} dimensions each."
        )


def memory() -> int | None:
    """Return the bytes that this process may use, by the machine and its container, if known."""
    found = []
    with contextlib.suppress(ValueError, OSError, AttributeError):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for limit in _LIMITS:
        with contextlib.suppress(ValueError, OSError):  # no such file, or "max"
            found.append(int(Path(limit).read_text()))
    return min((size for size in found if size > 0), default=None)


def _in_gb(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size < 1e15 else f"{size / 1e9:.1e} GB"
