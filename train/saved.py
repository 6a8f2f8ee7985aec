"""Saved runs: config, data, model and a checkpoint's state, from a workdir."""

import dataclasses
import sys
import types
import typing
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from train.checkpoints import CheckpointError, Checkpoints
from train.configs.base import TrainingConfig
from train.data import Dataset
from train.failures import reason
from train.identity import (
    DATA,
    EXAMPLE,
    NoRunError,
    assumed_before,
    differences,
    identity,
    read_settings,
    settings_of,
    stored_identity,
)
from train.networks import ModelFunctions
from train.programs import TASKS, config_type
from train.steps import FirstState, TrainState
from train.task import Task
from train.workdir import WorkdirError

Which = Literal["newest", "best"] | int

_SPLITS = ("train", "validation", "test")
#: Settings by which a tool may read other data than its run did.
_OF_DATA = {"dataset", "margin", "margins", "max_examples"}


class SavedRun(NamedTuple):
    """A run to evaluate, sample or invert: its task, the parts of that, and a saved state."""

    task: Task
    config: Any
    dataset: Dataset
    functions: ModelFunctions
    state: TrainState


def load_run(
    workdir: Path, which: Which, *, max_test: int | None = None, **changes: Any
) -> SavedRun:
    """Load the run in a workdir at a checkpoint.

    Args:
      workdir: folder of the run.
      which: "newest", "best" on the validation set, or a step.
      max_test: largest size of the test set, ≥ 1; the run's own by default. The training set, which
        gives a classifier's head its statistics, stays the same.
      **changes: settings to change.

    Raises:
      WorkdirError: if the folder holds no run, or not that checkpoint; if its config.json, its
        checkpoint and its data do not belong together; for an unknown setting.
    """
    return _load(workdir, which, changes, max_test)


def load_network(workdir: Path, which: Which, **changes: Any) -> SavedRun:
    """Load a run as :func:`load_run` does, for what needs a network alone.

    It is loaded without its data: one example of zeros, of the shape that its config.json states,
    stands in their place.
    """
    return _load(workdir, which, changes, None, with_data=False)


def _load(
    workdir: Path,
    which: Which,
    changes: dict[str, Any],
    max_test: int | None,
    *,
    with_data: bool = True,
) -> SavedRun:
    config, settings = read_config(workdir), read_settings(workdir / "config.json")
    if unknown := changes.keys() - vars(config).keys():
        names = ", ".join(sorted(unknown))
        raise WorkdirError(f"--workdir {workdir} holds {config.program}, without {names}.")
    config = dataclasses.replace(config, workdir=workdir, **changes)
    kind = TASKS[config.program]
    known = None if changes.keys() & _OF_DATA else settings.get(DATA)
    stated = None if with_data else _stated_data(config, settings)
    task = kind(config, stated or load_data(kind, config, max_test, known))
    example = np.zeros((1, *task.dataset.example_shape), np.float32)
    template = FirstState(task.init, config, example).template()
    state = _read_state(workdir, which, template, task.best, identity(settings))
    return SavedRun(task, config, task.dataset, task.functions, state)


def _stated_data(config: Any, settings: dict[str, Any]) -> Dataset | None:
    """Return one example of zeros as the data; None where a config.json does not say its shape."""
    try:
        stated = settings[EXAMPLE]
        levels = stated["num_levels"]
        kind = np.float32 if levels is None else np.uint8
        example = np.zeros((1, *map(int, stated["shape"])), kind)
        labels = None if stated["classes"] is None else np.zeros(1, np.int64)
        sizes = {"num_levels": levels and int(levels), "classes": stated["classes"]}
        return Dataset(config.dataset, *[example] * 3, *[labels] * 3, **sizes)
    except (KeyError, TypeError, ValueError):
        return None


def load_data(
    kind: type[Task], config: Any, max_test: int | None, fingerprint: str | None = None
) -> Dataset:
    """Load the data of a run, with at most ``max_test`` test examples.

    Raises:
      WorkdirError: if they are others than those of the run, by their fingerprint.
    """
    if max_test is None:
        return _checked(kind.load(config), config, fingerprint)
    if max_test < 1:
        raise ValueError(f"max_examples must be ≥ 1; got {max_test}.")
    own = config.max_examples
    whole = kind.load(dataclasses.replace(config, max_examples=own and max(own, max_test)))
    if fingerprint is not None:
        _checked(_cut(whole, dict.fromkeys(_SPLITS, own)), config, fingerprint)
    return _cut(whole, {"train": own, "test": max_test})


