"""The programs that train, by name: the registry of tasks."""

from collections.abc import Iterator, MutableMapping
from typing import Any

from train.catalogue import PROGRAMS, Program
from train.configs.base import TrainingConfig
from train.task import Task


class _Tasks(MutableMapping[str, type[Task]]):
    """The tasks of the catalogue's programs, imported when they are asked for."""

    def __getitem__(self, name: str) -> type[Task]:
        task: type[Task] = PROGRAMS[name].task()
        return task

    def __setitem__(self, name: str, task: type[Task]) -> None:
        PROGRAMS[name] = Program(task.purpose, task.experiments, lambda: task)

    def __delitem__(self, name: str) -> None:
        del PROGRAMS[name]

    def __iter__(self) -> Iterator[str]:
        return iter(PROGRAMS)

    def __len__(self) -> int:
        return len(PROGRAMS)


TASKS = _Tasks()


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
