"""The programs' configs of images, whose blocks and filters the peers' convolutions have too."""

import dataclasses
from typing import Any

from train.configs.density import DENSITY, DensityConfig

#: Half the blocks and half the filters of the config mnist-small.
_SMALLER: dict[str, Any] = {"depths": (4, 4), "features": (32, 32)}


def image_config(data: str) -> DensityConfig:
    """Return the config of a data set of images."""
    config = DENSITY["digits" if data == "digits" else "mnist-small"]
    return dataclasses.replace(config, **_SMALLER) if data == "mnist-small" else config
