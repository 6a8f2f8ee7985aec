"""Runs that an earlier version saved: they load, with the numbers they had then."""

import json

import pytest
from saved_cases import EXPECTED, unpacked

from train.__main__ import main
from train.report import parameters_sha256
from train.saved import load_run


@pytest.fixture(scope="module")
def run(request, tmp_path_factory):
    """A run's folder, and what is expected of it."""
    folder = tmp_path_factory.mktemp("saved")
    return unpacked(folder, request.param), EXPECTED[request.param]


@pytest.mark.parametrize("run", EXPECTED, indirect=True)
@pytest.mark.parametrize("which", ["newest", "best"])
def test_the_parameters_are_read_bit_for_bit(run, which):
    workdir, expected = run
    state = load_run(workdir, which).state
    assert state.step == expected["step"]
    assert parameters_sha256(state.params) == expected["parameters_sha256"]


@pytest.mark.slow
@pytest.mark.parametrize("run", EXPECTED, indirect=True)
def test_it_is_evaluated_as_it_was(run):
    """Up to rounding: XLA may order sums in another way."""
    workdir, expected = run
    assert main(["evaluate", "--workdir", str(workdir)]) == 0
    report = json.loads((workdir / "evaluation" / "evaluation.json").read_text())
    for name in expected.keys() & {"bits_per_dim", "accuracy"}:
        assert report[name] == pytest.approx(expected[name], rel=1e-4)
    certified_as_it_was(workdir / "evaluation", expected)


@pytest.mark.parametrize(
    "run", ["density", pytest.param("classification", marks=pytest.mark.slow)], indirect=True
)
def test_it_is_certified_as_it_was(run):
    workdir, expected = run
    assert main(["certify", "--workdir", str(workdir)]) == 0
    certified_as_it_was(workdir, expected)


def certified_as_it_was(folder, expected):
    """Up to rounding: the bounds are rigorous."""
    certificate = json.loads((folder / "certificate.json").read_text())
    products = [block["product"] for block in certificate["blocks"]]
    assert products == pytest.approx(expected["lipschitz"], rel=1e-5)
    assert all(block["lipschitz"] <= block["product"] for block in certificate["blocks"])
