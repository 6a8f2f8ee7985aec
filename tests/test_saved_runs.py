"""Runs that an earlier version saved: they load, with the numbers they had then.

``fixtures/saved_runs.tar.xz`` holds a run of each program on the digits (two blocks, 20 and 200
steps) as commit 0b9cb1c saved it, ``saved_runs.json`` what that commit said of them.
"""

import json
import tarfile
from pathlib import Path

import pytest

from train.__main__ import main
from train.report import parameters_sha256
from train.saved import load_run

FIXTURES = Path(__file__).with_name("fixtures")
EXPECTED = json.loads((FIXTURES / "saved_runs.json").read_text())


@pytest.fixture(scope="module", params=EXPECTED)
def run(request, tmp_path_factory):
    """A run's folder, and what is expected of it."""
    folder = tmp_path_factory.mktemp("saved")
    with tarfile.open(FIXTURES / "saved_runs.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder / request.param, EXPECTED[request.param]


@pytest.mark.parametrize("which", ["newest", "best"])
def test_the_parameters_are_read_bit_for_bit(run, which):
    workdir, expected = run
    state = load_run(workdir, which).state
    assert state.step == expected["step"]
    assert parameters_sha256(state.params) == expected["parameters_sha256"]


def test_it_is_evaluated_and_certified_as_it_was(run):
    """Up to rounding: the bounds are rigorous, and XLA may order sums in another way."""
    workdir, expected = run
    assert main(["evaluate", "--workdir", str(workdir)]) == 0
    report = json.loads((workdir / "evaluation" / "evaluation.json").read_text())
    for name in expected.keys() & {"bits_per_dim", "accuracy"}:
        assert report[name] == pytest.approx(expected[name], rel=1e-4)
    certificate = json.loads((workdir / "evaluation" / "certificate.json").read_text())
    products = [block["product"] for block in certificate["blocks"]]
    assert products == pytest.approx(expected["lipschitz"], rel=1e-5)
    assert all(block["lipschitz"] <= block["product"] for block in certificate["blocks"])
