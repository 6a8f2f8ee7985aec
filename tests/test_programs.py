"""The programs as their users meet them: runs, reports, resuming, Ctrl-C, errors."""

import ast
import dataclasses
import inspect
import json
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from tfds_data import tfds_dir

import train.training
from train.__main__ import main, parse
from train.configs import (
    CLASSIFICATION,
    DENSITY,
    ClassificationConfig,
    DensityConfig,
    TrainingConfig,
)
from train.data import Dataset, load_dataset
from train.metrics import MetricsLog
from train.points import SAMPLERS
from train.programs import TASKS
from train.saved import load_run
from train.steps import FirstState
from train.tools import TOOLS
from train.training import TrainingError

_DIGITS = ["--smoke", "--depths", "1", "1", "--features", "4", "4", "--batch-size", "16"]
_POINTS = [
    *("--dataset", "moons", "--smoke", "--features", "8", "--batch-size", "32", "--steps", "20"),
]


_PROCESSES = ["--distributed", "--coordinator", "localhost:1", "--num-processes", "2"]


def _run(program, workdir, *arguments, status=0):
    assert main([program, "--workdir", str(workdir), *arguments]) == status
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
    assert report["inverse_error_in_double_examples"] == 16
    assert 0.0 < report["inverse_error_in_double_guaranteed"] < 1e-3
    assert report["data_diameter"] <= 8.0 < report["inverse_error_bound_guaranteed"] * 1e6
    assert 1 <= report["inverse_steps_max"] <= report["config"]["inverse_max_steps"]
    assert 0.0 < report["train_seconds"] <= report["total_seconds"]
    assert np.isfinite(report["train_loss"]) and report["num_devices"] == jax.device_count()
    assert report["steps"] == 4 and not report["interrupted"]
    assert report["packages"]["jax"] == jax.__version__
    for name in ("samples.png", "reconstructions.png", "training_curve.png"):
        assert (workdir / name).stat().st_size > 5000


def test_metrics_are_logged(digits_run):
    workdir, _ = digits_run
    log = MetricsLog(workdir, 4)
    steps, losses = log.series("loss")
    assert steps.tolist() == [1, 4]
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


def test_a_finished_run_is_not_trained_again_and_reports_the_same(digits_run, monkeypatch):
    """Nothing is left to stop, so that no signal ends it with a report of a training cut off."""
    workdir, report = digits_run
    monkeypatch.setattr(train.training, "_stop_on_interrupt", lambda: pytest.fail("to be stopped"))
    how = ("--remat", "--cpu-devices", "1")  # does not make it another run
    again = _run("density", workdir, *_DIGITS, "--steps", "4", *how)
    assert again["bits_per_dim"] == report["bits_per_dim"]
    assert again["examples_per_second"] == pytest.approx(report["examples_per_second"])
    assert 0.5 < again["train_seconds"] / report["train_seconds"] < 1.5
    assert again["train_seconds"] <= again["total_seconds"]


def test_another_config_in_the_same_workdir_is_refused(digits_run, capsys):
    workdir, _ = digits_run
    arguments = [*_DIGITS, "--steps", "4", "--seed", "1"]
    assert main(["density", "--workdir", str(workdir), *arguments]) == 2
    message = capsys.readouterr().err
    assert "--seed: 0 there, 1 here" in message and "--restart" in message


@pytest.fixture(scope="module")
def points_run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("points") / "run"
    return workdir, _run("density", workdir, *_POINTS)


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


def test_restart_moves_the_old_run_aside(points_copy, tmp_path):
    workdir, first = points_copy
    second = _run("density", workdir, *_POINTS, "--restart")
    moved = json.loads((tmp_path / "run.1" / "report.json").read_text())
    assert moved["bits_per_dim"] == first["bits_per_dim"] == second["bits_per_dim"]


def test_classification_inverts_its_features(tmp_path):
    report = _run("classification", tmp_path / "run", *_DIGITS, "--steps", "2")
    assert 0.0 <= report["accuracy"] <= 1.0
    assert report["all_converged"]
    assert report["reconstruction_max_error"] < 1e-4
    assert (tmp_path / "run" / "inversion.png").stat().st_size > 5000
    _check_that_the_head_takes_statistics_of_the_shipped_network(tmp_path / "run", report)


