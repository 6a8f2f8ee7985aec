"""The one place that knows devices: it maps a step, written for one device, over all of them.

The step averages over the axis :data:`AXIS` itself. State is replicated, batches are split: device
``i`` of all devices sees the ``i``-th part of the global batch.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from iresnet_jax.logdet import DETERMINANTS_BY_FORMULA

AXIS = "devices"
_MOST_CPU_DEVICES = 8
_FUSE_LOOPS = "--xla_backend_extra_options=xla_cpu_use_multi_output_fusion=true"

Parallel = Literal["pmap", "shard_map"]
Result = TypeVar("Result")
StepFunction = Callable[[Any, Any], tuple[Any, Any]]


class Devices:
    """All devices of all processes, and how a step is mapped over them.

    What is mapped has a leading axis of devices: arrays [local devices, ...] in each process.

    Attributes:
      count: of devices.

    Args:
      parallel: "pmap", or "shard_map" under ``jit``.
      batch_size: of the global batch.
      devices: which; all by default.

    Raises:
      ValueError: for a batch that the devices cannot share equally.
    """

    def __init__(
        self, parallel: Parallel, batch_size: int, devices: Sequence[jax.Device] | None = None
    ):
        # By process, as the batch is: make_mesh might choose another order.
        found = jax.devices() if devices is None else devices
        self._devices = sorted(found, key=lambda device: (device.process_index, device.id))
        self.count = len(self._devices)
        if batch_size % self.count:
            raise ValueError(
                f"batch_size must be a multiple of the number of devices, {self.count}; "
                f"got {batch_size}."
            )
        here = jax.process_index()
        self._local_count = sum(device.process_index == here for device in self._devices)
        self._pmapped = parallel == "pmap"
        self._mesh = Mesh(np.array(self._devices), (AXIS,), axis_types=(AxisType.Auto,))

    def map(self, step: StepFunction) -> Callable[[Any, Any], Any]:
        """``step(state, batch) -> (state, metrics)`` on all devices; it donates the state.

        It is compiled for its first inputs; all others are to have their shapes.
        """
        # jax.pmap looks at all inputs of every call; what it compiled does not, and can be called
        # instead, but in one process only.
        alone = jax.process_count() == 1
        # Devices of one CPU share its threads: steps in flight can fill them and wait for ever.
        crowded = self._devices[0].platform == "cpu" and self._local_count > 1
        mapped: Any = None

        def call(*inputs):
            nonlocal mapped
            if mapped is None:
                mapped = self.lower(step, *inputs).compile() if alone else self._over(step)
            return jax.block_until_ready(mapped(*inputs)) if crowded else mapped(*inputs)

        return call

    def lower(self, step: StepFunction, *inputs: Any) -> Any:
        """The mapped step traced for these inputs, to be compiled."""
        return self._over(step).lower(*inputs)

    def _over(self, step: StepFunction) -> Any:
        if self._pmapped:
            return jax.pmap(step, AXIS, devices=self._devices, donate_argnums=0)

        def of_one(*inputs):
            out = step(*jax.tree.map(lambda leaf: leaf[0], inputs))
            return jax.tree.map(lambda leaf: leaf[None], out)

        split = PartitionSpec(AXIS)
        # Under check_vma, gradients of replicated parameters come out summed over the devices.
        mapped = jax.shard_map(
            of_one, mesh=self._mesh, in_specs=split, out_specs=split, check_vma=False
        )
        return jax.jit(mapped, donate_argnums=0)

    def replicate(self, tree: Any) -> Any:
        """A copy on every device."""
        count = self._local_count
        return self._placed(lambda x: np.broadcast_to(np.asarray(x), (count, *np.shape(x))), tree)

    def split(self, batch: Any) -> Any:
        """This process's part of a global batch, split over its devices."""
        return self._placed(lambda x: x.reshape(self._local_count, -1, *x.shape[1:]), batch)

    def _placed(self, shape: Callable[[Any], Any], tree: Any) -> Any:
        """jax.pmap takes this process's arrays, ``jit`` global ones."""
        tree = jax.tree.map(shape, tree)
        if self._pmapped:
            return tree
        split = NamedSharding(self._mesh, PartitionSpec(AXIS))
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(split, x), tree)

    def one(self, tree: Any) -> Any:
        """The copy of a replicated tree that lies on this process's first device."""

        def first(leaf):
            return (leaf.addressable_data(0) if isinstance(leaf, jax.Array) else leaf)[0]

        return jax.tree.map(first, tree)


def global_indices(local_batch: int) -> jax.Array:
    """Inside a mapped step: where this device's examples stand in the global batch."""
    return jax.lax.axis_index(AXIS) * local_batch + jnp.arange(local_batch)


