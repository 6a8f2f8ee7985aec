"""``python -m benchmarks.accelerator.pack OUT``: MNIST and a part of CIFAR-10 as .npz files.

For a machine without TFDS. Splits are those of ``python -m train``; of CIFAR-10 the first images of
each, as many as fit in a few tens of megabytes.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from train.data import load_dataset

#: Data set -> images to keep of each split, at most.
KEPT: Mapping[str, int | None] = {"mnist": None, "cifar10": 12_000}


def pack(name: str, out: Path, data_dir: Path | None, most: int | None) -> Path:
    """Write one data set's images and labels."""
    data = load_dataset(name, data_dir=data_dir, max_examples=most)
    splits = ("train", "validation", "test")
    arrays: dict[str, Any] = {f"{split}_images": getattr(data, split) for split in splits}
    labels: dict[str, Any] = {f"{split}_labels": data.labels(split) for split in splits}
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.npz"
    np.savez_compressed(path, **arrays, **labels)
    return path


if __name__ == "__main__":
    _parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    _parser.add_argument("out", type=Path)
    _parser.add_argument("--data-dir", type=Path)
    _options = _parser.parse_args()
    for _name, _most in KEPT.items():
        print(pack(_name, _options.out, _options.data_dir, _most))
