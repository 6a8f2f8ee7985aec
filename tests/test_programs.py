"""The programs as their users meet them: runs, reports, resuming, Ctrl-C, errors."""

import json
import shutil
import signal

import jax
import numpy as np
import pytest
from finished_runs import DIGITS, MOONS, finished_run
from page_cases import checked
from tfds_data import tfds_dir

import train.training
from train.__main__ import main
from train.metrics import MetricsLog
from train.saved import load_run


def _run(workdir, *arguments, status=0):
    assert main([*arguments, "--workdir", str(workdir)]) == status
    return _report(workdir)


def _report(workdir):
    return json.loads((workdir / "report.json").read_text())


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    workdir = finished_run(tmp_path_factory, "digits")
    return workdir, _report(workdir)


def test_density_on_digits_reports_all_that_it_promises(digits_run):
    workdir, report = digits_run
    assert 1.0 < report["bits_per_dim"] < np.log2(17) + 1.0
    assert 0.0 < report["bits_per_dim_stderr"] < 0.1
    assert 0.0 < report["bits_per_dim_bias_bound"] <= report["config"]["target_bias"]
    assert report["bits_per_dim_sampling_stderr"] > 0.0
    assert report["bits_per_dim_estimator"] == "series" and report["log_det_continuation"] == 0.0
    assert "bits_per_dim_importance_weighted" not in report
    assert report["block_lipschitz_max"] < 1.0
    assert report["reconstruction_max_error"] < 1e-4
    assert report["all_converged"] and report["samples_converged"]
    assert report["inverse_error_in_double_examples"] == 16
    assert 0.0 < report["inverse_error_in_double_guaranteed"] < 1e-3
    assert report["data_diameter"] <= 8.0 < report["inverse_error_bound_guaranteed"] * 1e6
    assert 1 <= report["inverse_steps_max"] <= report["config"]["inverse_max_steps"]
    assert 0.0 < report["train_seconds"] <= report["total_seconds"]
    assert np.isfinite(report["train_loss"]) and report["num_devices"] == jax.device_count()
    assert report["steps"] == 20 and not report["interrupted"]
    assert report["packages"]["jax"] == jax.__version__
    for name in ("samples.png", "reconstructions.png", "walk.png", "training_curve.png"):
        assert (workdir / name).stat().st_size > 5000
    assert report["pictures"] == ["samples.png", "reconstructions.png", "walk.png"]
    page = checked(workdir / "report.html").text
    assert f"{report['bits_per_dim']:.4f} ± {report['bits_per_dim_stderr']:.4f} bits/dim" in page


def test_metrics_are_logged(digits_run):
    workdir, _ = digits_run
    log = MetricsLog(workdir, 20)
    steps, losses = log.series("loss")
    assert steps.tolist() == [1, 10, 20]
    assert np.isfinite(losses).all()
    records = {name for record in log.records() for name in record}
    assert records >= {
        *("gradient", "update", "learning_rate", "examples_per_second"),
        *("validation", "sigma", "inverse_residual"),
    }
    assert any((workdir / "tensorboard").glob("events.out.tfevents.*"))
    log.close()


def test_what_is_not_finite_is_logged_as_json_that_any_reader_takes(tmp_path):
    def refuse(name):
        raise ValueError(f"{name} is no JSON")

    log = MetricsLog(tmp_path, 0)
    log.write(1, validation=1.5)
    log.write(2, validation=-np.inf)
    log.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=refuse) for line in lines]
    assert records[1] == {"step": 2, "validation": "-inf"}
    log = MetricsLog(tmp_path, 2)
    log.close()
    assert log.series("validation")[1].tolist() == [1.5, -np.inf]


@pytest.mark.slow
def test_a_finished_run_is_not_trained_again_and_reports_the_same(points_copy, monkeypatch):
    """Nothing is left to stop, so that no signal ends it with a report of a training cut off."""
    workdir, report = points_copy
    monkeypatch.setattr(train.training, "_stop_on_interrupt", lambda: pytest.fail("to be stopped"))
    how = ("--remat", "--cpu-devices", "1")  # does not make it another run
    again = _run(workdir, *MOONS, *how)
    assert again["bits_per_dim"] == report["bits_per_dim"]
    assert again["examples_per_second"] == pytest.approx(report["examples_per_second"])
    assert 0.5 < again["train_seconds"] / report["train_seconds"] < 1.5
    assert again["train_seconds"] <= again["total_seconds"]


def test_another_config_in_the_same_workdir_is_refused(digits_run, capsys):
    workdir, _ = digits_run
    assert main([*DIGITS, "--workdir", str(workdir), "--seed", "1"]) == 2
    message = capsys.readouterr().err
    assert "--seed: 0 there, 1 here" in message and "--restart" in message


@pytest.fixture(scope="module")
def points_run(tmp_path_factory):
    workdir = finished_run(tmp_path_factory, "moons")
    return workdir, _report(workdir)


@pytest.fixture
def points_copy(points_run, tmp_path):
    """The finished run, to be changed."""
    workdir, report = points_run
    return shutil.copytree(workdir, tmp_path / "run"), report


