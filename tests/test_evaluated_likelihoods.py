"""``python -m train evaluate``: likelihoods of a saved run, by settings of one's own."""

import json

import pytest
from saved_cases import unpacked

from train.__main__ import main


def evaluation(workdir):
    return json.loads((workdir / "evaluation" / "evaluation.json").read_text())


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A run that is not to be trained for this."""
    return unpacked(tmp_path_factory.mktemp("digits"), "density")


FEW = ["--max-examples", "20", "--target-stderr", "0.05"]


@pytest.mark.slow
def test_a_saved_run_is_evaluated_by_the_roulette(digits):
    assert main(["evaluate", "--workdir", str(digits), *FEW, "--eval-estimator", "roulette"]) == 0
    roulette = evaluation(digits)
    assert roulette["bits_per_dim_estimator"] == "roulette"
    assert roulette["bits_per_dim_bias_bound"] == 0.0
    assert roulette["log_det_continuation"] == max(0.5, roulette["block_lipschitz_max"])


@pytest.mark.slow
def test_a_saved_run_is_evaluated_exactly_with_importance_weights(digits, capsys):
    exact = ["--eval-estimator", "exact", "--importance-samples", "2", "--max-draws", "4"]
    assert main(["evaluate", "--workdir", str(digits), *FEW, *exact]) == 0
    weighted = evaluation(digits)
    assert weighted["importance_samples"] == 2 and weighted["likelihood_draws"] == 4
    assert weighted["bits_per_dim_importance_weighted"] < weighted["bits_per_dim"]
    told = capsys.readouterr().out
    assert "importance-weighted, 2 samples" in told and "bits/dim" in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--importance-samples", "8"], "--importance-samples = 8 needs --eval-estimator exact"),
        (["--importance-samples", "0"], "--importance-samples must be ≥ 1; got 0"),
        (["--target-bias", "0"], "--target-bias must lie in (1e-12, inf); got 0.0"),
        (["--target-stderr", "-1"], "--target-stderr must lie in (1e-12, inf); got -1.0"),
        (
            ["--eval-estimator", "exact", "--importance-samples", "8", "--max-draws", "9"],
            "--max-draws must be ≥ 16; got 9",
        ),
        (["--eval-estimator", "roulette", "--importance-samples", "2"], "got 'roulette'"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(arguments, message, digits, capsys):
    assert main(["evaluate", "--workdir", str(digits), *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err


def test_importance_samples_of_points_are_refused(tmp_path, capsys):
    arguments = ["--dataset", "moons", "--importance-samples", "2", "--max-draws", "4"]
    assert main(["density", *arguments, "--workdir", str(tmp_path / "run")]) == 2
    assert "'moons' holds points" in capsys.readouterr().err


def test_settings_of_a_likelihood_are_refused_for_a_classifier(tmp_path, capsys):
    (tmp_path / "config.json").write_text(
        json.dumps({"program": "classification", "dataset": "digits", "workdir": "x",
                    "depths": [1], "features": [4], "steps": 1})
    )  # fmt: skip
    assert main(["evaluate", "--workdir", str(tmp_path), "--target-bias", "1e-4"]) == 2
    assert "holds classification, without --target-bias" in capsys.readouterr().err
