"""The settings of a run beside those of the nearest experiment, and the command that repeats it."""

import dataclasses
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from train.catalogue import PROGRAMS
from train.configs.base import TrainingConfig

#: Of how a run was started, not of what it is.
_NOT_REPEATED = ("restart", "smoke")


class Setting(NamedTuple):
    """A setting of a run, its value in the nearest experiment, and whether the two differ."""

    name: str
    value: Any
    default: Any
    differs: bool


def nearest(config: TrainingConfig) -> tuple[str, TrainingConfig]:
    """Return the experiment from which a config differs in the fewest settings, and its name.

    That of a smoke run is the smoke variant.
    """
    experiments: Mapping[str, Any] = PROGRAMS[config.program].experiments
    variants = {name: e.smoke_variant() if config.smoke else e for name, e in experiments.items()}
    name = min(variants, key=lambda name: len(changed(config, variants[name])))
    return name, variants[name]


def changed(config: TrainingConfig, default: TrainingConfig) -> list[str]:
    """Return the names of the settings by which two configs differ."""
    names = (f.name for f in dataclasses.fields(config) if f.name not in _NOT_REPEATED)
    return [name for name in names if getattr(config, name) != getattr(default, name)]


def settings(config: TrainingConfig) -> tuple[str, list[Setting]]:
    """Return the name of the nearest experiment, and all settings of a config in their order."""
    name, default = nearest(config)
    differing = changed(config, default)
    return name, [
        Setting(f.name, getattr(config, f.name), getattr(default, f.name), f.name in differing)
        for f in dataclasses.fields(config)
        if f.name not in _NOT_REPEATED
    ]


def command(config: TrainingConfig) -> str:
    """Return the command line of a run with these settings, for a POSIX shell.

    A program of a user's own is started by the script that registered it.
    """
    name, default = nearest(config)
    own = not type(config).__module__.startswith("train.")
    script = [sys.argv[0]] if own else ["-m", "train"]
    words = ["python", *script, config.program, "--config", name]
    words += ["--smoke"] * config.smoke
    for setting in changed(config, default):
        words += _option(setting, getattr(config, setting))
    return shlex.join(words)


def _option(name: str, value: Any) -> list[str]:
    option = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{option}" if value else f"--no-{option}"]
    if isinstance(value, tuple):
        return [f"--{option}", *map(written, value)]
    word = written(value)  # which is taken for an option where it begins as one
    return [f"--{option}={word}"] if word.startswith("-") else [f"--{option}", word]


def written(value: Any) -> str:
    """Write a value as the command line takes it; the values of a tuple on a line each."""
    if isinstance(value, tuple):
        return "\n".join(map(written, value))
    return str(value) if isinstance(value, str | Path) else repr(value)
