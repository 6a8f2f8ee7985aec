"""The benchmarks' own machinery; speed itself is never tested."""

import json
import os

import jax
import jax.numpy as jnp
import pytest

from benchmarks.__main__ import BENCHMARKS, main
from benchmarks.krylov import optimal_evaluations
from benchmarks.report import ROWS, markdown, with_table
from benchmarks.specs import SPECS
from benchmarks.starting import DIGITS_SAMPLED, HELP, Start, run
from benchmarks.timing import ratio
from iresnet_jax import Residual


@pytest.mark.slow
def test_a_training_step_is_measured(tmp_path):
    path = tmp_path / "out.json"
    arguments = ["--config", "tiny", "--peer", "none", "--rounds", "2", "--json", str(path)]
    assert main(["train", *arguments]) == 0
    result = json.loads(path.read_text())
    assert result["seconds_ours"] > 0 and result["temporary_megabytes"] > 0
    assert result["convolution_gflop"] == SPECS["tiny"].step_flops(5) / 1e9


@pytest.mark.parametrize("name, fused", [("train", True), ("inverse", False), ("all", False)])
def test_loops_are_fused_where_training_is_measured(monkeypatch, name, fused):
    flags = []

    def measure(options):
        flags.append(os.environ["XLA_FLAGS"])
        return {"failed": []}

    monkeypatch.setitem(BENCHMARKS, name, (BENCHMARKS[name][0], measure))
    monkeypatch.setenv("XLA_FLAGS", "")
    assert main([name]) == 0
    assert ("xla_cpu_use_multi_output_fusion" in flags[0]) == fused


@pytest.mark.slow
def test_starts_are_measured_cold_and_warm(monkeypatch):
    monkeypatch.setattr("benchmarks.starting._drop_files", lambda: None)
    starts = run(Start(programs=("density --smoke",), rounds=1))["starts"]
    found = {row["what"]: row for row in starts}
    assert found["first step of density --smoke"]["cold"] > 0
    assert found[HELP]["warm"] < found[DIGITS_SAMPLED]["warm"]


def test_a_program_that_takes_no_step_is_named(monkeypatch):
    monkeypatch.setattr("benchmarks.starting._until_end", lambda *_: 0.0)
    monkeypatch.setattr("benchmarks.starting._drop_files", lambda: None)
    with pytest.raises(SystemExit, match=r"density --nothing .*took no step"):
        run(Start(programs=("density --nothing",), rounds=1))


def test_starts_need_a_round():
    with pytest.raises(SystemExit, match="rounds must be ≥ 1; got 0"):
        run(Start(rounds=0))


def test_an_unknown_benchmark_is_refused(capsys):
    assert main(["speed"]) == 2
    assert "roofline" in capsys.readouterr().err


def test_a_ratio_is_the_peers_time_over_ours():
    found = ratio([2.0, 4.0, 9.0], [1.0, 2.0, 3.0])
    assert found["ratios"] == [2.0, 2.0, 3.0] and found["median_of_ratios"] == 2.0
    assert found["ratio"] == 2.0


def test_the_table_shows_what_has_been_measured_and_a_dash_elsewhere(tmp_path):
    first = ROWS[0]
    found = {"median_of_ratios": 2.5, "quartiles": [2.25, 2.75]}
    (tmp_path / first.file).write_text(json.dumps(found))
    lines = markdown(tmp_path).splitlines()
    assert lines[2] == f"| {first.what} | {first.goal} | 2.50 (2.25 to 2.75) |"
    assert all(line.endswith("| – |") for line in lines[3:])
    assert len({row.file for row in ROWS}) == len({row.command for row in ROWS})
    assert {row.command.split()[0] for row in ROWS} <= BENCHMARKS.keys()


def test_the_table_replaces_what_stands_between_its_marks():
    text = "a\n<!-- measured: begin -->\nold\n<!-- measured: end -->\nb"
    assert with_table(text, "new") == text.replace("old", "new")
    with pytest.raises(ValueError, match="measured: begin"):
        with_table("nothing", "new")


def test_the_best_combination_takes_a_product_for_each_eigenvalue_that_is_excited(x64):
    eigenvalues = jnp.asarray([0.9, 0.9, -0.5, 0.2, 0.0])
    branch = jax.tree_util.Partial(jnp.multiply, eigenvalues)
    y = jnp.asarray([[1.0, 2.0, 0.0, 0.0, 0.0], [1.0] * 5, [0.0, 0.0, 0.0, 0.0, 3.0]])
    block = Residual(branch, lipschitz=0.9)
    assert list(optimal_evaluations(block, y, 1e-9, 1000)) == [2, 4, 1]
    assert list(optimal_evaluations(block, y, 10.0, 1000)) == [1, 1, 1]
