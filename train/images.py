"""Image data sets, as arrays: scikit-learn's digits, TFDS without TensorFlow, .npz files."""

import importlib.util
import io
import os
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from iresnet_jax.dequantization import MAX_LEVELS
from train.archives import DataError, read_archive
from train.tables import fixed_split

#: Data sets that are read through TFDS.
TFDS = ("mnist", "fashion_mnist", "cifar10", "cifar100", "svhn_cropped")

_VALIDATION = 2_000
_SPLITS = ("train", "validation", "test")
_STARTS = tuple(f"{split}_" for split in _SPLITS)
_MAX_LABEL = np.iinfo(np.int32).max
_MANY_CLASSES = 1_000
_LEVELS = {"bool": 2, "uint8": 256, "uint16": 65_536}

#: Names of a user's arrays.
KEYS = (
    "num_levels",
    *(f"{start}{kind}" for kind in ("images", "labels") for start in ("", *_STARTS)),
)


class Images(NamedTuple):
    """Training, validation and test arrays, in this order.

    Attributes:
      images: three arrays of integers [n, height, width, channels].
      labels: three arrays, int32 [n], or none.
      num_levels: grey levels are 0 … num_levels − 1.
      num_classes: number of classes of the labels, or None.
    """

    images: Sequence[np.ndarray]
    labels: Sequence[np.ndarray]
    num_levels: int
    num_classes: int | None


def read_digits() -> Images:
    """Read the 8×8 digits that scikit-learn bundles, split 1,257 / 180 / 360."""
    from sklearn.datasets import load_digits  # takes a second to import

    bunch = load_digits()
    images, labels = bunch.images[..., None].astype(np.uint8), bunch.target.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(images))
    parts = np.split(order, [len(order) - 540, len(order) - 360])
    return Images([images[p] for p in parts], [labels[p] for p in parts], 17, 10)


def read_tfds(name: str, data_dir: Path | None, max_examples: int | None = None) -> Images:
    """Read a data set that TFDS has prepared, at most ``max_examples`` of each split.

    Raises:
      DataError: if it is not prepared, and TensorFlow, which prepares it, is not installed; if
        the prepared files cannot be read.
    """
    folder = prepared_folder(name, data_dir) or prepare(name, data_dir)
    try:
        return _read_prepared(name, folder, max_examples)
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(
            f"Data set {name!r} cannot be read from {folder}: {error}. Remove that folder and "
            "prepare the data set again."
        ) from error


def _read_prepared(name: str, folder: Path, max_examples: int | None) -> Images:
    import tensorflow_datasets as tfds  # takes a second to import

    builder = tfds.builder_from_directory(str(folder))
    total = builder.info.splits["train"].num_examples
    splits = (  # train, validation, test
        ("train", range(total - _VALIDATION)[:max_examples]),
        ("train", range(total - _VALIDATION, total)[:max_examples]),
        ("test", range(builder.info.splits["test"].num_examples)[:max_examples]),
    )
    counts = " + ".join(f"{len(indices):,}" for _, indices in splits)
    print(f"Decoding {name} ({counts} images) …", flush=True)
    started = time.perf_counter()
    decoded = [_decode(tfds, builder, source, indices) for source, indices in splits]
    print(f"Decoded {name} in {time.perf_counter() - started:.1f} s.")
    images, labels = zip(*decoded, strict=True)
    return Images(images, labels, 256, builder.info.features["label"].num_classes)


def _decode(tfds: Any, builder: Any, split: str, indices: range) -> tuple[np.ndarray, np.ndarray]:
    """Decode a part of a split, without TFDS's own decoder, which is slower."""
    from PIL import Image

    source = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
    records = source.__getitems__(list(indices))
    images = np.empty((len(records), *builder.info.features["image"].shape), np.uint8)
    for out, record in zip(images, records, strict=True):
        image = Image.open(io.BytesIO(record["image"]), formats=("PNG",))
        out[:] = np.asarray(image).reshape(out.shape)
    return images, np.array([record["label"] for record in records], np.int32)


