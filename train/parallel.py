"""Devices and processes: maps a step, written for one device, over all of them.

The step itself averages over the axis :data:`AXIS`. State is replicated, batches are split: device
``i`` sees the ``i``-th part of the global batch.
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
#: The axis of examples, of results [examples, ...] and [solves, examples].
PER_EXAMPLE, PER_SOLVE_AND_EXAMPLE = PartitionSpec(AXIS), PartitionSpec(None, AXIS)
_MOST_CPU_DEVICES = 8
_FUSE_LOOPS = "--xla_backend_extra_options=xla_cpu_use_multi_output_fusion=true"

Parallel = Literal["pmap", "shard_map"]
Result = TypeVar("Result")
StepFunction = Callable[[Any, Any], tuple[Any, Any]]


class Devices:
    """All devices of all processes; maps steps over them by pmap or shard_map.

    Mapped arrays have a leading axis of devices, [local devices, ...] in each process.

    Raises:
      ValueError: for a batch that does not split equally over the devices.
    """

    def __init__(
        self, parallel: Parallel, batch_size: int, devices: Sequence[jax.Device] | None = None
    ):
        # Ordered by process, like the batch: make_mesh might choose another order.
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
        """Map ``step(state, batch) -> (state, metrics)`` over all devices; it donates the state.

        It is compiled for its first inputs; all later ones must have the same shapes.
        """
        # jax.pmap checks all inputs of every call. Its compiled program does not, and can be called
        # directly, in one process only.
        alone = jax.process_count() == 1
        # Devices of one CPU share its threads: steps in flight can fill them and deadlock.
        crowded = self._devices[0].platform == "cpu" and self._local_count > 1
        mapped: Any = None

        def call(*inputs):
            nonlocal mapped
            if mapped is None:
                mapped = self.lower(step, *inputs).compile() if alone else self._over(step)
            return jax.block_until_ready(mapped(*inputs)) if crowded else mapped(*inputs)

        return call

    def lower(self, step: StepFunction, *inputs: Any) -> Any:
        """Trace the mapped step for these inputs, to be compiled."""
        return self._over(step).lower(*inputs)

    def _over(self, step: StepFunction) -> Any:
        if self._pmapped:
            return jax.pmap(step, AXIS, devices=self._devices, donate_argnums=0)

        def of_one(*inputs):
            out = step(*jax.tree.map(lambda leaf: leaf[0], inputs))
            return jax.tree.map(lambda leaf: leaf[None], out)

        split = PartitionSpec(AXIS)
        # check_vma finds results that should be equal and are not: none here, all are split. It
        # would refuse the library's loops, whose sums start from zeros that belong to no device.
        mapped = jax.shard_map(
            of_one, mesh=self._mesh, in_specs=split, out_specs=split, check_vma=False
        )
        return jax.jit(mapped, donate_argnums=0)

    def replicate(self, tree: Any) -> Any:
        """Copy to every device."""
        count = self._local_count
        return self._placed(lambda x: np.broadcast_to(np.asarray(x), (count, *np.shape(x))), tree)

    def split(self, batch: Any) -> Any:
        """Split this process's part of a global batch over its devices."""
        return self._placed(lambda x: x.reshape(self._local_count, -1, *x.shape[1:]), batch)

    def _placed(self, shape: Callable[[Any], Any], tree: Any) -> Any:
        """Place arrays: jax.pmap takes this process's own, ``jit`` global ones."""
        tree = jax.tree.map(shape, tree)
        if self._pmapped:
            return tree
        split = NamedSharding(self._mesh, PartitionSpec(AXIS))
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(split, x), tree)

    def shapes(self, state: Any, batch: Any) -> tuple[Any, Any]:
        """Return the shapes of a replicated state and of a split global batch, for :meth:`lower`.

        With these, a step compiles for devices that are not at hand.
        """
        split, count = NamedSharding(self._mesh, PartitionSpec(AXIS)), self.count

        def parted(state, batch):
            copies = jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *jnp.shape(x))), state)
            return copies, jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batch)

        copies, parts = jax.eval_shape(parted, state, batch)
        return shapes_placed(copies, split), shapes_placed(parts, split)

    def one(self, tree: Any) -> Any:
        """Return the copy of a replicated tree on this process's first device."""

        def first(leaf):
            return (leaf.addressable_data(0) if isinstance(leaf, jax.Array) else leaf)[0]

        return jax.tree.map(first, tree)


def global_indices(local_batch: int) -> jax.Array:
    """Return the indices of this device's examples in the global batch, in a mapped step."""
    return jax.lax.axis_index(AXIS) * local_batch + jnp.arange(local_batch)


