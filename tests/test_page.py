"""The page of a run: well-formed, in one file, with the numbers of its report."""

import dataclasses
import math
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from page_cases import CONFIG, REPORT, certificate, checked, draw, page, whole_page

from train import legend
from train.__main__ import parse
from train.configs import CLASSIFICATION, DENSITY, HYBRID
from train.density import likelihood_rows
from train.page import write_page
from train.page_curves import thinned
from train.page_parts import Html, element
from train.page_settings import command, nearest, settings
from train.page_verdict import verdict, warnings
from train.page_walk import great_circles, walk


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return whole_page(tmp_path_factory.mktemp("page"))


def written(folder, **changes):
    path = folder / "report.html"
    write_page(path, page(folder, **changes))
    return checked(path)


def test_a_page_is_one_well_formed_file_without_addresses_or_scripts(whole):
    assert checked(whole)
    text = whole.read_text(encoding="utf-8")
    assert not re.search(r"https?:|url\((?!#)|@import|xmlns", text)
    assert text.count("data:image/png;base64,") == 3
    assert whole.stat().st_size < 2_000_000


def test_a_page_has_the_numbers_of_its_report(whole):
    text = checked(whole).text
    told = "Certified invertible; 1.8387 ± 0.0020 bits/dim on 360 held-out images (bias ≤ 0.001)"
    assert told in text
    for number in ("1.8387 ± 0.0020", "± 0.0129", "0.9106", "8.4e-06", "3.8e-05", "0.013",
                   "239,008", REPORT["parameters_sha256"], "0.10.2"):  # fmt: skip
        assert number in text
    for title in ("Samples", "Training", "Results", "Reconstructions", "A walk through the latents",
                  "Bounds", "Settings", "Versions"):  # fmt: skip
        assert title in text


def test_bounds_are_rounded_up_and_the_loosest_and_tightest_layers_are_marked(whole):
    text = checked(whole).text
    assert "scale 0, block 0, layer 0 tightest 0.9600 0.97 0.97 99.0%" in text
    assert "scale 0, block 2, layer 2 loosest 0.9380 0.97 0.97 96.7%" in text
    line = "Largest L: 0.7813, of scale 0, block 2. Loosest layer: scale 0, block 2, layer 2, 96.7%"
    assert line in text and "Tightest layer: scale 0, block 0, layer 0, 99.0% used" in text
    assert "scale 0, block 2 largest L 0.7813 0.9375 1.25 6.5" in text


def test_a_bound_that_is_no_number_counts_as_the_largest(tmp_path):
    proved = certificate(problem="not finite")
    proved["blocks"][1]["lipschitz"] = proved["blocks"][1]["layers"][0]["sigma"] = "nan"
    text = written(tmp_path, report=REPORT | {"certified": False}, proved=proved).text
    assert "Largest L: nan, of scale 0, block 1." in text
    assert "Tightest layer: scale 0, block 1, layer 0, inf% used" in text


def test_what_its_rows_hold_is_explained_in_the_words_of_the_terminal(whole):
    text = checked(whole).text
    for term in [*legend.of_rows(likelihood_rows(REPORT)), *legend.BLOCKS, *legend.TARGETS]:
        assert f"{term.name} {term.meaning}" in text
    assert "(by double precision, first 64 examples)" in text
    assert "AUROC" not in text


def test_whatever_a_user_names_is_escaped(tmp_path):
    name = "<script>alert('&amp; \"quotes\"')</script>"
    config = dataclasses.replace(CONFIG, dataset=name, workdir=Path("runs") / "<b>&")
    proved = certificate(problem="its <bound> is 1.2 & more")
    found = written(tmp_path, config=config, proved=proved,
                    report=REPORT | {"certified": False, "device": "<i>"})  # fmt: skip
    assert (
        name in found.text and "NOT certified: scale 0, block 0: its <bound> is 1.2" in found.text
    )
    assert "<b>&" in found.text and "<i>" in found.text


def test_elements_escape_all_that_is_no_markup():
    made = element("p", "a < b", Html("<i>&amp;</i>"), class_='"&', open=True, hidden=False)
    assert made == '<p class="&quot;&amp;" open>a &lt; b<i>&amp;</i></p>'


