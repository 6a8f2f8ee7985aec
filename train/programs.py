"""The programs that train, by name: the registry of tasks."""

from typing import Any

from train.classification import Classification
from train.configs.base import TrainingConfig
from train.density import Density
from train.hybrid import Hybrid
from train.task import Task

TASKS: dict[str, type[Task]] = {}


def register(task: type[Task]) -> type[Task]:
    """Make a task a program, under the name in its configs; return it.

    ``python -m train NAME`` then trains it, and the tools for saved runs know it.

    Raises:
      ValueError: for a name that is taken.
    """
    name = config_type(task).program
    if TASKS.get(name, task) is not task:
        raise ValueError(
            f"There is a program {name!r} already. Give the configs of {task.__name__} a class of "
            "their own, with another program."
        )
    TASKS[name] = task
    return task


def config_type(task: type[Task]) -> type[TrainingConfig]:
    """Return the class of a task's settings."""
    return type(next(iter(task.experiments.values())))


def make_task(config: Any) -> Task:
    """Make the task of a config, and load its data."""
    return TASKS[config.program](config)


register(Density)
register(Classification)
register(Hybrid)
