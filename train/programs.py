"""The programs that train, by name: the registry of tasks."""

from typing import Any

from train.classification import Classification
from train.configs.base import TrainingConfig
from train.density import Density
from train.task import Task

TASKS: dict[str, type[Task]] = {}


def register(task: type[Task]) -> type[Task]:
    """Make a task a program, under the name that its configs give; returns it.

    ``python -m train NAME`` then trains it, and the tools that work on saved runs find it.
    """
    TASKS[config_type(task).program] = task
    return task


def config_type(task: type[Task]) -> type[TrainingConfig]:
    """What the settings of a task are."""
    return type(next(iter(task.experiments.values())))


def make_task(config: Any) -> Task:
    """The task that a config is of, its data loaded."""
    return TASKS[config.program](config)


register(Density)
register(Classification)
