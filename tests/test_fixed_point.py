"""The inverse by fixed-point iteration: answers, how each sample stops, error bounds."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import EXACT, contraction, rest_slow, slopes, unconverged

from iresnet_jax import FixedPointIteration, fixed_point_inverse

pytestmark = pytest.mark.usefixtures("no_rank_promotion")

X64 = pytest.mark.usefixtures("x64")


def draw(seed, shape, dtype=np.float32, scale=1.0):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), dtype)


def gap_of(branch, x, y):
    """‖y − g(x) − x‖ of every sample, recomputed."""
    return np.linalg.norm(np.asarray(y - branch(x) - x, np.float64).reshape(len(x), -1), axis=1)


def distance(a, b):
    difference = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    return np.linalg.norm(difference.reshape(len(difference), -1), axis=1)


# Answers


@X64
@pytest.mark.parametrize("lipschitz", rest_slow([0.1, 0.5, 0.9], 0.9))
@pytest.mark.parametrize("rtol", [1e-2, 1e-5, 1e-12])
def test_error_is_within_the_bound(lipschitz, rtol):
    branch, x = contraction(0, 4, lipschitz, np.float64), draw(1, (5, 4), np.float64)
    y = x + branch(x)
    solver = FixedPointIteration(rtol, 0.0, 500)
    found, info = fixed_point_inverse(branch, y, solver, lipschitz=lipschitz, **EXACT)
    assert bool(info.converged.all()) and (info.residual <= rtol * distance(found, 0 * x)).all()
    total = info.residual + info.rounding
    np.testing.assert_allclose(info.error_bound, total / (1 - lipschitz), rtol=1e-12)
    np.testing.assert_array_less(distance(found, x), info.error_bound + 1e-14)
    if rtol < 1e-5:
        np.testing.assert_allclose(found, x, atol=1e-10)


@X64
def test_error_reaches_the_bound_on_a_linear_branch():
    x = draw(0, (3, 2), np.float64)
    y = 0.2 * x  # g(x) = −0.8 x: error = residual / (1 − L), exactly
    solver = FixedPointIteration(1e-2)
    found, info = fixed_point_inverse(lambda x: -0.8 * x, y, solver, lipschitz=0.8, **EXACT)
    np.testing.assert_allclose(distance(found, x), info.error_bound, rtol=1e-9)


def test_single_precision_answers_agree_with_double():
    with jax.enable_x64(True):
        branch, x = contraction(0, 4, 0.9, np.float64), draw(1, (5, 4), np.float64)
        y = np.asarray(x + branch(x))
    single = contraction(0, 4, 0.9)
    found, info = fixed_point_inverse(single, jnp.asarray(y, jnp.float32), lipschitz=0.9, **EXACT)
    assert found.dtype == jnp.float32 and bool(info.converged.all())
    assert (distance(found, x) <= info.error_bound + 1e-5).all()


@pytest.mark.parametrize("shape", [(3, 4), (3, 2, 2, 1), (3, 1), (0, 4)])
def test_samples_of_any_shape(shape):
    x = draw(0, shape)
    found, info = fixed_point_inverse(lambda x: 0.5 * jnp.tanh(x), x + 0.5 * jnp.tanh(x))
    np.testing.assert_allclose(found, x, atol=1e-5)
    assert found.shape == shape
    assert {field.shape for field in info} == {shape[:1]}
    assert info.num_steps.dtype == jnp.int32 and info.converged.dtype == jnp.bool_


def test_jit_changes_nothing():
    branch, y = contraction(0, 4, 0.9), draw(1, (5, 4))
    eager = fixed_point_inverse(branch, y)
    jitted = jax.jit(lambda branch, y: fixed_point_inverse(branch, y))(branch, y)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), jitted, eager)


def test_vmap_over_branches_equals_a_loop():
    branches = [contraction(seed, 3, lipschitz) for seed, lipschitz in ((0, 0.2), (1, 0.9))]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *branches)
    y = draw(2, (2, 4, 3))
    invert = jax.jit(fixed_point_inverse, static_argnums=0)
    mapped, info = jax.vmap(lambda branch, y: fixed_point_inverse(branch, y))(stack, y)
    for i, branch in enumerate(branches):
        alone, alone_info = invert(lambda x, branch=branch: branch(x), y[i])
        np.testing.assert_allclose(mapped[i], alone, atol=1e-6)
        np.testing.assert_array_equal(info.num_steps[i], alone_info.num_steps)


# How each sample stops


def test_a_slow_sample_does_not_change_the_others():
    y, fast = draw(0, (3, 4)), (0.3, 0.1)
    solver = FixedPointIteration(max_steps=2000)
    together, info = fixed_point_inverse(slopes(0.3, 0.97, 0.1), y, solver)
    alone, alone_info = fixed_point_inverse(slopes(*fast), y[::2], solver)
    np.testing.assert_array_equal(info.num_steps[::2], alone_info.num_steps)
    np.testing.assert_array_equal(together[::2], alone)
    np.testing.assert_array_equal(info.residual[::2], alone_info.residual)
    assert int(info.num_steps[1]) > 2 * int(info.num_steps[0]) and bool(info.converged.all())


def test_num_steps_counts_evaluations():
    y = jnp.array([[1.0], [0.0]])
    _, info = fixed_point_inverse(lambda x: 0.5 * x, y, FixedPointIteration(0.0, 0.1))
    # from 1: residuals 0.5, 0.25, 0.125, 0.0625; from 0 the first evaluation meets the tolerance
    np.testing.assert_array_equal(info.num_steps, [4, 1])
    np.testing.assert_allclose(info.residual, [0.0625, 0.0])


def test_running_out_of_steps_is_reported_for_that_sample_alone():
    branch, y = slopes(0.2, 0.95), draw(0, (2, 4))
    with unconverged(1, 2):
        found, info = fixed_point_inverse(branch, y, FixedPointIteration(max_steps=15))
    np.testing.assert_array_equal(info.converged, [True, False])
    assert int(info.num_steps[1]) == 15 and int(info.num_steps[0]) < 15
    assert gap_of(branch, found, y)[1] > 1e-3


@pytest.mark.parametrize(("max_steps", "missed"), [(1, 3), (7, 3), (40, 1)])
def test_the_residual_is_that_of_the_returned_x(max_steps, missed):
    branch, y = slopes(0.2, 0.95, -1.2), draw(0, (3, 4))
    with unconverged(missed, 3):
        found, info = fixed_point_inverse(branch, y, FixedPointIteration(max_steps=max_steps))
    np.testing.assert_allclose(info.residual, gap_of(branch, found, y), rtol=1e-3, atol=1e-6)


def test_stagnation_above_the_tolerance_is_not_convergence():
    branch, y = contraction(0, 8, 0.9), draw(1, (20, 8), scale=100.0)
    invert = jax.jit(lambda y: fixed_point_inverse(branch, y, FixedPointIteration(0.0, 1e-9, 400)))
    found, info = invert(y)
    stagnant = info.residual > 1e-9
    assert stagnant.any(), "the example is meant to end in a cycle of rounding errors"
    np.testing.assert_array_equal(info.converged, ~stagnant)
    rounding = 20 * np.finfo(np.float32).eps * np.linalg.norm(y, axis=1)
    assert (np.abs(gap_of(branch, found, y) - info.residual) <= rounding).all()


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_a_sample_that_is_not_finite_stops_alone(value):
    y = draw(0, (3, 4))
    expected, clean = fixed_point_inverse(slopes(0.3, 0.3, 0.3), y)
    with unconverged(1, 3):
        found, info = fixed_point_inverse(slopes(0.3, 0.3, 0.3), y.at[1, 2].set(value))
    np.testing.assert_array_equal(info.converged, [True, False, True])
    np.testing.assert_array_equal(found[::2], expected[::2])
    np.testing.assert_array_equal(info.num_steps[::2], clean.num_steps[::2])
    assert int(info.num_steps[1]) == 1


def test_a_branch_that_turns_nan_on_the_way_does_not_converge():
    y = jnp.array([[1.0], [4.0]])
    with unconverged(1, 2):
        found, info = fixed_point_inverse(lambda x: 0.5 * jnp.where(x > 3.0, jnp.nan, x), y)
    np.testing.assert_array_equal(info.converged, [True, False])
    np.testing.assert_allclose(found[0], 2 / 3, atol=1e-5)


@pytest.mark.parametrize("slope", [1.0, -1.0, 1.01, -1.5, 1.5, 2.0, -3.0])
@pytest.mark.parametrize("max_steps", [50, 5000])
def test_an_expansion_never_converges(slope, max_steps):
    """Not even when ‖x‖ overflows, and with it the relative tolerance."""
    solver = FixedPointIteration(max_steps=max_steps)
    with unconverged(2, 2):
        _, info = fixed_point_inverse(lambda x: slope * x, jnp.ones((2, 3)), solver)
    assert not bool(info.converged.any())


def test_data_whose_norm_overflows_does_not_converge_by_it():
    y = jnp.array([[1.0, 1.0], [1e25, 1e25]])
    found, info = jax.jit(lambda y: fixed_point_inverse(lambda x: 0.5 * x, y))(y)
    wrong = np.abs(np.asarray(found)[:, 0] * 1.5 / np.asarray(y)[:, 0] - 1.0) > 1e-3
    assert not bool(info.converged[wrong].any())


# The error bound


@pytest.mark.parametrize("lipschitz", [None, 1.0, 1.5, math.inf, math.nan])
def test_error_bound_is_infinite_without_a_contraction(lipschitz):
    y = draw(0, (2, 3))
    _, info = fixed_point_inverse(lambda x: 0.5 * x, y, lipschitz=lipschitz, **EXACT)
    np.testing.assert_array_equal(info.error_bound, jnp.inf)


def test_error_bound_takes_traced_constants():
    bound = jax.jit(
        lambda y, lipschitz: fixed_point_inverse(
            lambda x: 0.5 * jnp.sin(x), y, FixedPointIteration(1e-3), lipschitz=lipschitz, **EXACT
        )[1]
    )
    info = bound(draw(0, (2, 3)), 0.75)
    total = info.residual + info.rounding
    np.testing.assert_allclose(info.error_bound, 4.0 * total, rtol=1e-6)


@pytest.mark.parametrize("gap", [1e-2, 1e-4, 4e-6, 0.8e-6, 2.1e-7, 0.9e-7, 1e-8])
def test_error_bound_is_not_lowered_by_the_rounding_of_its_constant(gap):
    _, info = fixed_point_inverse(
        lambda x: 0.5 * jnp.sin(x),
        draw(0, (2, 3)),
        FixedPointIteration(1e-2),
        lipschitz=1.0 - gap,
        **EXACT,
    )
    assert (np.asarray(info.error_bound) >= np.asarray(info.residual) / gap * (1 - 1e-6)).all()


# Refusals


@pytest.mark.parametrize("shape", [(), (3,)])
def test_inputs_without_a_batch_axis_are_refused(shape):
    with pytest.raises(ValueError, match="batch axis"):
        fixed_point_inverse(lambda x: 0.5 * x, jnp.ones(shape))


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8, jnp.bool_, jnp.complex64])
def test_inputs_that_are_not_floating_point_are_refused(dtype):
    with pytest.raises(TypeError, match=f"floating point; got {jnp.dtype(dtype).name}"):
        fixed_point_inverse(lambda x: x, jnp.ones((2, 3), dtype))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "error_tolerance 0.01 needs a bound on the branch's Lipschitz"),
        ({"lipschitz": 0.5}, "error_tolerance 0.01 needs a bound on the branch's rounding"),
    ],
    ids=str,
)
def test_an_error_tolerance_needs_bounds_to_prove_it_by(options, message):
    solver = FixedPointIteration(error_tolerance=1e-2)
    with pytest.raises(ValueError, match=message):
        fixed_point_inverse(lambda x: 0.5 * x, jnp.ones((2, 3)), solver, **options)


@pytest.mark.parametrize("solver", ["anderson", 1e-6, None])
def test_what_is_no_solver_is_refused(solver):
    with pytest.raises(TypeError, match=rf"solver must be a Solver, such as .* got {solver!r}"):
        fixed_point_inverse(lambda x: 0.5 * x, jnp.ones((2, 3)), solver)


@pytest.mark.parametrize("y", [[[1.0, 2.0]], 1.0, None])
def test_what_is_no_array_is_refused(y):
    with pytest.raises(TypeError, match=f"y must be an array .* got {type(y).__name__}"):
        fixed_point_inverse(lambda x: 0.5 * x, y)
