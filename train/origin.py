"""Where the first state of a run comes from: its own checkpoint, another run, or nothing."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from train.checkpoints import CheckpointError
from train.configs.base import TrainingConfig
from train.identity import DATA, WARM, Content, NoRunError, checkpoint_folders, stored_identity
from train.optim import describe_schedule, make_schedule
from train.parallel import broadcast, is_primary, on_primary
from train.report import tree_sha256
from train.saved import SavedRun, load_network, read_settings
from train.steps import FirstState, TrainState, first_state
from train.task import Task
from train.workdir import WorkdirError

#: Settings of a model that leave its map, and so the meaning of its variables, as it is.
_OF_TRAINING = {"num_steps", "normalize", "precision", "remat", "axis_name", "parent", "name"}


class WarmStart(NamedTuple):
    """The variables of another run, and which run that is.

    Attributes:
      record: its workdir, step, program and data, and a hash of the variables, as they were saved.
      variables: averaged, power iterations converged; None where the run goes on from a checkpoint
        of its own, or in another process than the first.
    """

    record: Content
    variables: Any = None


def warm_start(task: Task, template: TrainState) -> WarmStart | None:
    """Load the averaged variables of the run that ``--warm-start`` names; None without the setting.

    The optimiser's state is not taken. ``template`` has the shapes of this run's first state.

    Raises:
      WorkdirError: if there is no such run, or its network is another.
    """
    config = task.config
    folder = config.warm_start
    if folder is None:
        return None
    found = on_primary(lambda: _found(task, folder, template), WorkdirError)
    return found or WarmStart({})


def _found(task: Task, folder: Path, template: TrainState) -> WarmStart:
    config = task.config
    if folder.resolve() == config.workdir.resolve():
        raise WorkdirError(
            f"--warm-start {folder} is the run's own workdir: without the setting, the run goes on "
            "there from its checkpoint."
        )
    known = None if config.restart else _known(config.workdir)
    if known is not None and known["workdir"] == str(folder.resolve()):
        return WarmStart(known)
    try:
        saved = load_network(folder, "newest")
    except (WorkdirError, CheckpointError, NoRunError, ValueError) as error:
        told = str(error).removeprefix("--workdir ").removeprefix(f"{folder}")
        raise WorkdirError(
            f"--warm-start {folder}{': ' if told[:1] != ' ' else ''}{told}"
        ) from error
    variables = saved.state.averaged_variables
    if told := "; ".join(_network_differences(saved, task, variables, template)):
        raise WorkdirError(f"--warm-start {folder} holds another network ({told}).")
    record = {
        "workdir": str(folder.resolve()),
        "step": int(saved.state.step),
        "program": saved.config.program,
        "variables_sha256": tree_sha256(variables),
        DATA: read_settings(folder / "config.json").get(DATA),
    }
    return WarmStart(record, jax.device_get(saved.functions.converge(variables)))


def _known(workdir: Path) -> Content | None:
    """Return the record of the run in a workdir, if it has a checkpoint to go on from."""
    for folder in checkpoint_folders(workdir):
        if (stored := stored_identity(folder)) is not None:
            return stored.get(WARM)
    return None


def _network_differences(
    saved: SavedRun, task: Task, variables: Any, template: TrainState
) -> Iterator[str]:
    """Yield in what two networks differ."""
    there, here = saved.task.model, task.model
    if type(there) is not type(here):
        yield f"{type(there).__name__} there, {type(here).__name__} here"
        return
    names = {field.name for field in dataclasses.fields(here)} - _OF_TRAINING
    for name in sorted(names):
        pair = getattr(there, name), getattr(here, name)
        if pair[0] != pair[1]:  # functions by their names
            yield "{}: {} there, {} here".format(
                name, *(getattr(value, "__name__", value) for value in pair)
            )
    shapes = (_shapes(tree) for tree in (variables, template.averaged_variables))
    for path, of_there, of_here in _unequal(*shapes):
        yield f"variable {path}: {of_there or 'none'} there, {of_here or 'none'} here"


def _shapes(tree: Any) -> dict[str, str]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def _unequal(there: dict[str, str], here: dict[str, str]) -> Iterator[tuple[str, Any, Any]]:
    """Yield the first path at which two trees differ in shape or type, if there is one."""
    for path in sorted(there.keys() | here.keys()):
        if there.get(path) != here.get(path):
            yield path, there.get(path), here.get(path)
            return


def first_of(first: FirstState, warm: WarmStart | None, config: TrainingConfig) -> TrainState:
    """Return the state before the first step: fresh, or with another run's variables."""
    if warm is None:
        return first.values()
    if not is_primary():
        return broadcast(first.values())
    print(
        f"Starting from the averaged variables of {warm.record['workdir']}, step "
        f"{warm.record['step']:,}; the optimiser starts afresh."
    )
    return broadcast(first_state(warm.variables, config))


def tell_of_more_steps(config: TrainingConfig, step: int, before: int) -> None:
    """Print what the learning rate does where a run planned for other steps goes on."""
    old = dataclasses.replace(config, steps=before)
    rates = [float(make_schedule(c)(step)) for c in (old, config)]
    print(
        f"It was planned for {before:,} steps, and now for {config.steps:,}.\n"
        f"Learning rate before: {describe_schedule(old)}.\n"
        f"Learning rate now: {describe_schedule(config)}. At the next step it is {rates[1]:.3g}; "
        f"by the plan before, it would be {rates[0]:.3g}."
    )
