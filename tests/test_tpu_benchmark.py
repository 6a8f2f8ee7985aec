"""``python -m benchmarks tpu``: its programs lower, its rows resume; nothing here needs libtpu."""

import importlib.util
import json
import subprocess

import jax
import pytest

from benchmarks.__main__ import main
from benchmarks.accelerator.records import read
from benchmarks.specs import SPECS
from benchmarks.tpu import command
from benchmarks.tpu.chips import CHIPS
from benchmarks.tpu.programs import PROGRAMS, lower
from benchmarks.tpu.rows import RECORD, SIZES, rows

FIGURES = {
    **dict.fromkeys(("chips", "batch", "open_loops"), 4),
    **dict.fromkeys(("compile_seconds", "flops", "compilers_flops", "hbm_bytes"), 1e9),
    **dict.fromkeys(("matrix_share", "float32_share"), 0.5),
    **dict.fromkeys(("temporary_bytes", "argument_bytes"), 2e6),
    "collective_bytes": {"all-reduce": 3e6},
    "collective_calls": {"all-reduce": 2},
    "bound_seconds": 0.005,
    "bound_by": "memory",
    "compiled_by": "jax 1, libtpu 2",
}


@pytest.mark.parametrize(
    "program",
    [
        name if name == "density" else pytest.param(name, marks=pytest.mark.slow)
        for name in PROGRAMS
    ],
)
def test_a_program_lowers_for_devices_given_as_shapes(program):
    spec = SPECS["tiny-C" if program == "classification" else "tiny"]
    lowered = lower(program, spec, jax.devices()[:2], num_terms=2)
    assert "callback" not in lowered.as_text()


def test_every_row_has_a_program_and_a_chip():
    for size in SIZES:
        for row in rows(size).values():
            assert row.program in PROGRAMS and row.chip in CHIPS
            kind = "classification" if row.program == "classification" else "density"
            assert row.spec.kind == kind
    with pytest.raises(ValueError, match="size must be one of"):
        rows("huge")


@pytest.fixture
def compiled(monkeypatch):
    """Names of the rows that would have been compiled."""
    asked = []
    monkeypatch.setattr(command, "_compile", lambda name, *_: asked.append(name))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: True)
    return asked


def test_what_is_compiled_is_not_compiled_again(tmp_path, compiled, capsys):
    first, second, *_ = rows("tiny")
    found = {first: FIGURES, second: {"error": "exit status 1"}}
    (tmp_path / RECORD).write_text(json.dumps(found))
    arguments = ["tpu", "--out", str(tmp_path), "--size", "tiny", "--only"]
    assert main([*arguments, first]) == 0 and compiled == []
    assert main([*arguments, first, second]) == 1 and compiled == [second]
    table = (tmp_path / "table.md").read_text()
    assert f"| {first} | 4 | 4 | 1e+09 | 1 | 1 | 50.0% | 50.0% | 1 | 2 | 2 |" in table
    assert "2 all-reduce, 3 MB | 5 a turn | memory |" in table
    assert f"| {second} | exit status 1 |" in table
    assert table.endswith("\n\nCompiled by jax 1, libtpu 2.\n")


def test_a_row_is_not_blamed_for_the_output_of_another(tmp_path, monkeypatch):
    (tmp_path / "log.txt").write_text("the row before: 3 chips\n")
    ended = subprocess.CompletedProcess([], -9)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: ended)
    command._compile("killed", tmp_path, "tiny")
    assert read(tmp_path / RECORD)["killed"] == {"error": "exit status -9: "}


def test_a_row_that_there_is_not_is_refused(tmp_path, compiled, capsys):
    assert main(["tpu", "--out", str(tmp_path), "--only", "D7"]) == 2
    assert "no row ['D7']" in capsys.readouterr().err


def test_without_the_compiler_the_command_says_what_brings_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert main(["tpu", "--out", str(tmp_path / "new")]) == 2
    assert "'.[tpu]'" in capsys.readouterr().err and not (tmp_path / "new").exists()
