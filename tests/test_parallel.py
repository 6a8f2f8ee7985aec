"""Any number of devices and processes computes the same five steps.

The state compared is all of it: parameters, singular vectors, BatchNorm's statistics, the
optimiser's moments and the averages. Devices differ only in the order in which float32 sums are
taken; five steps amplify that to at most 2e-4 of a leaf's largest value. The classifier is trained
by SGD: BatchNorm makes the gradient of some biases zero, and Adam would divide rounding by itself.
"""

import dataclasses
import functools
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import rest_slow

from train.__main__ import cpu_devices, main
from train.configs import DENSITY
from train.data import Dataset
from train.density import Density
from train.parallel import (
    AXIS,
    Devices,
    cpu_devices_for,
    devices_for_determinants,
    fuse_loops_on_cpu,
)

WORKER = Path(__file__).with_name("parallel_worker.py")
TOLERANCE = 2e-4
FUSE_LOOPS = "--xla_backend_extra_options=xla_cpu_use_multi_output_fusion=true"


def start(num_devices, *arguments, flags=None):
    flags = os.environ["XLA_FLAGS"] if flags is None else flags
    flags = f"{flags} --xla_force_host_platform_device_count={num_devices}"
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(WORKER.parents[1])}
    command = [sys.executable, str(WORKER), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def finish(process):
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def of_one_process(program, folder):
    finish(start(8, program, folder / "one", "pmap:1", "pmap:8"))


def of_shard_map(program, folder):
    finish(start(8, program, folder / "one", "shard_map:8"))


def compiled_as_programs_are(program, folder):
    finish(start(2, program, folder / "programs", "pmap:2", flags=FUSE_LOOPS))


def of_two_processes(program, folder):
    coordinator = f"localhost:{free_port()}"
    ends = [(program, folder / "two", "pmap:8", "--process", i, 2, coordinator) for i in range(2)]
    for process in [start(4, *arguments) for arguments in ends]:
        finish(process)


@pytest.fixture(scope="module")
def five_steps(tmp_path_factory):
    """Of a program's processes that a function above starts: what they leave, by variant.

    Started when first asked for.
    """

    @functools.cache
    def results(processes, program):
        folder = tmp_path_factory.mktemp("five_steps")
        processes(program, folder)
        return {path.stem: dict(np.load(path)) for path in folder.glob("*.npz")}

    return results


@pytest.mark.parametrize("program", rest_slow(["density", "classification"], "density"))
@pytest.mark.parametrize(
    ("processes", "variant"),
    [
        (of_one_process, "one-pmap-8"),
        pytest.param(of_shard_map, "one-shard_map-8", marks=pytest.mark.slow),
        pytest.param(of_two_processes, "two-pmap-8", marks=pytest.mark.slow),
        pytest.param(compiled_as_programs_are, "programs-pmap-2", marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_same_state_and_losses(five_steps, processes, variant, program):
    reference = five_steps(of_one_process, program)[f"one-pmap-1-{program}"]
    other = five_steps(processes, program)[f"{variant}-{program}"]
    assert reference.keys() == other.keys() and len(reference) > 20
    assert np.ptp(reference["losses"]) > 0.0
    for name, expected in reference.items():
        scale = max(np.abs(expected).max(), 1e-3)
        np.testing.assert_allclose(
            other[name], expected, rtol=0, atol=TOLERANCE * scale, err_msg=name
        )


def test_a_batch_that_devices_cannot_share_is_refused():
    with pytest.raises(ValueError, match="multiple of the number of devices, 2; got 5"):
        Devices("pmap", 5, jax.devices()[:1] * 2)


@pytest.mark.parametrize(
    ("batch_size", "cores", "expected"),
    [(128, 2, 2), (128, 6, 4), (100, 8, 5), (16, 8, 4), (7, 2, 1), (3, 8, 1), (128, 64, 8)],
)
def test_a_cpu_acts_as_devices_that_share_a_batch_and_see_four_examples(
    batch_size, cores, expected
):
    assert cpu_devices_for(batch_size, cores) == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({}, 2), ({"cpu_devices": 1}, 1), ({"cpu_devices": 5}, 5), ({"distributed": True}, 1)],
)
def test_a_program_asks_for_a_device_a_core_unless_told(monkeypatch, changes, expected):
    monkeypatch.setattr("train.parallel._cores", lambda: 2)
    config = dataclasses.replace(DENSITY["digits"], **changes)
    assert cpu_devices(config) == expected


@pytest.mark.parametrize(("dim", "distributed"), [(2, True), (3, False)])
def test_a_run_with_exact_determinants_takes_the_devices_that_can(monkeypatch, dim, distributed):
    found = exact_run(monkeypatch, dim, distributed).devices()
    assert found is None if distributed else len(found) == 1


def test_exact_determinants_on_several_devices_of_a_process_are_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"3 dimensions.*got 2: pass --cpu-devices 1"):
        exact_run(monkeypatch, 3, distributed=True).devices()


def exact_run(monkeypatch, dim, distributed):
    """A task on two CPU devices."""
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1] * 2)
    monkeypatch.setattr(jax, "local_device_count", lambda: 2)
    changes = {"train_estimator": "exact", "distributed": distributed}
    config = dataclasses.replace(DENSITY["checkerboard"], **changes)
    points = np.zeros((4, dim), np.float32)
    return Density(config, Dataset("points", points, points, points))


