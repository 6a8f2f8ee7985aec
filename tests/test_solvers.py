"""Settings of solvers: refused out of range; a solver of one's own."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iresnet_jax import Anderson, FixedPointIteration, Solver, fixed_point_inverse
from iresnet_jax.iterations import plain

SOLVERS = [FixedPointIteration, Anderson]


def half(x):
    return 0.5 * jnp.sin(x)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"rtol": -1e-3},
            "Tolerances must be ≥ 0 and one of them > 0; got rtol=-0.001, atol=1e-06",
        ),
        ({"atol": -1e-3}, "Tolerances.*atol=-0.001"),
        ({"rtol": 0.0, "atol": 0.0}, "one of them > 0; got rtol=0.0, atol=0.0"),
        ({"rtol": math.nan}, "Tolerances.*rtol=nan"),
        ({"atol": math.inf}, "Tolerances.*atol=inf"),
        ({"max_steps": 0}, "max_steps must be ≥ 1; got 0"),
        ({"max_steps": -3}, "max_steps must be ≥ 1; got -3"),
        ({"error_tolerance": 0.0}, "error_tolerance must be > 0; got 0.0"),
        ({"error_tolerance": -1.0}, "error_tolerance must be > 0; got -1.0"),
        ({"error_tolerance": math.nan}, "error_tolerance must be > 0; got nan"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(solver, settings, message):
    with pytest.raises(ValueError, match=message):
        solver(**settings)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("value", [2.5, "3", None])
def test_steps_that_are_no_integer_are_refused(solver, value):
    with pytest.raises(TypeError, match=f"max_steps must be an integer ≥ 1; got {value!r}"):
        solver(max_steps=value)


def test_a_window_out_of_range_is_refused():
    with pytest.raises(ValueError, match="window must be ≥ 1; got 0"):
        Anderson(window=0)
    with pytest.raises(TypeError, match=r"window must be an integer ≥ 1; got 2\.5"):
        Anderson(window=2.5)


def test_a_solver_of_ones_own_is_a_dataclass_with_an_iteration():
    """x ← x + ½(f(x) − x): fewer steps to the same answer, where g pulls back and forth."""

    @dataclasses.dataclass(frozen=True)
    class Damped(Solver):
        damping: float = dataclasses.field(default=0.5, kw_only=True)

        def iterate(self, update, start, rule, lipschitz):
            damped = lambda x: x + self.damping * (update(x) - x)  # noqa: E731
            ours = lambda x, residual: rule(x, residual / self.damping)  # noqa: E731
            solution = plain(damped, start, ours, self.max_steps)
            return solution._replace(residual=solution.residual / self.damping)

    y = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)
    solve = jax.jit(lambda y, solver: fixed_point_inverse(half, y, solver))
    expected, info = solve(y, FixedPointIteration())
    found, ours = solve(y, Damped())
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert bool(ours.converged.all()) and (ours.num_steps < info.num_steps).all()
    with pytest.raises(ValueError, match="max_steps must be ≥ 1; got 0"):
        Damped(max_steps=0)


def test_a_solver_without_an_iteration_is_none():
    with pytest.raises(TypeError, match="abstract"):
        Solver()
