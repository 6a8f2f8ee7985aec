"""Points [n, d] of a user's own: from an .npz archive or a .csv table."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from train.archives import DataError

_SPLITS = ("train", "validation", "test")

#: Names of arrays of points in an archive.
POINTS = ("points", *(f"{split}_points" for split in _SPLITS))


def points_of(path: Path, arrays: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Return training, validation and test points, float32 [n, d], of an archive's arrays.

    They are numbers: ``points``, of which a tenth becomes the test set and a tenth the validation
    set, by a fixed permutation; or ``train_points``, ``validation_points`` and ``test_points``.

    Raises:
      DataError: for missing or unsuitable arrays, naming them.
    """
    if "points" in arrays:
        whole = _checked(f"{path}: 'points'", arrays["points"])
        return [whole[part] for part in fixed_split(f"{path}: 'points'", len(whole))]
    if missing := [name for name in POINTS[1:] if name not in arrays]:
        raise DataError(f"{path} has points for some splits, but no {' and no '.join(missing)}.")
    parts = [_checked(f"{path}: {name!r}", arrays[name]) for name in POINTS[1:]]
    for name, part in zip(POINTS[1:], parts, strict=True):
        if part.shape[1] != parts[0].shape[1]:
            raise DataError(
                f"{path}: {name!r} has {part.shape[1]} columns, 'train_points' {parts[0].shape[1]}."
            )
    return parts


def read_csv(path: Path) -> list[np.ndarray]:
    """Read points from a table of numbers, a row a line, separated by commas.

    A first line without any number is a header. Rows are split as those of ``points`` in
    :func:`points_of`.

    Raises:
      DataError: for a file that cannot be read; for a row of another length, or with what is no
        finite number, naming its line.
    """
    rows: list[list[float]] = []
    first = True
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            for fields in reader:
                if not any(field.strip() for field in fields):
                    continue
                if not (first and not any(map(_is_number, fields))):
                    rows.append(_row(f"{path}, line {reader.line_num}", fields, rows[:1]))
                first = False
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as a .csv file: {error}.") from error
    if not rows:
        raise DataError(f"{path} holds no row of numbers.")
    whole = _checked(str(path), np.array(rows))
    return [whole[part] for part in fixed_split(str(path), len(whole))]


def fixed_split(what: str, count: int, kind: str = "points") -> list[np.ndarray]:
    """Return indices for training, validation and test: a tenth each for the last two."""
    if count < 3:
        raise DataError(f"{what}: three {kind} are the fewest that make three splits; got {count}.")
    order = np.random.default_rng(0).permutation(count)
    held_out = max(1, count // 10)
    return np.split(order, [count - 2 * held_out, count - held_out])


def _row(where: str, fields: Sequence[str], first: Sequence[Sequence[float]]) -> list[float]:
    if first and len(fields) != len(first[0]):
        raise DataError(f"{where}: rows must have {len(first[0])} numbers; got {len(fields)}.")
    for column, field in enumerate(fields, 1):
        if not _is_number(field):
            raise DataError(f"{where}, column {column}: a number is needed; got {field!r}.")
        with np.errstate(over="ignore"):
            if not np.isfinite(np.float32(float(field))):
                raise DataError(
                    f"{where}, column {column}: a number that float32 holds is needed; got "
                    f"{field.strip()}."
                )
    return [float(field) for field in fields]


def _is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True


def _checked(what: str, points: np.ndarray) -> np.ndarray:
    if points.ndim != 2 or 0 in points.shape:
        raise DataError(f"{what} must have shape [n, d], n and d ≥ 1; got {points.shape}.")
    if not (np.issubdtype(points.dtype, np.floating) or np.issubdtype(points.dtype, np.integer)):
        raise DataError(f"{what} must be numbers; got {points.dtype}.")
    with np.errstate(over="ignore"):
        single = np.ascontiguousarray(points, np.float32)
    finite = np.isfinite(single)
    if not finite.all():
        row, column = (int(i) for i in np.argwhere(~finite)[0])
        raise DataError(
            f"{what} must be finite in float32; got {points[row, column]} at row {row}, column "
            f"{column}."
        )
    return single
