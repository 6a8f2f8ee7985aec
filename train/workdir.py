"""The folder of a run: created, moved aside or resumed; what is written there."""

import contextlib
import json
import math
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from train.configs.base import TrainingConfig
from train.failures import ProgramError, naming, unused
from train.identity import (
    CONTINUED,
    DATA,
    EXAMPLE,
    WARM,
    Content,
    NoRunError,
    checkpoint_folders,
    described,
    differences,
    identity,
    read_settings,
    stored_identity,
)
from train.identity import (
    jsonable as jsonable,
)
from train.locks import Locked, lock

_PACKAGES = ("iresnet_jax", "jax", "jaxlib", "flax", "optax", "numpy", "orbax-checkpoint")
_PATTERNS = "*?["


class WorkdirError(ProgramError):
    """A folder that cannot be this run's workdir."""


def prepare_workdir(
    config: TrainingConfig, data: str | None = None, example: Content | None = None
) -> Path:
    """Make the workdir and write the config; an earlier run is resumed, or moved aside.

    ``data`` is the fingerprint of the data set, ``example`` what :func:`train.identity.example_of`
    says of it; None leaves what an earlier run knew.

    Raises:
      WorkdirError: if it cannot be written, holds a run of another config or of other data, or
        something else, or if another process trains there.
    """
    with claimed_workdir(config, described(config, data, example)) as workdir:
        return workdir


@contextlib.contextmanager
def claimed_workdir(config: TrainingConfig, about: Content | None = None) -> Iterator[Path]:
    """Prepare the workdir as :func:`prepare_workdir` does, and hold its lock.

    ``about`` is what config.json is to hold, by :func:`train.identity.described`.
    """
    workdir, held = config.workdir, ExitStack()
    _refuse_patterns(workdir)
    with held:
        with _refused(workdir):
            _refuse_foreign(workdir)
            if config.restart and _is_run(workdir):
                with lock(workdir):
                    _move_aside(workdir)
            workdir.mkdir(parents=True, exist_ok=True)
            held.enter_context(lock(workdir))
            content = _same_run(config, about or described(config, None))
            write_json(workdir / "config.json", content)
        yield workdir


@contextlib.contextmanager
def _refused(workdir: Path) -> Iterator[None]:
    try:
        yield
    except Locked as error:
        raise WorkdirError(str(error)) from error
    except OSError as error:
        raise WorkdirError(
            f"--workdir {workdir} cannot be written: {error.strerror or error}."
        ) from error


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as JSON, whole or not at all; see :func:`finite`."""
    replace_text(path, json.dumps(finite(content), indent=2, allow_nan=False) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    partial = path.with_suffix(path.suffix + ".partial")
    with naming(path):
        try:
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise


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
    """Return the device, and the versions of Python, of packages that numbers depend on, and of a
    checkout (its commit, with "-dirty" where tracked files were changed)."""
    versions = {}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        "packages": versions,
        **_commit(),
        "device": f"{device.platform} ({device.device_kind})",
        "num_devices": jax.device_count(),
    }


def _commit() -> dict[str, str]:
    """The commit of the checkout that this file is in; nothing elsewhere, or without git."""
    here = Path(__file__)
    git = ["git", "-C", str(here.parent)]
    described = ["describe", "--always", "--abbrev=12", "--exclude=*", "--dirty"]
    try:
        for command in (["ls-files", "--error-unmatch", here.name], described):
            done = subprocess.run(
                [*git, *command], capture_output=True, text=True, timeout=10, check=True
            )
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"commit": done.stdout.strip()}


def _refuse_patterns(workdir: Path) -> None:
    if found := sorted({*_PATTERNS} & {*str(workdir.absolute())}):
        raise WorkdirError(
            f"--workdir {workdir.absolute()} contains {' and '.join(found)}, which checkpoints "
            f"would take for a pattern of names: choose a path without {' '.join(_PATTERNS)}."
        )


def _refuse_foreign(workdir: Path) -> None:
    """Refuse a folder with a config.json, or checkpoints, that are no run's."""
    if _is_run(workdir):
        return
    for path in (workdir / "config.json", *checkpoint_folders(workdir)[:1]):
        if path.exists():
            raise WorkdirError(
                f"{path} is not of a run, or is damaged: move it away, or choose another --workdir."
            )