def cpu_devices_for(batch_size: int, cores: int | None = None) -> int:
    """Choose how many devices to split a CPU into: each has a core and an equal part of a batch.

    XLA runs many convolutions on one core, but those of different devices in parallel. Parts
    smaller than four examples are not worth a device, since each keeps a copy of the state.
    """
    most = min(cores or _cores(), max(batch_size // 4, 1), _MOST_CPU_DEVICES)
    return next(count for count in range(most, 0, -1) if batch_size % count == 0)


def _cores() -> int:
    """Count the cores that this process may use."""
    known = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1


def use_cpu_devices(count: int) -> None:
    """Split a CPU into ``count`` devices, at most one per core.

    This has no effect where XLA_FLAGS sets the number, or after JAX has initialised its devices.
    """
    count = min(count, _cores())
    if count > 1 and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", count)


def fuse_loops_on_cpu() -> None:
    """Turn on XLA's multi-output fusion on a CPU, so that a loop may have several results.

    A training step then has fewer loops to compile, and some run a twentieth faster. An inverse
    that is not differentiated takes longer (1.7 times in the benchmarks' network D2), since an
    activation is recomputed for each shifted image. Use it in programs that train.
    XLA reads it from the environment: call this before JAX initialises its devices. An
    ``--xla_backend_extra_options`` in XLA_FLAGS takes precedence, as does a file of flags there.
    """
    flags = os.environ.get("XLA_FLAGS", "").strip()
    if "xla_backend_extra_options" not in flags and (not flags or flags.startswith("-")):
        os.environ["XLA_FLAGS"] = f"{flags} {_FUSE_LOOPS}".strip()


def check_devices() -> None:
    """Refuse a platform that JAX does not find here.

    Raises:
      ValueError: naming it.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        asked = os.environ.get("JAX_PLATFORMS") or "unset"
        told = f" ({[*str(error).splitlines(), ''][0]})" if str(error) else ""
        raise ValueError(
            f"JAX finds no device{told}: JAX_PLATFORMS is {asked}. Unset it, or install JAX for "
            "that platform."
        ) from error


def is_primary() -> bool:
    """Return whether this process writes files, checkpoints and to the terminal."""
    return jax.process_index() == 0


@contextlib.contextmanager
def silent_unless_primary() -> Iterator[None]:
    """Let only the first process print, within this context."""
    with contextlib.ExitStack() as stack:
        if not is_primary():
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        yield


def broadcast(tree: Any) -> Any:
    """Return the first process's arrays, in every process."""
    return multihost_utils.broadcast_one_to_all(tree) if jax.process_count() > 1 else tree


def broadcast_text(text: str, size: int = 1 << 16) -> str:
    """Return the first process's ``text``, at most ``size`` bytes, in every process."""
    data = np.frombuffer(text.encode().ljust(size, b"\0"), np.uint8)
    return bytes(np.asarray(broadcast(data))).rstrip(b"\0").decode()


def on_primary(function: Callable[[], Result], kind: type[Exception]) -> Result | None:
    """Call ``function`` in the first process only, and return its result; None in the others.

    Raises:
      kind: in every process, if the first raises it, so that none is left waiting.
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
    """Wait until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(place)


def devices_for_determinants(dim: int) -> list[jax.Device]:
    """Return this process's devices; above two dimensions, only the first device of a CPU.

    There LAPACK decomposes batches of [dim, dim] matrices in XLA's threads, and waits in one of
    them. With as many devices as threads, all wait for ever (seen in jax 0.10.2).
    """
    devices = jax.local_devices()
    decomposed = dim > DETERMINANTS_BY_FORMULA
    return devices[:1] if devices[0].platform == "cpu" and decomposed else devices


class LocalDevices:
    """This process's devices, or some of them, for evaluation: splits batches, copies networks.

    Those of the same devices are equal, so that they may be static arguments of ``jax.jit``.
    """

    def __init__(self, devices: Sequence[jax.Device] | None = None) -> None:
        devices = jax.local_devices() if devices is None else devices
        self.count = len(devices)
        self._mesh = Mesh(np.array(devices), (AXIS,))
        self._everywhere = NamedSharding(self._mesh, PartitionSpec())
        self._split = NamedSharding(self._mesh, PartitionSpec(AXIS))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LocalDevices) and self._mesh == other._mesh

    def __hash__(self) -> int:
        return hash(self._mesh)

    def map(
        self, function: Callable[[Any, Any], Result], out: Any = PER_EXAMPLE
    ) -> Callable[[Any, Any], Result]:
        """Map ``function(tree, batch)``, under ``jit``: each device runs it on its own part.

        Where ``jit`` alone splits a program, its loops ask all devices at each turn whether any of
        them goes on. Here, each ends when its own examples have.

        Args:
          function: of a replicated tree and split arrays.
          out: which axis of the results is of examples, :data:`PER_EXAMPLE` or
            :data:`PER_SOLVE_AND_EXAMPLE`; a prefix of the tree of results.
        """
        if self.count == 1:
            return function
        split = PartitionSpec(), PartitionSpec(AXIS)
        return jax.shard_map(
            function, mesh=self._mesh, in_specs=split, out_specs=out, check_vma=False
        )

    def replicate(self, tree: Any) -> Any:
        """Copy to each of them."""
        return jax.device_put(tree, self._everywhere)

    def split(self, x: Any) -> Any:
        """Split arrays along their first axis, whose length must be a multiple of the count."""
        return jax.device_put(x, self._split)

    def shapes(self, tree: Any, batch: Any) -> tuple[Any, Any]:
        """Return the shapes of a replicated tree and of split arrays, to lower what takes them."""
        return shapes_placed(tree, self._everywhere), shapes_placed(batch, self._split)


def shapes_placed(tree: Any, sharding: NamedSharding) -> Any:
    """Return the shapes and types of arrays, as placed by a sharding."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)
