"""What makes two runs the same: their settings and their data."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from train.configs.base import TrainingConfig
from train.data import Dataset

#: Settings of how a run is executed, not of what it computes.
_NOT_COMPARED = (
    *("workdir", "data_dir", "restart", "checkpoint_every", "keep_checkpoints", "picture_every"),
    *("parallel", "cpu_devices", "remat"),
    *("distributed", "coordinator", "num_processes", "process_id"),
)
#: normalize before shrink was a setting of its own -> today's (normalize, shrink).
_NORMALIZE_BEFORE = {
    "power": ("estimate", False),
    "certified": ("estimate", True),
    "certified-steps": ("bound", True),
}
#: Name of the data's fingerprint, beside the settings.
DATA = "data_sha256"
#: Name of what a network's shape takes from the data, with which it is loaded without them.
EXAMPLE = "example"

Content = dict[str, Any]


class NoRunError(Exception):
    """A file that describes no run."""


def read_settings(path: Path) -> Content:
    """Read the settings in a config.json, by today's names, and the data's fingerprint.

    Raises:
      NoRunError: for what is not the settings of a run.
      OSError: if it cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise NoRunError(f"{type(error).__name__}: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("program"), str):
        raise NoRunError("it names no program")
    return _todays(content)


def _todays(content: Content) -> Content:
    before = content.get("normalize")
    if isinstance(before, str) and before in _NORMALIZE_BEFORE:
        content["normalize"], content["shrink"] = _NORMALIZE_BEFORE[before]
    return content


def jsonable(config: TrainingConfig) -> Content:
    """Convert a config to JSON's types."""
    fields = {"program": config.program, **dataclasses.asdict(config)}
    content: Content = json.loads(json.dumps(fields, default=str))
    return content


def described(config: TrainingConfig, data: str | None, example: Content | None = None) -> Content:
    """Return what config.json holds: the settings, and what is known of the data."""
    known = {DATA: data, EXAMPLE: example}
    return jsonable(config) | {name: value for name, value in known.items() if value is not None}


def example_of(data: Dataset) -> Content:
    """Return what a network takes from its data."""
    classes = None if data.train_labels is None else data.num_classes
    return {"shape": data.example_shape, "num_levels": data.num_levels, "classes": classes}


def settings_of(content: Content) -> Content:
    """Return the settings in a config.json alone."""
    return {name: value for name, value in content.items() if name not in (DATA, EXAMPLE)}


def identity(content: Content) -> Content:
    """Return the part of a config.json that says what a run computes."""
    left_out = {*_NOT_COMPARED, EXAMPLE}
    return {name: value for name, value in content.items() if name not in left_out}


def differences(old: Content, new: Content) -> Iterator[str]:
    """Yield the settings by which a saved run computes something else; unknown data is the same."""
    for name in sorted((new.keys() | old.keys()) - {*_NOT_COMPARED, DATA, EXAMPLE}):
        if old.get(name) != new.get(name):
            yield f"{name}: {old.get(name)} there, {new.get(name)} here"
    if DATA in old and DATA in new and old[DATA] != new[DATA]:
        yield f"the data of {new.get('dataset')!r} are others than those it was trained on"


def stored_identity(checkpoint: Path) -> Content | None:
    """Read which run a checkpoint belongs to; None where it is damaged, or does not say."""
    try:
        content = json.loads((checkpoint / "data" / "metadata").read_text(encoding="utf-8"))
        found = content["run"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return None
    return _todays(found) if isinstance(found, dict) else None


def checkpoint_folders(workdir: Path) -> list[Path]:
    """Return the folders of a workdir's checkpoints, newest first."""
    folder = workdir / "checkpoints"
    found = [path for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
    return sorted(found, key=lambda path: -int(path.name))
