"""The hybrid program: a run by the command line, and the scores that tell images apart."""

import json
import re

import numpy as np
import pytest

from train.__main__ import main
from train.configs import HYBRID, find_config
from train.data import load_dataset
from train.hybrid import told_apart, unknown_images

SMALL = (
    "--smoke --depths 2 --features 4 --batch-size 32 --steps 60 --learning-rate 0.02 "
    "--dequantization variational --likelihood-weight 0.5 --validate-every 60 "
    "--checkpoint-every 60"
)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("hybrid") / "run"
    assert main(["hybrid", *SMALL.split(), "--workdir", str(workdir)]) == 0
    return workdir


def test_the_report_has_both_numbers_the_certificate_and_what_is_told_apart(workdir):
    report = json.loads((workdir / "report.json").read_text())
    assert report["certified"] and report["all_converged"]
    assert report["bits_per_dim"] < np.log2(17)
    assert report["accuracy"] > 0.3  # of ten classes
    assert report["accuracy_interval_95"][0] < report["accuracy"]
    assert set(report["unknown"]) == {"noise", "shuffled", "inverted"}
    areas = np.array([list(one.values()) for one in report["unknown"].values()])
    assert areas.shape == (3, 3) and (areas >= 0).all() and (areas <= 1).all()
    assert report["unknown"]["noise"]["log_prob"] > 0.9


@pytest.mark.slow
def test_the_tools_work_on_its_runs(workdir, capsys):
    assert main(["evaluate", "--workdir", str(workdir)]) == 0
    out = capsys.readouterr().out
    assert "test accuracy" in out and "told from noise" in out
    report, evaluation = (
        json.loads((workdir / name).read_text())
        for name in ("report.json", "evaluation/evaluation.json")
    )
    assert evaluation["bits_per_dim"] == pytest.approx(report["bits_per_dim"], rel=1e-4)
    assert evaluation["accuracy"] == report["accuracy"]
    assert main(["sample", "--workdir", str(workdir), "--count", "4"]) == 0


def test_areas_under_the_curve():
    """By their definition, the share of pairs in the right order; −inf and NaN are unlikeliest."""
    classes = np.full((3, 2), 0.5)
    known = np.array([-1.0, -2.0, -3.0]), classes
    unknown = np.array([-2.5, -np.inf, np.nan]), classes
    found = told_apart(known, unknown, typical=-2.0)
    assert found["log_prob"] == pytest.approx((2 + 3 + 3) / 9)
    assert found["typicality"] == pytest.approx((1 + 3 + 3) / 9)
    assert found["confidence"] == 0.5


def test_what_is_made_of_the_test_set():
    dataset, config = load_dataset("digits", max_examples=40), HYBRID["digits"]
    shuffled, inverted, noise = (
        unknown_images(name, config, dataset, 5) for name in ("shuffled", "inverted", "noise")
    )
    test = dataset.test[:5]
    np.testing.assert_array_equal(np.sort(shuffled.reshape(5, -1)), np.sort(test.reshape(5, -1)))
    assert (shuffled != test).any()
    np.testing.assert_array_equal(inverted.astype(int) + test, 16)
    assert noise.min() >= 0 and noise.max() <= 16 and len(np.unique(noise)) == 17


def test_images_in_a_file_of_ones_own_have_settings():
    config = find_config(HYBRID, None, "mine.npz")
    assert (config.dataset, config.program) == ("mine.npz", "hybrid")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--unknown moons", "unknown 'moons' has"),
        ("--likelihood-weight -1", "likelihood.weight"),
        ("--dataset moons", "no data set 'moons'"),
        ("--head-features 0", "head.features"),
    ],
)
def test_bad_settings_are_refused_before_training(options, message, tmp_path, capsys):
    arguments = ["hybrid", "--smoke", "--workdir", str(tmp_path / "run"), *options.split()]
    with pytest.raises(SystemExit):
        raise SystemExit(main(arguments))
    assert re.search(message, capsys.readouterr().err)
