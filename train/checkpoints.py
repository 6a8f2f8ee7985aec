"""Checkpoints by Orbax: the newest states of a run, and the best on the validation set."""

import contextlib
import errno
import json
import math
import operator
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from train.failures import ProgramError, reason, unused
from train.parallel import is_primary


class CheckpointError(ProgramError):
    """A checkpoint that cannot be written or read."""


class Saved(NamedTuple):
    """The train state, as NumPy arrays, and the state of the data iterator.

    Random keys are derived from the seed and the step. ``seconds`` of training led there. ``run``
    is the identity that was stored, if one was.
    """

    state: Any
    data: dict[str, Any]
    seconds: float = 0.0
    run: dict[str, Any] | None = None


class Checkpoints:
    """The checkpoints in a workdir, written by the first process alone.

    The newest ``keep`` stay, and the one with the best score, the smallest ("min") or largest
    ("max"). Saves are atomic and run in the background; :meth:`close` waits for them. The first
    save of a process is read back.

    Args:
      workdir: folder of the run.
      keep: number of newest checkpoints to keep.
      best: "min" or "max".
      run: which run they belong to; see :func:`train.identity.identity`. It is stored with each.

    Attributes:
      run: the same; it may be changed between saves.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        keep: int = 2,
        best: str = "min",
        run: dict[str, Any] | None = None,
    ):
        self._folder, self.run = workdir / "checkpoints", run
        self._manager = _manager(workdir, keep, best) if is_primary() else None
        self._verified = False

    def save(
        self, step: int, state: Any, data: dict[str, Any], score: float, seconds: float = 0.0
    ) -> None:
        """Save the state after ``step`` steps, unless that step is saved already.

        Raises:
          CheckpointError: in every process, if a parameter is not finite; in the first, if a
            checkpoint cannot be written, or not be read back.
        """
        state = jax.tree.map(np.asarray, state)
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params)):
            raise CheckpointError(
                f"Parameters are not finite after step {step}: they are not saved, and earlier "
                "checkpoints are kept. A smaller --learning-rate may help."
            )
        if self._manager is None or step in self._manager.all_steps():
            return
        beside = {"iterator": data, "seconds": seconds}
        beside |= {} if self.run is None else {"run": self.run}
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(beside)
        )
        with self._told(f"The checkpoint of step {step} was not saved"):
            if not self._manager.save(step, args=args, metrics={"score": score}):
                raise CheckpointError(f"The checkpoint of step {step} was not saved.")
        if not self._verified:
            self._verify(step, state)

    def _verify(self, step: int, state: Any) -> None:
        """Wait for a save, and compare it with what is read back."""
        assert self._manager is not None
        with self._told(f"The checkpoint of step {step} was not saved"):
            self._manager.wait_until_finished()
        with self._told(f"The checkpoint of step {step} cannot be read back"):
            pairs = zip(*map(jax.tree.leaves, (self.read(step, state).state, state)), strict=True)
            if any(np.asarray(a).tobytes() != b.tobytes() for a, b in pairs):
                raise CheckpointError(f"The checkpoint of step {step} is not what was saved.")
        self._verified = True

    @contextlib.contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """Turn what Orbax raises into a CheckpointError of one sentence."""
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:  # threads of Orbax raise many kinds
            raise CheckpointError(f"{what}: {_cause(error, self._folder)}") from error

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, in order."""
        return [] if self._manager is None else sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """Return the step of the best checkpoint; None without any."""
        return None if self._manager is None else self._manager.best_step()

    def restore(self, like: Any) -> Saved | None:
        """Read the newest checkpoint that can be read; None without any.

        Later ones are moved to the folder "unreadable-checkpoints", since Orbax saves nothing at or
        below its newest step. ``like`` is a train state of the same structure.

        Raises:
          CheckpointError: if there are checkpoints, and none can be read.
        """
        unreadable: list[int] = []
        for step in reversed(self.steps()):
            assert self._manager is not None
            try:
                saved = self.read(step, like)
            except Exception as error:  # whatever a damaged file makes Orbax raise
                told = f"{type(error).__name__}: {[*str(error).splitlines(), ''][0]}"
                print(f"Checkpoint {step} cannot be read and is skipped: {told}")
                unreadable.append(step)
                continue
            self._move_aside(unreadable)
            return saved
        if unreadable:
            raise CheckpointError(
                f"None of the checkpoints (steps {unreadable}) can be read: they are damaged, or "
                "an earlier version wrote them. Nothing was changed; pass --restart to move the "
                "run aside."
            )
        return None

    def _move_aside(self, steps: list[int]) -> None:
        """Move checkpoints out of Orbax's sight, and say where to."""
        assert self._manager is not None
        for step in steps:
            aside = unused(self._folder.with_name("unreadable-checkpoints") / str(step))
            try:
                aside.parent.mkdir(exist_ok=True)
                (self._folder / str(step)).rename(aside)
            except OSError as error:
                told = _cause(error, self._folder)
                raise CheckpointError(f"Checkpoint {step} cannot be moved aside: {told}") from error
            print(f"Checkpoint {step} was moved to {aside}.")
        if steps:
            self._manager.reload()

    def read(self, step: int, like: Any) -> Saved:
        """Read the checkpoint of one step, in the structure of ``like``."""
        assert self._manager is not None
        template = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), like)
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(template), data=ocp.args.JsonRestore()
        )
        read = self._manager.restore(step, args=args)
        beside = read["data"]
        seconds = float(beside.get("seconds", 0.0))
        return Saved(read["state"], beside["iterator"], seconds, beside.get("run"))

    def close(self) -> None:
        """Wait for unfinished saves."""
        if self._manager is not None:
            with self._told("A checkpoint was not saved"):
                try:
                    self._manager.wait_until_finished()
                finally:
                    self._manager.close()


