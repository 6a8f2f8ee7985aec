"""Anderson acceleration: the plain answers, fewer evaluations, and a safeguard that holds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import build, quick_jit
from helpers import contraction, random_like, unconverged

from iresnet_jax import Anderson, FixedPointIteration, fixed_point_inverse
from iresnet_jax.iterations import _extrapolate, anderson, plain


def draw(seed, shape, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def distances(x):
    return np.linalg.norm(np.asarray(x, np.float64).reshape(len(x), -1), axis=1)


def until(tolerance):
    """The rule: residual ≤ tolerance; what is not finite is given up."""
    return lambda x, residual: (residual <= tolerance, ~jnp.isfinite(residual))


def solve(branch, y, tolerance=1e-5, max_steps=200, **options):
    """Plain and accelerated solutions of x = y − g(x)."""

    def update(x):
        return y - branch(x)

    return (
        plain(update, y, until(tolerance), max_steps),
        anderson(update, y, until(tolerance), max_steps, **options),
    )


def slow(rates, dtype=np.float32):
    """g(x) = −rᵢ sin(x) in sample i: near 0 its plain iteration contracts by rᵢ a step."""
    return lambda x: -jnp.asarray(rates, dtype)[:, None] * jnp.sin(x)


@pytest.mark.parametrize("window", [1, 2, 3])
def test_answers_are_those_of_the_plain_iteration(window):
    branch, y = contraction(0, 6, 0.95), draw(1, (20, 6))
    expected, found = solve(branch, y, window=window, lipschitz=0.95)
    np.testing.assert_array_equal(found.converged, 1.0)
    np.testing.assert_array_less(found.residual, 1e-5 * (1 + 1e-6))
    assert (distances(found.x - expected.x) <= 2e-5 / 0.05).all()


def test_slow_samples_take_less_than_half_and_none_takes_more_than_one_more():
    rates = np.linspace(0.3, 0.97, 24)
    expected, found = solve(slow(rates), 0.3 * draw(1, (24, 1)), lipschitz=0.97, max_steps=1000)
    before, after = np.asarray(expected.num_steps), np.asarray(found.num_steps)
    assert (after <= before + 1).all()
    assert (before > 15).sum() > 8 and np.mean((after / before)[before > 15]) <= 0.5


def test_a_linear_equation_in_few_dimensions_is_solved_at_once(x64):
    """With a window of d, the extrapolation from d differences is exact."""
    matrix = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3)) / 4)
    y = draw(1, (4, 3), np.float64)
    _, found = solve(lambda x: x @ matrix, y, 1e-10, window=3)
    exact = np.linalg.solve(np.eye(3) + np.asarray(matrix).T, np.asarray(y).T).T
    np.testing.assert_allclose(found.x, exact, atol=1e-9)
    assert int(found.num_steps.max()) <= 6  # four for three differences, the answer, and to see it


def test_the_extrapolation_is_the_least_squares_solution(x64):
    residuals, images = (tuple(draw(s, (3, 5, 7), np.float64)) for s in (0, 1))
    image, residual = draw(2, (5, 7), np.float64), draw(3, (5, 7), np.float64)
    ours = _extrapolate(image, residual, images, residuals)
    for i in range(5):
        columns, partners = (np.stack([c[i] for c in part], 1) for part in (residuals, images))
        weights = np.linalg.lstsq(columns, np.asarray(residual[i]), rcond=None)[0]
        np.testing.assert_allclose(ours[i], image[i] - partners @ weights, rtol=1e-9, atol=1e-9)


def test_columns_that_say_nothing_new_are_left_out():
    column, zero = draw(0, (2, 4)), jnp.zeros((2, 4))
    image, residual = draw(1, (2, 4)), draw(2, (2, 4))
    alone = _extrapolate(image, residual, (column,), (column,))
    again = _extrapolate(image, residual, (column, column, zero), (column, column, zero))
    np.testing.assert_allclose(again, alone, atol=1e-6)
    unchanged = _extrapolate(image, residual, (zero,), (zero,))
    np.testing.assert_array_equal(unchanged, image)


def kinked(x):
    """g = 0.9|x| − 0.5: the kink makes the secant through both sides point the wrong way."""
    return 0.9 * jnp.abs(x) - 0.5 + 0.0 * x


def test_the_rate_is_kept_through_rejected_steps():
    """Watched after every evaluation: at most Lⁿ⁻¹ times the first residual, Lⁿ⁻² after a loss."""
    y = draw(0, (200, 2))
    watch = jax.jit(lambda n: solve(kinked, y, 0.0, n, lipschitz=0.9)[1])
    counted = [watch(n) for n in range(1, 30)]
    residuals = np.stack([solution.residual for solution in counted])
    lost = np.cumsum(residuals[1:] == residuals[:-1], axis=0) * (residuals[1:] > 1e-5)
    assert (lost.max(axis=0) == 1).sum() > 20, "the branch is meant to mislead the extrapolation"
    assert lost.max() == 1
    for n, solution in enumerate(counted, start=1):
        open_ones = np.asarray(solution.converged) == 0
        np.testing.assert_array_equal(np.asarray(solution.num_steps)[open_ones], n)
        bound = 0.9 ** np.maximum(n - 2, 0) * residuals[0]
        assert (np.asarray(solution.residual) <= bound * (1 + 1e-5) + 1e-6).all()


def test_after_a_rejection_the_steps_are_plain():
    """An L that no extrapolation meets: one evaluation is lost, the answer is the plain one."""
    branch, y = contraction(0, 6, 0.9), draw(1, (8, 6))
    expected, found = solve(branch, y, lipschitz=1e-9)
    np.testing.assert_array_equal(found.num_steps, expected.num_steps + 1)
    np.testing.assert_allclose(found.x, expected.x, atol=1e-6)
    np.testing.assert_allclose(found.residual, expected.residual, rtol=1e-2)


def test_each_sample_goes_its_own_way():
    rates = [0.97, 0.1, 0.6]
    y = 0.3 * draw(0, (3, 4))
    _, together = solve(slow(rates), y, lipschitz=0.97)
    for i, rate in enumerate(rates):
        _, alone = solve(slow([rate]), y[i : i + 1], lipschitz=0.97)
        np.testing.assert_array_equal(together.num_steps[i], alone.num_steps[0])
        np.testing.assert_allclose(together.x[i], alone.x[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_a_sample_that_is_not_finite_stops_alone(value):
    y = draw(0, (3, 4))
    expected = solve(contraction(0, 4, 0.9), y)[1]
    found = solve(contraction(0, 4, 0.9), y.at[1, 2].set(value))[1]
    np.testing.assert_array_equal(found.converged, [1, 0, 1])
    np.testing.assert_array_equal(found.num_steps[::2], expected.num_steps[::2])
    assert int(found.num_steps[1]) == 1


@pytest.mark.parametrize("max_steps", [1, 2, 3, 7])
def test_running_out_of_steps_is_reported_with_the_residual_of_x(max_steps):
    branch, y = contraction(0, 6, 0.97), draw(1, (5, 6))
    with unconverged(5, 5):
        found, info = fixed_point_inverse(branch, y, Anderson(rtol=0.0, max_steps=max_steps))
    assert not bool(info.converged.any())
    np.testing.assert_array_equal(info.num_steps, max_steps)
    np.testing.assert_allclose(info.residual, distances(y - branch(found) - found), atol=1e-6)


@pytest.mark.parametrize("slope", [1.0, 1.5, -3.0])
def test_an_expansion_is_not_claimed_to_be_inverted(slope):
    """Where it is solved nevertheless, as a linear one can be, the residual proves it."""
    y = jnp.ones((2, 3))
    found, info = jax.jit(lambda y: fixed_point_inverse(lambda x: slope * x, y, Anderson()))(y)
    residual = distances(y - (1 + slope) * found)
    assert (residual[np.asarray(info.converged)] < 1e-4).all()


def test_derivatives_are_those_of_the_plain_solver(x64):
    branch, y = contraction(0, 3, 0.8, np.float64), draw(1, (2, 3), np.float64)
    direction = random_like(2, (branch, y))

    def loss(arguments, solver):
        x, _ = fixed_point_inverse(*arguments, solver(1e-12, 1e-12, 300), lipschitz=0.8)
        return jnp.sum(jnp.sin(x))

    @functools.partial(jax.jit, static_argnums=1)
    def derivatives(arguments, solver):
        along = jax.jvp(lambda a: loss(a, solver), (arguments,), (direction,))[1]
        return jax.grad(loss)(arguments, solver), along

    ours, theirs = (derivatives((branch, y), solver) for solver in (Anderson, FixedPointIteration))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), ours, theirs)


def test_it_works_in_a_scan_over_blocks_and_under_vmap():
    flow, x = build("vector").flow, draw(1, (2, 4, 3))
    flow = flow.with_bounds()
    there_and_back = lambda x: flow.inverse(flow.forward(x), Anderson())  # noqa: E731
    back, info = quick_jit(jax.vmap(there_and_back))(x)
    assert bool(info.converged.all()) and info.num_steps.shape == (2, 3, 4)
    np.testing.assert_allclose(back, x, atol=1e-4)
