"""Checkpoints by Orbax: the newest two train states of a run."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp


class CheckpointError(Exception):
    """A checkpoint that cannot be written or read."""


class Checkpoints:
    """The checkpoints in a workdir.

    A save is atomic and goes on in the background; :meth:`close` waits for it. Random keys are not
    part of a state: they are derived from the seed and the step.

    Args:
      workdir: folder of the run.
    """

    def __init__(self, workdir: Path):
        options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
        self._manager = ocp.CheckpointManager((workdir / "checkpoints").absolute(), options=options)

    def save(self, step: int, state: Any) -> None:
        """Save ``state`` as of ``step`` completed steps, unless that step is saved already.

        Raises:
          CheckpointError: if a parameter is not finite, or Orbax declines.
        """
        if step in self._manager.all_steps():
            return
        if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(state.params)):
            raise CheckpointError(
                f"Parameters are not finite after step {step}: they are not saved, and earlier "
                "checkpoints are kept. A smaller --learning-rate may help."
            )
        if not self._manager.save(step, args=ocp.args.StandardSave(state)):
            raise CheckpointError(f"The checkpoint of step {step} was not saved.")

    def restore(self, like: Any) -> Any | None:
        """The newest state that can be read, in the structure of ``like``; None without any.

        Damaged checkpoints above it are removed: Orbax saves nothing at or below its newest step.

        Raises:
          CheckpointError: if there are checkpoints, and none can be read.
        """
        template = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        damaged: list[int] = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                state = self._manager.restore(step, args=ocp.args.StandardRestore(template))
            except Exception as error:  # whatever a damaged file makes Orbax raise
                print(f"Checkpoint {step} cannot be read and is skipped: {_first_line(error)}")
                damaged.append(step)
                continue
            for bad in damaged:
                self._manager.delete(bad)
            return state
        if damaged:
            raise CheckpointError(
                f"None of the checkpoints (steps {damaged}) can be read. Nothing was changed; pass "
                "--restart to move the run aside."
            )
        return None

    def close(self) -> None:
        """Wait for a save under way."""
        self._manager.wait_until_finished()
        self._manager.close()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