def _check_that_the_head_takes_statistics_of_the_shipped_network(workdir, report):
    """Whatever statistics training left: the kernels have been scaled since."""
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
        part = _run("density", tmp_path / "part", *_POINTS, status=status)
        monkeypatch.undo()
        assert part["interrupted"] and part["steps"] == steps
        assert f"Stopped after step {steps} of 20, which is saved. The same command" in (
            capsys.readouterr().err
        )
        assert not (tmp_path / "part" / "certificate.json").exists()  # nothing was evaluated
        assert seconds < part["train_seconds"] <= part["total_seconds"]
        seconds = part["train_seconds"]
    resumed = _run("density", tmp_path / "part", *_POINTS)
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


def test_a_damaged_newest_checkpoint_is_skipped(points_copy, capsys):
    workdir, whole = points_copy
    for file in (workdir / "checkpoints" / "20").rglob("*"):
        if file.is_file():
            file.write_bytes(b"damaged")
    again = _run("density", workdir, *_POINTS)
    assert "Checkpoint 20 cannot be read" in capsys.readouterr().out
    assert again["parameters_sha256"] == whole["parameters_sha256"]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, capsys):
    arguments = [*_POINTS, "--warmup-steps", "0", "--learning-rate", "1e30"]
    arguments += ["--checkpoint-every", "20"]  # saving one would refuse the parameters first
    assert main(["density", "--workdir", str(tmp_path / "run"), *arguments]) == 2
    assert "The loss is nan at step" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["density", "--dataset", "digit"], "Did you mean 'digits'? Known: "),
        (["density", "--coeff", "1.0"], "error: --coeff must lie in (0, 1)"),
        (["density", "--coeff", "0"], "error: --coeff must lie in (0, 1)"),
        (["density", "--num-terms", "0"], "--num-terms must be ≥ 1; got 0"),
        (["density", "--batch-size", "5000"], "--batch-size must lie in [1, 1257]"),
        (["density", "--depths", "6", "6", "6", "6"], "8×8 cannot be halved 4 times"),
        (["density", "--features", "6", "6"], "one for each of 3 scales; got (6, 6)"),
        (["density", "--learning-rate", "-1"], "--learning-rate must lie in (0, inf); got -1.0"),
        (["density", "--activation", "relux"], "Unknown activation 'relux'; known: elu"),
        (["classification", "--dataset", "moons"], "no data set 'moons'"),
        (["density", "--dataset", "moons", "--augment"], "'moons' holds points"),
        (["density", "--config", "cifar"], "config 'cifar'. Did you mean 'cifar10'? Known: digits"),
        (["density", "--clip-gradient", "0"], "--clip-gradient must lie in (0, inf); got 0.0"),
        (["density", "--milestones", "0.5", "1.5"], "--milestones must lie in (0, 1); got 1.5"),
        (["density", "--keep-checkpoints", "0"], "--keep-checkpoints must be ≥ 1; got 0"),
        (["classification", "--mean", "0.5", "0.5"], "one for each of 1 channels; got (0.5, 0.5)"),
        (["classification", "--std", "0"], "--std must lie in (1e-6, 1e6); got 0.0"),
        (["density", "--dataset", "nothing.npz"], "nothing.npz cannot be read as an .npz file"),
        (["density", "--process-id", "1"], "--process-id = 1 would be ignored"),
        (["density", *_PROCESSES, "--process-id", "2"], "--process-id must lie in [0, 1]"),
        (["density", *_PROCESSES, "--process-id", "-1"], "--process-id must be ≥ 0; got -1"),
        (
            ["density", "--distributed", "--num-processes", "0"],
            "--num-processes must be ≥ 1; got 0",
        ),
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


def test_a_config_without_a_name_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["density", "--config"])
    assert "--config" in capsys.readouterr().err