def _is_run(workdir: Path) -> bool:
    """Return whether a folder holds a run's settings, or its checkpoints."""
    try:
        read_settings(workdir / "config.json")
    except (NoRunError, FileNotFoundError):
        kept = checkpoint_folders(workdir)
        return any((path / "state").is_dir() and (path / "data").is_dir() for path in kept)
    return True


def _move_aside(workdir: Path) -> None:
    inside = workdir.resolve()
    if inside in (Path.home(), Path.cwd(), *Path.cwd().parents) or inside.is_mount():
        raise WorkdirError(
            f"--restart would move {inside}, a home folder, a disk, or a folder that this program "
            "runs in: choose another --workdir."
        )
    aside = unused(workdir)
    try:
        workdir.rename(aside)
    except OSError as error:
        raise WorkdirError(f"--workdir {workdir} cannot be moved aside: {error}.") from error
    print(f"The run in {workdir} was moved to {aside}.")


def _same_run(config: TrainingConfig, new: Content) -> Content:
    """Return what to write to config.json; refuse a folder that holds another run."""
    workdir, old = config.workdir, _saved_settings(config.workdir)
    kept = checkpoint_folders(workdir)
    runs = {path.name: run for path in kept if (run := stored_identity(path)) is not None}
    if kept and old is None and not runs:
        raise WorkdirError(
            f"--workdir {workdir} holds checkpoints without their config.json: nobody knows of "
            "which run. Choose another workdir, or pass --restart to move them aside."
        )
    if old is not None:
        _refuse_changes(workdir, "a run of another config", old, new)
    for step, run in runs.items():
        _refuse_changes(workdir, f"a checkpoint (step {step}) of another run", run, identity(new))
    _refuse_steps(config, old, kept, runs)
    if kept and DATA in new and not any(DATA in run for run in (old or {}, *runs.values())):
        told = "does not say which data it was trained on: they are taken to be the same"
        print(f"Warning: the run in {workdir} {told}.", file=sys.stderr)
    known = (DATA, EXAMPLE, CONTINUED, WARM)
    return {name: value for name, value in (old or {}).items() if name in known} | new


def _refuse_steps(
    config: TrainingConfig, old: Content | None, kept: list[Path], runs: dict[str, Content]
) -> None:
    """Refuse fewer steps than are done, and other steps where a checkpoint does not say its own."""
    workdir, done = config.workdir, max(map(int, runs), default=0)
    if config.steps < done:
        raise WorkdirError(
            f"--steps {config.steps} is fewer than the {done} that the run in {workdir} has done: "
            f"pass --steps {done} or more, choose another workdir, or pass --restart to move that "
            "run aside."
        )
    if kept and not runs and old is not None and old.get("steps") != config.steps:
        raise WorkdirError(
            f"--workdir {workdir} holds a run of {old.get('steps')} steps, by an earlier version "
            f"whose checkpoints do not say so: it cannot go on to {config.steps}. Give its workdir "
            "as --warm-start to a new run, or pass --restart to move it aside."
        )


def _saved_settings(workdir: Path) -> dict[str, Any] | None:
    path = workdir / "config.json"
    try:
        return read_settings(path)
    except FileNotFoundError:
        return None
    except NoRunError as error:
        raise WorkdirError(
            f"{path} cannot be read ({error}). Pass --restart to move the run aside."
        ) from error


def _refuse_changes(workdir: Path, what: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    if told := "; ".join(differences(old, new)):
        raise WorkdirError(
            f"--workdir {workdir} holds {what} ({told}). "
            "Choose another workdir, or pass --restart to move that run aside."
        )
