"""Several processes as one run: how they meet and stop together, one that dies, other devices."""

import contextlib
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

from train.failures import ProgramError

_NUM_DEVICES = "num_devices"
#: JAX says so several times before the cause.
_DISPATCHING = "Error dispatching computation: "
#: Another process counts as lost after so long.
_SECONDS_WITHOUT_HEARTBEAT = 30


class LostProcessError(ProgramError):
    """A process of the run that ended, so that the others cannot go on."""


def start_processes(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    *,
    limit: int = 300,
) -> None:
    """Join the other processes of a run; None is read from the cluster's environment.

    It waits ``limit`` seconds for them.

    Raises:
      ValueError: if the processes cannot be found, or do not answer.
    """
    if coordinator is not None:
        host, port = _host_and_port(coordinator)
        print(f"Waiting for the processes at {coordinator}, {limit} s at most.", file=sys.stderr)
        if process_id:  # JAX would abort this process
            _wait_for(host, port, limit)
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            initialization_timeout=limit,
            heartbeat_timeout_seconds=_SECONDS_WITHOUT_HEARTBEAT,
        )
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"--distributed: the processes did not come together ({error}). Pass --coordinator "
            "host:port, --num-processes and --process-id, or start under SLURM, on a TPU pod or "
            "under Kubernetes."
        ) from error


def _host_and_port(coordinator: str) -> tuple[str, int]:
    host, _, port = coordinator.rpartition(":")
    if not host or not (port.isascii() and port.isdigit() and 1 <= int(port) <= 65535):
        raise ValueError(
            f"coordinator must be host:port, with a port in [1, 65535]; got {coordinator!r}."
        )
    return host.strip("[]"), int(port)


def _wait_for(host: str, port: int, limit: float) -> None:
    """Wait until the first process listens."""
    until = time.monotonic() + limit
    while True:
        try:
            socket.create_connection((host, port), timeout=max(limit, 0.1)).close()
            return
        except OSError as error:
            if time.monotonic() >= until:
                raise ValueError(
                    f"--coordinator {host}:{port} did not answer for {limit:g} s ({error}). Start "
                    "the process with --process-id 0 there, and check the name and the port."
                ) from error
        time.sleep(min(0.2, max(limit, 0.01)))


def say_who_is_here() -> None:
    """Print a line to stderr: which process this is, on which host, with which devices."""
    devices = jax.local_devices()
    print(
        f"Process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}: "
        f"{len(devices)} of {jax.device_count()} devices, {devices[0].device_kind}.",
        file=sys.stderr,
        flush=True,
    )
    if devices[0].platform == "gpu" and (idle := _idle_gpus(len(devices))):
        print(
            f"warning: {idle} of this node's GPUs are in no task. Under SLURM, JAX gives each task "
            "one: start a task for each, or name them, as in JAX_LOCAL_DEVICE_IDS=0,1,2,3.",
            file=sys.stderr,
            flush=True,
        )


def _idle_gpus(seen: int) -> int:
    """Of a SLURM job's GPUs on this node, those that no task sees if each sees ``seen``."""
    gpus = os.environ.get("SLURM_GPUS_ON_NODE", "")
    tasks = re.match(r"\d+", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    return max(int(gpus) - int(tasks[0]) * seen, 0) if gpus.isdigit() and tasks else 0


def reached_common_stop(step: int) -> bool:
    """Return whether all processes stop after ``step``, since one has received SIGTERM or Ctrl-C.

    JAX's distributed runtime takes the signal, from ``jax.distributed.initialize`` on, and agrees
    with the other processes on a step that none has passed. Each has to ask after every step.
    Alone, a process handles the signal itself.
    """
    return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step)


def ask_for_common_stop() -> None:
    """Let all processes stop after a common step, as if this one had received SIGTERM."""
    signal.raise_signal(signal.SIGTERM)


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
        first = [*str(error).splitlines(), ""][0]
        raise LostProcessError(
            f"Process {jax.process_index()} cannot reach the others; one may have ended: see what "
            "it printed last. The same command, without --restart and in all processes, resumes "
            f"from the newest checkpoint. ({first.rpartition(_DISPATCHING)[2]})"
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