def test_a_run_that_was_stopped_has_a_page_without_figures(tmp_path):
    draw(tmp_path)  # of an earlier evaluation
    report = {name: REPORT[name] for name in ("schedule", "num_parameters")}
    report |= {"steps": 200, "interrupted": True, "config": {"steps": 1400}}
    text = written(tmp_path, report=report).text
    assert "Not evaluated: training was stopped after step 200 of 1,400." in text
    assert "bits/dim on" not in text and "Bounds" not in text
    assert "base64" not in (tmp_path / "report.html").read_text()


def test_a_picture_of_an_earlier_evaluation_is_left_out(tmp_path):
    draw(tmp_path)
    written(tmp_path, report=REPORT | {"pictures": ["samples.png"]})
    assert (tmp_path / "report.html").read_text().count("data:image/png") == 1


@pytest.mark.slow
def test_a_large_picture_is_embedded_smaller(tmp_path):
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (800, 1600, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "samples.png")
    assert (tmp_path / "samples.png").stat().st_size > 3_000_000
    written(tmp_path, report=REPORT | {"pictures": ["samples.png"]})
    assert (tmp_path / "report.html").stat().st_size < 2_000_000  # noise, which nothing compresses


# The verdict


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"all_converged": False}, "Not every inverse of a test example"),
        ({"samples_converged": False}, "Not every inverse of a sample"),
        ({"samples_converged": None}, "Samples could not be drawn"),
        ({"bits_per_dim_stderr": 0.003}, "standard error of the likelihood missed"),
        ({"bits_per_dim_bias_bound": "inf"}, "bound on the bias of the likelihood missed"),
        ({"bits_per_dim_stderr": "nan"}, "standard error of the likelihood missed"),
    ],
)
def test_what_speaks_against_a_figure_is_said(changes, told):
    assert not list(warnings(REPORT))
    (line,) = warnings(REPORT | changes)
    assert told in line


def test_a_network_that_is_not_certified_is_said_to_be_so_with_the_reasons():
    told = verdict(REPORT | {"certified": False}, certificate(5, "L = 1.2"), what="images")
    assert told.startswith("NOT certified: scale 0, block 0: L = 1.2; scale 0, block 1: L = 1.2")
    assert "and 2 more" in told


def test_an_accuracy_has_its_error():
    report = {"certified": True, "accuracy": 0.975, "accuracy_stderr": 0.0083}
    told = verdict(report | {"accuracy_examples": 360}, certificate(), what="images")
    assert told == (
        "Certified invertible; 97.50% ± 0.83% classified correctly on 360 held-out images"
    )


def test_an_evaluation_without_a_certificate_is_not_taken_for_a_stopped_run():
    own = {"steps": 3, "interrupted": False}
    assert verdict(own, None, what="images") == "Evaluated without a certificate"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"bits_per_dim_stderr": 0.003}, "a standard error of 0.002 needs more than 10 draws"),
        ({"bits_per_dim": math.nan, "bits_per_dim_stderr": math.nan}, "likelihood is not finite"),
        ({"bits_per_dim_bias_bound": 0.002}, "a bias ≤ 0.001 needs more than 1000 terms"),
        ({"bits_per_dim_bias_bound": math.inf}, "it takes a certified network"),
    ],
)
def test_a_target_that_was_missed_says_why(changes, told):
    before, after = (likelihood_rows(REPORT | found) for found in ({}, changes))
    (row,) = after[len(before) :]
    assert row[0] == "TARGET MISSED" and told in row[1]


# Settings


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (CONFIG, "digits"),
        (DENSITY["checkerboard"], "checkerboard"),
        (DENSITY["cifar10"].smoke_variant(), "cifar10"),
        (
            dataclasses.replace(DENSITY["digits"], dataset="my images.npz", workdir=Path("a b")),
            None,
        ),
        (dataclasses.replace(DENSITY["digits"], dataset="-x.npz", workdir=Path("-a\nb")), None),
        (dataclasses.replace(DENSITY["digits"], shrink=False, margins=(1, 1, 2, 2)), "digits"),
        (dataclasses.replace(DENSITY["digits"], schedule="steps", milestones=(), seed=5), "digits"),
        (dataclasses.replace(CLASSIFICATION["digits"], coeff=None, seed=7), "digits"),
        (dataclasses.replace(HYBRID["digits"], unknown=("noise",)), "digits"),
    ],
    ids=lambda value: None if value is None or isinstance(value, str) else value.program,
)
def test_the_command_gives_the_settings_again(config, name, capsys):
    words = shlex.split(command(config))
    assert words[:4] == ["python", "-m", "train", config.program]
    assert parse(config.program, words[4:]) == config
    assert name in (None, nearest(config)[0])


