"""The programs and tools by name, as far as ``--help`` needs them: without JAX.

What a program computes is imported when it is asked for.
"""

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from train.configs import CLASSIFICATION, DENSITY, HYBRID


class Program(NamedTuple):
    """A program that trains.

    Attributes:
      purpose: what it does, in a few words.
      experiments: its configs by name; the first is the default.
      task: function that returns its class, a :class:`train.task.Task`.
    """

    purpose: str
    experiments: Mapping[str, Any]
    task: Callable[[], Any]

    @property
    def settings(self) -> type:
        """The class of its settings."""
        return type(next(iter(self.experiments.values())))


def _class(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


#: :func:`train.programs.register` adds to them.
PROGRAMS: dict[str, Program] = {
    "density": Program(
        "train a density model", DENSITY, partial(_class, "train.density", "Density")
    ),
    "classification": Program(
        "train a classifier",
        CLASSIFICATION,
        partial(_class, "train.classification", "Classification"),
    ),
    "hybrid": Program(
        "train a density model that classifies",
        HYBRID,
        partial(_class, "train.hybrid", "Hybrid"),
    ),
}

#: The classes of :mod:`train.tools`, and what they do.
TOOLS = {
    "evaluate": 'evaluate a checkpoint on the test set, into the folder "evaluation"',
    "certify": "bound every layer's norm, and say whether the network is proved to be invertible",
    "sample": "draw samples from a density model",
    "reconstruct": "map test images to latents and back",
    "interpolate": "interpolate between pairs of test images, along straight lines of latents",
    "compare": "put saved runs side by side, in the terminal and in a page",
    "export": "write a density model to one file, for iresnet_jax.load",
    "prepare": "download and prepare a TFDS data set (needs TensorFlow)",
}

PAPER = {"reproduce": "regenerate the paper's figures and tables"}


def settings_of(name: str) -> type:
    """Return the class of the settings that the command line of a program or tool takes."""
    if name in PROGRAMS:
        return PROGRAMS[name].settings
    if name in ("compare", "export"):
        return _class(f"train.{name}", name.capitalize())
    if name in TOOLS:
        return _class("train.tools", name.capitalize())
    return _class("paper.program", "Reproduce")
