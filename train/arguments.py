"""The command line of a config: options in groups, paths, and settings named as they are typed."""

import ast
import dataclasses
import inspect
import itertools
import os
import re
import textwrap
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated, Any

import tyro

#: Options that take a path.
_PATHS = ("--workdir", "--data-dir", "--output", "--dataset", "--warm-start")

#: Groups of ``--help``, and their settings in order; what is in none comes last.
GROUPS = {
    "data": "dataset data_dir max_examples margin margins augment mean std",
    "run": "workdir restart warm_start smoke seed",
    "network": "depths features branch block mixing coeff activation power_steps normalize "
    "shrink domain padding",
    "training": "steps batch_size optimizer learning_rate adam_learning_rate schedule milestones "
    "milestone_factor warmup_steps weight_decay clip_gradient ema_decay validate_every "
    "picture_every checkpoint_every keep_checkpoints",
    "likelihood": "dequantization dequantization_features dequantization_couplings "
    "likelihood_weight head_features unknown",
    "log_determinant": "train_estimator num_terms continuation shared_length eval_estimator "
    "target_bias",
    "inverse": "inverse_tolerance inverse_error_tolerance inverse_solver inverse_max_steps",
    "evaluation": "target_stderr max_draws importance_samples num_samples num_reconstructed",
    "machine": "precision remat parallel cpu_devices distributed coordinator num_processes "
    "process_id",
}
_REST = "further"
#: Text between single quotes that are no apostrophes.
_QUOTED = r"((?<!\w)'[^'\n]*'(?!\w))"


def parse_grouped(default: Any, arguments: Sequence[str], *, prog: str, description: str) -> Any:
    """Return ``default``, a config, overridden by the command line; ``--help`` is in groups."""
    kind = type(default)
    told, hints = dict(explanations(kind)), typing.get_type_hints(kind)
    groups: dict[str, Any] = {}
    for title, names in _grouped(field.name for field in dataclasses.fields(kind)).items():
        fields: list[Any] = [
            (
                name,
                Annotated[hints[name], tyro.conf.arg(help=told.get(name, ""))],
                dataclasses.field(default=getattr(default, name)),
            )
            for name in names
        ]
        groups[title] = dataclasses.make_dataclass(title, fields, frozen=True, kw_only=True)
    outer: Any = dataclasses.make_dataclass(
        kind.__name__,
        [(title, group, dataclasses.field(default=group())) for title, group in groups.items()],
    )
    parsed = tyro.cli(
        outer,
        prog=prog,
        # Tyro keeps the line breaks before what is no letter.
        description=textwrap.fill(description, 78, subsequent_indent="  "),
        args=arguments,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    given = {
        name: value for title in groups for name, value in vars(getattr(parsed, title)).items()
    }
    return dataclasses.replace(default, **given)


def _grouped(names: Iterable[str]) -> dict[str, list[str]]:
    """Sort settings into groups, none of which is empty."""
    left = list(names)
    groups = {title: [n for n in known.split() if n in left] for title, known in GROUPS.items()}
    known = {name for group in groups.values() for name in group}
    groups[_REST] = [name for name in left if name not in known]
    return {title: group for title, group in groups.items() if group}


def explanations(kind: type) -> Iterator[tuple[str, str]]:
    """Yield the settings of a dataclass with the strings below them, those of its bases first."""
    for base in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        source: Any = ast.parse(textwrap.dedent(inspect.getsource(base)))
        for statement, after in itertools.pairwise(source.body[0].body):
            told = after.value if isinstance(after, ast.Expr) else None
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(told, ast.Constant)
            ):
                yield statement.target.id, " ".join(str(told.value).split())


def expand_paths(arguments: Sequence[str]) -> list[str]:
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


def as_typed(message: str, settings: type) -> str:
    """Name settings as the user types them: ``--target-bias`` for target_bias.

    A name that is a word too, such as steps, counts where a message says what it must be. Quoted
    text and parts of paths stay.
    """
    for field in dataclasses.fields(settings):
        name, option = field.name, f"--{field.name.replace('_', '-')}"
        if "_" in name:
            pattern = rf"(?<![\w./\\'\"-]){name}(?![\w/\\'\"-]|\.\w)"
        else:
            pattern = rf"(?:^|(?<=; )|(?<=\()){name}(?= must | = | has |: [^;]* there)"
        message = re.sub(rf"{_QUOTED}|{pattern}", _outside_quotes(option), message)
    return message


def _outside_quotes(option: str) -> Callable[[re.Match[str]], str]:
    return lambda found: found[1] or option
