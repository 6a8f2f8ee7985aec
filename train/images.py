"""Image data sets, as arrays: scikit-learn's digits, TFDS without TensorFlow, .npz files."""

import importlib.util
import io
import os
import time
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

#: Data sets that are read through TFDS.
TFDS = ("mnist", "fashion_mnist", "cifar10", "cifar100", "svhn_cropped")

_VALIDATION = 2_000
_SPLITS = ("train", "validation", "test")
_MAX_LABEL = np.iinfo(np.int32).max


class DataError(ValueError):
    """Data that are missing, or cannot be used."""


class Images(NamedTuple):
    """Training, validation and test arrays, in this order.

    Attributes:
      images: three arrays, uint8 [n, height, width, channels].
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
    """Read a user's own images from an .npz file.

    Its arrays are ``images``, uint8 [n, height, width] or [n, height, width, channels], and,
    optionally, ``labels``, integers ≥ 0 [n]: a tenth becomes the test set and a tenth the
    validation set, by a fixed permutation. Or else ``train_images``, ``validation_images``,
    ``test_images``, and, optionally, ``train_labels`` and so on.

    Raises:
      DataError: for a missing file or one that is no .npz, or unsuitable arrays, naming them.
    """
    arrays = _read_arrays(path)
    starts = [""] if "images" in arrays else [f"{split}_" for split in _SPLITS]
    images = [_checked_images(path, f"{start}images", arrays) for start in starts]
    missing = [f"{start}labels" for start in starts if f"{start}labels" not in arrays]
    if 0 < len(missing) < len(starts):
        raise DataError(f"{path} has labels for some splits, but no {' and no '.join(missing)}.")
    labels = [
        _checked_labels(path, f"{start}labels", arrays, len(part))
        for start, part in zip(starts, images, strict=True)
        if not missing
    ]
    if len(images) == 1:
        order = _fixed_split(path, len(images[0]))
        images, labels = (
            [x[part] for x in arrays for part in order] for arrays in (images, labels)
        )
    for split, part in zip(_SPLITS, images, strict=True):
        if part.shape[1:] != images[0].shape[1:]:
            raise DataError(
                f"{path}, split {split!r}: examples have shape {part.shape[1:]}, those of 'train' "
                f"{images[0].shape[1:]}."
            )
    classes = 1 + max(int(part.max()) for part in labels) if labels else None
    return Images(images, labels, 256, classes)


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as raw:
            if not zipfile.is_zipfile(raw):
                raise ValueError("it is not a whole zip archive")
            raw.seek(0)
            with np.load(raw, allow_pickle=False) as file:
                return dict(file)
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} cannot be read as an .npz file: {error}.") from error


def _checked_images(path: Path, key: str, arrays: dict[str, np.ndarray]) -> np.ndarray:
    if key not in arrays:
        raise DataError(
            f"{path} has no array {key!r}; it has {', '.join(arrays) or 'none'}. It needs "
            "'images', or 'train_images', 'validation_images' and 'test_images'."
        )
    images = arrays[key]
    if images.dtype != np.uint8:
        raise DataError(f"{path}: {key!r} must be uint8, from 0 to 255; got {images.dtype}.")
    if images.ndim not in (3, 4) or 0 in images.shape:
        raise DataError(
            f"{path}: {key!r} must have shape [n, height, width] or [n, height, width, channels], "
            f"n ≥ 1; got {images.shape}."
        )
    return images if images.ndim == 4 else images[..., None]


def _checked_labels(path: Path, key: str, arrays: dict[str, np.ndarray], count: int) -> np.ndarray:
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


def _fixed_split(path: Path, count: int) -> list[np.ndarray]:
    if count < 3:
        raise DataError(f"{path}: three images are the fewest that make three splits; got {count}.")
    order = np.random.default_rng(0).permutation(count)
    held_out = max(1, count // 10)
    return np.split(order, [count - 2 * held_out, count - held_out])