def test_a_config_on_another_data_set_is_said_to_be(capsys):
    config = parse("density", ["--config", "checkerboard", "--dataset", "moons"])
    assert config.dataset == "moons" and config.depths == DENSITY["checkerboard"].depths
    assert "Settings of config 'checkerboard', on data set 'moons'" in capsys.readouterr().out
    parse("density", ["--config", "checkerboard"])
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("program", "config"),
    [("density", DENSITY["digits"]), ("classification", CLASSIFICATION["digits"])],
)
def test_help_explains_every_field(program, config, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([program, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for name in vars(config):
        assert "--" + name.replace("_", "-") in text


_SETTINGS = {
    *(TrainingConfig, DensityConfig, ClassificationConfig),
    *(kind for tool in TOOLS.values() for kind in tool.__mro__ if dataclasses.is_dataclass(kind)),
}


@pytest.mark.parametrize("kind", sorted(_SETTINGS, key=lambda kind: kind.__name__))
def test_every_setting_has_its_explanation(kind):
    (body,) = (node.body for node in ast.parse(inspect.getsource(kind)).body)
    for statement, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and "ClassVar" not in ast.unparse(statement):
            told = after.value.value if isinstance(after, ast.Expr) else ""
            assert isinstance(told, str) and len(told) > 3, ast.unparse(statement)


@pytest.mark.parametrize(("arguments", "optimised"), [(["--smoke"], False), ([], True)])
def test_a_smoke_run_alone_is_compiled_with_few_optimisations(arguments, optimised, monkeypatch):
    def disabled():
        return jax.config.values["jax_disable_most_optimizations"]

    def run(task):
        seen.append(disabled())
        raise TrainingError("stopped")

    seen, before = [], disabled()
    monkeypatch.setattr("train.training.run", run)
    assert main(["density", *arguments]) == 2
    assert seen == [not optimised] and disabled() == before


@pytest.mark.parametrize("program", ["density", "classification"])
def test_every_config_can_be_built_for_its_data_set(program):
    """By shapes alone: the data need not be there."""
    shapes = {"mnist": (28, 28, 1), "fashion_mnist": (28, 28, 1)}
    checked = set()
    for name, config in TASKS[program].experiments.items():
        config.check()
        config.smoke_variant().check()
        local = config.dataset in ("digits", *SAMPLERS)
        if local:
            dataset = load_dataset(config.dataset, max_examples=2)
        elif name == "points":
            dataset = Dataset(name, *[np.zeros((2, 3), np.float32)] * 3)
        else:
            height, width, channels = shapes.get(config.dataset, (32, 32, 3))
            sides = (height + 2 * config.margin, width + 2 * config.margin)
            images = np.zeros((2, *sides, channels), np.uint8)
            dataset = Dataset(name, *[images] * 3, num_levels=256, classes=10)
        task = TASKS[program](config, dataset)
        model = task.model
        if (model, dataset.example_shape) not in checked:  # some data sets take the same model
            batch = jax.ShapeDtypeStruct((1, *dataset.example_shape), "float32")
            FirstState(task.init, config, batch).template()
            checked.add((model, dataset.example_shape))
        assert model.coeff == config.coeff


def test_the_documentation_names_every_config():
    text = (Path(__file__).parents[1] / "docs" / "TRAINING.md").read_text()
    rows = {row.split("|")[1].strip(): row for row in text.splitlines() if row.startswith("| ")}
    for program, configs in {"density": DENSITY, "classification": CLASSIFICATION}.items():
        plain = (name for name in configs if name.removesuffix("-paper") not in SAMPLERS)
        for name in (*plain, *(SAMPLERS if program == "density" else ())):
            assert f"`{name}`" in rows[program]


def test_configs_are_named_and_kept_apart():
    for configs in (DENSITY, CLASSIFICATION):
        workdirs = [config.workdir for config in configs.values()]
        assert len(set(workdirs)) == len(workdirs)


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
    report = _run(program, tmp_path / "run", *arguments)
    assert report["steps"] == 2
    assert report["config"]["dataset"] == "mnist"
