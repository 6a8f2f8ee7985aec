"""What makes two runs the same: their settings and their data."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from train.catalogue import PROGRAMS
from train.configs.base import FILES, TrainingConfig
from train.data import Dataset

#: Settings of how a run is executed, not of what it computes.
NOT_COMPARED = (
    *("workdir", "data_dir", "restart", "warm_start"),
    *("checkpoint_every", "keep_checkpoints", "picture_every"),
    *("parallel", "cpu_devices", "remat"),
    *("distributed", "coordinator", "num_processes", "process_id"),
)
#: normalize before shrink was a setting of its own -> today's (normalize, shrink).
_NORMALIZE_BEFORE = {
    "power": ("estimate", False),
    "certified": ("estimate", True),
    "certified-steps": ("bound", True),
}
#: Behaviour from before a setting existed, where it differs from today's default.
BEFORE = {"shrink": False, "inverse_solver": "plain"}
#: Name of the data's fingerprint, beside the settings.
DATA = "data_sha256"
#: Name of what a network's shape takes from the data, with which it is loaded without them.
EXAMPLE = "example"
#: Name of the list of earlier numbers of steps; see :func:`continued`.
CONTINUED = "continued_from"
#: Name of the run that the first variables are from; see :mod:`train.origin`.
WARM = "warm_started_from"
#: What stands beside the settings.
_BESIDE = (DATA, EXAMPLE, CONTINUED, WARM)

#: What is known of data -> its name in messages.
_OF_DATA = {
    "shape": "shape of an example",
    "sizes": "examples for training, validation and test",
    "num_levels": "grey levels",
    "classes": "classes",
}

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


def described(
    config: TrainingConfig,
    data: str | None,
    example: Content | None = None,
    warm: Content | None = None,
) -> Content:
    """Return what config.json holds: the settings, what is known of the data, and a warm start."""
    known = {DATA: data, EXAMPLE: example, WARM: warm}
    return jsonable(config) | {name: value for name, value in known.items() if value is not None}


def example_of(data: Dataset) -> Content:
    """Return what a network takes from its data, and how many examples each split has."""
    classes = None if data.train_labels is None else data.num_classes
    sizes = [len(split) for split in (data.train, data.validation, data.test)]
    shape = list(data.example_shape)
    return {"shape": shape, "num_levels": data.num_levels, "classes": classes, "sizes": sizes}


def settings_of(content: Content) -> Content:
    """Return the settings in a config.json alone."""
    return {name: value for name, value in content.items() if name not in _BESIDE}


def identity(content: Content) -> Content:
    """Return the part of a config.json that says what a run computes."""
    left_out = {*NOT_COMPARED, EXAMPLE}
    return {name: value for name, value in content.items() if name not in left_out}


def differences(old: Content, new: Content) -> Iterator[str]:
    """Yield the settings by which a saved run computes something else; unknown data is the same.

    A setting that is newer than a run has there the value that behaves as before.
    Data are the same by their fingerprint, wherever their file lies. A run with more steps goes on
    from one with fewer, so that their number is not compared.
    """
    known = DATA in old and DATA in new
    left_out = {*NOT_COMPARED, *_BESIDE, "steps", *["dataset"] * known}
    there, here = ({**_assumed(content), **content} for content in (old, new))
    for name in sorted((there.keys() | here.keys()) - left_out):
        if _settled(name, there.get(name)) != _settled(name, here.get(name)):
            yield f"{name}: {there.get(name)} there, {here.get(name)} here"
    if known and old[DATA] != new[DATA]:
        told = f"the data of {new.get('dataset')!r} are others than those it was trained on"
        yield f"{told} ({_data_differences(old, new)})"
    warm = [content.get(WARM) for content in (old, new)]
    if len(set(map(_variables, warm))) > 1:
        yield "--warm-start: {} there, {} here".format(*map(_told, warm))


def assumed_before(kind: Any) -> Content:
    """Return what is assumed of the settings that a run is older than, for a class of settings."""
    return {
        field.name: BEFORE.get(field.name, field.default)
        for field in dataclasses.fields(kind)
        if field.default is not dataclasses.MISSING
    }


def _assumed(content: Content) -> Content:
    """Return the same in JSON's types, for the program of a config.json."""
    program = PROGRAMS.get(content.get("program", ""))
    if program is None:
        return {}
    assumed: Content = json.loads(json.dumps(assumed_before(program.settings), default=str))
    return assumed


def _settled(name: str, value: Any) -> Any:
    """Resolve the path of a file of data."""
    if name == "dataset" and isinstance(value, str) and value.endswith(FILES):
        return str(Path(value).resolve())
    return value


def _data_differences(old: Content, new: Content) -> str:
    """Say in what two data sets differ, as far as it is known."""
    there, here = old.get(EXAMPLE) or {}, new.get(EXAMPLE) or {}
    told = [
        f"{what}: {there[name]} there, {here[name]} here"
        for name, what in _OF_DATA.items()
        if name in there and name in here and there[name] != here[name]
    ]
    if old.get("dataset") != new.get("dataset"):
        told.append(f"{old.get('dataset')!r} there")
    marks = f"SHA-256 {old[DATA][:12]} there, {new[DATA][:12]} here"
    return "; ".join([*told, marks])


def _variables(warm: Content | None) -> str | None:
    return None if warm is None else warm["variables_sha256"]


def _told(warm: Content | None) -> str:
    if warm is None:
        return "none"
    return f"{warm['workdir']} at step {warm['step']} (SHA-256 {warm['variables_sha256'][:12]})"


def continued(stored: Content | None, step: int, steps: int) -> list[Content]:
    """Return the earlier plans of a run, oldest first: {"step": reached, "steps": planned then}.

    ``stored`` is the identity of the checkpoint at ``step``, from which a run of ``steps`` goes on.
    """
    stored = stored or {}
    history: list[Content] = list(stored.get(CONTINUED, []))
    planned = stored.get("steps", steps)
    return history if planned == steps else [*history, {"step": step, "steps": planned}]


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
