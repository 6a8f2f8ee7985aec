"""``python -m train PROGRAM …``: the command line of all programs.

What computes is imported once the arguments are known to be good: ``--help`` needs no JAX.
"""

import contextlib
import dataclasses
import logging
import os
import signal
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tyro

from train.arguments import as_typed, expand_paths, parse_grouped
from train.catalogue import PAPER, PROGRAMS, TOOLS, settings_of
from train.configs.base import TrainingConfig, find_config
from train.failures import ProgramError, Stopped, leaving_others, reason, terminable
from train.terminal import degrade_characters, repeating


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a program, and return the exit status."""
    degrade_characters()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    name, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if name not in PROGRAMS | TOOLS | PAPER:
        return _usage(arguments)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs what it raises as well
    try:
        with terminable():
            return _run(name, expand_paths(rest))
    except (ValueError, TypeError, ProgramError) as error:
        print(f"error: {as_typed(str(error), settings_of(name))}", file=sys.stderr)
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


def _run(name: str, arguments: Sequence[str]) -> int:
    if name in PROGRAMS:
        train(parse(name, arguments))
        return 0
    from train.parallel import check_devices, fuse_loops_on_cpu

    if name in PAPER:
        from paper import program as paper

        fuse_loops_on_cpu()
        _keep_compiled()
        return paper.main(arguments)
    tool: Any = tyro.cli(settings_of(name), prog=f"python -m train {name}", args=arguments)
    _keep_compiled()
    check_devices()
    with repeating():
        status: int = tool.run()
    return status


def _keep_compiled() -> None:
    """Cache compiled programs in the checkout, unless the environment names another folder."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = Path(__file__).parents[1] / ".jax_cache"
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def train(config: TrainingConfig) -> None:
    """Train by a config, on its devices and processes."""
    from train import parallel, processes
    from train.programs import make_task
    from train.training import run

    parallel.fuse_loops_on_cpu()
    _keep_compiled()
    parallel.use_cpu_devices(cpu_devices(config))
    if config.distributed:
        processes.start_processes(config.coordinator, config.num_processes, config.process_id)
    parallel.check_devices()
    if config.distributed:
        processes.say_who_is_here()
    quiet = parallel.silent_unless_primary()
    told = processes.telling_of_lost_processes()
    with told, quiet, repeating(), _quick_to_compile(config.smoke):
        run(make_task(config))


def cpu_devices(config: TrainingConfig) -> int:
    """Return the number of devices that a CPU is split into."""
    from train.parallel import cpu_devices_for

    if config.cpu_devices is not None:
        return config.cpu_devices
    return 1 if config.distributed else cpu_devices_for(config.batch_size)


@contextlib.contextmanager
def _quick_to_compile(smoke: bool) -> Iterator[None]:
    """Compile with few optimisations, process-wide: for runs shorter than their compilation.

    Programs compiled meanwhile stay as they are: jit's own cache does not see the flag.
    """
    import jax

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
    prog, program = f"python -m train {name}", PROGRAMS[name]
    chosen, rest = tyro.cli(
        _Experiment, prog=prog, args=arguments, return_unknown_args=True, add_help=False
    )
    default = find_config(program.experiments, chosen.config, chosen.dataset)
    own = default.dataset
    default = default.smoke_variant() if chosen.smoke else default
    default = dataclasses.replace(default, dataset=chosen.dataset or default.dataset)
    if chosen.config is not None and chosen.dataset not in (None, own):
        print(f"Settings of config {chosen.config!r}, on data set {chosen.dataset!r}.")
    config = parse_grouped(
        default,
        rest,
        prog=f"{prog} [--config NAME]",
        description=f"{program.purpose.capitalize()}. The defaults below are those of the "
        "experiment that --config NAME or --dataset selects. Experiments: "
        f"{', '.join(program.experiments)}.",
    )
    config.check()
    config.refuse_ignored(default)
    return config


def _usage(arguments: Sequence[str]) -> int:
    asked = bool(arguments) and arguments[0] in ("-h", "--help")
    out = sys.stdout if asked else sys.stderr
    if arguments and not asked:
        print(f"error: there is no program {arguments[0]!r}.", file=out)
    print("usage: python -m train PROGRAM [--help] [settings]\n", file=out)
    trained = {name: program.purpose for name, program in PROGRAMS.items()}
    for title, purposes in {
        "programs": trained,
        "tools for saved runs and data": TOOLS,
        "the paper": PAPER,
    }.items():
        print(f"{title}:", file=out)
        for name, purpose in purposes.items():
            print(f"  {name:<16}{_wrapped(purpose)}", file=out)
    return 0 if asked else 2


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 60, subsequent_indent=" " * 18)


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
    with leaving_others():
        sys.exit(_piped())
