"""Runs that go on: with more steps, from another run's variables, or with data that have moved."""

import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from finished_runs import MOONS, finished_run

from train.__main__ import main
from train.configs import DENSITY
from train.data import load_dataset
from train.identity import WARM, checkpoint_folders, differences, example_of, stored_identity
from train.metrics import MetricsLog
from train.optim import describe_schedule, make_optimizer, make_schedule
from train.report import tree_sha256
from train.saved import load_run, read_config
from train.steps import first_state
from train.workdir import WorkdirError, prepare_workdir


def train(workdir, *arguments, status=0):
    """The run of 20 steps, or with other settings."""
    assert main([*MOONS, "--workdir", str(workdir), *arguments]) == status


def report(workdir):
    return json.loads((workdir / "report.json").read_text())


def rates(workdir):
    """The learning rate by step."""
    log = MetricsLog(workdir, 10**6)
    log.close()
    return dict(zip(*map(np.ndarray.tolist, log.series("learning_rate")), strict=True))


@pytest.fixture(scope="module")
def twenty(tmp_path_factory):
    """A finished run of 20 steps."""
    return finished_run(tmp_path_factory, "moons")


@pytest.fixture
def copy(twenty, tmp_path):
    return shutil.copytree(twenty, tmp_path / "run")


# More steps


@pytest.mark.slow
def test_more_steps_of_a_constant_rate_end_as_if_planned_at_once(tmp_path):
    constant = ("--schedule", "constant", "--warmup-steps", "2")
    train(tmp_path / "whole", "--steps", "8", *constant)
    for steps in ("3", "8"):
        train(tmp_path / "parts", "--steps", steps, *constant)
    whole, parts = map(report, (tmp_path / "whole", tmp_path / "parts"))
    assert parts["steps"] == 8
    assert parts["parameters_sha256"] == whole["parameters_sha256"]
    assert parts["bits_per_dim"] == whole["bits_per_dim"]
    assert [(p["step"], p["steps"]) for p in parts["continued_from"]] == [(3, 3)]
    assert "continued_from" not in whole


def test_the_learning_rate_follows_the_longer_schedule_and_says_so(copy, capsys):
    before = rates(copy)
    train(copy, "--steps", "26")
    told = " ".join(capsys.readouterr().out.split())
    config = load_run(copy, "newest").config
    plans = [make_schedule(planned(config, steps)) for steps in (20, 26)]
    after = rates(copy)
    assert set(before) < set(after)
    for step, rate in after.items():  # metrics of step n have the rate that led there
        assert rate == pytest.approx(float(plans[step > 20](step - 1)), rel=1e-5)
    assert "Resuming from step 20. It was planned for 20 steps, and now for 26." in told
    assert f"the next step it is {float(plans[1](20)):.3g}" in told
    assert f"would be {float(plans[0](20)):.3g}" in told
    found = report(copy)
    (plan,) = found["continued_from"]
    assert plan == {"step": 20, "steps": 20, "schedule": describe_schedule(planned(config, 20))}
    assert found["schedule"] == describe_schedule(config)
    assert json.loads((copy / "config.json").read_text())["continued_from"] == [plan]


@pytest.mark.slow
def test_a_continued_run_that_is_finished_stays_as_it_is(copy):
    for _ in range(2):
        train(copy, "--steps", "26")
        (plan,) = report(copy)["continued_from"]
        assert (plan["step"], plan["steps"]) == (20, 20)
    assert main(["certify", "--workdir", str(copy)]) == 0


def planned(config, steps):
    return type(config)(**{**vars(config), "steps": steps})


def test_fewer_steps_than_done_are_refused(copy, capsys):
    train(copy, "--steps", "19", status=2)
    told = capsys.readouterr().err
    assert (
        f"--steps 19 is fewer than the 20 that the run in {copy} has done: pass --steps 20" in told
    )
    assert json.loads((copy / "config.json").read_text())["steps"] == 20


@pytest.mark.slow
def test_a_run_from_before_a_setting_goes_on(copy):
    """What its config.json and its checkpoints do not say behaves as before."""
    newer = ("branch", "block", "mixing", "dequantization", "shared_length", "adam_learning_rate")
    for path in (copy / "config.json", *copy.glob("checkpoints/*/data/metadata")):
        content = json.loads(path.read_text())
        settings = content.get("run", content)
        for name in newer:
            del settings[name]
        path.write_text(json.dumps(content))
    train(copy, "--steps", "22")
    assert report(copy)["steps"] == 22 and report(copy)["certified"]


def test_a_setting_from_before_counts_as_it_behaved():
    old = {"program": "density", "shrink": False}
    assert list(differences({"program": "density"}, old)) == []
    (told,) = differences({"program": "density"}, old | {"mixing": True})
    assert told == "mixing: False there, True here"


def test_more_steps_of_another_run_are_refused(copy, capsys):
    train(copy, "--steps", "26", "--seed", "1", status=2)
    assert "seed: 0 there, 1 here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, "a linear warm-up to 0.02 at step 100, then a cosine down to 0.0002 at step 6,000"),
        ({"schedule": "constant", "warmup_steps": 0}, "0.02 at first, then a constant"),
        ({"schedule": "steps", "steps": 10}, "0.2 times as much from steps 3 and 6 and 8 on"),
    ],
)
def test_a_schedule_is_described(changes, told):
    config = type(DENSITY["moons"])(**{**vars(DENSITY["moons"]), **changes})
    assert describe_schedule(config).endswith(told)


# Warm start


