"""``python -m benchmarks to-likelihood``: its cells, what it tells and resumes, its methods."""

import json
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks.accelerator.records import COMPLETE, Record, read
from benchmarks.likelihood import command, report
from benchmarks.likelihood.cells import DEFAULT, GRID, SECONDS, SEEDS, TUNED, Cell, plan
from benchmarks.likelihood.clock import LAST
from benchmarks.likelihood.curves import FAILED, Curve
from benchmarks.likelihood.methods import METHODS, methods_on
from benchmarks.likelihood.problems import (
    DATA,
)
from benchmarks.likelihood.thresholds import thresholds

# Cells


def test_every_data_set_has_methods_of_both_kinds_a_budget_and_seeds():
    assert set(DATA) == SECONDS.keys() == SEEDS.keys()
    for name in DATA:
        assert {METHODS[method].ours for method in methods_on(name)} == {True, False}
    for method in METHODS.values():
        options = [method.default, *method.grid]
        assert len({json.dumps(setting) for setting in method.grid}) == 4
        assert all(setting.keys() >= method.default.keys() for setting in options)


def test_defaults_come_first_and_further_seeds_last():
    cells = list(
        plan(["wine"], ["fit", "zuko-nsf", "fit-vectors"], ["default", "tuned"], 2, "full")
    )
    told = [(cell.method, cell.setting, cell.seed) for cell in cells]
    assert told == [
        *(("fit", DEFAULT, 0), ("zuko-nsf", DEFAULT, 0), ("fit", TUNED, 0), ("zuko-nsf", TUNED, 0)),
        *(("fit", DEFAULT, 1), ("zuko-nsf", DEFAULT, 1), ("fit", TUNED, 1), ("zuko-nsf", TUNED, 1)),
    ]
    everything = list(plan(DATA, list(METHODS), ["default", "grid", "tuned"], None, "full"))
    assert len(set(everything)) == len(everything)


def test_a_cell_survives_the_way_to_another_process():
    cell = Cell(data="wine", method="fit", setting=GRID[2], seed=1, size="smoke")
    assert Cell.from_json(cell.to_json()) == cell
    assert cell.options() == {"learning_rate": 1e-2, "features": 32}


@pytest.fixture
def started(monkeypatch):
    """Cells whose process would have been started, and what the processes were given."""
    asked, environments = [], []

    def run(arguments, *, stdout, env, **_):
        cell, out = Cell.from_json(arguments[4]), arguments[3]
        asked.append(f"{cell.method}-{cell.setting}-{cell.seed}")
        environments.append(env)
        if cell.method == "flowjax-bnaf":
            stdout.write("Traceback …\nMemoryError: too much\n")
            return types.SimpleNamespace(returncode=1)
        record = Record(cell.record(Path(out)))
        loss = 1.0 + abs(GRID.index(cell.setting) - 2) if cell.setting in GRID else 5.0
        figures = {"stderr": 0.0, "validation": loss, "whole": True, "enough": False, "steps": 7}
        record.add(LAST, seconds=3.0, test=loss, **figures)
        record.complete()
        return types.SimpleNamespace(returncode=0)

    monkeypatch.setattr(command.subprocess, "run", run)
    monkeypatch.setattr(command, "_possible", lambda _: True)
    monkeypatch.setattr(report, "draw", lambda *_: None)  # takes a second
    return types.SimpleNamespace(asked=asked, environments=environments)


def arguments(out, *more):
    return ["to-likelihood", "--out", str(out), "--data", "wine", *more]


def test_a_grid_is_run_once_and_its_best_setting_is_the_tuned_one(tmp_path, started, capsys):
    wanted = arguments(tmp_path, "--methods", "fit", "--seeds", "2")
    assert main(wanted) == 0
    first = ["fit-default-0", *(f"fit-{setting}-0" for setting in GRID)]
    assert started.asked == [*first, "fit-default-1", "fit-tuned-1"]
    assert "tuned, seed 0: the same as grid-2" in capsys.readouterr().out
    assert read(tmp_path / "wine" / "fit-tuned-0.json")[LAST]["test"] == 1.0
    started.asked.clear()
    (tmp_path / "wine" / "fit-default-1.json").unlink()
    assert main(wanted) == 0
    assert started.asked == ["fit-default-1"]
    assert "1 of 8 cells" in capsys.readouterr().out