def test_determinants_that_need_lapack_are_left_to_one_device(monkeypatch):
    """On two, test_likelihood's of 48×48 matrices would wait for ever."""
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1] * 2)
    assert len(devices_for_determinants(2)) == 2
    assert len(devices_for_determinants(3)) == 1


@pytest.mark.parametrize(("flags", "expected"), [("", cpu_devices_for(8)), ("=3", 3)])
def test_a_cpu_acts_as_several_devices_unless_the_environment_says_how_many(flags, expected):
    code = (
        "from train.parallel import use_cpu_devices; use_cpu_devices(2); "
        "import jax; print(jax.device_count()); use_cpu_devices(1)"
    )
    flags = f"--xla_force_host_platform_device_count{flags}" if flags else ""
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(WORKER.parents[1])}
    out = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert int(out.stdout) == expected


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", FUSE_LOOPS),
        ("--xla_dump_to=here", f"--xla_dump_to=here {FUSE_LOOPS}"),
        ("--xla_backend_extra_options=xla_a=b", "--xla_backend_extra_options=xla_a=b"),
        ("a_file_of_flags", "a_file_of_flags"),
        (FUSE_LOOPS, FUSE_LOOPS),
    ],
)
def test_loops_are_fused_unless_the_environment_says_what_backends_are_to_do(
    monkeypatch, flags, expected
):
    monkeypatch.setenv("XLA_FLAGS", flags)
    fuse_loops_on_cpu()
    assert os.environ["XLA_FLAGS"] == expected


def loops_after_a_program_started(*arguments, flags=""):
    """Of a sine and a cosine of the same numbers, which one loop can make."""
    code = (
        f"from train.__main__ import main; assert main({arguments}) == 2; "
        "import jax; f = jax.jit(lambda x: (jax.numpy.sin(x), jax.numpy.cos(x))); "
        "print(f.lower(jax.numpy.ones(4096)).compile().as_text().count(' fusion('))"
    )
    changes = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(WORKER.parents[1])}
    out = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | changes,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return int(out.stdout)


@pytest.mark.parametrize(
    ("arguments", "fused"),
    [(("density", "--dataset", "none.npz"), True), (("sample", "--workdir", "none"), False)],
)
def test_programs_that_train_ask_for_fused_loops(monkeypatch, arguments, fused):
    monkeypatch.setenv("XLA_FLAGS", "")
    assert main(arguments) == 2
    assert os.environ["XLA_FLAGS"] == (FUSE_LOOPS if fused else "")


@pytest.mark.slow
def test_programs_that_train_fuse_loops():
    train = ("density", "--dataset", "none.npz")
    asis = "--xla_backend_extra_options=xla_none=true"
    unfused = loops_after_a_program_started(*train, flags=asis)
    if unfused < 2:
        pytest.skip("this XLA fuses loops by itself")
    assert loops_after_a_program_started(*train) < unfused
    assert loops_after_a_program_started("sample", "--workdir", "none") == unfused


@pytest.mark.parametrize("parallel", ["pmap", "shard_map"])
def test_a_step_is_traced_once(parallel):
    devices, traced = Devices(parallel, 4, jax.devices()[:2]), []

    def step(state, batch):
        traced.append(batch.shape)
        return state + jax.lax.pmean(batch.sum(), AXIS), {"mean": batch.mean()}

    mapped, state = devices.map(step), devices.replicate(np.float32(1.0))
    for _ in range(3):
        state, _ = mapped(state, devices.split(np.arange(4, dtype=np.float32)))
    assert devices.one(state) == 1.0 + 3 * 3.0
    assert traced == [(2,)]
