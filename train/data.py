"""Data sets in memory, by name: NumPy arrays that do not depend on the training seed."""

import difflib
import hashlib
import math
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from train import images, points

#: Of a run; see :func:`check_seed`.
MAX_SEED = 2**32 - 4

_SPLITS = ("train", "validation", "test")


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
        """Number of classes; a ValueError without labels."""
        if self.classes is not None:
            return self.classes
        return 1 + max(int(self.labels(split).max()) for split in _SPLITS)

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
    """Return the names that :func:`load_dataset` takes, beside paths of .npz files."""
    return ("digits", *points.SAMPLERS, *images.TFDS)


def load_dataset(
    name: str,
    *,
    data_dir: Path | None = None,
    max_examples: int | None = None,
    margin: int = 0,
) -> Dataset:
    """Load a data set by name; every call returns the same arrays.

    "digits" is scikit-learn's 1,797 images, uint8 [n, 8, 8, 1] of 17 grey levels, with labels,
    split 1,257 / 180 / 360. The sets in the plane are float32 points [n, 2], 50,000 / 2,000 /
    10,000. The others are read through TFDS, uint8 [n, height, width, channels] of 256 levels: its
    "test" is the test set, the last 2,000 images of its "train" are the validation set. A name that
    ends in ".npz" is a file; see :func:`train.images.read_npz`.

    Args:
      name: one of :func:`dataset_names`, or a path that ends in ".npz".
      data_dir: folder of TFDS's data sets; None: its own default.
      max_examples: largest size of each split, counted from its start; None: all.
      margin: zero pixels to add around every image.

    Raises:
      ValueError: for an unknown name, listing the known ones; if the data cannot be read; for
        settings out of range.
    """
    if name not in dataset_names() and not name.endswith(".npz"):
        raise ValueError(unknown_dataset(name, dataset_names()))
    if max_examples is not None and max_examples < 1:
        raise ValueError(f"max_examples must be ≥ 1; got {max_examples}.")
    if margin < 0 or (margin and name in points.SAMPLERS):
        raise ValueError(f"margin must be ≥ 0, and 0 for points; got {margin} for {name!r}.")
    if name in points.SAMPLERS:
        return Dataset(name, *(split[:max_examples] for split in points.draw_splits(name)))
    if name == "digits":
        read = images.read_digits()
    elif name.endswith(".npz"):
        read = images.read_npz(Path(name))
    else:
        read = images.read_tfds(name, data_dir, max_examples)
    splits = (_margined(split[:max_examples], margin) for split in read.images)
    labels = (part[:max_examples] for part in read.labels)
    return Dataset(
        Path(name).stem, *splits, *labels, num_levels=read.num_levels, classes=read.num_classes
    )


def _margined(split: np.ndarray, margin: int) -> np.ndarray:
    sides = ((0, 0), (margin, margin), (margin, margin), (0, 0))
    return np.pad(split, sides) if margin else split


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
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed must be ≥ 0 and ≤ {MAX_SEED}; got {seed}.")


def unknown_dataset(name: str, known: Iterable[str]) -> str:
    """Return the message for a data set that is not among ``known``."""
    known = tuple(known)
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.6)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"There is no data set {name!r}.{hint} Known: {', '.join(known)}."
