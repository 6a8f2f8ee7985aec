"""Workdirs: whose they are, what is moved, who trains there, and what the system refuses."""

import dataclasses
import errno
import json
import os
import subprocess
import types
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from test_checkpoints import save, state

import train.__main__
from train import workdir as workdirs
from train.__main__ import main
from train.board import Board
from train.checkpoints import CheckpointError, Checkpoints, _cause
from train.configs import DENSITY
from train.data import load_dataset
from train.failures import reason
from train.identity import DATA, described, identity
from train.metrics import MetricsLog
from train.saved import load_run, read_config
from train.training import TrainingError, _Training
from train.workdir import WorkdirError, claimed_workdir, jsonable, prepare_workdir

_FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def config(tmp_path):
    return dataclasses.replace(DENSITY["moons"].smoke_variant(), workdir=tmp_path / "run")


def trained(config, data="a", *, told=True):
    """Make the workdir of a run with a checkpoint, which says whose it is if it is ``told``."""
    workdir = prepare_workdir(config, data)
    run = identity(described(config, data)) if told else None
    save(Checkpoints(workdir, run=run), {1: 0.0})
    return workdir


# Identity


def test_a_run_resumes_with_its_data_alone(config):
    workdir = trained(config)
    prepare_workdir(config, "a")
    prepare_workdir(config)  # unknown data are the same, and forget nothing
    assert json.loads((workdir / "config.json").read_text())[DATA] == "a"
    with pytest.raises(WorkdirError, match=r"data of 'moons' are others.*--restart"):
        prepare_workdir(config, "b")


def test_the_data_count_from_the_first_step_on(config):
    prepare_workdir(config, "a")
    with pytest.raises(WorkdirError, match="data of 'moons' are others"):
        prepare_workdir(config, "b")


def test_a_run_of_before_goes_on_with_a_warning(config, capsys):
    workdir = trained(config, None, told=False)
    assert DATA not in json.loads((workdir / "config.json").read_text())
    prepare_workdir(config, "a")
    assert "does not say which data it was trained on" in capsys.readouterr().err


def test_a_new_run_gets_no_warning(config, capsys):
    prepare_workdir(config)
    prepare_workdir(config, "a")
    assert not capsys.readouterr().err


def test_a_checkpoint_knows_its_run_without_the_config(config):
    (trained(config) / "config.json").unlink()
    for other in ({"seed": 1}, {"coeff": 0.5}):
        with pytest.raises(WorkdirError, match=r"checkpoint \(step 1\) of another run"):
            prepare_workdir(dataclasses.replace(config, **other), "a")
    with pytest.raises(WorkdirError, match="data of 'moons' are others"):
        prepare_workdir(config, "b")
    assert not (config.workdir / "config.json").exists()
    how = dataclasses.replace(config, remat=True, checkpoint_every=7, keep_checkpoints=5)
    assert (prepare_workdir(how, "a") / "config.json").exists()


def test_a_checkpoint_of_nobody_is_not_taken(config):
    (trained(config, told=False) / "config.json").unlink()
    with pytest.raises(WorkdirError, match=r"without their config\.json.*--restart"):
        prepare_workdir(config, "a")


def test_a_config_that_was_edited_is_not_believed(config):
    data = load_dataset("moons", max_examples=config.max_examples).fingerprint
    path = trained(config, data) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"coeff": 0.5}))
    with pytest.raises(WorkdirError, match="another run"):
        prepare_workdir(dataclasses.replace(config, coeff=0.5), data)
    with pytest.raises(WorkdirError, match=r"config\.json is not that of checkpoint 1 \(coeff"):
        load_run(config.workdir, "newest")


def test_a_saved_run_is_evaluated_on_its_data_alone(config):
    workdir = trained(config)
    with pytest.raises(WorkdirError, match=r"data of 'moons' are others.*was trained on"):
        load_run(workdir, "newest")
    with pytest.raises(WorkdirError, match="data of 'moons' are others"):
        load_run(workdir, "newest", max_test=5)


# --restart


