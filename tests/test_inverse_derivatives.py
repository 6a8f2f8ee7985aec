"""The derivatives of the inverse, by the implicit function theorem, and where they are NaN."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    EXACT,
    contraction,
    directional_difference,
    random_like,
    slopes,
    tree_dot,
    unconverged,
)

from iresnet_jax import FixedPointIteration, fixed_point_inverse

pytestmark = pytest.mark.usefixtures("no_rank_promotion")

X64 = pytest.mark.usefixtures("x64")


def draw(seed, shape, dtype=np.float32, scale=1.0):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), dtype)


def unrolled(branch, y, steps=80):
    return jax.lax.fori_loop(0, steps, lambda _, x: y - branch(x), y)


def losses(direction):
    """A nonlinear function of the inverse, by the library and by differentiating the iteration."""

    def implicit(arguments):
        branch, y = arguments
        solver = FixedPointIteration(1e-13, 1e-13)
        return tree_sum(fixed_point_inverse(branch, y, solver)[0], direction)

    def explicit(arguments):
        return tree_sum(unrolled(*arguments), direction)

    return implicit, explicit


def tree_sum(x, weights):
    return jnp.sum(jnp.sin(x) * weights)


def example():
    arguments = contraction(0, 3, 0.6, np.float64), draw(1, (2, 3), np.float64)
    return arguments, random_like(2, arguments), draw(3, (2, 3), np.float64)


@X64
def test_gradient_equals_the_unrolled_one_and_the_finite_difference():
    arguments, direction, weights = example()
    implicit, explicit = losses(weights)
    ours, theirs = jax.jit(lambda a: (jax.grad(implicit)(a), jax.grad(explicit)(a)))(arguments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-11), ours, theirs)
    expected = directional_difference(jax.jit(implicit), arguments, direction)
    np.testing.assert_allclose(tree_dot(ours, direction), expected, rtol=1e-7)
    assert min(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(ours)) > 1e-3


@X64
def test_forward_derivative_is_that_of_the_unrolled_iteration():
    arguments, direction, weights = example()

    @jax.jit
    def both(arguments, direction):
        return [jax.jvp(f, (arguments,), (direction,))[1] for f in losses(weights)]

    ours, theirs = both(arguments, direction)
    np.testing.assert_allclose(ours, theirs, rtol=1e-11)


@X64
@pytest.mark.parametrize("order", ["forward over reverse", "reverse over reverse"])
def test_second_derivative_is_that_of_the_unrolled_iteration(order):
    arguments, direction, weights = example()

    def product(loss, arguments):
        if order == "forward over reverse":
            return jax.jvp(jax.grad(loss), (arguments,), (direction,))[1]
        return jax.grad(lambda a: dot(jax.grad(loss)(a), direction))(arguments)

    def dot(a, b):
        return sum(map(jnp.vdot, jax.tree.leaves(a), jax.tree.leaves(b)))

    implicit, explicit = losses(weights)
    ours, theirs = jax.jit(lambda a: (product(implicit, a), product(explicit, a)))(arguments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), ours, theirs)


@X64
def test_derivatives_map_over_batches():
    branch, y = contraction(0, 3, 0.6, np.float64), draw(1, (2, 4, 3), np.float64)

    def gradient(branch, y):
        solver = FixedPointIteration(1e-12)
        return jax.grad(lambda b: jnp.sum(fixed_point_inverse(b, y, solver)[0] ** 2))(branch)

    mapped = jax.jit(jax.vmap(gradient, (None, 0)))(branch, y)
    each = jax.jit(gradient)
    for i in range(2):
        alone = each(branch, y[i])
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, atol=1e-9), mapped, alone
        )


@X64
def test_jacobian_of_a_linear_inverse_is_known():
    y = draw(0, (2, 3), np.float64)
    jacobian = jax.jacfwd(lambda y: fixed_point_inverse(lambda x: 0.5 * x, y)[0].sum(0))(y)
    expected = np.broadcast_to(np.eye(3)[:, None] / 1.5, (3, 2, 3))
    np.testing.assert_allclose(jacobian, expected, rtol=1e-5)


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_derivative_is_nan_exactly_where_a_sample_did_not_converge(mode):
    branch, y = slopes(0.2, 0.9, 1.5, 0.3), draw(0, (4, 3)).at[3, 0].set(jnp.nan)

    def inverted(y):
        return fixed_point_inverse(branch, y, FixedPointIteration(max_steps=20))

    def invert(y):
        return inverted(y)[0]

    def total(y):
        return jnp.sum(invert(y), axis=1)

    with unconverged(3, 4):
        if mode == "reverse":
            derivative = jax.grad(lambda y: jnp.sum(total(y)))(y)
        else:
            derivative = jax.jvp(invert, (y,), (jnp.ones_like(y),))[1]
        converged = np.asarray(inverted(y)[1].converged)
    np.testing.assert_array_equal(converged, [True, False, False, False])
    np.testing.assert_array_equal(np.isnan(derivative), np.repeat(~converged, 3).reshape(4, 3))


def test_derivative_is_nan_where_only_its_linear_system_diverges():
    """y = 0 is its own preimage, found at once, but there g has slope 2."""
    y = jnp.array([[0.0], [3.0]])
    found, info = fixed_point_inverse(lambda x: -2.0 * jnp.sin(x) * jnp.exp(-x * x), y)
    np.testing.assert_array_equal(info.converged, [True, True])
    gradient = jax.grad(
        lambda y: jnp.sum(fixed_point_inverse(lambda x: -2.0 * jnp.sin(x) * jnp.exp(-x * x), y)[0])
    )(y)
    np.testing.assert_array_equal(jnp.isnan(gradient), [[True], [False]])
    assert float(found[0, 0]) == 0.0


@pytest.mark.slow
def test_derivative_is_nan_where_only_the_inverse_diverges():
    """A cycle between points where g is flat: the linear system there is solved at once."""

    def branch(x):
        return 3.0 * jnp.tanh(20.0 * x)

    y = jnp.array([[0.5]])
    with unconverged(1, 1):
        assert not bool(fixed_point_inverse(branch, y)[1].converged[0])
        gradient = jax.grad(lambda y: jnp.sum(fixed_point_inverse(branch, y)[0]))(y)
    assert math.isnan(float(gradient[0, 0]))


def test_an_unconverged_sample_makes_the_parameters_gradient_nan():
    y = draw(0, (2, 3))

    def loss(scale):
        solver = FixedPointIteration(max_steps=9)
        return jnp.sum(fixed_point_inverse(lambda x: scale * slopes(0.2, 0.95)(x), y, solver)[0])

    with unconverged(1, 2):
        assert math.isnan(float(jax.grad(loss)(1.0)))


def test_diagnostics_are_constants():
    def loss(y):
        info = fixed_point_inverse(lambda x: 0.5 * jnp.sin(x), y, lipschitz=0.5, **EXACT)[1]
        return jnp.sum(info.residual) + jnp.sum(info.error_bound)

    np.testing.assert_array_equal(jax.grad(loss)(draw(0, (2, 3))), 0.0)


def test_the_gradient_is_linear_in_small_cotangents_too():
    """An absolute tolerance would call the linear system of a tiny right-hand side solved."""
    weights = jnp.diag(jnp.array([0.8, -0.5, 0.3]))
    y = jnp.ones((4, 3))

    def gradient(scale):
        return jax.grad(lambda y: scale * jnp.sum(fixed_point_inverse(lambda x: x @ weights, y)[0]))

    expected = np.broadcast_to(1.0 / (1.0 + np.diag(weights)), y.shape)
    for scale in (1.0, 1e-4, 1e-8):
        np.testing.assert_allclose(gradient(scale)(y) / scale, expected, rtol=2e-5)