def test_a_warm_start_has_the_averages_and_a_fresh_optimiser(twenty, tmp_path, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "train.origin.first_state", lambda *args: seen.append(args[0]) or _made(*args)
    )
    train(tmp_path / "run", "--steps", "3", "--warm-start", str(twenty), "--seed", "5")
    assert f"averaged variables of {twenty}, step 20; the optimiser starts afresh" in (
        " ".join(capsys.readouterr().out.split())
    )
    saved = load_run(twenty, "newest")
    for name, tree in saved.state.averages.items():
        jax.tree.map(np.testing.assert_array_equal, seen[0][name], tree)
    record = report(tmp_path / "run")["warm_started_from"]
    assert record["workdir"] == str(twenty) and record["step"] == 20
    assert record["variables_sha256"] == tree_sha256(saved.state.averaged_variables)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["warm_started_from"] == record
    state = load_run(tmp_path / "run", "newest").state
    assert state.step == 3


def _made(variables, config):
    state = first_state(variables, config)
    fresh = make_optimizer(config).init(variables["params"])
    jax.tree.map(np.testing.assert_array_equal, state.opt_state, fresh)
    assert state.step == 0
    return state


@pytest.mark.slow
def test_a_warm_started_run_resumes_as_itself_alone(twenty, tmp_path, capsys):
    source, workdir = shutil.copytree(twenty, tmp_path / "source"), tmp_path / "run"
    train(workdir, "--steps", "3", "--warm-start", str(source))
    first = report(workdir)
    shutil.rmtree(source)  # what is saved needs it no more
    train(workdir, "--steps", "3", "--warm-start", os.path.relpath(source))
    assert report(workdir)["warm_started_from"] == first["warm_started_from"]
    train(workdir, "--steps", "3", status=2)
    assert f"--warm-start: {source} at step 20" in capsys.readouterr().err


@pytest.mark.slow
def test_a_warm_start_from_elsewhere_is_the_same_by_its_variables(twenty, copy, tmp_path):
    train(tmp_path / "new", "--steps", "3", "--warm-start", str(twenty))
    train(tmp_path / "new", "--steps", "3", "--warm-start", str(copy))
    (newest, *_) = checkpoint_folders(tmp_path / "new")
    stored = stored_identity(newest)
    other = stored | {WARM: stored[WARM] | {"variables_sha256": "0" * 64}}
    (told,) = differences(stored, other)
    assert told.startswith(f"--warm-start: {twenty} at step 20 (SHA-256 ")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("--depths", "1"), "holds another network (depth: 2 there, 1 here"),
        (("--coeff", "0.5"), "holds another network (--coeff: 0.99 there, 0.5 here)"),
        (("--activation", "elu"), "activation: sin there, elu here"),
        (("--branch", "concatenation"), "dense_branch there, concatenation_branch here"),
        (("--dataset", "digits", "--depths", "1", "1", "--features", "4", "4"), "VectorFlow there"),
    ],
)
def test_a_warm_start_from_another_network_is_refused(change, told, twenty, tmp_path, capsys):
    train(tmp_path / "run", "--warm-start", str(twenty), *change, status=2)
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_warm_start_from_no_run_is_refused(twenty, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for name, told in {
        "nowhere": "nowhere holds no run: there is no",
        "empty": "empty holds no run: there is no",
        "file": "file",
    }.items():
        train(tmp_path / "run", "--warm-start", str(tmp_path / name), status=2)
        error = capsys.readouterr().err
        assert error.startswith(f"error: --warm-start {tmp_path / name}") or "Reading" in error
        assert told in error and "--workdir" not in error and "Traceback" not in error
        assert not (tmp_path / "run").exists()
    train(twenty, "--warm-start", str(twenty), status=2)
    assert "is the run's own workdir" in capsys.readouterr().err


# The same data elsewhere


@pytest.fixture
def points(tmp_path, monkeypatch):
    """A run on points.npz that has been prepared, in the current folder."""
    monkeypatch.chdir(tmp_path)
    np.savez("points.npz", points=np.random.default_rng(0).normal(size=(200, 2)))
    prepare("points.npz")
    return tmp_path


def prepare(name):
    config = type(DENSITY["points"])(
        **{**vars(DENSITY["points"]), "dataset": name, "workdir": Path("run")}
    )
    data = load_dataset(name)
    return prepare_workdir(config, data.fingerprint, example_of(data))


def test_the_same_file_by_another_path_is_the_same_run(points):
    (points / "link.npz").symlink_to("points.npz")
    (points / "elsewhere").mkdir()
    for name in ("./points.npz", str(points / "points.npz"), "link.npz"):
        prepare(name)
    (points / "points.npz").rename("elsewhere/renamed.npz")
    prepare("elsewhere/renamed.npz")
    assert read_config(points / "run").dataset == "elsewhere/renamed.npz"


def test_a_path_counts_where_the_data_are_not_known(points):
    (points / "other.npz").touch()
    config = type(DENSITY["points"])(
        **{**vars(read_config(points / "run")), "workdir": Path("run")}
    )
    for name in ("./points.npz", str(points / "points.npz")):
        prepare_workdir(type(config)(**{**vars(config), "dataset": name}))
    with pytest.raises(WorkdirError, match=r"dataset: .*points\.npz there, other\.npz here"):
        prepare_workdir(type(config)(**{**vars(config), "dataset": "other.npz"}))


def test_other_data_are_told_apart_and_named(points):
    data = np.load("points.npz")["points"]
    np.savez("more.npz", points=np.concatenate([data, data[:50]]))
    np.savez("other.npz", points=data + 1.0)
    for name, told in {
        "more.npz": r"examples for training, validation and test: \[160, 20, 20\] there, \[200, ",
        "other.npz": r"'points\.npz' there; SHA-256 \w{12} there, \w{12} here\).*--restart",
    }.items():
        with pytest.raises(WorkdirError, match=f"data of '{name}' are others.*{told}"):
            prepare(name)