@pytest.mark.parametrize("without", ["config.json", "checkpoints", ""])
def test_a_restart_always_starts_afresh(config, without):
    workdir = trained(config, told=False)
    (workdir / "mark").touch()
    if without:
        (workdir / without).rename(workdir.parent / "elsewhere")
    prepare_workdir(dataclasses.replace(config, restart=True, seed=1), "b")
    assert sorted(p.name for p in workdir.iterdir()) == [".run.lock", "config.json"]
    assert (workdir.with_name("run.1") / "mark").exists()


@pytest.mark.parametrize("content", ['{"name": "a project"}', "[1]", "{", '{"program": 3}'])
def test_what_is_no_run_is_neither_moved_nor_written_to(config, content):
    config.workdir.mkdir()
    (config.workdir / "config.json").write_text(content)
    for restart in (True, False):
        with pytest.raises(WorkdirError, match=r"config\.json is not of a run"):
            prepare_workdir(dataclasses.replace(config, restart=restart), "a")
    assert [p.name for p in config.workdir.parent.iterdir()] == ["run"]
    assert [p.name for p in config.workdir.iterdir()] == ["config.json"]


def test_the_folder_where_a_program_runs_is_not_moved(config, monkeypatch):
    inside = trained(config) / "checkpoints"
    monkeypatch.chdir(inside)
    with pytest.raises(WorkdirError, match="--restart would move"):
        prepare_workdir(dataclasses.replace(config, restart=True), "a")
    assert inside.exists()


# Locks


def test_one_process_trains_at_a_time(config):
    for restart in (False, True):
        again = dataclasses.replace(config, restart=restart)
        with claimed_workdir(config, described(config, "a")):
            (config.workdir / "mark").touch()
            with pytest.raises(WorkdirError, match=f"Process {os.getpid()} on .* trains in"):
                prepare_workdir(again, "a")
            assert (config.workdir / "mark").exists()
        prepare_workdir(config, "a")


# What the system refuses


