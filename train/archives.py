"""A user's .npz archives, read with care: nothing is allocated that the file cannot hold."""

import math
import struct
import sys
import zipfile
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np

from train.memory import memory

_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA}
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
#: DEFLATE shrinks nothing further.
_DEFLATE_RATIO = 1032
_ENCRYPTED = 0x1
_UNREADABLE = (OSError, ValueError, RuntimeError, EOFError, MemoryError, struct.error)


class DataError(ValueError):
    """Data that are missing, or cannot be used."""


class Archive(NamedTuple):
    """What an .npz file holds.

    Attributes:
      names: of all its arrays.
      arrays: those that were asked for, by name.
    """

    names: list[str]
    arrays: dict[str, np.ndarray]


def read_archive(path: Path, wanted: Collection[str]) -> Archive:
    """Read those arrays of an .npz file that are ``wanted`` and there.

    Raises:
      DataError: for a missing file or one that is no .npz; for a member that is encrypted, that
        claims more than it holds, or that memory does not hold.
    """
    try:
        with path.open("rb") as raw:
            if not zipfile.is_zipfile(raw):
                raise ValueError("it is not a whole zip archive")
            raw.seek(0)
            with zipfile.ZipFile(raw) as archive:
                members = {x.filename.removesuffix(".npy"): x for x in archive.infolist()}
                chosen = {name: x for name, x in members.items() if name in wanted}
                sizes = [_checked_size(archive, member) for member in chosen.values()]
            refuse_beyond_memory(sum(sizes), f"the arrays {', '.join(chosen)}")
            raw.seek(0)
            with np.load(raw, allow_pickle=False) as file:
                return Archive(list(members), {name: file[name] for name in chosen})
    except (*_UNREADABLE, zipfile.BadZipFile, zlib.error) as error:
        told = str(error) or type(error).__name__
        raise DataError(f"{path} cannot be read as an .npz file: {told.rstrip('.')}.") from error


def refuse_beyond_memory(size: int, what: str) -> None:
    """Refuse an array of ``size`` bytes where the machine does not have as many, by a DataError."""
    if size > (total := memory() or sys.maxsize):
        raise DataError(
            f"{what} would take {told_size(size)} of memory; this machine has {told_size(total)}."
        )


def told_size(size: int) -> str:
    """Return a number of bytes in the unit that suits it."""
    power = min(max(size.bit_length() - 1, 0) // 10, 6)
    return f"{size / 2 ** (10 * power):,.4g} {('B', *(f'{x}iB' for x in 'KMGTPE'))[power]}"


def _checked_size(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> int:
    """The bytes of a member's array, as claimed and possible; a ValueError where they differ."""
    name = f"its member {member.filename!r}"
    if member.flag_bits & _ENCRYPTED:
        raise ValueError(f"{name} is encrypted")
    if member.compress_type not in _METHODS:
        raise ValueError(f"{name} is compressed by the unknown method {member.compress_type}")
    most = {
        zipfile.ZIP_STORED: member.compress_size,
        zipfile.ZIP_DEFLATED: _DEFLATE_RATIO * (member.compress_size + 1),
    }.get(member.compress_type, member.file_size)
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        if version not in _HEADERS:
            raise ValueError(f"{name} has the unknown format version {version}")
        shape, _, dtype = _HEADERS[version](file)
        claimed = math.prod(shape) * dtype.itemsize
        held = min(member.file_size, most) - file.tell()
    if claimed > held and not dtype.hasobject:
        raise ValueError(
            f"{name} claims {told_size(claimed)}, shape {shape} of {dtype}, and holds at most "
            f"{told_size(held)}"
        )
    return claimed
