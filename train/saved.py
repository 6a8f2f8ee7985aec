"""Saved runs: config, data, model and a checkpoint's state, from a workdir."""

import dataclasses
import json
import sys
import typing
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from train.checkpoints import CheckpointError, Checkpoints
from train.configs.base import TrainingConfig
from train.data import Dataset
from train.networks import ModelFunctions
from train.programs import TASKS, config_type
from train.steps import FirstState, TrainState
from train.task import Task
from train.workdir import WorkdirError, read_settings

Which = Literal["newest", "best"] | int

#: Behaviour from before a setting existed, where it differs from today's default.
_BEFORE = {"shrink": False, "inverse_solver": "plain"}


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
      WorkdirError: if the folder holds no run, or not that checkpoint; for an unknown setting.
    """
    config = read_config(workdir)
    if unknown := changes.keys() - vars(config).keys():
        names = ", ".join(sorted(unknown))
        raise WorkdirError(f"--workdir {workdir} holds {config.program}, without {names}.")
    config = dataclasses.replace(config, workdir=workdir, **changes)
    kind = TASKS[config.program]
    task = kind(config, load_data(kind, config, max_test))
    example = np.zeros((1, *task.dataset.example_shape), np.float32)
    template = FirstState(task.init, config, example).template()
    state = _read_state(workdir, which, template, task.best)
    return SavedRun(task, config, task.dataset, task.functions, state)


def load_data(kind: type[Task], config: Any, max_test: int | None) -> Dataset:
    """Load the data of a run, with at most ``max_test`` test examples."""
    if max_test is None:
        return kind.load(config)
    if max_test < 1:
        raise ValueError(f"max_examples must be ≥ 1; got {max_test}.")
    own = config.max_examples
    whole = kind.load(dataclasses.replace(config, max_examples=own and max(own, max_test)))
    kept = {"train": own, "train_labels": own, "test": max_test, "test_labels": max_test}
    arrays: dict[str, Any] = {name: getattr(whole, name) for name in kept}
    few = {name: a[: kept[name]] for name, a in arrays.items() if a is not None}
    return dataclasses.replace(whole, **few)


def read_config(workdir: Path) -> TrainingConfig:
    """Read the settings of the run in a workdir.

    Raises:
      WorkdirError: if there is none, or it cannot be read.
    """
    path = workdir / "config.json"
    try:
        content = read_settings(path)
        kind = config_type(TASKS[content.pop("program")])
        types = typing.get_type_hints(kind)
        content = _assumed(path, kind, content) | content
        return kind(**{name: _typed(types[name], v) for name, v in content.items()})
    except FileNotFoundError as error:
        raise WorkdirError(f"--workdir {workdir} holds no run: there is no {path}.") from error
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise WorkdirError(f"{path} cannot be read as the config of a run: {error!r}.") from error


def _assumed(path: Path, kind: Any, content: dict[str, Any]) -> dict[str, Any]:
    """Fill in settings that are newer than the config, and print them."""
    values = {
        field.name: _BEFORE.get(field.name, field.default)
        for field in dataclasses.fields(kind)
        if field.name not in content and field.default is not dataclasses.MISSING
    }
    if values:
        told = ", ".join(f"{name} = {value!r}" for name, value in values.items())
        print(f"{path} is older than some settings; assumed: {told}.", file=sys.stderr)
    return values


def _typed(kind: Any, value: Any) -> Any:
    """Convert a value from JSON to its type in a config."""
    if value is None:
        return None
    if Path in (kind, *typing.get_args(kind)):
        return Path(value)
    return tuple(value) if isinstance(value, list) else value


def _read_state(workdir: Path, which: Which, template: Any, best: str) -> TrainState:
    if not (workdir / "checkpoints").is_dir():
        raise WorkdirError(f"--workdir {workdir} holds no checkpoint yet.")
    with closing(Checkpoints(workdir, best=best)) as checkpoints:
        steps = checkpoints.steps()
        if not steps:
            raise WorkdirError(f"--workdir {workdir} holds no checkpoint yet.")
        step = {"newest": steps[-1], "best": checkpoints.best_step()}.get(str(which), which)
        if step not in steps:
            known = ", ".join(map(str, steps))
            raise WorkdirError(f"There is no checkpoint of step {step}; there are {known}.")
        try:
            return checkpoints.read(step, template).state
        except Exception as error:  # whatever a damaged file makes Orbax raise
            raise CheckpointError(
                f"The checkpoint of step {step} in {workdir} cannot be read "
                f"({type(error).__name__}): it is damaged, or an earlier version wrote the run. "
                f"Choose another by --checkpoint: {steps}."
            ) from error
