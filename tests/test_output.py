"""Files that programs write: never over another, whole or not at all, at no report's cost."""

import dataclasses
import json
import math

import numpy as np
import pytest

from train import memory, output
from train.classification import accuracy_report, wilson_interval
from train.configs import CLASSIFICATION, DENSITY
from train.data import Dataset, load_dataset
from train.density import Density, likelihood_rows
from train.output import OutputError, array_path, optionally, picture_path, save_array, whole
from train.plane import extent_of
from train.task import Task

PNG = b"\x89PNG\r\n\x1a\n rest"
POINTS = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)


@pytest.fixture
def workdir(tmp_path):
    """A run's folder, with some of its files."""
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    for name in ("config.json", "report.json", "metrics.jsonl"):
        (folder / name).write_text("{}")
    (folder / "samples.png").write_bytes(PNG)
    return folder


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("run/config.json", r"ends in \.png, \.jpg, .*; got .*config\.json"),
        ("run/metrics.jsonl", "ends in"),
        ("run/samples.png", "belongs to the run"),
        ("run/../run/checkpoints/a.png", "belongs to the run"),
        ("run", "got the folder"),
        ("", "got the folder"),
        ("text.png", "is there, and no picture: it is not written over"),
        ("text.png/a.png", r"text\.png is a file"),
    ],
)
def test_a_picture_is_written_over_nothing_else(name, message, workdir, tmp_path, monkeypatch):
    (tmp_path / "text.png").write_text("a table of numbers")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match=message):
        picture_path(output.Path(name), workdir)


def test_a_picture_replaces_a_picture_and_has_a_suffix(workdir, tmp_path):
    for name in ("old.png", "new.png", "new/folder/a.pdf"):
        (tmp_path / "old.png").write_bytes(PNG)
        assert picture_path(tmp_path / name, workdir) == tmp_path / name
    assert picture_path(tmp_path / "plain", workdir) == tmp_path / "plain.png"
    assert picture_path(workdir / "sample.png", workdir) == workdir / "sample.png"
    assert not (tmp_path / "new").exists()


def test_an_array_stands_beside_its_picture_and_replaces_arrays_alone(tmp_path):
    path = array_path(tmp_path / "sample.png", "latents")
    assert path == tmp_path / "sample-latents.npy"
    for _ in range(2):
        save_array(path, POINTS)
        np.testing.assert_array_equal(
            np.load(array_path(tmp_path / "sample.png", "latents")), POINTS
        )
    path.write_text("notes")
    with pytest.raises(OutputError, match="is there, and no NumPy array"):
        array_path(tmp_path / "sample.png", "latents")


def test_a_file_that_fails_half_way_leaves_the_old_one(tmp_path):
    path = tmp_path / "a.npy"
    path.write_text("old")
    with pytest.raises(RuntimeError), whole(path) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_what_is_optional_costs_a_line(capsys):
    def fail(*arguments):
        raise MemoryError(f"no room\nfor {arguments}")

    assert optionally("The picture", fail, 1) is None
    assert capsys.readouterr().err == "The picture could not be made: no room for (1,)\n"
    assert optionally("The sum", sum, (1, 2)) == 3 and not capsys.readouterr().err


def test_the_numbers_are_there_before_a_picture_is_drawn(tmp_path, capsys):
    seen = []

    def fail(path, argument):
        seen.append(json.loads((tmp_path / "evaluation.json").read_text()))
        raise ValueError(f"cannot draw {argument}")

    report = {"bits_per_dim": 1.5}
    assert Task.conclude(None, tmp_path, report, (tmp_path / "a.png", fail, "two")) == report
    assert (
        seen == [report] and "a.png could not be made: cannot draw two" in capsys.readouterr().err
    )


def test_samples_that_no_machine_can_hold_are_refused_before_training(monkeypatch):
    config = dataclasses.replace(DENSITY["moons"], num_samples=10**12, max_examples=4)
    with pytest.raises(ValueError, match=r"num_samples must lie in \[1, .* GB; got 1000000000000"):
        Density.load(config)
    monkeypatch.setattr(memory, "memory", lambda: 4 * 4 * 2 * 64)
    Density.load(dataclasses.replace(config, num_samples=64))
    with pytest.raises(ValueError, match=r"num_samples must lie in \[1, 64\].* got 65"):
        Density.load(dataclasses.replace(config, num_samples=65))


# Settings


