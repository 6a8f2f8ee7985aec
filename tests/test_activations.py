"""sin(πx) and cos(πx) against NumPy in double precision, to second order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iresnet_jax.activations import cospi, sinpi


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
