"""Several processes as one run: who is there, a common stop, one that dies, other devices."""

import contextlib
import socket
import sys
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

from train.failures import ProgramError

_NUM_DEVICES = "num_devices"


class LostProcessError(ProgramError):
    """A process of the run that ended, so that the others cannot go on."""


def say_who_is_here() -> None:
    """Print a line to stderr: which process this is, on which host, with which devices."""
    devices = jax.local_devices()
    print(
        f"Process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}: "
        f"{len(devices)} of {jax.device_count()} devices, {devices[0].device_kind}.",
        file=sys.stderr,
        flush=True,
    )


def reached_common_stop(step: int) -> bool:
    """Return whether all processes stop after ``step``, since one of them has received SIGTERM.

    JAX's distributed runtime takes the signal, from ``jax.distributed.initialize`` on, and agrees
    with the other processes on a step that none has passed. Each has to ask after every step.
    Alone, a process handles the signal itself.
    """
    return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step)


@contextlib.contextmanager
def telling_of_lost_processes() -> Iterator[None]:
    """Say in a sentence that a collective failed, which is how a lost process shows.

    On accelerators a collective may wait instead. There JAX ends this process, with a message of
    its own, when the other one's heartbeats are missing.

    Raises:
      LostProcessError: for what JAX raises, where there are several processes; a device that is out
        of memory is no such case.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or "RESOURCE_EXHAUSTED" in str(error):
            raise
        raise LostProcessError(
            f"Process {jax.process_index()} cannot reach the others; one may have ended: see what "
            "it printed last. The same command, without --restart and in all processes, resumes "
            f"from the newest checkpoint. ({[*str(error).splitlines(), ''][0]})"
        ) from error


def with_num_devices(data: dict[str, Any], count: int) -> dict[str, Any]:
    """Return what a checkpoint holds of the data, and of how many devices trained so far."""
    return {**data, _NUM_DEVICES: count}


def without_num_devices(data: dict[str, Any], count: int) -> dict[str, Any]:
    """Return the data's state alone; say so if other than ``count`` devices trained so far."""
    before = data.get(_NUM_DEVICES, count)
    if before != count:
        print(
            f"The run had {before} devices, and has {count} now: the same batches and noise, but "
            "float32 sums in another order, so that it does not go on bit for bit."
        )
    return {name: value for name, value in data.items() if name != _NUM_DEVICES}
