"""The folder of a run: created, moved aside or resumed; its settings and its report."""

import contextlib
import dataclasses
import json
import math
import platform
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from train.configs.base import TrainingConfig

_PACKAGES = ("iresnet_jax", "jax", "jaxlib", "flax", "optax", "numpy", "orbax-checkpoint")
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


class WorkdirError(Exception):
    """A folder that cannot be this run's workdir."""


def prepare_workdir(config: TrainingConfig) -> Path:
    """Make the workdir and write the config; an earlier run is resumed, or moved aside.

    Raises:
      WorkdirError: if it cannot be written, or holds a run of another config.
    """
    workdir = config.workdir
    if config.restart and (workdir / "config.json").is_file():
        _move_aside(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / ".writable").write_text("")
        (workdir / ".writable").unlink()
    except OSError as error:
        raise WorkdirError(
            f"--workdir {workdir} cannot be written: {error.strerror or error}."
        ) from error
    _check_same_run(config)
    write_json(workdir / "config.json", jsonable(config))
    return workdir


def read_settings(path: Path) -> dict[str, Any]:
    """Read the settings in a config.json, by today's names."""
    content = json.loads(path.read_text())
    if (before := content.get("normalize")) in _NORMALIZE_BEFORE:
        content["normalize"], content["shrink"] = _NORMALIZE_BEFORE[before]
    return content


def jsonable(config: TrainingConfig) -> dict[str, Any]:
    """Convert a config to JSON's types."""
    fields = {"program": config.program, **dataclasses.asdict(config)}
    return json.loads(json.dumps(fields, default=str))


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as JSON, whole or not at all; see :func:`finite`."""
    replace_text(path, json.dumps(finite(content), indent=2, allow_nan=False) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(text)
    partial.replace(path)


def finite(content: Any) -> Any:
    """Replace infinity and NaN, which JSON lacks, by the strings "inf" and "nan"."""
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [finite(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return str(content)
    return content


def environment() -> dict[str, Any]:
    """Return the device, and the versions of Python and of packages that numbers depend on."""
    versions = {}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        "packages": versions,
        "device": f"{device.platform} ({device.device_kind})",
        "num_devices": jax.device_count(),
    }


def _move_aside(workdir: Path) -> None:
    number = 1
    while (aside := workdir.with_name(f"{workdir.name}.{number}")).exists():
        number += 1
    try:
        workdir.rename(aside)
    except OSError as error:
        raise WorkdirError(f"--workdir {workdir} cannot be moved aside: {error}.") from error
    print(f"The run in {workdir} was moved to {aside}.")


def _check_same_run(config: TrainingConfig) -> None:
    saved = config.workdir / "config.json"
    if not saved.exists():
        return
    try:
        old = read_settings(saved)
    except (OSError, json.JSONDecodeError) as error:
        raise WorkdirError(
            f"{saved} cannot be read ({error}). Pass --restart to move the run aside."
        ) from error
    if changes := "; ".join(_changes(old, jsonable(config))):
        raise WorkdirError(
            f"--workdir {config.workdir} holds a run of another config ({changes}). "
            "Choose another workdir, or pass --restart to move that run aside."
        )


def _changes(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """Yield the settings by which a saved run computes something else."""
    for name in sorted((new.keys() | old.keys()) - set(_NOT_COMPARED)):
        if old.get(name) != new.get(name):
            yield f"{name}: {old.get(name)} there, {new.get(name)} here"