def test_a_program_of_a_users_own_is_repeated_by_its_script(monkeypatch):
    own = type("OwnConfig", (type(CONFIG),), {"__module__": "own"})
    monkeypatch.setattr("sys.argv", ["my own.py", "density"])
    words = shlex.split(command(own(**vars(CONFIG))))
    assert words[:3] == ["python", "my own.py", "density"]


def test_settings_that_differ_from_the_experiment_are_marked(whole):
    name, found = settings(CONFIG)
    differing = {s.name for s in found if s.differs}
    assert (name, differing) == ("digits", {"depths", "features", "seed"})
    text = checked(whole).text
    assert "depths changed 2 1 6 6 6" in text and "seed changed 3 0" in text


# Curves, and the walk


def test_a_long_curve_keeps_its_ends_and_is_thinned():
    steps = np.arange(1, 100_001)
    few, values = thinned(steps, steps / 2)
    assert 1000 < len(few) <= 2500 and few[0] == 1 and few[-1] == 100_000
    np.testing.assert_array_equal(values, few / 2)
    assert not len(thinned(steps[:0], steps[:0])[0])


def test_great_circles_are_those_of_repeated_rotations():
    rng, frames = np.random.default_rng(0), 7
    start, end = rng.normal(size=(2, 3, 5))
    found = great_circles(start, end, frames)
    np.testing.assert_allclose(found[:, [0, -1]], np.stack([start, end], 1), atol=1e-12)
    for a, b, path in zip(start, end, found, strict=True):
        lengths = np.linspace(np.linalg.norm(a), np.linalg.norm(b), frames)
        np.testing.assert_allclose(np.linalg.norm(path, axis=1), lengths, rtol=1e-12)
        plane = np.linalg.qr(np.stack([a, b], axis=1))[0]
        x, y = (plane.T @ v / np.linalg.norm(v) for v in (a, b))
        turn = np.arctan2(x[0] * y[1] - x[1] * y[0], x @ y) / (frames - 1)
        rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        units = [np.linalg.matrix_power(rotation, k) @ x for k in range(frames)]
        expected = np.stack(units) @ plane.T * lengths[:, None]
        np.testing.assert_allclose(path, expected, atol=1e-12)


def test_where_there_is_no_great_circle_the_path_is_straight():
    a = np.array([[1.0, 2.0], [1.0, 2.0], [0.0, 0.0]])
    b = np.array([[2.0, 4.0], [-1.0, -2.0], [1.0, 1.0]])
    expected = a[:, None] + np.linspace(0, 1, 5)[None, :, None] * (b - a)[:, None]
    np.testing.assert_allclose(great_circles(a, b, 5), expected, atol=1e-12)


@pytest.mark.parametrize("with_priors", [True, False])
def test_a_walk_begins_and_ends_at_the_examples(with_priors):
    """Through a network that doubles its latents, of two parts."""
    rng = np.random.default_rng(1)
    shapes = (2, 2, 1), (3,)
    latents = tuple(rng.normal(size=(4, *s)).astype(np.float32) for s in shapes)
    made = [SimpleNamespace(mean=rng.normal(size=s), log_std=rng.normal(size=s)) for s in shapes]

    def inverse(flow, z):
        x = np.concatenate([2.0 * part.reshape(len(part), -1) for part in z], axis=1)
        x[0] = np.nan
        return x, SimpleNamespace(converged=np.arange(2 * len(x)).reshape(2, -1) != len(x) - 1)

    flow = SimpleNamespace(priors=made if with_priors else [])
    x, missed = walk(SimpleNamespace(inverse=inverse), flow, latents, pairs=2, frames=5)
    expected = np.concatenate([2.0 * z.reshape(4, -1) for z in latents], axis=1)
    assert missed == 2 and x.shape == (10, 7)
    np.testing.assert_allclose(x[5], expected[1], rtol=1e-5)
    np.testing.assert_allclose(x[[4, 9]], expected[2:], rtol=1e-5)