def cpu_devices_for(batch_size: int, cores: int | None = None) -> int:
    """The most devices that a CPU can act as, each with a core and an equal part of a batch.

    XLA runs many convolutions on one core, and every device's at the same time. Parts smaller than
    four examples are not worth a device, and every device keeps a copy of the state.
    """
    most = min(cores or _cores(), max(batch_size // 4, 1), _MOST_CPU_DEVICES)
    return next(count for count in range(most, 0, -1) if batch_size % count == 0)


def _cores() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def use_cpu_devices(count: int) -> None:
    """Let a CPU act as ``count`` devices, or as many as it has cores where those are fewer.

    Without effect where XLA_FLAGS says how many, or once JAX has looked for devices.
    """
    count = min(count, _cores())
    if count > 1 and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", count)


def fuse_loops_on_cpu() -> None:
    """Turn on XLA's multi-output fusion on a CPU: a loop may have several results.

    There are fewer loops to compile in a training step then, and some steps run a twentieth faster.
    An inverse that is not differentiated takes longer (1.7 times in the benchmarks' network D2): an
    activation is fused into the laying out of shifted images, and computed anew for each. So it is
    for programs that train.
    By the environment, since no option of a single compilation says so: call it before JAX looks
    for devices. An ``--xla_backend_extra_options`` in XLA_FLAGS stands, and a file that it names.
    """
    flags = os.environ.get("XLA_FLAGS", "").strip()
    if "xla_backend_extra_options" not in flags and (not flags or flags.startswith("-")):
        os.environ["XLA_FLAGS"] = f"{flags} {_FUSE_LOOPS}".strip()


def start_processes(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> None:
    """Join the other processes of a run; what is None is read from the cluster's environment.

    Raises:
      ValueError: if the processes cannot be found, or do not answer.
    """
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"--distributed: the processes did not come together ({error}). Pass --coordinator "
            "host:port, --num-processes and --process-id, or start under SLURM, on a TPU pod or "
            "under Kubernetes."
        ) from error


def is_primary() -> bool:
    """Whether this process writes: files, checkpoints, the terminal."""
    return jax.process_index() == 0


@contextlib.contextmanager
def silent_unless_primary() -> Iterator[None]:
    """Within it, only the first process prints."""
    if is_primary():
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def broadcast(tree: Any) -> Any:
    """The first process's arrays, on every process."""
    return multihost_utils.broadcast_one_to_all(tree) if jax.process_count() > 1 else tree


def broadcast_text(text: str, size: int = 1 << 16) -> str:
    """The first process's ``text``, of at most ``size`` bytes, on every process."""
    data = np.frombuffer(text.encode().ljust(size, b"\0"), np.uint8)
    return bytes(np.asarray(broadcast(data))).rstrip(b"\0").decode()


def on_primary(function: Callable[[], Result], kind: type[Exception]) -> Result | None:
    """What ``function`` returns in the first process, which alone calls it; None in the others.

    Raises:
      kind: in every process, where the first one raises it: none is left waiting.
    """
    result, refusal = None, ""
    if is_primary():
        try:
            result = function()
        except kind as error:
            refusal = str(error)
    refusal = broadcast_text(refusal)
    if refusal:
        raise kind(refusal)
    return result


def wait_for_all(place: str) -> None:
    """Return once every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(place)


def devices_for_determinants(dim: int) -> list[jax.Device]:
    """This process's devices; of a CPU that acts as several, the first alone, above two dimensions.

    There LAPACK decomposes batches of [dim, dim] matrices in XLA's threads, and waits in one of
    them; on as many devices as there are threads, all wait for ever (seen in jax 0.10.2).
    """
    devices = jax.local_devices()
    decomposed = dim > DETERMINANTS_BY_FORMULA
    return devices[:1] if devices[0].platform == "cpu" and decomposed else devices


class LocalDevices:
    """This process's devices, or some, for evaluation: batches are split, networks copied."""

    def __init__(self, devices: Sequence[jax.Device] | None = None) -> None:
        devices = jax.local_devices() if devices is None else devices
        mesh = jax.sharding.Mesh(np.array(devices), (AXIS,))
        self.count = len(devices)
        self._everywhere = NamedSharding(mesh, PartitionSpec())
        self._split = NamedSharding(mesh, PartitionSpec(AXIS))

    def replicate(self, tree: Any) -> Any:
        """A copy on each of them."""
        return jax.device_put(tree, self._everywhere)

    def split(self, x: Any) -> Any:
        """Arrays split along their first axis, whose length is a multiple of the count."""
        return jax.device_put(x, self._split)
