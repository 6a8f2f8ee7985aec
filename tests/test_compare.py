"""Runs side by side: what is said of their differences, and what is refused."""

import dataclasses
import re

import numpy as np
import pytest
from page_cases import CONFIG, REPORT, checked, draw, made

from train import figures
from train.__main__ import main
from train.compare import Compare, difference, differences, labels, read_runs
from train.configs import CLASSIFICATION, HYBRID
from train.output import OutputError, page_path
from train.page_curves import literal
from train.workdir import WorkdirError


def told(capsys):
    return " ".join(capsys.readouterr().out.split())


def test_two_runs_stand_side_by_side(tmp_path, capsys):
    other = REPORT | {"bits_per_dim": 1.8987, "num_parameters": 7, "pictures": []}
    one = made(tmp_path / "one")
    two = made(tmp_path / "<two>", other, dataclasses.replace(CONFIG, seed=4))
    draw(one)
    out = tmp_path / "page.html"
    assert main(["compare", str(one), str(two), "--out", str(out)]) == 0
    text = told(capsys)
    for what in ("1.8387 ± 0.0020", "1.8987 ± 0.0020", "239,008", "setting seed 3 4"):
        assert what in text
    assert "bits/dim of <two> minus one: +0.0600 ± 0.0028 is beyond two standard errors" in text
    page = checked(out)
    assert "1.8987 ± 0.0020" in page.text and "+0.0600 ± 0.0028 is beyond" in page.text
    assert out.read_text().count("data:image/png") == 1
    assert "setting workdir" not in page.text


@pytest.mark.parametrize(
    ("apart", "stderr", "bias", "within"),
    [
        (0.004, 0.003, 0.0, True),
        (0.0061, 0.003, 0.0, False),
        (-0.0061, 0.003, 0.0, False),
        (0.0061, 0.003, 0.001, True),
        (0.0, 0.0, 0.0, True),
    ],
)
def test_a_difference_is_weighed_against_its_errors(apart, stderr, bias, within):
    first = {"bits_per_dim": 2.0, "bits_per_dim_stderr": 0.0, "bits_per_dim_bias_bound": 0.0}
    other = {
        "bits_per_dim": 2.0 + apart,
        "bits_per_dim_stderr": stderr,
        "bits_per_dim_bias_bound": bias,
    }
    found = difference(first, other, "bits_per_dim", 1)
    assert f"{apart:+.4f} ± {stderr:.4f}" in found
    assert ("is within two" in found, "is beyond two" in found) == (within, not within)
    assert "not known" in difference(first, other | {"bits_per_dim_stderr": "inf"},
                                     "bits_per_dim", 1)  # fmt: skip


def test_the_errors_of_two_runs_add_up_as_the_rule_says():
    """By simulation: of differences of equal means, about 1 in 22 is beyond two standard errors."""
    rng, size = np.random.default_rng(0), 4000
    first, other = rng.normal(0.0, (0.003, 0.004), (size, 2)).T
    reports = (
        [{"accuracy": v, "accuracy_stderr": s} for v in values]
        for values, s in ((first, 0.003), (other, 0.004))
    )
    told = [difference(a, b, "accuracy", 100) for a, b in zip(*reports, strict=True)]
    share = np.mean(["beyond" in line for line in told])
    assert abs(share - 0.0455) < 4 * (0.0455 * 0.9545 / size) ** 0.5


def test_runs_of_other_data_or_programs_are_not_compared_where_they_cannot_be(tmp_path, capsys):
    accuracies = {"accuracy": 0.9, "accuracy_stderr": 0.01, "certified": True}
    runs = [
        made(tmp_path / "one"),
        made(tmp_path / "other", data="two"),
        made(tmp_path / "classes", accuracies, CLASSIFICATION["digits"]),
        made(tmp_path / "stopped", {"steps": 3, "interrupted": True}),
    ]
    out = tmp_path / "page.html"
    assert main(["compare", *map(str, runs), "--output", str(out)]) == 0
    text = told(capsys)
    assert "other has other data than one: their figures are not compared." in text
    assert "classes is of classification, one of density" in text
    assert "stopped was stopped before its evaluation" in text
    assert "minus" not in text
    assert "90.00% ± 1.00%" in checked(out).text


