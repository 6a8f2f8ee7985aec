"""Two processes of one program: SIGTERM to one, the death of one; other devices that resume."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import jax
import pytest
from finished_runs import MOONS, finished_run
from test_parallel import free_port

import train.failures
import train.training
from train.__main__ import main
from train.density import Density
from train.failures import leaving_others
from train.processes import (
    LostProcessError,
    reached_common_stop,
    say_who_is_here,
    telling_of_lost_processes,
    with_num_devices,
    without_num_devices,
)

ROOT = Path(__file__).parents[1]
SETTINGS = ["--steps", "100000", "--depths", "1", "--features", "4", "--batch-size", "8"]
SETTINGS += ["--num-samples", "4", "--checkpoint-every", "100000", "--validate-every", "100000"]
LIMIT = 300

#: ``python -m train``, with an error in the middle of training.
FAILING = """
import runpy
import train.training
def fail(step):
    if step == 20:
        raise RuntimeError("a disk is gone")
    return ask(step)
ask, train.training.reached_common_stop = train.training.reached_common_stop, fail
runpy.run_module("train", run_name="__main__", alter_sys=True)
"""


class Pair:
    """A program in two processes that share a workdir."""

    def __init__(self, workdir, started=(["-m", "train"], ["-m", "train"])):
        self.workdir, coordinator = workdir, f"localhost:{free_port()}"
        command = ["density", "--dataset", "moons", *SETTINGS, "--workdir", str(workdir)]
        command += ["--distributed", "--coordinator", coordinator, "--num-processes", "2"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        self.processes = [
            subprocess.Popen(
                [sys.executable, *started[i], *command, "--process-id", str(i)],
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for i in range(2)
        ]

    def wait_for_steps(self):
        """Wait until it has logged a training step."""
        until, log = time.monotonic() + LIMIT, self.workdir / "metrics.jsonl"
        while not (log.exists() and '"loss"' in log.read_text()):
            assert time.monotonic() < until
            assert all(process.poll() is None for process in self.processes)
            time.sleep(0.2)

    def ends(self):
        """What each printed to stderr, once all have ended."""
        return [process.communicate(timeout=LIMIT)[1] for process in self.processes]

    def kill(self):
        for process in self.processes:
            process.kill()
            process.communicate()


@pytest.fixture
def pair(tmp_path):
    started = Pair(tmp_path / "run")
    yield started
    started.kill()


@pytest.mark.slow
@pytest.mark.parametrize("told_by", [signal.SIGTERM, signal.SIGINT])
def test_one_is_told_to_stop_and_all_save_and_stop_together(pair, told_by):
    pair.wait_for_steps()
    pair.processes[1].send_signal(told_by)
    told = pair.ends()
    assert [process.returncode for process in pair.processes] == [128 + signal.SIGTERM] * 2
    (step,) = (int(path.name) for path in (pair.workdir / "checkpoints").iterdir())
    for i, text in enumerate(told):
        here = jax.device_count()  # as XLA_FLAGS say to all
        assert f"Process {i} of 2 on " in text and f"{here} of {2 * here} devices" in text
        assert f"Stopped after step {step} of 100000, which is saved." in text


@pytest.mark.slow
def test_one_dies_and_the_other_ends_with_a_message_within_a_minute(pair):
    pair.wait_for_steps()
    started = time.monotonic()
    pair.processes[0].kill()
    text = pair.processes[1].communicate(timeout=LIMIT)[1]
    assert time.monotonic() - started < 60.0
    assert pair.processes[1].returncode not in (0, None)
    assert "cannot reach the others" in text or "another task died" in text


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_one_fails_and_the_other_ends_with_a_message_within_a_minute(tmp_path, failing):
    """At its 20th step, of which the other knows nothing."""
    started = [["-m", "train"], ["-m", "train"]]
    started[failing] = ["-c", FAILING]
    pair = Pair(tmp_path / "run", started)
    try:
        pair.wait_for_steps()
        said = pair.processes[failing].communicate(timeout=LIMIT)[1]
        since = time.monotonic()
        text = pair.processes[1 - failing].communicate(timeout=LIMIT)[1]
        assert time.monotonic() - since < 50.0
        assert "a disk is gone" in said and pair.processes[failing].returncode == 1
        assert pair.processes[1 - failing].returncode not in (0, None)
        assert "cannot reach the others" in text or "another task died" in text
    finally:
        pair.kill()


def test_a_run_goes_on_with_other_devices_and_says_so(tmp_path_factory, monkeypatch, capsys):
    workdir = finished_run(tmp_path_factory, "moons")
    before = json.loads((workdir / "report.json").read_text())
    assert before["num_devices"] == jax.device_count() == 2
    assert "The run had" not in capsys.readouterr().out
    monkeypatch.setattr(Density, "devices", lambda _: jax.devices()[:1])
    assert main([*MOONS, "--workdir", str(workdir)]) == 0
    assert "The run had 2 devices, and has 1 now" in capsys.readouterr().out
    after = json.loads((workdir / "report.json").read_text())
    assert after["parameters_sha256"] == before["parameters_sha256"]


def test_what_a_checkpoint_holds_of_the_devices_is_not_the_iterators(capsys):
    state = {"next_index": 3}
    assert without_num_devices(with_num_devices(state, 4), 4) == state
    assert without_num_devices(state, 4) == state  # of an earlier version
    assert not capsys.readouterr().out
    assert without_num_devices(with_num_devices(state, 4), 8) == state
    assert "4 devices, and has 8 now" in capsys.readouterr().out


def test_a_process_says_who_it_is(capsys):
    say_who_is_here()
    assert "Process 0 of 1 on " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tasks", "devices", "idle"), [("1(x4)", 1, 7), ("1", 8, 0), ("8(x4)", 1, 0), ("2", 1, 6)]
)
def test_gpus_that_no_task_of_slurm_sees_are_told(monkeypatch, capsys, tasks, devices, idle):
    gpu = types.SimpleNamespace(platform="gpu", device_kind="GPU")
    monkeypatch.setattr(jax, "local_devices", lambda: [gpu] * devices)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", tasks)
    say_who_is_here()
    told = capsys.readouterr().err
    assert (f"warning: {idle} of this node's GPUs" in told) == ("warning" in told) == (idle > 0)


def test_the_variable_of_the_guide_gives_a_task_of_slurm_all_gpus():
    """As JAX joins a job of one task; without it the task has one GPU, which JAX may change."""
    slurm = {
        **{"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "1"},
        **{"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "PYTHONPATH": str(ROOT)},
        **{"JAX_COORDINATOR_PORT": str(free_port()), "JAX_PLATFORMS": "cpu"},
    }
    guide = (ROOT / "docs" / "SCALING.md").read_text(encoding="utf-8")
    (listed,) = re.findall(r"^export JAX_LOCAL_DEVICE_IDS=(\S+)$", guide, re.MULTILINE)
    seen = subprocess.run(
        [
            *(sys.executable, "-c"),
            "import jax; from train.processes import start_processes as start\n"
            "start(None, None, None, limit=60); print(jax.config.read('jax_cuda_visible_devices'))",
        ],
        env={**os.environ, **slurm, "JAX_LOCAL_DEVICE_IDS": listed},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout
    assert seen.split() == ["0,1,2,3,4,5,6,7"]


def test_what_jax_raises_of_a_lost_process_is_told_in_a_sentence(monkeypatch):
    told = f"INTERNAL: {2 * 'Error dispatching computation: '}Connection closed by peer\nand more"
    error = jax.errors.JaxRuntimeError(told)
    with pytest.raises(jax.errors.JaxRuntimeError), telling_of_lost_processes():
        raise error  # alone, it is something else
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    lost = pytest.raises(LostProcessError, match=r"resumes .*\(Connection closed by peer\)")
    with lost, telling_of_lost_processes():
        raise error
    full = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
    with pytest.raises(jax.errors.JaxRuntimeError, match="memory"), telling_of_lost_processes():
        raise full


def test_alone_there_is_no_common_stop():
    assert not reached_common_stop(1)


@pytest.fixture
def pythons_ctrl_c():
    """Ctrl-C raises, as in a terminal; a shell lets its background jobs ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("pythons_ctrl_c")