def _cut(data: Dataset, sizes: dict[str, int | None]) -> Dataset:
    """Keep so many examples of each split, with their labels."""
    kept = {name + end: size for name, size in sizes.items() for end in ("", "_labels")}
    arrays: dict[str, Any] = {name: getattr(data, name) for name in kept}
    few = {name: a[: kept[name]] for name, a in arrays.items() if a is not None}
    return dataclasses.replace(data, **few)


def _checked(data: Dataset, config: Any, fingerprint: str | None) -> Dataset:
    if fingerprint not in (None, data.fingerprint):
        raise WorkdirError(
            f"The data of {config.dataset!r} are others than those that the run in "
            f"{config.workdir} was trained on. Put those back, or train on the new ones with "
            "--restart."
        )
    return data


def read_config(workdir: Path) -> TrainingConfig:
    """Read the settings of the run in a workdir.

    Raises:
      WorkdirError: if there is none, or it cannot be read.
    """
    path = workdir / "config.json"
    try:
        content = settings_of(read_settings(path))
        kind = config_type(TASKS[content.pop("program")])
        hints = typing.get_type_hints(kind)
        content = _assumed(path, kind, content) | content
        return kind(**{name: _typed(name, hints[name], v) for name, v in content.items()})
    except FileNotFoundError as error:
        raise WorkdirError(f"--workdir {workdir} holds no run: there is no {path}.") from error
    except OSError as error:
        raise WorkdirError(f"--workdir {workdir} cannot be read: {reason(error)}") from error
    except (NoRunError, KeyError, TypeError) as error:
        told = error if isinstance(error, NoRunError) else repr(error)
        raise WorkdirError(f"{path} cannot be read as the config of a run: {told}.") from error


def _assumed(path: Path, kind: Any, content: dict[str, Any]) -> dict[str, Any]:
    """Fill in settings that are newer than the config, and print them."""
    values = {k: v for k, v in assumed_before(kind).items() if k not in content}
    if values:
        told = ", ".join(f"{name} = {value!r}" for name, value in values.items())
        print(f"{path} is older than some settings; assumed: {told}.", file=sys.stderr)
    return values


def _typed(name: str, kind: Any, value: Any) -> Any:
    """Convert a value from JSON to its type in a config; a TypeError if it has another."""
    if not _fits(kind, value):
        raise TypeError(f"{name} = {value!r} is none of {kind}")
    if value is None:
        return None
    if Path in (kind, *typing.get_args(kind)):
        return Path(value)
    return tuple(value) if isinstance(value, list) else value


def _fits(kind: Any, value: Any) -> bool:
    """Return whether a value from JSON, or a default, can be of a type; unknown types take all."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(part, value) for part in arguments)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        return isinstance(value, list | tuple) and (
            arguments[1:] != (...,) or all(_fits(arguments[0], part) for part in value)
        )
    taken: dict[Any, Any] = {float: (int, float, str), str: str, int: int, bool: bool}
    taken[Path] = (str, Path)
    taken[types.NoneType] = types.NoneType
    if kind not in taken:
        return True
    return isinstance(value, taken[kind]) and (kind is bool or not isinstance(value, bool))


def _read_state(
    workdir: Path, which: Which, template: Any, best: str, run: dict[str, Any]
) -> TrainState:
    if not (workdir / "checkpoints").is_dir():
        raise WorkdirError(f"--workdir {workdir} holds no checkpoint yet.")
    with closing(Checkpoints(workdir, best=best)) as checkpoints:
        steps = checkpoints.steps()
        if not steps:
            raise WorkdirError(f"--workdir {workdir} holds no checkpoint yet.")
        step = {"newest": steps[-1], "best": checkpoints.best_step()}.get(str(which), which)
        if step is None:
            raise WorkdirError(
                f"No checkpoint in {workdir} has a validation score, by which the best is chosen: "
                f"take --checkpoint newest, or one of {steps}."
            )
        if step not in steps:
            known = ", ".join(map(str, steps))
            raise WorkdirError(f"There is no checkpoint of step {step}; there are {known}.")
        stored = stored_identity(workdir / "checkpoints" / str(step))
        if stored is not None and (told := "; ".join(differences(stored, run))):
            raise WorkdirError(
                f"{workdir / 'config.json'} is not that of checkpoint {step} ({told}): it was "
                "changed after the training. Change it back, or train again with --restart."
            )
        try:
            return checkpoints.read(step, template).state
        except Exception as error:  # whatever a damaged file makes Orbax raise
            raise CheckpointError(
                f"The checkpoint of step {step} in {workdir} cannot be read "
                f"({type(error).__name__}): it is damaged, or an earlier version wrote the run. "
                f"Choose another by --checkpoint: {steps}."
            ) from error