def tfds_folder(data_dir: Path | None) -> Path:
    """Return the folder of TFDS's data sets."""
    default = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    return Path(default if data_dir is None else data_dir).expanduser()


def prepared_folder(name: str, data_dir: Path | None) -> Path | None:
    """Return the newest prepared version of a TFDS data set, or None."""
    versions = (tfds_folder(data_dir) / name).glob("*/dataset_info.json")
    return max((path.parent for path in versions), key=_version, default=None)


def _version(folder: Path) -> tuple[int, ...]:
    return tuple(int(part) for part in folder.name.split(".") if part.isdigit())


def prepare(name: str, data_dir: Path | None) -> Path:
    """Download and prepare a TFDS data set, which needs TensorFlow; return its folder.

    Raises:
      DataError: without TensorFlow, with how to install it.
    """
    folder = tfds_folder(data_dir)
    if importlib.util.find_spec("tensorflow") is None:
        where = "" if data_dir is None else f" --data-dir {data_dir}"
        raise DataError(
            f"Data set {name!r} is not prepared in {folder} (--data-dir, or the variable "
            "TFDS_DATA_DIR, names another folder). To prepare it, which needs TensorFlow once:\n"
            "  pip install -e '.[prepare]'\n"
            f"  python -m train prepare --dataset {name}{where}"
        )
    import tensorflow_datasets as tfds

    print(f"Preparing {name} in {folder} …")
    builder = tfds.builder(name, data_dir=str(folder), file_format="array_record")
    builder.download_and_prepare()
    return Path(builder.data_dir)


def read_npz(path: Path) -> Images:
    """Read a user's own images from an .npz file; see :func:`images_of`."""
    names, arrays = read_archive(path, KEYS)
    return images_of(path, arrays, names)


def images_of(path: Path, arrays: Mapping[str, np.ndarray], names: Collection[str]) -> Images:
    """Return the images of an archive.

    Its arrays are ``images``, [n, height, width] or [n, height, width, channels], and, optionally,
    ``labels``, integers ≥ 0 [n]: a tenth becomes the test set and a tenth the validation set, by a
    fixed permutation. Or else ``train_images``, ``validation_images``, ``test_images``, and,
    optionally, ``train_labels`` and so on.

    Grey levels are the integers from 0 to ``num_levels`` − 1. That number may be an array too;
    without it, it is 256 for uint8, 65,536 for uint16 and 2 for bool. Images of other types need
    it. Floats must be whole numbers: those in [0, 1] are to be rounded first, as
    ``np.rint(x * (num_levels - 1))``.

    Args:
      path: of the archive, for messages.
      arrays: those that are there of :data:`KEYS`.
      names: of all that is in the archive.

    Raises:
      DataError: for unsuitable arrays, naming them.
    """
    starts = ("",) if "images" in arrays else _STARTS
    images = [_checked_images(path, f"{start}images", arrays, names) for start in starts]
    missing = [f"{start}labels" for start in starts if f"{start}labels" not in arrays]
    if 0 < len(missing) < len(starts):
        raise DataError(f"{path} has labels for some splits, but no {' and no '.join(missing)}.")
    labels = [
        _checked_labels(path, f"{start}labels", arrays, len(part))
        for start, part in zip(starts, images, strict=True)
        if not missing
    ]
    num_levels = _num_levels(f"{path}: '{starts[0]}images'", arrays.get("num_levels"), images)
    images = [
        _levels(path, f"{start}images", part, num_levels)
        for start, part in zip(starts, images, strict=True)
    ]
    classes = count_classes(str(path), labels) if labels else None
    if len(images) == 1:
        order = fixed_split(str(path), len(images[0]), "images")
        images, labels = (
            [x[part] for x in arrays for part in order] for arrays in (images, labels)
        )
    for split, part in zip(_SPLITS, images, strict=True):
        if part.shape[1:] != images[0].shape[1:]:
            raise DataError(
                f"{path}, split {split!r}: examples have shape {part.shape[1:]}, those of 'train' "
                f"{images[0].shape[1:]}."
            )
    return Images(images, labels, num_levels, classes)


