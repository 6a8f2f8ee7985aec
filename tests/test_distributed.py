"""A whole program in two processes, each with a workdir of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from test_parallel import finish, free_port

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


def test_the_first_process_writes_and_prints_alone(processes):
    folder, (first, second) = processes
    report = json.loads((folder / "run0" / "report.json").read_text())
    assert report["num_devices"] == 2 * jax.device_count()
    assert "bits/dim" in first["first"]["printed"] and not second["first"]["printed"]
    assert not (folder / "run1").exists()


def test_all_go_on_from_the_first_ones_checkpoint(processes):
    _, (first, _) = processes
    assert "Resuming from step 2." in first["resumed"]["printed"]
    assert first["resumed"]["hash"] == first["first"]["hash"] is not None


def test_what_the_first_refuses_all_refuse(processes):
    for seen in processes[1]:
        assert "seed: 0 there, 1 here" in seen["refused"]["error"]