def _cause(error: Exception, folder: Path) -> str:
    """Say in a sentence why Orbax could not write or read."""
    text = str(error)
    if isinstance(error, OSError) and error.errno is not None:
        return reason(OSError(error.errno, error.strerror, error.filename or str(folder)))
    if "os_error_code='28'" in text or os.strerror(errno.ENOSPC) in text:
        return reason(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)))
    return f"{folder}: {type(error).__name__}: {[*text.splitlines(), ''][0]}"


class _Manager(ocp.CheckpointManager):
    """Orbax's manager, for scores that are damaged or of an earlier version."""

    def metrics(self, step: int) -> Any:
        """Return the metrics of a checkpoint; None where they cannot be read, or are NaN."""
        try:
            found = super().metrics(step) or self._earlier_metrics(step)
            return None if math.isnan(found["score"]) else found
        except Exception:  # whatever a damaged file makes Orbax raise
            return None

    def _earlier_metrics(self, step: int) -> dict[str, float]:
        """Read a score of an earlier version: with the data, negated where less is better."""
        text = (Path(self.directory) / str(step) / "data" / "metadata").read_text()
        sign = 1.0 if self._options.best_mode == "max" else -1.0
        return {"score": sign * float(json.loads(text)["score"])}


def _manager(workdir: Path, keep: int, best: str) -> ocp.CheckpointManager:
    score, less = operator.itemgetter("score"), best == "min"
    best_one = BestN(get_metric_fn=score, reverse=less, n=1, keep_checkpoints_without_metrics=False)
    one_process = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})
    options = ocp.CheckpointManagerOptions(
        best_fn=score,
        best_mode=best,
        preservation_policy=AnyPreservationPolicy([LatestN(keep), best_one]),
        create=False,
        multiprocessing_options=one_process,
    )
    folder = (workdir / "checkpoints").absolute()
    folder.mkdir(exist_ok=True)
    return _Manager(folder, options=options)
