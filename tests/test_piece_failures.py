"""Pieces of ``reproduce`` that fail: their numbers are kept, and the reason is one sentence."""

import csv
import errno
import os

import pytest

import paper.program
from paper.pieces import Piece, Result
from train.__main__ import main


def reproduce(folder, run, monkeypatch):
    monkeypatch.setitem(paper.program.PIECES, "bounds", Piece("A piece", run))
    return main(["reproduce", "bounds", "--scale", "smoke", "--workdir", str(folder)])


def test_numbers_are_kept_where_drawing_fails(tmp_path, monkeypatch, capsys):
    def run(context):
        context.record(
            [{"what": "a number", "measured": 1.5}], [{"x": 0, "y": 1}, {"x": 1, "y": 2}]
        )
        raise ValueError("the picture is too large")

    assert reproduce(tmp_path, run, monkeypatch) == 1
    assert "bounds failed: the picture is too large" in capsys.readouterr().out
    folder = tmp_path / "smoke" / "bounds"
    with (folder / "table.csv").open() as file:
        assert list(csv.DictReader(file)) == [{"what": "a number", "measured": "1.5"}]
    assert (folder / "curves.csv").exists() and not (folder / "done.json").exists()
    assert reproduce(tmp_path, lambda context: Result([{"what": 1}]), monkeypatch) == 0  # again


@pytest.mark.parametrize("where", ["run", "save"])
def test_what_the_system_refuses_is_a_sentence(where, tmp_path, monkeypatch, capsys):
    def run(context):
        if where == "save":
            (context.folder / "done.json").mkdir()
            return Result([{"what": 1}])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(context.folder / "figure.png"))

    assert reproduce(tmp_path, run, monkeypatch) == 1
    told = " ".join(capsys.readouterr().out.split())
    name, cause = {"run": ("figure.png", "No space left"), "save": ("done.json", "Is a directory")}[
        where
    ]
    assert "bounds failed: " in told and name in told and cause in told
    assert ("Free some space" if where == "run" else "Move the folder") in told


@pytest.mark.parametrize(
    "piece", ["figure_1", "figure_2", "figure_4", "convergence", "tables", "images"]
)
def test_every_piece_that_draws_records_first(piece):
    """Read from the source: each call that draws stands below one that records."""
    path = os.path.join(os.path.dirname(paper.program.__file__), f"{piece}.py")
    with open(path, encoding="utf-8") as file:
        parts = file.read().split("\ndef ")
    drawing = ("[_draw(", "image_rows(path", "[image_grids(")
    found = [part for part in parts if any(call in part for call in drawing)]
    assert found
    for part in found:
        first = min(part.find(call) for call in drawing if call in part)
        assert 0 < part.find("context.record(") < first
