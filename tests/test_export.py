"""``python -m train export``: the file holds the network that the run ships."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from finished_runs import finished_run

import iresnet_jax as ir
from train.__main__ import main
from train.data import load_dataset
from train.identity import NOT_COMPARED
from train.saved import load_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return finished_run(tmp_path_factory, "moons")


def test_the_file_holds_the_network_that_is_shipped(run):
    assert main(["export", "--workdir", str(run), "--licence", "CC0"]) == 0
    fitted = ir.load(run / "model.safetensors")
    saved = load_run(run, "newest")
    flow, certificate = saved.functions.shipped_flow(saved.state)
    x = jnp.asarray(saved.dataset.test[:20])
    np.testing.assert_allclose(fitted.flow.log_prob(x), flow.log_prob(x), rtol=1e-5)
    assert fitted.certificate.certified
    np.testing.assert_allclose(fitted.certificate.lipschitz, certificate.lipschitz, rtol=1e-6)
    assert (fitted.about["data"], fitted.about["licence"]) == ("moons", "CC0")
    settings = {f.name for f in dataclasses.fields(saved.config)}
    assert fitted.about["settings"].keys() == settings - {*NOT_COMPARED}
    report = json.loads((run / "report.json").read_text())
    for folder in (run, report["config"]["workdir"]):
        assert str(folder) not in json.dumps(fitted.about)
    assert fitted.about["results"]["bits_per_dim"] == report["bits_per_dim"]
    assert fitted.about["trained_with"]["packages"] == report["packages"]
    assert (run / "model.md").read_text(encoding="utf-8") == fitted.card


def test_results_of_other_weights_are_not_told(run, tmp_path, capsys):
    """A report that was written before the run went on."""
    report = json.loads((run / "report.json").read_text())
    try:
        (run / "report.json").write_text(json.dumps({**report, "parameters_sha256": "0"}))
        path = tmp_path / "model.safetensors"
        assert main(["export", "--workdir", str(run), "--output", str(path)]) == 0
    finally:
        (run / "report.json").write_text(json.dumps(report))
    assert "of other weights: the file tells no results" in capsys.readouterr().out
    assert ir.load(path).about["results"] == {}


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    assert main(["export", "--workdir", str(tmp_path)]) == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.slow
def test_what_a_file_lacks_is_said(tmp_path, capsys):
    """Of a hybrid with a learned dequantisation, the classes; the noise is in the file."""
    run = ["--workdir", str(tmp_path / "run")]
    small = ["--depths", "1", "--features", "8", "--steps", "2", "--batch-size", "16"]
    small += ["--max-draws", "2", "--dequantization", "variational", "--unknown", "noise"]
    assert main(["hybrid", "--dataset", "digits", *small, *run]) == 0
    assert main(["export", *run]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "Left out: the head" in told
    fitted = ir.load(tmp_path / "run" / "model.safetensors")
    assert fitted.about["left_out"] == ["head"]
    levels = load_dataset("digits").test[:3]
    noisy, log_noise = fitted.dequantizer(levels, jax.random.key(0))
    assert noisy.shape == levels.shape and np.isfinite(np.asarray(log_noise)).all()
    assert fitted.variables["params"].keys() == {"prior_log_std_0", "prior_mean_0", "scale0_blocks"}
