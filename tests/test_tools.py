"""What a saved run can do, and what is refused."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from finished_runs import finished_run
from page_cases import checked

from iresnet_jax import FixedPointInfo
from train import figures
from train.__main__ import main
from train.classification import Classification
from train.configs import CLASSIFICATION, DENSITY
from train.density import Density
from train.report import parameters_sha256
from train.saved import load_data, load_network, load_run, read_config
from train.tools import Sample, between
from train.workdir import WorkdirError, jsonable


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return finished_run(tmp_path_factory, "digits")


@pytest.fixture(scope="module")
def points(tmp_path_factory):
    return finished_run(tmp_path_factory, "moons")


def run(name, workdir, *arguments):
    return main([name, "--workdir", str(workdir), *arguments])


def copied(workdir, folder, **changes):
    """The run with other settings, as if it had been trained with them."""
    copy = edited(workdir, folder, **changes)
    for path in (copy / "checkpoints").glob("*/data/metadata"):
        content = json.loads(path.read_text())
        path.write_text(json.dumps(content | {"run": content["run"] | changes}))
    return copy


def edited(workdir, folder, **changes):
    """The run with a changed config.json."""
    copy = folder / "run"
    shutil.copytree(workdir / "checkpoints", copy / "checkpoints")
    config = json.loads((workdir / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | changes))
    return copy


def refused(capsys, name, workdir, *arguments):
    assert run(name, workdir, *arguments) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


def test_evaluate_repeats_the_report_of_the_newest_checkpoint(digits):
    assert run("evaluate", digits) == 0
    report = json.loads((digits / "report.json").read_text())
    evaluation = json.loads((digits / "evaluation" / "evaluation.json").read_text())
    for name in ("bits_per_dim", "bits_per_dim_bias_bound", "block_lipschitz_max"):
        assert evaluation[name] == report[name]
    assert evaluation["step"] == 20
    page = checked(digits / "evaluation" / "report.html").text
    assert f"{evaluation['bits_per_dim']:.4f} ± " in page and "of step 20" in page


def test_a_checkpoint_is_chosen_by_its_step_or_as_the_best(digits):
    assert load_run(digits, 10).state.step == 10
    best = load_run(digits, "best").state.step
    records = [json.loads(line) for line in (digits / "metrics.jsonl").read_text().splitlines()]
    scores = {r["step"]: r["validation"] for r in records if "validation" in r}
    kept = {step: scores[step] for step in (10, 20)}
    assert best == min(kept, key=kept.get)


@pytest.mark.parametrize("own", [None, 2300, 100])
@pytest.mark.parametrize("max_test", [20, 250])
def test_fewer_test_images_leave_a_classifier_its_training_images(own, max_test, tmp_path):
    """From all over the training set its head takes its statistics."""
    draw, path = np.random.default_rng(0), tmp_path / "own.npz"
    np.savez(path, images=draw.integers(0, 256, (3000, 4, 4), np.uint8), labels=np.arange(3000) % 3)
    config = dataclasses.replace(
        CLASSIFICATION["digits"], dataset=str(path), max_examples=own, mean=(0.5,), std=(1.0,)
    )
    whole = Classification.load(dataclasses.replace(config, max_examples=None))
    few = load_data(Classification, config, max_test)
    np.testing.assert_array_equal(few.train, whole.train[:own])
    np.testing.assert_array_equal(few.train_labels, whole.train_labels[:own])
    np.testing.assert_array_equal(few.test, whole.test[:max_test])
    np.testing.assert_array_equal(few.test_labels, whole.test_labels[:max_test])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param("sample", "--count 9 --temperature 0.5", marks=pytest.mark.slow),
        pytest.param("reconstruct", "--count 3", marks=pytest.mark.slow),
        ("interpolate", "--count 2 --frames 4"),
    ],
)
def test_pictures_are_written_where_they_are_asked_for(name, options, digits, tmp_path):
    output = tmp_path / f"{name}.png"
    assert run(name, digits, *options.split(), "--output", str(output)) == 0
    assert output.stat().st_size > 2000


def test_points_are_sampled(points, tmp_path, capsys):
    """And saved, with the latents that they come from."""
    output = tmp_path / "own.png"
    assert run("sample", points, "--count", "50", "--save-arrays", "--output", str(output)) == 0
    assert output.stat().st_size > 5000
    samples, latents = (np.load(tmp_path / name) for name in ("own.npy", "own-latents.npy"))
    flow = load_run(points, "newest").functions.shipped_flow(load_run(points, "newest").state)[0]
    (forward,) = jax.jit(lambda flow, x: flow.forward(x))(flow, samples)
    np.testing.assert_allclose(forward, latents, atol=1e-3)
    told = capsys.readouterr().out.splitlines()
    assert told[-1] == str(output) and str(tmp_path / "own.npy") in told


@pytest.mark.slow
def test_a_picture_that_fails_leaves_the_evaluation(digits, monkeypatch, capsys):
    def fail(*arguments):
        raise RuntimeError("no room")

    monkeypatch.setattr(Density, "_draw_samples", fail)
    monkeypatch.setattr(figures, "reconstructions", fail)
    assert run("evaluate", digits, "--max-examples", "20") == 0
    report = json.loads((digits / "evaluation" / "evaluation.json").read_text())
    assert report["bits_per_dim"] > 0.0 and report["samples_converged"] is None
    told = capsys.readouterr().err
    assert "The samples could not be made: no room" in told
    assert "reconstructions.png could not be made: no room" in told


def test_a_picture_for_tensorboard_that_fails_does_not_stop_training(digits, monkeypatch, capsys):
    def fail(*arguments):
        raise RuntimeError("no room")

    saved = load_run(digits, "newest")
    monkeypatch.setattr(figures, "image_grid", fail)
    monkeypatch.setattr(Density, "_draw_samples", fail)
    assert saved.task.pictures(saved.state) == {}
    assert capsys.readouterr().err.count("could not be made: no room") == 2


def test_a_network_of_images_is_loaded_without_its_data(digits, monkeypatch):
    whole = load_run(digits, "newest")
    monkeypatch.setattr(Density, "load", lambda _: pytest.fail("the data were loaded"))
    alone = load_network(digits, "newest")
    assert alone.task.model == whole.task.model
    assert alone.dataset.num_levels == whole.dataset.num_levels
    hashes = (parameters_sha256(run.state.params) for run in (alone, whole))
    assert next(hashes) == next(hashes)


def test_points_are_certified_without_their_data(points, monkeypatch):
    monkeypatch.setattr(Density, "load", lambda _: pytest.fail("the data were loaded"))
    assert run("certify", points) == 0


def test_without_any_score_there_is_no_best_checkpoint(points, tmp_path, capsys):
    copy = edited(points, tmp_path)
    for path in (copy / "checkpoints").glob("*/metrics"):
        shutil.rmtree(path)
    told = refused(capsys, "certify", copy, "--checkpoint", "best")
    assert "has a validation score" in told and "--checkpoint newest" in told


def test_a_network_that_was_never_trained_is_not_certified(digits, tmp_path, capsys):
    copy = edited(digits, tmp_path, coeff=0.5)
    assert "(coeff: 0.97 there, 0.5 here)" in refused(capsys, "certify", copy)
    assert not (copy / "certificate.json").exists()


def test_an_evaluation_that_is_a_file_is_told(digits, tmp_path, capsys):
    copy = edited(digits, tmp_path)
    (copy / "evaluation").touch()
    assert "evaluation: File exists. Move what is there" in refused(capsys, "evaluate", copy)


def test_every_run_carries_its_certificate_and_certify_repeats_it(digits, capsys):
    written = json.loads((digits / "certificate.json").read_text())
    report = json.loads((digits / "report.json").read_text())
    assert written["certified"] and report["certified"]
    assert report["block_lipschitz_max"] == max(b["lipschitz"] for b in written["blocks"]) < 1.0
    assert run("certify", digits) == 0
    assert json.loads((digits / "certificate.json").read_text()) == written
    told = capsys.readouterr().out
    assert "Certified invertible." in told and written["blocks"][0]["name"] in told


def test_what_is_not_certified_ends_with_status_1_and_names_the_blocks(digits, tmp_path, capsys):
    copy = copied(digits, tmp_path, coeff=None)
    assert run("certify", copy) == 1
    told = capsys.readouterr().out
    certificate = json.loads((copy / "certificate.json").read_text())
    broken = [block for block in certificate["blocks"] if block["lipschitz"] >= 1.0]
    assert certificate["certified"] is False and broken
    assert "NOT certified invertible:" in told
    assert all(f"{block['name']}: {block['problem']}" in told for block in broken)


def test_shipped_kernels_are_within_their_bounds_unless_power_iteration_is_asked_for(
    digits, tmp_path
):
    largest = {}
    settings = {
        "as trained": ("estimate", False),
        "shrunk": ("estimate", True),
        "bound": ("bound", False),
    }
    for name, (normalize, shrink) in settings.items():
        (tmp_path / name).mkdir()
        copy = copied(digits, tmp_path / name, normalize=normalize, shrink=shrink)
        assert run("certify", copy) == 0
        blocks = json.loads((copy / "certificate.json").read_text())["blocks"]
        largest[name] = max(b["upper_bound"] for block in blocks for b in block["layers"])
    assert largest["shrunk"] <= DENSITY["digits"].coeff < largest["as trained"]
    assert largest["bound"] <= DENSITY["digits"].coeff


def test_an_interpolation_starts_and_ends_at_its_images():
    start, end = np.zeros((2, 3)), np.arange(6.0).reshape(2, 3)
    frames = between(start, end, 5).reshape(2, 5, 3)
    np.testing.assert_allclose(frames, np.linspace(start, end, 5, axis=1))


def test_an_inverse_that_missed_its_tolerance_writes_no_picture(digits, tmp_path, capsys):
    copy = copied(digits, tmp_path, inverse_max_steps=1)
    message = refused(capsys, "sample", copy, "--count", "4")
    assert "4 of 4 inverses did not meet their tolerance; the worst is sample" in message
    assert " at scale " in message and ", block " in message and not (copy / "sample.png").exists()
    assert run("sample", copy, "--count", "4", "--allow-unconverged") == 0
    assert (copy / "sample.png").exists()


def test_a_reconstruction_tells_its_error_and_meets_an_error_tolerance(digits, tmp_path, capsys):
    copy = copied(digits, tmp_path, inverse_error_tolerance=0.05)
    assert run("reconstruct", copy, "--count", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("error of the inverse, proved: ≤ ") and "double" in lines[0]
    assert 0.0 < float(lines[0].split("≤ ")[1].split()[0]) < 0.05  # what a block may err
    residual = next(line for line in lines if line.startswith("‖F(x) − z‖, measured: "))
    assert float(residual.split(": ")[1]) < 1.0
    copied_again = tmp_path / "finer"
    copied_again.mkdir()
    finer = copied(digits, copied_again, inverse_error_tolerance=1e-9, inverse_max_steps=50)
    message = refused(capsys, "sample", finer, "--count", "2")
    assert "error_tolerance 1e-09 is below what rounding allows" in message
    assert "at scale" in message and not (finer / "sample.png").exists()


def test_samples_that_are_not_finite_are_not_drawn():
    info = FixedPointInfo(*np.ones((6, 2, 3), bool))
    x = np.array([[1.0], [np.inf], [np.nan]])
    with pytest.raises(ValueError, match="2 of 3 inverses are not finite, the first of sample 1"):
        Sample(workdir=None).check_converged(x, info, None, None)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("sample", ["--count", "0"], "count must be ≥ 1; got 0"),
        ("interpolate", ["--frames", "1"], "frames must be ≥ 2; got 1"),
        ("reconstruct", ["--count", "5000"], "The test set has 360 images; 5000 are asked for"),
        ("sample", ["--temperature", "-1"], "temperature must be ≥ 0; got -1.0"),
        ("evaluate", ["--max-examples", "0"], "--max-examples must be ≥ 1; got 0"),
        ("sample", ["--count", "1" + "0" * 15], "count must lie in [1, "),
        ("sample", ["--seed", str(2**32 + 7)], "seed must be an integer in [0, 4294967292]"),
        ("sample", ["--seed", "-1"], "seed must be an integer in [0, 4294967292]"),
        ("sample", ["--temperature", "nan"], "temperature must be finite; got nan"),
        ("interpolate", ["--frames", "5000"], "frames must be ≤ 1,000; got 5000"),
        ("sample", ["--output", "x.json"], "output must be a picture"),
        ("evaluate", ["--checkpoint", "7"], "no checkpoint of step 7; there are 10, 15, 20"),
    ],
)
def test_settings_out_of_range_are_refused(name, arguments, message, digits, capsys):
    assert message in refused(capsys, name, digits, *arguments)


def test_what_is_no_run_is_refused(tmp_path, points, capsys):
    assert "holds no run" in refused(capsys, "sample", tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "cannot be read as the config of a run" in refused(capsys, "sample", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(jsonable(DENSITY["digits"])))
    assert "holds no checkpoint yet" in refused(capsys, "sample", tmp_path)
    assert "holds points, not images" in refused(capsys, "reconstruct", points)


def test_a_config_is_read_back_as_it_was_written(tmp_path):
    for config in DENSITY.values():
        (tmp_path / "config.json").write_text(json.dumps(jsonable(config)))
        assert read_config(tmp_path) == config


def test_settings_that_a_config_lacks_are_told_and_are_what_was_in_force(tmp_path, capsys):
    config = dataclasses.replace(DENSITY["digits"], seed=3)
    content = jsonable(config)
    for name in ("shrink", "inverse_solver", "max_draws"):
        del content[name]
    (tmp_path / "config.json").write_text(json.dumps(content))
    read = read_config(tmp_path)
    assert read == dataclasses.replace(config, shrink=False, inverse_solver="plain")
    (line,) = capsys.readouterr().err.splitlines()
    for told in ("config.json", "shrink = False", "inverse_solver = 'plain'",
                 "max_draws = 64"):  # fmt: skip
        assert told in line
    assert "seed" not in line
    (tmp_path / "config.json").write_text(json.dumps(jsonable(config)))
    assert read_config(tmp_path) == config and not capsys.readouterr().err


def test_a_setting_without_a_default_cannot_be_assumed(tmp_path):
    content = jsonable(DENSITY["digits"])
    del content["features"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(WorkdirError, match="features"):
        read_config(tmp_path)


def test_prepare_refuses_unknown_names_and_finds_what_is_prepared(tmp_path, capsys):
    assert main(["prepare", "--dataset", "mnits"]) == 2
    assert "Did you mean 'mnist'?" in capsys.readouterr().err
    folder = tmp_path / "mnist" / "3.0.1"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text("{}")
    assert main(["prepare", "--dataset", "mnist", "--data-dir", str(tmp_path)]) == 0
    assert str(folder) in capsys.readouterr().out