@pytest.mark.parametrize(
    ("experiments", "changes", "message"),
    [
        (CLASSIFICATION, {"mean": (0.5, math.nan)}, "mean must be finite; got nan"),
        (CLASSIFICATION, {"std": (math.inf,)}, "std must be finite; got inf"),
        (CLASSIFICATION, {"mean": (1e30,)}, r"mean must lie in \(-1000, 1000\); got 1e\+30"),
        (CLASSIFICATION, {"std": (1e-30,)}, r"std must lie in \(1e-6, 1e6\); got 1e-30"),
        (DENSITY, {"milestones": (math.nan,)}, "milestones must be finite; got nan"),
        (DENSITY, {"weight_decay": math.nan}, "weight_decay must be finite; got nan"),
        (DENSITY, {"depths": (3, 0, 3)}, "depths must be ≥ 1; got 0"),
        (DENSITY, {"features": (-4,)}, "features must be ≥ 1; got -4"),
        (DENSITY, {"steps": math.nan}, "steps must be finite; got nan"),
        (DENSITY, {"steps": 2.5}, "steps must be ≥ 1 and an integer; got 2.5"),
        (DENSITY, {"steps": 2**31}, "steps must be ≤ 2,147,483,647; got 2147483648"),
        (DENSITY, {"target_stderr": 1e-300}, r"target_stderr must lie in \(1e-12, inf\)"),
        (DENSITY, {"seed": 2**32}, r"seed must be an integer in \[0, 4294967292\]"),
        (DENSITY, {"seed": -1}, "seed must be an integer in .*; got -1"),
        (DENSITY, {"seed": 2**63}, "seed must be an integer in"),
    ],
)
def test_every_number_of_every_setting_is_checked(experiments, changes, message):
    config = experiments["digits"]
    config.check()
    with pytest.raises(ValueError, match=f"^{message}"):
        dataclasses.replace(config, **changes).check()


# Error bars


@pytest.mark.parametrize(("share", "count"), [(0.0, 1), (1.0, 1), (1.0, 360), (0.9, 10), (0.5, 7)])
def test_wilsons_interval_holds_all_proportions_that_the_share_does_not_speak_against(share, count):
    p = np.linspace(0.0, 1.0, 1_000_001)
    inside = p[np.abs(share - p) <= 1.96 * np.sqrt(p * (1.0 - p) / count)]
    interval = wilson_interval(share, count, 1.96)
    np.testing.assert_allclose(interval, (inside[0], inside[-1]), atol=2e-6)


def test_an_accuracy_of_one_has_an_error_bar_and_others_the_usual_one():
    report = accuracy_report(1.0, 1)
    assert report["accuracy_stderr"] == pytest.approx(0.25) and report["accuracy_examples"] == 1
    assert report["accuracy_interval_95"] == pytest.approx([1.0 / (1.0 + 1.959964**2), 1.0])
    usual = math.sqrt(0.9 * 0.1 / 10_000)
    assert accuracy_report(0.9, 10_000)["accuracy_stderr"] == pytest.approx(usual, rel=1e-3)


# What is told and drawn of a density


def test_a_smoke_run_is_not_blamed_for_a_target():
    report = {
        "bits_per_dim": 2.0, "bits_per_dim_stderr": 0.1, "bits_per_dim_bias_bound": 0.0,
        "likelihood_draws": 2, "log_det_description": "exact", "bits_per_dim_target_bias": 1e-3,
        "bits_per_dim_sampling_stderr": 0.1, "bits_per_dim_target_stderr": 1e-3,
    }  # fmt: skip
    assert [what for what, _ in likelihood_rows(report)][-1] == "TARGET MISSED"
    (*_, (what, value)) = likelihood_rows(report, smoke=True)
    assert "not expected of a smoke run" in what and "0.001" in value


def test_the_region_that_is_drawn_holds_points_wherever_they_lie():
    own = Dataset("own", *[100.0 + POINTS[:, :2]] * 3)
    left, right, low, high = extent_of(own)
    assert left < own.test[:, 0].min() and own.test[:, 0].max() < right < left + 10.0
    assert low < own.test[:, 1].min() and own.test[:, 1].max() < high < low + 10.0
    few = load_dataset("moons", max_examples=2)
    assert extent_of(few) == (-4.5, 4.5, -4.5, 4.5)


def test_a_users_file_may_be_called_as_a_built_in_set_is(tmp_path):
    np.savez(tmp_path / "moons.npz", points=100.0 + np.arange(60.0).reshape(30, 2))
    left, right, *_ = extent_of(load_dataset(str(tmp_path / "moons.npz")))
    assert 50.0 < left < right < 300.0
