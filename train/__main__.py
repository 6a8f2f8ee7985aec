"""``python -m train PROGRAM …``: the command line of all programs."""

import contextlib
import dataclasses
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import tyro

from train.checkpoints import CheckpointError
from train.configs.base import TrainingConfig, find_config
from train.failures import Stopped, reason, terminable
from train.parallel import (
    check_devices,
    cpu_devices_for,
    fuse_loops_on_cpu,
    silent_unless_primary,
    start_processes,
    use_cpu_devices,
)
from train.processes import LostProcessError, say_who_is_here, telling_of_lost_processes
from train.programs import TASKS, make_task
from train.terminal import degrade_characters
from train.tools import TOOLS
from train.training import TrainingError, run
from train.workdir import WorkdirError

#: What a sentence explains.
_TOLD = ValueError, TypeError, WorkdirError, TrainingError, CheckpointError, LostProcessError
#: Options that take a path.
_PATHS = ("--workdir", "--data-dir", "--output", "--dataset")
_PAPER = {"reproduce": "regenerate the paper's figures and tables"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a program, and return the exit status."""
    degrade_characters()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    name, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if name not in TASKS | TOOLS | _PAPER:
        return _usage(arguments)
    if name not in TOOLS:
        fuse_loops_on_cpu()
    _keep_compiled()
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs what it raises as well
    try:
        with terminable():
            return _run(name, _paths(rest))
    except _TOLD as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        raise
    except OSError as error:
        print(f"error: {reason(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        told = " The same command, without --restart, resumes." if name not in TOOLS else ""
        print(f"{str(error) or 'Interrupted.'}{told}", file=sys.stderr)
        return error.status if isinstance(error, Stopped) else 130


def _paths(arguments: Sequence[str]) -> list[str]:
    """Expand ~ in paths, which a shell leaves in ``--workdir=~/x``; refuse an empty path.

    Raises:
      ValueError: naming the argument.
    """
    told, option = [], ""
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if equals and _is_path(name):
            argument = f"{name}={_path(name, value)}"
        elif option:
            argument = _path(option, argument)
        told.append(argument)
        option = argument if _is_path(argument) else ""
    return told


def _is_path(option: str) -> bool:
    return option.replace("_", "-") in _PATHS


def _path(option: str, value: str) -> str:
    if not value.strip():
        raise ValueError(
            f"{option} must be a path, such as . for the current folder; got {value!r}."
        )
    return os.path.expanduser(value)


def _run(name: str, arguments: Sequence[str]) -> int:
    if name in _PAPER:
        from paper import program as paper

        return paper.main(arguments)
    if name in TOOLS:
        tool = tyro.cli(TOOLS[name], prog=f"python -m train {name}", args=arguments)
        check_devices()
        return tool.run()
    train(parse(name, arguments))
    return 0


def _keep_compiled() -> None:
    """Cache compiled programs in the checkout, unless the environment names another folder."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = Path(__file__).parents[1] / ".jax_cache"
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def train(config: TrainingConfig) -> None:
    """Train by a config, on its devices and processes."""
    use_cpu_devices(cpu_devices(config))
    if config.distributed:
        start_processes(config.coordinator, config.num_processes, config.process_id)
    check_devices()
    if config.distributed:
        say_who_is_here()
    quiet = silent_unless_primary()
    with telling_of_lost_processes(), quiet, _quick_to_compile(config.smoke):
        run(make_task(config))


def cpu_devices(config: TrainingConfig) -> int:
    """Return the number of devices that a CPU is split into."""
    if config.cpu_devices is not None:
        return config.cpu_devices
    return 1 if config.distributed else cpu_devices_for(config.batch_size)


@contextlib.contextmanager
def _quick_to_compile(smoke: bool) -> Iterator[None]:
    """Compile with few optimisations, process-wide: for runs shorter than their compilation.

    Programs compiled meanwhile stay as they are: jit's own cache does not see the flag.
    """
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", smoke or before)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


@dataclasses.dataclass(frozen=True)
class _Experiment:
    """The experiment that gives all other settings their defaults."""

    config: str | None = None
    dataset: str | None = None
    smoke: bool = False


def parse(name: str, arguments: Sequence[str]) -> Any:
    """Return the config of a task: an experiment's, overridden by the command line."""
    prog, task = f"python -m train {name}", TASKS[name]
    chosen, rest = tyro.cli(
        _Experiment, prog=prog, args=arguments, return_unknown_args=True, add_help=False
    )
    default = find_config(task.experiments, chosen.config, chosen.dataset)
    default = default.smoke_variant() if chosen.smoke else default
    if chosen.config is not None and chosen.dataset not in (None, default.dataset):
        print(f"Settings of config {chosen.config!r}, on data set {chosen.dataset!r}.")
    config = tyro.cli(
        type(default),
        prog=f"{prog} [--config NAME]",
        description=f"{task.purpose.capitalize()}. The defaults below are those of the "
        "experiment that --config NAME or --dataset selects. Experiments: "
        f"{', '.join(task.experiments)}.",
        default=dataclasses.replace(default, dataset=chosen.dataset or default.dataset),
        args=rest,
    )
    config.check()
    return config


def _usage(arguments: Sequence[str]) -> int:
    asked = bool(arguments) and arguments[0] in ("-h", "--help")
    out = sys.stdout if asked else sys.stderr
    if arguments and not asked:
        print(f"error: there is no program {arguments[0]!r}.", file=out)
    print("usage: python -m train PROGRAM [--help] [settings]\n", file=out)
    purposes = {name: task.purpose for name, task in TASKS.items()}
    for name, tool in TOOLS.items():
        told = (tool.__doc__ or "").splitlines()[0].removesuffix(".")
        purposes[name] = told[:1].lower() + told[1:]
    for name, purpose in (purposes | _PAPER).items():
        print(f"  {name:<16}{purpose}", file=out)
    return 0 if asked else 2


def _piped() -> int:
    """Run a program; end quietly where the reader of its output has ended, as ``head`` does."""
    try:
        try:
            return main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


if __name__ == "__main__":
    sys.exit(_piped())
