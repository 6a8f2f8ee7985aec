"""The programs' command line: settings, their help, and what is refused."""

import ast
import dataclasses
import inspect
from pathlib import Path

import jax
import numpy as np
import pytest

from train.__main__ import main, parse
from train.configs import (
    CLASSIFICATION,
    DENSITY,
    ClassificationConfig,
    DensityConfig,
    TrainingConfig,
)
from train.data import Dataset, load_dataset
from train.points import SAMPLERS
from train.programs import TASKS
from train.steps import FirstState
from train.tools import TOOLS
from train.training import TrainingError

_POINTS = [
    *("--dataset", "moons", "--smoke", "--features", "8", "--batch-size", "32", "--steps", "20"),
]
_PROCESSES = ["--distributed", "--coordinator", "localhost:1", "--num-processes", "2"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["density", "--dataset", "digit"], "Did you mean 'digits'? Known: "),
        (["density", "--coeff", "1.0"], "--coeff must lie in (0, 1)"),
        (["density", "--coeff", "0"], "--coeff must lie in (0, 1)"),
        (
            ["density", "--margin", "1", "--margins", "1", "1", "0", "0"],
            "--margin must be 0 beside margins (1, 1, 0, 0); got 1",
        ),
        (["density", "--margins", "1", "1", "0", "-1"], "--margins must be ≥ 0; got"),
        (
            ["density", "--train-estimator", "series", "--continuation", "0.5"],
            "--continuation = 0.5 would be ignored: it needs --train-estimator roulette; got",
        ),
        (
            ["hybrid", "--dequantization", "uniform", "--dequantization-features", "9"],
            "would be ignored: it needs --dequantization variational; got 'uniform'.",
        ),
        (["classification", "--milestones", "0.5"], "needs --schedule steps; got 'cosine'."),
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


CONFIGS = [
    (program, name)
    for program in ("density", "classification")
    for name in TASKS[program].experiments
]
#: One of each kind of data and network.
FIRST = [("density", name) for name in ("digits", "cifar10", "moons", "points")]
FIRST.append(("classification", "mnist"))


@pytest.mark.parametrize(("program", "name"), CONFIGS)
def test_every_config_has_settings_within_their_ranges(program, name):
    config = TASKS[program].experiments[name]
    config.check()
    config.smoke_variant().check()


@pytest.mark.parametrize(
    ("program", "name"),
    [pytest.param(*c, marks=[] if c in FIRST else pytest.mark.slow) for c in CONFIGS],
)
def test_every_config_can_be_built_for_its_data_set(program, name):
    """By shapes alone: the data need not be there."""
    shapes = {"mnist": (28, 28, 1), "fashion_mnist": (28, 28, 1)}
    config = TASKS[program].experiments[name]
    if config.dataset in ("digits", *SAMPLERS):
        dataset = load_dataset(config.dataset, max_examples=2)
    elif name == "points":
        dataset = Dataset(name, *[np.zeros((2, 3), np.float32)] * 3)
    else:
        height, width, channels = shapes.get(config.dataset, (32, 32, 3))
        sides = (height + 2 * config.margin, width + 2 * config.margin)
        images = np.zeros((2, *sides, channels), np.uint8)
        dataset = Dataset(name, *[images] * 3, num_levels=256, classes=10)
    task = TASKS[program](config, dataset)
    batch = jax.ShapeDtypeStruct((1, *dataset.example_shape), "float32")
    FirstState(task.init, config, batch).template()
    assert task.model.coeff == config.coeff


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
