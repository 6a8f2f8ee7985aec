"""``python -m train PROGRAM …``: the command line of all programs."""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import tyro

from paper import program as paper
from train import classification, density, tools
from train.checkpoints import CheckpointError
from train.configs import CLASSIFICATION, DENSITY, classification_config, density_config
from train.configs.base import TrainingConfig
from train.loop import TrainingError
from train.parallel import (
    cpu_devices_for,
    fuse_loops_on_cpu,
    silent_unless_primary,
    start_processes,
    use_cpu_devices,
)
from train.workdir import WorkdirError


class Program(NamedTuple):
    """A program that trains.

    Attributes:
      config: (name, data set) -> its config.
      names: the names of its configs.
      run: what runs a config.
      purpose: in a few words.
    """

    config: Callable[[str | None, str | None], Any]
    names: Sequence[str]
    run: Callable[[Any], Any]
    purpose: str


PROGRAMS = {
    "density": Program(density_config, tuple(DENSITY), density.run, "train a density model"),
    "classification": Program(
        classification_config, tuple(CLASSIFICATION), classification.run, "train a classifier"
    ),
}

_PAPER = {"reproduce": "regenerate the paper's figures and tables"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a program; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    name, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if name not in PROGRAMS | tools.TOOLS | _PAPER:
        return _usage(arguments)
    if name not in tools.TOOLS:
        fuse_loops_on_cpu()
    _keep_compiled()
    try:
        if name in PROGRAMS:
            _train(PROGRAMS[name], _parse(name, rest))
        elif name in _PAPER:
            return paper.main(rest)
        else:
            return tools.run(name, rest)
    except (ValueError, TypeError, WorkdirError, TrainingError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted. The same command, without --restart, resumes.", file=sys.stderr)
        return 130
    return 0


def _keep_compiled() -> None:
    """Keep what XLA compiles in the checkout, unless the environment names another place."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = Path(__file__).parents[1] / ".jax_cache"
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def _train(program: Program, config: TrainingConfig) -> None:
    use_cpu_devices(_cpu_devices(config))
    if config.distributed:
        start_processes(config.coordinator, config.num_processes, config.process_id)
    with silent_unless_primary(), _quick_to_compile(config.smoke):
        program.run(config)


def _cpu_devices(config: TrainingConfig) -> int:
    if config.cpu_devices is not None:
        return config.cpu_devices
    return 1 if config.distributed else cpu_devices_for(config.batch_size)


@contextlib.contextmanager
def _quick_to_compile(smoke: bool) -> Iterator[None]:
    """For runs that take less time than their compilation: optimise little, process-wide.

    What is compiled meanwhile stays so: jit's own cache does not know of it.
    """
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", smoke or before)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def _parse(name: str, arguments: Sequence[str]) -> Any:
    """The config: an experiment's, changed by what else the command line says."""
    program = PROGRAMS[name]
    parser = argparse.ArgumentParser(
        prog=f"python -m train {name}", add_help=False, allow_abbrev=False
    )
    parser.add_argument("--config")
    _, rest = parser.parse_known_args(arguments)
    parser.add_argument("--dataset")
    parser.add_argument("--smoke", action="store_true")
    early, _ = parser.parse_known_args(arguments)
    default = program.config(early.config, early.dataset)
    default = default.smoke_variant() if early.smoke else default
    config = tyro.cli(
        type(default),
        prog=f"python -m train {name} [--config NAME]",
        description=f"{program.purpose.capitalize()}. The defaults below are those of an "
        f"experiment, by --config NAME or --dataset. Experiments: {', '.join(program.names)}.",
        default=default,
        args=rest,
    )
    config.check()
    if early.config is not None and config.dataset != default.dataset:
        print(f"The settings of config {early.config!r}, on data set {config.dataset!r}.")
    return config


def _usage(arguments: Sequence[str]) -> int:
    asked = bool(arguments) and arguments[0] in ("-h", "--help")
    out = sys.stdout if asked else sys.stderr
    if arguments and not asked:
        print(f"error: there is no program {arguments[0]!r}.", file=out)
    print("usage: python -m train PROGRAM [--help] [settings]\n", file=out)
    purposes = {name: program.purpose for name, program in PROGRAMS.items()}
    for name, purpose in (purposes | tools.TOOLS | _PAPER).items():
        print(f"  {name:<16}{purpose}", file=out)
    return 0 if asked else 2


if __name__ == "__main__":
    sys.exit(main())
