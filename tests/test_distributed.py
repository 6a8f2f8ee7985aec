"""A whole program in two processes, each with a workdir of its own.

Two processes take half a minute. What each does alone is tested in one that takes itself for
another than the first.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from test_parallel import finish, free_port

import train.checkpoints
import train.metrics
import train.parallel
import train.training
from train.configs import DENSITY
from train.parallel import on_primary, silent_unless_primary
from train.programs import make_task
from train.workdir import WorkdirError

WORKER = Path(__file__).with_name("distributed_worker.py")


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What two processes saw, and the folder with their workdirs."""
    folder, coordinator = tmp_path_factory.mktemp("distributed"), f"localhost:{free_port()}"
    environment = os.environ | {"PYTHONPATH": str(WORKER.parents[1])}
    started = []
    for i in range(2):
        places = folder / f"run{i}", folder / f"seen{i}"
        command = [sys.executable, WORKER, *places, str(i), "2", coordinator]
        started.append(
            subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        )
    for process in started:
        finish(process)
    return folder, [json.loads((folder / f"seen{i}.json").read_text()) for i in range(2)]


@pytest.mark.slow
def test_the_first_process_writes_and_prints_alone(processes):
    folder, (first, second) = processes
    report = json.loads((folder / "run0" / "report.json").read_text())
    assert report["num_devices"] == 2 * jax.device_count()
    assert "bits/dim" in first["first"]["printed"] and not second["first"]["printed"]
    assert not (folder / "run1").exists()


@pytest.mark.slow
def test_all_go_on_from_the_first_ones_checkpoint(processes):
    _, (first, _) = processes
    assert "Resuming from step 2." in first["resumed"]["printed"]
    assert first["resumed"]["hash"] == first["first"]["hash"] is not None


@pytest.mark.slow
def test_what_the_first_refuses_all_refuse(processes):
    for seen in processes[1]:
        assert "seed: 0 there, 1 here" in seen["refused"]["error"]


@pytest.fixture
def another_process(monkeypatch):
    """This process is not the first."""
    for module in (train.parallel, train.training, train.metrics, train.checkpoints):
        monkeypatch.setattr(module, "is_primary", lambda: False)


@pytest.mark.usefixtures("another_process")
def test_a_process_that_is_not_the_first_trains_without_a_trace(tmp_path, capsys):
    small = {"depths": (1,), "features": (4,), "steps": 2, "batch_size": 8, "checkpoint_every": 1}
    config = dataclasses.replace(
        DENSITY["moons"].smoke_variant(), workdir=tmp_path / "run", max_examples=32, **small
    )
    with silent_unless_primary():
        assert train.training.run(make_task(config)) == {}
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("another_process")
def test_a_process_that_is_not_the_first_raises_what_the_first_refuses(monkeypatch):
    monkeypatch.setattr(train.parallel, "broadcast_text", lambda text: text or "a run is there")
    with pytest.raises(WorkdirError, match="a run is there"):
        on_primary(lambda: pytest.fail("the first alone does this"), WorkdirError)
