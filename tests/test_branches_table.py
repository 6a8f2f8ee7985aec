"""The table of branches: settings that can be built, and the share of the budget that is used."""

import dataclasses
import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import rest_slow

from iresnet_jax import Residual
from paper import branches, budget, step_times
from paper.blocks import Site
from paper.branches import VARIANTS, config_of, distance_to_scaling, variants_of
from paper.pieces import Context
from paper.trainings import Trainings
from train.__main__ import main
from train.data import load_dataset
from train.density import Density


def test_the_distance_to_a_scaling_is_least():
    """Against a fine grid; of a scaled identity it is 0, of a reflection its norm."""
    matrices = np.random.default_rng(0).normal(size=(3, 5, 5)) / 5.0
    grid = np.linspace(-1.0, 1.0, 4001)
    norms = [[np.linalg.norm(matrix - a * np.eye(5), 2) for a in grid] for matrix in matrices]
    assert distance_to_scaling(matrices) == pytest.approx(np.max(np.min(norms, 1)), abs=1e-3)
    assert distance_to_scaling(0.7 * np.eye(4)[None]) == pytest.approx(0.0, abs=1e-4)
    assert distance_to_scaling(np.diag([0.5, -0.5])[None]) == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("dataset", rest_slow(["checkerboard", "digits"], "checkerboard"))
def test_every_row_is_a_network_that_can_be_built(dataset, tmp_path):
    context = Context("smoke", tmp_path, Trainings(tmp_path, "smoke"))
    data = load_dataset(dataset, max_examples=40)
    for variant in variants_of(dataset):
        config = config_of(context, dataset, variant)
        config.check()
        task = Density(config, data)
        x = jnp.zeros((4, *data.example_shape))
        shapes = jax.eval_shape(task.init, jax.random.key(0), x)
        assert shapes["params"]


def test_branches_are_allowed_the_same_constant(tmp_path):
    context = Context("cpu", tmp_path, Trainings(tmp_path, "cpu"))
    layered, whole = (
        next(config_of(context, "digits", v) for v in VARIANTS if v.changes.get("branch") == name)
        for name in (None, "monlip")
    )
    assert whole.coeff == pytest.approx(layered.coeff**3)


def test_rows_of_equal_time_take_steps_by_the_time_of_a_step(tmp_path, monkeypatch):
    class Trained(NamedTuple):
        data_dir: None = None

        def density_of(self, config, name, seed):
            return branches.Training({"steps": config.steps}, tmp_path)

    def twice_as_dear(first, other, turns):
        timed.append(other.activation)
        assert first.num_terms == 5 and first.activation == "elu"
        return 2.0

    timed = []
    monkeypatch.setattr(branches, "step_ratio", twice_as_dear)
    context = Context("cpu", tmp_path, Trained())
    slow = next(v for v in VARIANTS if v.name == "LipSwish")
    steps = [
        branches._trained(context, "digits", variant, equal, 0).report["steps"]
        for variant in (VARIANTS[0], slow)
        for equal in ("steps", "time", "time")
    ]
    planned = steps[0]
    assert steps == [planned, planned, planned, planned, planned // 2, planned // 2]
    assert timed == ["lipswish"]  # once; then it is read


def test_the_two_best_of_mnist_get_three_seeds(tmp_path, monkeypatch):
    def row(context, dataset, variant, equal, seeds):
        return {"branch": variant.name, "bits/dim": values[variant.name], "seeds": seeds}

    names = [variant.name for variant in variants_of("mnist")]
    values = {name: 2.0 - 0.1 * (i % 4) for i, name in enumerate(names)}
    monkeypatch.setattr(branches, "_row", row)
    rows = branches._rows(Context("cpu", tmp_path, Trainings(tmp_path, "cpu")), "mnist", "steps")
    assert [r["branch"] for r in rows] == names
    assert [i for i, r in enumerate(rows) if r["seeds"] == 3] == [3, 7]


def test_steps_are_timed_in_turns():
    clock, order = [0.0], []

    def taking(seconds, name):
        def step():
            clock[0] += seconds
            order.append(name)

        return step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_times.time, "perf_counter", lambda: clock[0])
        patch.setattr(step_times, "_stepper", lambda config: taking(*config))
        assert step_times.step_ratio((0.5, "a"), (0.25, "b"), 3) == pytest.approx(0.5)
    assert "".join(order) == "aaabbb" + 3 * "bbbbaa"


def test_the_share_of_the_budget_is_that_of_known_maps():
    """A block of slope ±0.45 everywhere uses half of 0.9; one that scales by it uses none."""

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Linear:
        matrix: jax.Array

        def __call__(self, x):
            return x @ self.matrix.T

    def site(*diagonal):
        branch = Linear(jnp.diag(jnp.array(diagonal)))
        return Site("it", Residual(branch), np.zeros((3, 2)), 0.9)

    mirror, scaling = site(0.45, -0.45), site(0.45, 0.45)
    assert budget.measure([mirror], [0.9]) == pytest.approx((0.5, 0.5, 1.0), abs=1e-3)
    assert budget.measure([scaling], [0.9]) == pytest.approx((0.0, 0.5, 1.0), abs=1e-3)
    both = budget.measure([mirror, scaling], [0.9, 0.45])
    assert both == pytest.approx((0.25, 0.5, 0.75), abs=1e-3)


@pytest.mark.parametrize("hidden", [1, 3])
def test_branches_of_any_depth_are_allowed_the_same_constant(hidden, tmp_path):
    context = Context("cpu", tmp_path, Trainings(tmp_path, "cpu"))
    layered = budget.config_of(context, hidden, "by layers", "trained")
    whole = budget.config_of(context, hidden, "as a whole", "trained")
    assert layered.coeff ** (hidden + 1) == pytest.approx(whole.coeff)
    assert len(layered.features) == len(whole.features) == hidden


@pytest.mark.slow
def test_the_budget_is_measured_at_smoke_scale(tmp_path):
    assert main(["reproduce", "budget", "--scale", "smoke", "--workdir", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "smoke/budget/done.json").read_text())["rows"]
    assert len(rows) == 8 and (tmp_path / "smoke/budget/budget.png").is_file()
    for row in rows:
        assert 0.0 < row["largest ‖J‖"] <= row["bound"] <= 1.0 + 1e-3
        assert row["used"] <= row["largest ‖J‖"] + 1e-3
