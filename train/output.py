"""Files that programs write beside a report: whole or not at all, and never over another file."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from train.terminal import tell

#: Suffixes that a picture may have, with what such files begin with.
PICTURES: dict[str, tuple[bytes, ...]] = {
    ".png": (b"\x89PNG",),
    ".jpg": (b"\xff\xd8",),
    ".jpeg": (b"\xff\xd8",),
    ".pdf": (b"%PDF",),
    ".svg": (b"<?xml", b"<svg"),
}
_ARRAY: dict[str, tuple[bytes, ...]] = {".npy": (b"\x93NUMPY",)}
_PAGE: dict[str, tuple[bytes, ...]] = {".html": (b"<!DOCTYPE",)}
#: What a run writes itself, beside files that are no pictures.
_OF_THE_RUN = (
    *("samples.png", "reconstructions.png", "density.png", "inversion.png"),
    "walk.png",
    *("training_curve.png", "checkpoints", "tensorboard", "evaluation"),
)

Result = TypeVar("Result")


class OutputError(ValueError):
    """A file that cannot be written, or must not be."""


def optionally(what: str, function: Callable[..., Result], *args: Any) -> Result | None:
    """Call a function whose result is optional: if it fails, say so in one line, and return None.

    For pictures and samples, which must not take a finished evaluation with them.
    """
    try:
        return function(*args)
    except Exception as error:  # whatever a drawing raises
        told = " ".join(str(error).split()) or type(error).__name__
        tell(f"{what} could not be made: {told[:300]}")
        return None


def picture_path(output: Path, workdir: Path) -> Path:
    """Return the file that ``--output`` names for a picture; ".png" is its suffix by default.

    Raises:
      OutputError: if it cannot be written, is no picture, or belongs to the run in ``workdir``.
    """
    path = output if output.suffix or not output.name else output.with_suffix(".png")
    if output.is_dir() or not output.name:
        raise OutputError(f"output must be a file; got the folder {str(output)!r}.")
    _refuse_file_of_run(path, workdir)
    _refuse_to_replace(path, PICTURES, "picture")
    _refuse_unwritable(path)
    return path


def page_path(output: Path) -> Path:
    """Return the file that ``--output`` names for a page; ".html" is its suffix by default.

    Raises:
      OutputError: if it cannot be written, is no page, or is the page of a run.
    """
    path = output if output.suffix or not output.name else output.with_suffix(".html")
    if output.is_dir() or not output.name:
        raise OutputError(f"output must be a file; got the folder {str(output)!r}.")
    for folder in path.resolve().parents[:2]:  # that of the run, or its evaluation
        if path.name == "report.html" and (folder / "config.json").exists():
            raise OutputError(f"output {path} belongs to the run in {folder}: choose another name.")
    _refuse_to_replace(path, _PAGE, "page")
    _refuse_unwritable(path)
    return path


def array_path(picture: Path, what: str = "") -> Path:
    """Return the file for an array beside a picture, as in "sample-latents.npy".

    Raises:
      OutputError: if it is there, and holds something else.
    """
    path = picture.with_name(f"{picture.stem}{what and f'-{what}'}.npy")
    _refuse_to_replace(path, _ARRAY, "NumPy array")
    return path


def save_array(path: Path, array: np.ndarray) -> None:
    """Write an array as .npy, whole or not at all."""
    with whole(path) as partial, partial.open("wb") as file:
        np.save(file, array, allow_pickle=False)


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a name of the same suffix to write to; then rename it to ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _refuse_file_of_run(path: Path, workdir: Path) -> None:
    own = workdir.resolve()
    if own not in path.resolve().parents:
        return
    name = path.resolve().relative_to(own).parts[0]
    if name in _OF_THE_RUN:
        raise OutputError(f"output {path} belongs to the run in {workdir}: choose another name.")


def _refuse_to_replace(path: Path, kinds: dict[str, tuple[bytes, ...]], what: str) -> None:
    """Refuse a name that is not of these kinds, or a file there that is not."""
    if path.suffix.lower() not in kinds:
        known = ", ".join(kinds)
        raise OutputError(f"output must be a {what}, whose name ends in {known}; got {path}.")
    if path.is_dir():
        raise OutputError(f"output must be a file; got the folder {str(path)!r}.")
    if not path.exists():
        return
    start = path.read_bytes()[:16] if os.access(path, os.R_OK) and path.is_file() else b"?"
    if start and not start.startswith(kinds[path.suffix.lower()]):
        raise OutputError(f"output {path} is there, and no {what}: it is not written over.")


def _refuse_unwritable(path: Path) -> None:
    folder = path.absolute().parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise OutputError(f"output {path} cannot be written: {folder} is a file.")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"output {path} cannot be written: {folder} is read-only.")