def test_nothing_cached_reaches_a_cell(tmp_path, started, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/somewhere")
    main(arguments(tmp_path, "--methods", "fit", "--settings", "default", "--seeds", "1"))
    (environment,) = started.environments
    assert environment["JAX_ENABLE_COMPILATION_CACHE"] == "false"
    assert "JAX_COMPILATION_CACHE_DIR" not in environment and "XLA_FLAGS" not in environment


def test_a_failed_cell_is_noted_and_stops_no_other(tmp_path, started, capsys):
    wanted = arguments(tmp_path, "--methods", "flowjax-bnaf", "flowjax-coupling")
    wanted += ["--settings", "default", "--seeds", "1"]
    assert main(wanted) == 1
    assert started.asked == ["flowjax-bnaf-default-0", "flowjax-coupling-default-0"]
    assert "FAILED, exit status 1: MemoryError: too much" in capsys.readouterr().out
    parts = read(tmp_path / "wine" / "flowjax-bnaf-default-0.json")
    assert COMPLETE in parts and "MemoryError" in parts[FAILED]["reason"]
    assert main(wanted) == 1 and len(started.asked) == 2  # not again
    assert "MemoryError: too much" in (tmp_path / "wine" / "table.md").read_text()


def test_an_interrupted_cell_is_begun_anew(tmp_path, started, monkeypatch, capsys):
    wanted = arguments(tmp_path, "--methods", "fit", "--settings", "default", "--seeds", "1")
    run = command.subprocess.run

    def interrupted(arguments, **_):
        record = Record(Cell.from_json(arguments[4]).record(tmp_path))
        record.add("point 01", seconds=1.0, test=9.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(command.subprocess, "run", interrupted)
    assert main(wanted) == 130
    assert "the same command goes on" in capsys.readouterr().err
    monkeypatch.setattr(command.subprocess, "run", run)
    assert main(wanted) == 0
    assert read(tmp_path / "wine" / "fit-default-0.json").keys() == {LAST, COMPLETE}


def test_a_tuned_cell_without_a_grid_is_left_out(tmp_path, started, capsys):
    assert main(arguments(tmp_path, "--methods", "fit", "--settings", "tuned", "--seeds", "1")) == 0
    assert not started.asked
    assert "left out, nothing of its grid is known" in capsys.readouterr().out


def test_a_missing_package_leaves_its_methods_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda _: None)
    assert main(arguments(tmp_path, "--methods", "zuko-nsf")) == 2
    assert "zuko-nsf: left out, torch and zuko not installed" in capsys.readouterr().out


@pytest.mark.parametrize(
    "wrong", [["--data", "cats"], ["--methods", "magic"], ["--seeds", "0"], ["--size", "huge"]]
)
def test_what_cannot_be_asked_for_is_refused(tmp_path, wrong):
    with pytest.raises(SystemExit, match="2"):
        main(["to-likelihood", "--out", str(tmp_path), *wrong])


def test_peers_alone_fix_the_thresholds_that_are_open(tmp_path, started):
    assert "wine" not in thresholds()
    wanted = ["--methods", "fit", "flowjax-coupling", "--settings", "grid", "tuned"]
    assert main(arguments(tmp_path, *wanted, "--seeds", "1")) == 0
    proposed = json.loads((tmp_path / "wine" / "thresholds.json").read_text())
    assert proposed == {"wine": [1.0, 1.0, 1.0]}


def test_a_report_of_nothing_writes_nothing(tmp_path):
    report.write_report(tmp_path, DATA)
    assert not list(tmp_path.iterdir())


# The methods


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_method_runs(tmp_path, method):
    for package in METHODS[method].packages:
        pytest.importorskip(package, exc_type=ImportError)
    name = METHODS[method].data[0]
    name = "wine" if "wine" in METHODS[method].data else name
    wanted = ["--data", name, "--methods", method, "--settings", "default", "--seeds", "1"]
    assert main(["to-likelihood", "--out", str(tmp_path), "--size", "smoke", *wanted]) == 0
    found = Curve.read(tmp_path / "smoke" / name / f"{method}-default-0.json")
    assert found.parameters > 0 and np.isfinite(found.final[0])


@pytest.mark.slow
def test_sigterm_ends_the_cell_that_runs(tmp_path):
    pytest.importorskip("flowjax", exc_type=ImportError)
    root = Path(__file__).parents[1]
    wanted = ["--data", "wine", "--methods", "flowjax-coupling", "--size", "smoke"]
    ours = [sys.executable, "-m", "benchmarks", "to-likelihood", "--out", str(tmp_path)]
    process = subprocess.Popen([*ours, *wanted], cwd=root, stderr=subprocess.PIPE, text=True)
    record = Cell(data="wine", method="flowjax-coupling", size="smoke").record(tmp_path)
    while not record.exists():  # which the cell writes
        assert process.poll() is None
        time.sleep(0.1)
    children = _children(process.pid)
    assert children
    process.terminate()
    assert "the same command goes on" in process.communicate()[1]
    assert process.returncode == 128 + signal.SIGTERM
    assert not any(Path(f"/proc/{child}").exists() for child in children)


def _children(pid):
    """Processes that another one started."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [child for task in tasks for child in task.read_text().split()]


def test_a_process_that_cannot_start_is_noted(tmp_path, monkeypatch):
    cell = Cell(data="wine", method="fit", size="smoke")
    cell.folder(tmp_path).mkdir(parents=True)
    monkeypatch.setattr(command.sys, "executable", "false")
    assert command._run(cell, tmp_path) == "FAILED, exit status 1: "