def test_ctrl_c_on_one_of_several_asks_all_to_stop_and_a_second_one_stops_at_once(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    told = []
    monkeypatch.setattr(train.training, "ask_for_common_stop", lambda: told.append("all"))
    with train.training._stop_on_interrupt() as interrupted:
        signal.raise_signal(signal.SIGINT)
        assert told == ["all"] and not interrupted  # training goes on to the common step
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_failed_process_waits_a_while_for_the_others_and_ends_with_its_own_status(
    monkeypatch, capsys
):
    ended, for_ever = [], threading.Event()
    monkeypatch.setattr(train.failures, "_has_others", lambda: True)
    monkeypatch.setattr(jax.distributed, "shutdown", for_ever.wait)
    monkeypatch.setattr(os, "_exit", ended.append)
    with leaving_others(patience=0.01):
        sys.exit(2)
    with leaving_others(patience=0.01):
        raise RuntimeError("a disk is gone")
    for_ever.set()
    assert ended == [2, 1] and "a disk is gone" in capsys.readouterr().err


@pytest.mark.parametrize("status", [0, 128 + signal.SIGTERM])
def test_a_process_that_ends_with_the_others_leaves_as_python_does(monkeypatch, status):
    monkeypatch.setattr(train.failures, "_has_others", lambda: True)
    monkeypatch.setattr(os, "_exit", lambda _: pytest.fail("not at once"))
    with pytest.raises(SystemExit), leaving_others():
        sys.exit(status)


def test_alone_a_failure_is_pythons():
    with pytest.raises(RuntimeError), leaving_others():
        raise RuntimeError
