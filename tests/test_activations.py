"""sin(πx) and cos(πx) against NumPy to second order; activations of one's own by name."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iresnet_jax import (
    Activation,
    Affine,
    DenseOperator,
    FixedPointIteration,
    Sequential,
    certify_branch,
    fixed_point_inverse,
    nn,
    register_activation,
)
from iresnet_jax.activations import ACTIVATIONS, cospi, elu, sinpi


def points(dtype):
    rng = np.random.default_rng(0)
    halves = np.arange(-8, 9) / 2
    return np.concatenate([rng.uniform(-40, 40, 5000), rng.normal(size=5000), halves]).astype(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 4e-7), (np.float64, 1e-15)])
def test_values(dtype, tolerance, x64):
    x = points(dtype)
    exact = x.astype(np.float64)
    exact -= 2 * np.round(exact / 2)  # so that the oracle need not reduce large arguments
    assert sinpi(jnp.asarray(x)).dtype == dtype
    np.testing.assert_allclose(sinpi(jnp.asarray(x)), np.sin(np.pi * exact), atol=tolerance)
    np.testing.assert_allclose(
        cospi(jnp.asarray(x)), np.cos(np.pi * exact), atol=max(tolerance, 4 * np.finfo(dtype).eps)
    )


def test_integers_are_zeros_and_halves_are_extremes():
    n = jnp.arange(-5.0, 6.0)
    np.testing.assert_array_equal(sinpi(n), 0.0)
    np.testing.assert_allclose(sinpi(n + 0.5), (-1.0) ** np.arange(-5, 6), rtol=2e-7)


def test_derivatives(x64):
    x = jnp.asarray(points(np.float64))
    first = jax.vmap(jax.grad(sinpi))
    second = jax.vmap(jax.grad(jax.grad(sinpi)))
    forward = jax.jvp(sinpi, (x,), (jnp.ones_like(x),))[1]
    np.testing.assert_allclose(first(x), np.pi * np.cos(np.pi * x), atol=1e-12)
    np.testing.assert_allclose(forward, first(x), atol=1e-14)
    np.testing.assert_allclose(second(x), -(np.pi**2) * np.sin(np.pi * x), atol=1e-11)


def test_values_and_slopes_that_are_not_finite_stay_so():
    bad = jnp.array([jnp.nan, jnp.inf, -jnp.inf])
    assert jnp.isnan(sinpi(bad)).all()
    assert jnp.isnan(jax.vmap(jax.grad(sinpi))(bad)).all()


def test_elu_differentiates_to_second_order(x64):
    x = jnp.asarray([-3.0, -1.0, -1e-3, 1e-3, 2.0])
    first, second = (jax.vmap(f) for f in (jax.grad(elu), jax.grad(jax.grad(elu))))
    np.testing.assert_allclose(first(x), np.where(x > 0, 1.0, np.exp(x)), rtol=1e-14)
    np.testing.assert_allclose(second(x), np.where(x > 0, 0.0, np.exp(x)), rtol=1e-14)


# Activations of one's own


@pytest.fixture
def registry():
    """What is registered in a test is known in that test alone."""
    before = dict(ACTIVATIONS)
    yield
    ACTIVATIONS.clear()
    ACTIVATIONS.update(before)


def halved(x):
    return 0.5 * jnp.tanh(x)


def branch_of(name):
    kernel = 0.8 * np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    layer = Affine(DenseOperator(jnp.asarray(kernel, jnp.float32)), jnp.asarray([0.1, -0.2, 0.3]))
    return Sequential((layer, Activation(name), layer))


def test_a_registered_activation_is_known_wherever_names_are_taken(registry):
    register_activation("halved", halved, 0.5)
    x = jnp.linspace(-3.0, 3.0, 7)
    np.testing.assert_array_equal(Activation("halved")(x), halved(x))
    assert Activation("halved").lipschitz_bound() == 0.5
    assert certify_branch(branch_of("halved"), "it", (3,)).lipschitz == pytest.approx(
        0.32, rel=1e-6
    )
    model = nn.VectorFlow(dim=2, depth=2, features=(3,), activation="halved")
    variables = jax.jit(model.init)(jax.random.key(0), jnp.ones((4, 2)))
    (_, block), *_ = (chain.links for chain in model.flow(variables).blocks())
    assert "halved" in [getattr(stage, "name", "") for stage in block.branch.stages]


def test_with_its_rounding_inverses_through_it_have_error_bounds(registry):
    register_activation("halved", halved, 0.5, ulps=(16.0, 0.0))
    branch, y = branch_of("halved"), jnp.asarray(np.random.default_rng(1).normal(size=(5, 3)))
    solver = FixedPointIteration(error_tolerance=1e-4)
    found, info = fixed_point_inverse(branch, y, solver, lipschitz=0.33)
    assert (info.error_bound <= 1e-4).all()
    with jax.enable_x64(True):
        double = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), (branch, y))
        exact, _ = fixed_point_inverse(*double, FixedPointIteration(1e-14, 1e-14))
    errors = np.linalg.norm(np.asarray(found, np.float64) - np.asarray(exact), axis=1)
    assert (errors <= info.error_bound).all()


def test_without_its_rounding_no_error_bound_is_stated(registry):
    register_activation("halved", halved, 0.5)
    branch, y = branch_of("halved"), jnp.ones((2, 3))
    _, info = fixed_point_inverse(branch, y, lipschitz=0.33)
    np.testing.assert_array_equal(info.rounding, jnp.inf)
    np.testing.assert_array_equal(info.error_bound, jnp.inf)
    with pytest.raises(ValueError, match="bound on the branch's rounding, and that of halved is"):
        fixed_point_inverse(branch, y, FixedPointIteration(error_tolerance=1e-2), lipschitz=0.33)
    idle = Activation("halved", jnp.zeros(()))
    error = jnp.ones(2)
    np.testing.assert_array_equal(idle.rounding(y, error, None), error)


@pytest.mark.parametrize(
    ("function", "lipschitz", "message"),
    [
        (halved, 0.0, r"lipschitz must lie in \(0, inf\); got 0\.0 for 'mine'"),
        (halved, -1.0, r"lipschitz must lie in \(0, inf\); got -1\.0"),
        (halved, math.inf, r"lipschitz must lie in \(0, inf\); got inf"),
        (halved, math.nan, r"lipschitz must lie in \(0, inf\); got nan"),
        (halved, 0.4, r"'mine' has slopes of 0\.5, above lipschitz = 0\.4"),
        (jnp.square, 1.0, r"'mine' has slopes of \S+, above lipschitz = 1\.0"),
        (jnp.sqrt, 1.0, r"'mine' has slopes of nan"),
        (jnp.sum, 1.0, r"'mine' must be elementwise; it maps shape \(7999,\) to \(\)"),
        (lambda x: jnp.stack([x, x]), 1.0, r"elementwise; it maps .* to \(2, 7999\)"),
    ],
    ids=["zero", "negative", "infinite", "nan", "small", "steep", "undefined", "sum", "two"],
)
def test_what_is_no_activation_is_refused(registry, function, lipschitz, message):
    with pytest.raises(ValueError, match=message):
        register_activation("mine", function, lipschitz)
    assert "mine" not in ACTIVATIONS


@pytest.mark.parametrize("ulps", [(-1.0, 0.0), (1.0, -0.5), (math.inf, 0.0), (math.nan, 0.0)])
def test_a_rounding_that_is_none_is_refused(registry, ulps):
    with pytest.raises(ValueError, match=r"ulps must be two numbers in \[0, inf\); got .*'mine'"):
        register_activation("mine", halved, 0.5, ulps)
    assert "mine" not in ACTIVATIONS


@pytest.mark.parametrize("name", ["elu", "tanh", "mine"])
def test_a_name_is_taken_once(registry, name):
    register_activation("mine", halved, 0.5)
    with pytest.raises(ValueError, match=f"An activation '{name}' is known already"):
        register_activation(name, halved, 0.6)
    assert ACTIVATIONS["mine"] == (halved, (-0.5, 0.5), None)
