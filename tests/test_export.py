"""``python -m train export``: the file holds the network that the run ships."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import iresnet_jax as ir
from train.__main__ import main
from train.saved import load_run

pytest.importorskip("safetensors")

SMALL = ["--smoke", "--depths", "2", "--features", "8", "--steps", "2", "--batch-size", "16"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("moons") / "run"
    assert main(["density", "--dataset", "moons", *SMALL, "--workdir", str(workdir)]) == 0
    return workdir


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
    assert fitted.about["settings"].keys() == {f.name for f in dataclasses.fields(saved.config)}


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    assert main(["export", "--workdir", str(tmp_path)]) == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.slow
def test_what_a_file_lacks_is_said(tmp_path, capsys):
    """Of a hybrid with a learned dequantisation, the classes and the noise."""
    run = ["--workdir", str(tmp_path / "run")]
    small = [*SMALL, "--max-draws", "2", "--dequantization", "variational", "--unknown", "noise"]
    assert main(["hybrid", "--dataset", "digits", "--depths", "1", *small[3:], *run]) == 0
    assert main(["export", *run]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "Left out: the dequantizer" in told and "Left out: the head" in told
    fitted = ir.load(tmp_path / "run" / "model.safetensors")
    assert fitted.about["left_out"] == ["dequantizer", "head"]
    assert fitted.variables["params"].keys() == {"prior_log_std_0", "prior_mean_0", "scale0_blocks"}