def test_a_full_disk_is_told_with_its_file(config, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(*_FULL.args)

    with closing(MetricsLog(prepare_workdir(config), 0)) as log:
        monkeypatch.setattr(Path, "open", full)
        with pytest.raises(OSError) as refused:
            log.write(1, loss=1.0)
    assert str(log._path) in reason(refused.value)
    monkeypatch.setattr(train.__main__, "train", lambda config: log.write(1, loss=1.0))
    assert main(["density"]) == 2
    told = capsys.readouterr().err
    assert "metrics.jsonl: No space left on device. Free some space there" in told


def test_a_full_disk_ends_tensorboards_files_alone(tmp_path, capsys):
    def full():
        raise OSError(*_FULL.args)

    board, ended = Board(tmp_path, 1), Board(tmp_path / "ended", 1)
    events = board._events()
    events.flush = full
    board.close()
    assert f"Warning: {tmp_path} is not complete (No space left" in capsys.readouterr().err
    events.close()  # as tensorboardX does when Python ends
    ended._events()._worker.stop()
    for step in range(20):  # more than its queue takes
        ended.scalar("loss", 1.0, step)
    assert capsys.readouterr().err.count("its thread has ended") == 1
    ended.close()


def test_a_checkpoint_on_a_full_disk_is_told_in_a_sentence(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)

    def full(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: write failed\n [os_error_code='28']")

    monkeypatch.setattr(checkpoints._manager, "save", full)
    with pytest.raises(CheckpointError, match=r"step 1 was not saved: .*checkpoints: No space"):
        checkpoints.save(1, state(1), {}, 0.0)
    monkeypatch.setattr(checkpoints._manager, "wait_until_finished", full)
    with pytest.raises(CheckpointError, match="No space left"):
        checkpoints.close()
    assert "checkpoints: No space" in _cause(OSError(*_FULL.args), tmp_path / "checkpoints")


def test_a_save_is_read_back(tmp_path, monkeypatch):
    checkpoints, read = Checkpoints(tmp_path), Checkpoints.read
    monkeypatch.setattr(Checkpoints, "read", lambda *_: read(*_)._replace(state=state(2)))
    with pytest.raises(CheckpointError, match="step 1 is not what was saved"):
        checkpoints.save(1, state(1), {}, 0.0)
    checkpoints.close()


def test_a_score_that_is_nan_is_never_the_best(tmp_path):
    scores = {2: np.nan, 5: 3.0, 7: np.nan, 9: 5.0, 11: 4.0}
    for step, score in scores.items():  # each by a process of its own
        save(Checkpoints(tmp_path), {step: score})
    again = Checkpoints(tmp_path)
    assert again.steps() == [5, 9, 11] and again.best_step() == 5
    again.close()


def test_the_seconds_of_training_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state(1), {}, 0.0, 12.5)
    assert checkpoints.restore(state(0)).seconds == 12.5
    checkpoints.close()


@pytest.mark.parametrize(
    ("name", "message"),
    [("run[1]", r"contains \[, which"), ("x" * 300, "cannot be written: File name too long")],
)
def test_a_name_that_cannot_be_a_workdir_is_refused(config, name, message):
    with pytest.raises(WorkdirError, match=message):
        prepare_workdir(dataclasses.replace(config, workdir=config.workdir.with_name(name)))


@pytest.mark.parametrize("arguments", [["certify"], ["reproduce", "figure-1"]])
def test_a_workdir_that_is_a_file_is_refused(arguments, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main([*arguments, "--workdir", str(tmp_path / "file")]) == 2
    told = capsys.readouterr().err
    assert str(tmp_path / "file") in told and "Move the file" in told


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe", b"3", b"null", b"[]", b"[" * 100_000, b'{"program": 3}', b'{"program": "x"}'],
)
def test_a_config_that_is_none_is_refused_in_a_sentence(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(WorkdirError, match="cannot be read as the config of a run"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "wrong", [{"dataset": 3}, {"depths": "4"}, {"steps": 1.5}, {"remat": 1}, {"schedule": []}]
)
def test_a_setting_of_another_type_is_refused(wrong, tmp_path):
    content = jsonable(DENSITY["moons"]) | wrong
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(WorkdirError, match=f"{next(iter(wrong))} = "):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "line", [b'{"step": 3, "lo', b"\xff\xfe", b"[]", b"7", b'{"step": "x"}', b'{"step":1,"a":{}}']
)
def test_damaged_metrics_are_put_aside(line, tmp_path, capsys):
    path, good = tmp_path / "metrics.jsonl", b'{"step": 2, "loss": 1.5, "validation": "-inf"}\n'
    path.write_bytes(good + line)
    log = MetricsLog(tmp_path, 9)
    log.close()
    assert path.read_bytes() == good and log.series("loss")[1].tolist() == [1.5]
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == line + b"\n"
    assert "1 damaged lines were moved from" in capsys.readouterr().err


# Training


@pytest.mark.parametrize("name", ["loss", "gradient"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_neither_loss_nor_gradient_may_be_infinite(name, value, config):
    task = types.SimpleNamespace(config=config, loss_name="loss", shown_metrics=())
    with closing(MetricsLog(prepare_workdir(config), 0)) as log:
        loop = _Training(task, None, log, 0.0)
        loop._logged = 0, 0.0
        loop._log_metrics(1, {"loss": 1.0, "gradient": 2.0})
        with pytest.raises(TrainingError, match=rf"{name} is {value} at step 2\."):
            loop._log_metrics(2, {"loss": 1.0, "gradient": 2.0} | {name: value})


def test_an_environment_names_the_commit_of_its_checkout():
    command = ["git", "-C", str(Path(workdirs.__file__).parent), "rev-parse", "HEAD"]
    head = subprocess.run(command, capture_output=True, text=True)
    if head.returncode:
        pytest.skip("not a git checkout")
    assert head.stdout.startswith(workdirs.environment()["commit"].removesuffix("-dirty"))


def test_a_copy_outside_of_a_checkout_has_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(workdirs, "__file__", str(tmp_path / "workdir.py"))
    assert "commit" not in workdirs.environment()
