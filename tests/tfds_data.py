"""Where tests find data sets that TFDS has prepared."""

import os
from pathlib import Path

import pytest

from train.images import prepared_folder

BESIDE = Path(__file__).parents[2] / "shared" / "data" / "tfds"


def tfds_dir(name: str) -> Path:
    """The folder that holds a data set; skips the test where there is none."""
    places = [Path(p) for p in (os.environ.get("TFDS_DATA_DIR"),) if p] + [BESIDE]
    for place in places:
        if prepared_folder(name, place) is not None:
            return place
    pytest.skip(f"{name} is not prepared: TFDS_DATA_DIR names no folder that holds it.")
