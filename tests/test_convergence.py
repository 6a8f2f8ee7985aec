"""What is said of inverses that missed their tolerance: warnings, errors, their texts."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bijection_cases import residual, stacked
from helpers import slopes, unconverged

from iresnet_jax import (
    Anderson,
    DiagonalGaussian,
    FixedPointInfo,
    FixedPointIteration,
    Flow,
    UnconvergedError,
    UnconvergedWarning,
    fixed_point_inverse,
)
from iresnet_jax.convergence import refuse_out_of_reach, unconverged_message

FEW = FixedPointIteration(max_steps=5)


def report(converged, residual, num_steps=None, rounding=0.0, error_bound=np.inf):
    """A FixedPointInfo of these fields, all of the shape of ``converged``."""
    shape = np.shape(converged)
    full = lambda value: jnp.broadcast_to(jnp.asarray(value, jnp.float32), shape)  # noqa: E731
    steps = jnp.zeros(shape, int) if num_steps is None else jnp.asarray(num_steps, int)
    return FixedPointInfo(
        steps, full(residual), jnp.asarray(converged), full(error_bound), full(rounding), full(1.0)
    )


# Warnings


def test_a_warning_says_how_many_missed_which_is_worst_and_what_to_do():
    y = jnp.ones((4, 3))
    with pytest.warns(UnconvergedWarning) as seen:
        _, info = fixed_point_inverse(slopes(0.01, 0.9, 0.95, 0.8), y, FEW)
    assert len(seen) == 1 and seen[0].filename == __file__
    worst = float(info.residual[2])
    assert str(seen[0].message) == (
        "3 of 4 inverses did not meet their tolerance. The worst is sample 2, with a residual of "
        f"{worst:.3g} after 5 steps. Raise max_steps or the tolerance, or use the solver Anderson; "
        "a branch that is no contraction has no inverse to find."
    )


def test_an_inverse_that_met_its_tolerance_says_nothing():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        _, info = fixed_point_inverse(slopes(0.1, 0.2), jnp.ones((2, 3)))
        _, empty = fixed_point_inverse(lambda x: 0.5 * x, jnp.ones((0, 3)))
    assert seen == [] and info.check() is None and empty.check() is None


def test_a_warning_is_shown_each_time_when_asked_for():
    with unconverged(1, 2) as seen:
        for _ in range(2):
            fixed_point_inverse(slopes(0.01, 0.9), jnp.ones((2, 3)), FEW)
    assert len(seen) == 2


def test_under_jit_and_vmap_it_is_silent_and_the_report_can_be_checked():
    y = jnp.ones((2, 3))
    _, info = jax.jit(lambda y: fixed_point_inverse(slopes(0.01, 0.9), y, FEW))(y)
    with pytest.raises(UnconvergedError, match=r"^1 of 2 inverses.* sample 1, with .* 5 steps"):
        info.check()
    invert = jax.vmap(lambda y: fixed_point_inverse(slopes(0.01, 0.9), y, FEW))
    _, mapped = invert(jnp.stack([y, y]))
    with pytest.raises(UnconvergedError, match=r"^1 of 2 inverses.* sample 1, with"):
        mapped.check()


@pytest.mark.parametrize("sampled", [False, True])
def test_a_flow_warns_once_and_names_the_block(sampled):
    zeros = jnp.zeros(3)
    slow = [residual(0, lipschitz=0.1), residual(1, lipschitz=0.95), residual(2, lipschitz=0.1)]
    flow = Flow((stacked(*slow, name="scale 0"),), (3,), (DiagonalGaussian(zeros, zeros),))
    with unconverged(4, 4) as seen:
        if sampled:
            _, info = flow.sample(jax.random.key(0), 4, solver=FixedPointIteration(max_steps=7))
        else:
            _, info = flow.inverse((jnp.ones((4, 3)),), FixedPointIteration(max_steps=7))
    np.testing.assert_array_equal(info.converged.all(axis=1), [True, False, True])
    assert len(seen) == 1 and seen[0].filename == __file__
    assert "at scale 0, block 1, with a residual of" in str(seen[0].message)
    with pytest.raises(UnconvergedError, match=r"sample \d at scale 0, block 1, with"):
        info.check(flow.solve_names())
    with pytest.raises(UnconvergedError, match=r"sample \d, with"):
        info.check()


def test_one_latent_is_one_inverse():
    flow = Flow((stacked(residual(0, lipschitz=0.95)),), (3,))
    with unconverged(1, 1):
        x, _ = flow.inverse((jnp.ones(3),), FixedPointIteration(max_steps=2))
    assert x.shape == (3,)


# Texts


def test_samples_are_counted_once_whatever_blocks_they_missed():
    residuals, steps = [[0, 1, 2], [0, 3, 0]], [[5, 6, 7], [8, 9, 10]]
    info = report([[True, False, False], [True, False, True]], residuals, steps)
    text = unconverged_message(info, ["first", "second"])
    assert text.startswith("2 of 3 inverses") and "sample 1 at second, with a residual of 3" in text
    assert "after 9 steps" in text


def test_what_converged_is_not_the_worst_though_its_residual_is_larger():
    assert "sample 1, with a residual of 0.5" in unconverged_message(
        report([True, False], [9, 0.5])
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_the_worst(value):
    text = unconverged_message(report([False, False, False], [1e30, value, 2.0]))
    assert f"sample 1, with a residual of {value}" in text


def test_reports_of_mapped_flows_have_more_axes():
    converged, residuals = np.ones((2, 3, 4), bool), np.zeros((2, 3, 4))
    assert unconverged_message(report(converged, residuals)) == ""
    converged[1, 2, 3], residuals[1, 2, 3] = False, 0.25
    text = unconverged_message(report(converged, residuals))
    assert text.startswith("1 of 4 inverses") and "sample 3, with a residual of 0.25" in text


def test_reduced_precision_is_said_in_words_too():
    with unconverged(2, 2):
        fixed_point_inverse(lambda x: 0.9 * x, jnp.ones((2, 3), jnp.bfloat16), FEW)


# Error tolerances out of reach


def test_a_tolerance_below_the_rounding_floor_names_the_highest():
    info = report([[False, False], [True, False]], 1e-9, None, 1e-3, [[0.1, 0.2], [9.0, 0.4]])
    with pytest.raises(ValueError, match=r"0.3 is below .* of sample 1 at b cannot .* about 0\.4"):
        refuse_out_of_reach(info, 0.3, ["a", "b"])
    refuse_out_of_reach(info, 0.5, ["a", "b"])


def test_a_tolerance_of_a_branch_without_bounds_can_not_be_met():
    with pytest.raises(ValueError, match=r"0.3 cannot be met: nothing is known .* of sample 1\. "):
        refuse_out_of_reach(report([True, False], 1e-9, None, np.inf), 0.3)


@pytest.mark.parametrize("solver", [FixedPointIteration, Anderson])
def test_a_tolerance_that_only_lacks_steps_warns(solver):
    """The floor lies below: more steps would do."""
    exact = lambda x: 0.0 * x[:, 0]  # noqa: E731
    settings = solver(max_steps=3, error_tolerance=1e-4)
    with unconverged(2, 2):
        fixed_point_inverse(
            slopes(0.9, 0.8), jnp.ones((2, 3)), settings, lipschitz=0.9, rounding=exact
        )