def test_all_runs_that_cannot_be_read_are_named(tmp_path, capsys):
    good, bad = made(tmp_path / "good"), made(tmp_path / "bad")
    (bad / "report.json").write_text('{"bits')
    early = made(tmp_path / "early")
    (early / "report.json").unlink()
    listed = made(tmp_path / "listed")
    (listed / "report.json").write_text("[1]")
    empty = tmp_path / "none"
    with pytest.raises(WorkdirError) as raised:
        read_runs([good, bad, early, listed, empty])
    message = str(raised.value)
    assert "bad/report.json cannot be read" in message and "none holds no run" in message
    assert "early has no report.json" in message and "listed/report.json is not the" in message
    assert main(["compare", str(good), str(empty)]) == 2
    assert f"error: {empty} holds no run" in capsys.readouterr().err
    assert main(["compare", str(good)]) == 2
    assert "the folders of two runs or more; got 1" in capsys.readouterr().err


def test_only_a_page_is_written_over(tmp_path, capsys):
    runs = [str(made(tmp_path / name)) for name in ("one", "two")]
    notes = tmp_path / "notes.html"
    notes.write_text("my own notes")
    assert main(["compare", *runs, "--out", str(notes)]) == 2
    assert "is there, and no page" in capsys.readouterr().err
    assert notes.read_text() == "my own notes"
    assert main(["compare", *runs, "--out", f"{runs[0]}/report.html"]) == 2
    assert "belongs to the run in" in capsys.readouterr().err
    assert main(["compare", *runs, "--out", str(tmp_path / "table.csv")]) == 2
    assert re.search(r"ends in \.html", capsys.readouterr().err)
    for _ in range(2):
        assert Compare(runs=(tmp_path / "one", tmp_path / "two"), output=tmp_path / "p").run() == 0
    checked(tmp_path / "p.html")


def test_accuracies_are_compared_in_percent(tmp_path):
    report = {"accuracy": 0.9, "accuracy_stderr": 0.003, "certified": True, "interrupted": False}
    paths = [
        made(tmp_path / f"run{i}", report | {"accuracy": 0.9 + 0.01 * i}, CLASSIFICATION["digits"])
        for i in range(2)
    ]
    (told,) = differences(read_runs(paths))
    assert told == (
        "accuracy in %, of run1 minus run0: +1.0000 ± 0.4243 is beyond two standard errors."
    )


def test_labels_are_as_short_as_they_can_be(tmp_path):
    paths = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    assert labels(paths) == ["a/run", "b/run"]
    assert labels([paths[0], paths[1].with_name("other")]) == ["run", "other"]
    assert len(set(labels([paths[0], paths[0]]))) == 2


def test_without_its_errors_a_difference_is_not_judged():
    whole = {"bits_per_dim": 2.0, "bits_per_dim_stderr": 0.001, "bits_per_dim_bias_bound": 0.0}
    for name in ("bits_per_dim_stderr", "bits_per_dim_bias_bound"):
        for report in (
            {k: v for k, v in whole.items() if k != name},  # of an earlier version
            whole | {name: None},
            whole | {name: 10**400},
        ):
            told = difference(whole, report | {"bits_per_dim": 2.1}, "bits_per_dim", 1)
            assert "whose error is not known" in told


def test_damaged_parts_cost_no_more_than_themselves(tmp_path, capsys):
    broken = {"bits_per_dim": [1], "num_parameters": 10**400, "pictures": None, "steps": 9}
    runs = [made(tmp_path / "one"), made(tmp_path / "two", broken)]
    draw(runs[0])
    (runs[0] / "samples.png").write_bytes(b"\x89PNG and nothing else")
    assert main(["compare", *map(str, runs), "--out", str(tmp_path / "page.html")]) == 0
    found = capsys.readouterr()
    assert "samples.png could not be made" in found.err
    text = " ".join(found.out.split())
    assert "two was continued after its report, of step 9 of 1,400." in text
    assert "one was continued" not in text
    checked(tmp_path / "page.html")


def test_each_program_has_its_own_picture_of_losses(tmp_path):
    runs = [made(tmp_path / "one"), made(tmp_path / "two", config=HYBRID["digits"])]
    out = tmp_path / "page.html"
    Compare(runs=tuple(runs), output=out).run()
    text = checked(out).text
    assert "Loss in training, density." in text and "Loss in training, hybrid." in text


def test_a_page_of_an_evaluation_is_not_written_over(tmp_path):
    folder = made(tmp_path / "one") / "evaluation"
    folder.mkdir()
    with pytest.raises(OutputError, match=r"belongs to the run in .*one: choose"):
        page_path(folder / "report.html")


@pytest.mark.parametrize("label", ["_run", "__$", "run"])
def test_every_run_is_in_the_legend_by_its_own_name(label, tmp_path):
    with figures.sheet(tmp_path / "page.png") as axes:
        (line,) = axes[0, 0].plot([1, 2], label=literal(label))
        assert axes[0, 0].get_legend_handles_labels()[0] == [line]
