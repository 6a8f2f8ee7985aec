"""Data sets in memory, by name: NumPy arrays that do not depend on the training seed."""

import difflib
import hashlib
import math
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from train import images, points, tables
from train.archives import DataError, read_archive, refuse_beyond_memory
from train.configs.base import FILES

#: Of a run; see :func:`check_seed`.
MAX_SEED = 2**32 - 4

_SPLITS = ("train", "validation", "test")
_PICTURES = [name for name in images.KEYS if name.endswith("images")]


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set in memory, in three fixed splits.

    Attributes:
      name: as ``load_dataset`` knows it.
      train, validation, test: [n, height, width, channels] grey levels (integers), or [n, dim]
        points (floats). Validation is for choosing and stopping, test for the final report alone.
      train_labels, validation_labels, test_labels: [n] class indices, or None.
      num_levels: grey levels are the integers 0 … num_levels − 1; None for points.
      classes: number of classes; None without labels, or to count them in the labels.
    """

    name: str
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    train_labels: np.ndarray | None = None
    validation_labels: np.ndarray | None = None
    test_labels: np.ndarray | None = None
    _: KW_ONLY
    num_levels: int | None = None
    classes: int | None = None

    @property
    def example_shape(self) -> tuple[int, ...]:
        """Shape of one example: (height, width, channels), or (dim,)."""
        return self.train.shape[1:]

    @property
    def dim(self) -> int:
        """Dimensions of one example: the divisor of bits per dimension."""
        return math.prod(self.example_shape)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of an image; a ValueError for points."""
        if not self.is_image:
            raise ValueError(f"data set {self.name!r} holds points, not images.")
        height, width, channels = self.example_shape
        return height, width, channels

    def labels(self, split: str) -> np.ndarray:
        """Return the labels of "train", "validation" or "test"; a ValueError without labels."""
        labels = getattr(self, f"{split}_labels")
        if labels is None:
            raise ValueError(f"data set {self.name!r} has no labels.")
        return labels

    @property
    def num_classes(self) -> int:
        """Number of classes; a ValueError without labels, or for labels that number no classes."""
        if self.classes is not None:
            return self.classes
        return images.count_classes(self.name, [self.labels(split) for split in _SPLITS])

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all splits and labels, with shapes, types and number of levels, as hex digits.

        The name counts for nothing: a renamed file holds the same data. ``max_examples`` and
        ``margin`` change the arrays, and so the fingerprint. The arrays must not change afterwards.
        """
        digest = hashlib.sha256(repr(self.num_levels).encode())
        for split in _SPLITS:
            for array in (getattr(self, split), getattr(self, f"{split}_labels")):
                if array is None:
                    digest.update(b"None")
                    continue
                digest.update(repr((array.shape, array.dtype.name)).encode())
                little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
                digest.update(little.data)
        return digest.hexdigest()

    @property
    def is_image(self) -> bool:
        """Whether examples are images [height, width, channels] of grey levels."""
        return self.num_levels is not None


def dataset_names() -> tuple[str, ...]:
    """Return the names that :func:`load_dataset` takes, beside paths of .npz and .csv files."""
    return ("digits", *points.SAMPLERS, *images.TFDS)


def load_dataset(
    name: str,
    *,
    data_dir: Path | None = None,
    max_examples: int | None = None,
    margin: int | Sequence[int] = 0,
) -> Dataset:
    """Load a data set by name; every call returns the same arrays.

    "digits" is scikit-learn's 1,797 images, uint8 [n, 8, 8, 1] of 17 grey levels, with labels,
    split 1,257 / 180 / 360. The sets in the plane are float32 points [n, 2], 50,000 / 2,000 /
    10,000. The others are read through TFDS, uint8 [n, height, width, channels] of 256 levels: its
    "test" is the test set, the last 2,000 images of its "train" are the validation set.

    A name that ends in ".npz" or ".csv" is a file: images, see :func:`train.images.images_of`, or
    points, see :func:`train.tables.points_of` and :func:`train.tables.read_csv`.

    Args:
      name: one of :func:`dataset_names`, or a path that ends in ".npz" or ".csv".
      data_dir: folder of TFDS's data sets; None: its own default.
      max_examples: largest size of each split, counted from its start; None: all.
      margin: zero pixels to add around every image, or (top, bottom, left, right).

    Raises:
      ValueError: for an unknown name, listing the known ones; if the data cannot be read; for
        settings out of range.
    """
    own = Path(name) if name.endswith(FILES) else None
    if name not in dataset_names() and own is None:
        raise ValueError(unknown_dataset(name, dataset_names()))
    if max_examples is not None and max_examples < 1:
        raise ValueError(f"max_examples must be ≥ 1; got {max_examples}.")
    sides = _sides(margin)
    if min(sides) < 0 or (any(sides) and name in points.SAMPLERS):
        raise ValueError(f"margin must be ≥ 0, and 0 for points; got {margin} for {name!r}.")
    called = name if own is None else own.name
    read = _read_own(own) if own is not None else _read(name, data_dir, max_examples)
    if not isinstance(read, images.Images):
        if any(sides):
            raise ValueError(f"margin must be 0 for points; got {margin} for {name!r}.")
        return Dataset(called, *(split[:max_examples] for split in read))
    splits = [split[:max_examples] for split in read.images]
    _check_margin(splits, sides)
    labels = (part[:max_examples] for part in read.labels)
    return Dataset(
        called,
        *(_margined(split, sides) for split in splits),
        *labels,
        num_levels=read.num_levels,
        classes=read.num_classes,
    )


def _read(
    name: str, data_dir: Path | None, max_examples: int | None
) -> images.Images | list[np.ndarray]:
    """Images or points that come along, or through TFDS."""
    if name in points.SAMPLERS:
        return points.draw_splits(name)
    if name == "digits":
        return images.read_digits()
    return images.read_tfds(name, data_dir, max_examples)


def _read_own(path: Path) -> images.Images | list[np.ndarray]:
    """Images or points of a user's file."""
    if path.suffix == ".csv":
        return tables.read_csv(path)
    names, arrays = read_archive(path, (*images.KEYS, *tables.POINTS))
    pictures, rows = ([x for x in kind if x in arrays] for kind in (_PICTURES, tables.POINTS))
    if pictures and rows:
        raise DataError(f"{path} holds both {rows[0]!r} and {pictures[0]!r}: leave one out.")
    if rows:
        return tables.points_of(path, arrays)
    return images.images_of(path, arrays, names)


