"""``python -m train PROGRAM …``: the command line of all programs."""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from train import classification, density
from train.checkpoints import CheckpointError
from train.configs import classification_config, density_config
from train.loop import TrainingError
from train.workdir import WorkdirError

#: Program name -> (the config of a data set, what runs it, what it does).
PROGRAMS: dict[str, tuple[Callable[[str], Any], Callable[[Any], Any], str]] = {
    "density": (density_config, density.run, "train a density model"),
    "classification": (classification_config, classification.run, "train a classifier"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a program; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] not in PROGRAMS:
        return _usage(arguments)
    make_config, run, _ = PROGRAMS[arguments[0]]
    try:
        run(_parse(arguments[0], make_config, arguments[1:]))
    except (ValueError, TypeError, WorkdirError, TrainingError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted. The same command, without --restart, resumes.", file=sys.stderr)
        return 130
    return 0


def _parse(program: str, make_config: Callable[[str], Any], arguments: Sequence[str]) -> Any:
    """The config: the data set's experiment, changed by what else the command line says."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--dataset", default="digits")
    default = make_config(parser.parse_known_args(arguments)[0].dataset)
    config = tyro.cli(
        type(default), prog=f"python -m train {program}", default=default, args=arguments
    )
    config.check()
    if not config.smoke:
        return config
    if config.workdir == default.workdir:
        smoke_workdir = default.workdir.with_name(f"{default.workdir.name}-smoke")
        config = dataclasses.replace(config, workdir=smoke_workdir)
    return dataclasses.replace(config.smoke_variant(), smoke=True)


def _usage(arguments: Sequence[str]) -> int:
    asked = bool(arguments) and arguments[0] in ("-h", "--help")
    out = sys.stdout if asked else sys.stderr
    if arguments and not asked:
        print(f"error: there is no program {arguments[0]!r}.", file=out)
    print("usage: python -m train PROGRAM [--help] [settings]\n", file=out)
    for name, (_, _, purpose) in PROGRAMS.items():
        print(f"  {name:<16}{purpose}", file=out)
    return 0 if asked else 2


if __name__ == "__main__":
    sys.exit(main())