def test_density_on_points_draws(points_run):
    workdir, report = points_run
    assert report["bits_per_dim_bias_bound"] == 0.0
    assert report["all_converged"]
    assert (workdir / "density.png").stat().st_size > 5000


@pytest.mark.slow
def test_restart_moves_the_old_run_aside(points_copy, tmp_path):
    workdir, first = points_copy
    second = _run(workdir, *MOONS, "--restart")
    moved = json.loads((tmp_path / "run.1" / "report.json").read_text())
    assert moved["bits_per_dim"] == first["bits_per_dim"] == second["bits_per_dim"]


@pytest.fixture(scope="module")
def classification_run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("classification") / "run"
    small = ["--smoke", "--depths", "1", "--features", "4", "--batch-size", "16", "--steps", "2"]
    return workdir, _run(workdir, "classification", *small)


def test_classification_inverts_its_features(classification_run):
    workdir, report = classification_run
    assert 0.0 <= report["accuracy"] <= 1.0
    assert report["all_converged"]
    assert report["reconstruction_max_error"] < 1e-4
    assert (workdir / "inversion.png").stat().st_size > 5000
    assert report["pictures"] == ["inversion.png", "walk.png"]
    page = checked(workdir / "report.html").text
    assert f"{report['accuracy']:.2%} ± {report['accuracy_stderr']:.2%} classified" in page


@pytest.mark.slow
def test_the_head_takes_statistics_of_the_shipped_network(classification_run):
    """Whatever statistics training left: the kernels have been scaled since."""
    workdir, report = classification_run
    saved = load_run(workdir, "newest")
    averages = saved.state.averages
    lost = jax.tree.map(lambda statistic: statistic + 100.0, averages["batch_stats"])
    state = saved.state._replace(averages={**averages, "batch_stats": lost})
    again = saved.task.evaluate(state, workdir)
    for name in ("accuracy", "accuracy_before_certification"):
        assert again[name] == report[name]


def test_an_interrupted_run_resumes_to_the_same_parameters(
    points_run, tmp_path, monkeypatch, capsys
):
    _, whole = points_run
    seconds = 0.0
    for stop, steps, status in ((signal.SIGINT, 3, 130), (signal.SIGTERM, 6, 143)):
        _interrupt_after(monkeypatch, stop, calls=3)
        part = _run(tmp_path / "part", *MOONS, status=status)
        monkeypatch.undo()
        assert part["interrupted"] and part["steps"] == steps
        assert f"Stopped after step {steps} of 20, which is saved. The same command" in (
            capsys.readouterr().err
        )
        assert not (tmp_path / "part" / "certificate.json").exists()  # nothing was evaluated
        page = checked(tmp_path / "part" / "report.html").text
        assert f"Not evaluated: training was stopped after step {steps} of 20." in page
        assert seconds < part["train_seconds"] <= part["total_seconds"]
        seconds = part["train_seconds"]
    resumed = _run(tmp_path / "part", *MOONS)
    assert resumed["steps"] == 20 and seconds < resumed["train_seconds"]
    assert resumed["parameters_sha256"] == whole["parameters_sha256"]


def _interrupt_after(monkeypatch, stop, calls):
    """Press Ctrl-C, or send SIGTERM, while the given batch is fetched."""
    original = train.training.batch_iterator

    class Interrupting:
        def __init__(self, *args, **kwargs):
            self._batches, self._calls = original(*args, **kwargs), 0
            self.get_state, self.set_state = self._batches.get_state, self._batches.set_state

        def __next__(self):
            self._calls += 1
            if self._calls == calls:
                signal.raise_signal(stop)
            return next(self._batches)

    monkeypatch.setattr(train.training, "batch_iterator", Interrupting)


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_skipped(points_copy, capsys):
    workdir, whole = points_copy
    for file in (workdir / "checkpoints" / "20").rglob("*"):
        if file.is_file():
            file.write_bytes(b"damaged")
    again = _run(workdir, *MOONS)
    assert "Checkpoint 20 cannot be read" in capsys.readouterr().out
    assert again["parameters_sha256"] == whole["parameters_sha256"]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, capsys):
    arguments = [*MOONS, "--warmup-steps", "0", "--learning-rate", "1e38"]
    arguments += ["--checkpoint-every", "20"]  # saving one would refuse the parameters first
    assert main([*arguments, "--workdir", str(tmp_path / "run")]) == 2
    assert "The loss is nan at step" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "options"),
    [
        ("density", "--num-samples 4"),
        ("classification", "--coeff None --padding 0 --inverse-max-steps 3"),
    ],
)
def test_image_programs_train_on_tfds_data(program, options, tmp_path):
    arguments = ["--config", "mnist", "--smoke", "--data-dir", str(tfds_dir("mnist"))]
    net = "--depths 1 --features 4 --batch-size 8 --steps 2"
    few = "--max-examples 16 --num-reconstructed 4"
    arguments += [*net.split(), *few.split(), *options.split()]
    report = _run(tmp_path / "run", program, *arguments)
    assert report["steps"] == 2
    assert report["config"]["dataset"] == "mnist"