def holds_points(name: str) -> bool:
    """Return whether a file's name, or an archive's list of contents, says that it holds points.

    Nothing else is read; a file that cannot be is no file of points.
    """
    if not name.endswith(".npz"):
        return name.endswith(".csv")
    try:
        with zipfile.ZipFile(name) as archive:
            names = {member.removesuffix(".npy") for member in archive.namelist()}
    except (OSError, zipfile.BadZipFile):
        return False
    return not names.isdisjoint(tables.POINTS)


def needed_margins(side: int, halvings: int) -> tuple[int, int]:
    """Return the pixels (before, after) that a side lacks to be halved so many times."""
    lacking = -side % 2**halvings
    return lacking // 2, lacking - lacking // 2


def refuse_odd_sides(dataset: Dataset, halvings: int) -> None:
    """Refuse images whose sides cannot be halved so many times, by a ValueError.

    The message names the sides that can be, and the margin that gets there, if one does.
    """
    height, width, _ = dataset.image_shape
    lacking = [needed_margins(side, halvings) for side in (height, width)]
    if not any(map(any, lacking)):
        return
    sides = [side + sum(pixels) for side, pixels in zip((height, width), lacking, strict=True)]
    each = [*lacking[0], *lacking[1]]
    all_alike = f"margin = {each[0]}" if len(set(each)) == 1 else ""
    way = all_alike or f"--margins {' '.join(map(str, each))}"
    raise ValueError(
        f"Images of {height}×{width} cannot be halved {halvings} times, as the scales need: both "
        f"sides must be multiples of {2**halvings}, such as {sides[0]}×{sides[1]}; {way} does that."
    )


def _sides(margin: int | Sequence[int]) -> tuple[int, int, int, int]:
    """(top, bottom, left, right)."""
    if isinstance(margin, int):
        return margin, margin, margin, margin
    if len(margin) != 4:
        raise ValueError(f"margins are (top, bottom, left, right); got {tuple(margin)}.")
    top, bottom, left, right = margin
    return top, bottom, left, right


def _check_margin(splits: Iterable[np.ndarray], sides: tuple[int, int, int, int]) -> None:
    top, bottom, left, right = sides
    size = 0
    for split in splits:
        count, height, width, channels = split.shape
        pixels = (height + top + bottom) * (width + left + right)
        size += count * pixels * channels * split.dtype.itemsize
    told = sides[0] if len(set(sides)) == 1 else sides
    refuse_beyond_memory(size, f"margin = {told}: the images")


def _margined(split: np.ndarray, sides: tuple[int, int, int, int]) -> np.ndarray:
    top, bottom, left, right = sides
    pads = ((0, 0), (top, bottom), (left, right), (0, 0))
    return np.pad(split, pads) if any(sides) else split


def check_batch_size(num_examples: int, batch_size: int) -> None:
    """Refuse a batch larger than the data set, by a ValueError."""
    if not 1 <= batch_size <= num_examples:
        raise ValueError(
            f"batch_size must lie in [1, {num_examples}], the number of training examples "
            f"(num_examples); got batch_size {batch_size}."
        )


def check_seed(seed: int) -> None:
    """Refuse a seed that a random key of 32 bits would take for another, by a ValueError.

    The topmost four are for the streams at seed + 1, + 2 and + 3.
    """
    if not (isinstance(seed, int | np.integer) and 0 <= seed <= MAX_SEED):
        raise ValueError(f"seed must be an integer in [0, {MAX_SEED}]; got {seed}.")


def unknown_dataset(name: str, known: Iterable[str]) -> str:
    """Return the message for a data set that is not among ``known``."""
    known = tuple(known)
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.6)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"There is no data set {name!r}.{hint} Known: {', '.join(known)}."