def count_classes(what: str, labels: Sequence[np.ndarray]) -> int:
    """Return 1 + the largest label, the number of classes.

    Labels may leave gaps, but not be identifiers: a head of a class for each would hold them all.

    Raises:
      DataError: for more than 1,000 classes, of which fewer than a tenth occur.
    """
    largest = max(int(part.max()) for part in labels)
    distinct = len(np.unique(np.concatenate([np.unique(part) for part in labels])))
    if largest >= max(_MANY_CLASSES, 10 * distinct):
        raise DataError(
            f"{what}: labels are class indices from 0 on; the largest is {largest}, and only "
            f"{distinct} distinct ones occur. np.unique(labels, return_inverse=True)[1] numbers "
            "them."
        )
    return 1 + largest


def _checked_images(
    path: Path, key: str, arrays: Mapping[str, np.ndarray], names: Collection[str]
) -> np.ndarray:
    if key not in arrays:
        raise DataError(
            f"{path} has no array {key!r}; it has {', '.join(names) or 'none'}. It needs "
            "'images', or 'train_images', 'validation_images' and 'test_images'; or 'points', or "
            "'train_points', 'validation_points' and 'test_points'."
        )
    images = arrays[key]
    if images.ndim not in (3, 4) or 0 in images.shape:
        hint = " A table [n, d] of points is named 'points'." if images.ndim == 2 else ""
        raise DataError(
            f"{path}: {key!r} must have shape [n, height, width] or [n, height, width, channels], "
            f"n ≥ 1; got {images.shape}.{hint}"
        )
    if images.dtype.kind not in "buif":
        raise DataError(f"{path}: {key!r} must be numbers; got {images.dtype}.")
    return images if images.ndim == 4 else images[..., None]


def _num_levels(what: str, stated: np.ndarray | None, images: Sequence[np.ndarray]) -> int:
    """The number of grey levels, as stated or by the type of the images."""
    if stated is not None:
        if stated.size != 1 or stated.dtype.kind not in "ui":
            told = np.array2string(stated, threshold=6)
            raise DataError(f"{what}: their 'num_levels' must be one integer; got {told}.")
        if not 2 <= (num_levels := int(stated.item())) <= MAX_LEVELS:
            told = f"'num_levels' must lie in [2, {MAX_LEVELS}]"
            raise DataError(f"{what}: their {told}; got {num_levels}.")
        return num_levels
    kinds = {part.dtype.name for part in images}
    if unknown := sorted(kinds - _LEVELS.keys()):
        raise DataError(
            f"{what} must be uint8, uint16 or bool, or come with an array 'num_levels'; got "
            f"{', '.join(unknown)}."
        )
    return max(_LEVELS[kind] for kind in kinds)


def _levels(path: Path, key: str, images: np.ndarray, num_levels: int) -> np.ndarray:
    """The images in the smallest type that holds all levels; refused unless they are levels."""
    low, high = images.min(), images.max()
    if not (low >= 0 and high < num_levels):
        told = f"must be grey levels from 0 to {num_levels - 1}, by num_levels"
        raise DataError(f"{path}: {key!r} {told}; got {low} to {high}.")
    if images.dtype.kind == "f" and (images % 1).any():
        odd = images.ravel()[np.argmax(images.ravel() % 1 != 0)]
        raise DataError(
            f"{path}: {key!r} must be whole numbers, grey levels; got {odd}. Images in [0, 1] "
            "become levels by np.rint(images * (num_levels - 1))."
        )
    kind = np.min_scalar_type(num_levels - 1)
    return images.astype(kind if kind.itemsize < 4 else np.int32, copy=False)


def _checked_labels(
    path: Path, key: str, arrays: Mapping[str, np.ndarray], count: int
) -> np.ndarray:
    labels = arrays[key]
    if labels.shape != (count,):
        raise DataError(f"{path}: {key!r} must have shape ({count},); got {labels.shape}.")
    if not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"{path}: {key!r} must be integers ≥ 0; got {labels.dtype}.")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high > _MAX_LABEL:
        raise DataError(
            f"{path}: {key!r} must be integers in [0, {_MAX_LABEL}]; got {low} to {high}."
        )
    return labels.astype(np.int32)
