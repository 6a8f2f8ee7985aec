"""The programs as their users meet them: runs, reports, resuming, Ctrl-C, errors."""

import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train.training
from train.__main__ import main
from train.configs import DENSITY
from train.data import load_dataset
from train.loop import MetricsLog

_DIGITS = ["--smoke", "--depths", "1", "1", "--features", "8", "8", "--batch-size", "16"]
_POINTS = ["--dataset", "moons", "--smoke", "--features", "8", "--batch-size", "32"]


def _run(program, workdir, *arguments):
    status = main([program, "--workdir", str(workdir), *arguments])
    assert status == 0
    return json.loads((workdir / "report.json").read_text())


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("digits") / "run"
    return workdir, _run("density", workdir, *_DIGITS, "--steps", "4")


def test_density_on_digits_reports_all_that_it_promises(digits_run):
    workdir, report = digits_run
    assert 1.0 < report["bits_per_dim"] < np.log2(17) + 1.0
    assert 0.0 < report["bits_per_dim_stderr"] < 0.1
    assert 0.0 < report["bits_per_dim_bias_bound"] <= report["config"]["target_bias"]
    assert report["bits_per_dim_sampling_stderr"] > 0.0
    assert report["block_lipschitz_max"] < 1.0
    assert report["reconstruction_max_error"] < 1e-4
    assert report["all_converged"] and report["samples_converged"]
    assert 1 <= report["inverse_steps_max"] <= report["config"]["inverse_max_steps"]
    assert 0.0 < report["train_seconds"] <= report["total_seconds"]
    assert report["steps"] == 4 and not report["interrupted"]
    assert report["packages"]["jax"] == jax.__version__
    for name in ("samples.png", "reconstructions.png", "training_curve.png"):
        assert (workdir / name).stat().st_size > 5000


def test_metrics_are_logged(digits_run):
    workdir, _ = digits_run
    steps, losses = MetricsLog(workdir / "metrics.jsonl", 4).series("loss")
    assert steps.tolist() == [1, 4]
    assert np.isfinite(losses).all()


def test_a_finished_run_is_not_trained_again_and_reports_the_same(digits_run):
    workdir, report = digits_run
    again = _run("density", workdir, *_DIGITS, "--steps", "4")
    assert again["bits_per_dim"] == report["bits_per_dim"]


def test_another_config_in_the_same_workdir_is_refused(digits_run, capsys):
    workdir, _ = digits_run
    arguments = [*_DIGITS, "--steps", "4", "--seed", "1"]
    assert main(["density", "--workdir", str(workdir), *arguments]) == 2
    message = capsys.readouterr().err
    assert "seed: 0 there, 1 here" in message and "--restart" in message


def test_density_on_points_draws_and_restart_moves_the_old_run_aside(tmp_path):
    first = _run("density", tmp_path / "run", *_POINTS, "--steps", "2")
    assert first["bits_per_dim_bias_bound"] == 0.0
    assert first["all_converged"]
    assert (tmp_path / "run" / "density.png").stat().st_size > 5000
    second = _run("density", tmp_path / "run", *_POINTS, "--steps", "2", "--restart")
    moved = json.loads((tmp_path / "run.1" / "report.json").read_text())
    assert moved["bits_per_dim"] == first["bits_per_dim"] == second["bits_per_dim"]


def test_classification_inverts_its_features(tmp_path):
    report = _run("classification", tmp_path / "run", *_DIGITS, "--steps", "2")
    assert 0.0 <= report["accuracy"] <= 1.0
    assert report["all_converged"]
    assert report["reconstruction_max_error"] < 1e-4
    assert (tmp_path / "run" / "inversion.png").stat().st_size > 5000


def test_an_interrupted_run_resumes_to_the_same_parameters(tmp_path, monkeypatch):
    whole = _run("density", tmp_path / "whole", *_POINTS, "--steps", "6")
    _interrupt_after(monkeypatch, calls=3)
    part = _run("density", tmp_path / "part", *_POINTS, "--steps", "6")
    monkeypatch.undo()
    assert part["interrupted"] and part["steps"] == 3
    resumed = _run("density", tmp_path / "part", *_POINTS, "--steps", "6")
    assert resumed["steps"] == 6
    assert resumed["parameters_sha256"] == whole["parameters_sha256"]


def _interrupt_after(monkeypatch, calls):
    """Press Ctrl-C while the given batch is fetched."""
    original = train.training.epoch_batches

    def interrupting(*args, **kwargs):
        for count, batch in enumerate(original(*args, **kwargs), start=1):
            if count == calls:
                signal.raise_signal(signal.SIGINT)
            yield batch

    monkeypatch.setattr(train.training, "epoch_batches", interrupting)


def test_a_damaged_newest_checkpoint_is_skipped(tmp_path, capsys):
    arguments = [*_POINTS, "--steps", "20"]
    whole = _run("density", tmp_path / "run", *arguments)
    for file in (tmp_path / "run" / "checkpoints" / "20").rglob("*"):
        if file.is_file():
            file.write_bytes(b"damaged")
    again = _run("density", tmp_path / "run", *arguments)
    assert "Checkpoint 20 cannot be read" in capsys.readouterr().out
    assert again["parameters_sha256"] == whole["parameters_sha256"]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, capsys):
    arguments = [*_POINTS, "--steps", "20", "--warmup-steps", "0", "--learning-rate", "1e30"]
    assert main(["density", "--workdir", str(tmp_path / "run"), *arguments]) == 2
    assert "The loss is nan at step" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["density", "--dataset", "digit"], "Did you mean 'digits'? Known: "),
        (["density", "--coeff", "1.0"], "coeff must lie in (0, 1)"),
        (["density", "--coeff", "0"], "coeff must lie in (0, 1)"),
        (["density", "--num-terms", "0"], "num_terms must be ≥ 1; got 0"),
        (["density", "--batch-size", "5000"], "[1, 1257]"),
        (["density", "--depths", "6", "6", "6", "6"], "one for each of 4 scales"),
        (["density", "--learning-rate", "-1"], "learning_rate must lie in (0, inf); got -1.0"),
        (["density", "--activation", "relux"], "Unknown activation 'relux'; known: elu"),
        (["classification", "--dataset", "moons"], "no data set 'moons'"),
        (["classify"], "there is no program 'classify'"),
    ],
)
def test_bad_settings_are_refused_with_their_name_and_range(arguments, message, tmp_path, capsys):
    assert main([*arguments, "--workdir", str(tmp_path / "run")]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert not (tmp_path / "run").exists()


def test_an_unwritable_workdir_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["density", *_POINTS, "--workdir", str(tmp_path / "file" / "run")]) == 2
    assert "cannot be written: Not a directory" in capsys.readouterr().err


def test_an_unknown_setting_is_refused_with_its_name(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["density", "--workdir", str(tmp_path / "run"), "--stepz", "2"])
    assert stopped.value.code != 0
    assert "--stepz" in capsys.readouterr().err


def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["density", "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for name in vars(DENSITY["digits"]):
        assert "--" + name.replace("_", "-") in text


def test_every_density_config_fits_its_data_set():
    for name, config in DENSITY.items():
        assert config.dataset == name
        assert config.batch_size <= len(load_dataset(name).train)
        assert jnp.isfinite(config.learning_rate)
