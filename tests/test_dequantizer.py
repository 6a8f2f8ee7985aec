"""Learned dequantisation: its density against the full Jacobian of what it draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.stats import logistic

from iresnet_jax import quantize
from iresnet_jax.nn import VariationalDequantization

LEVELS = jnp.asarray(np.random.default_rng(0).integers(0, 17, (3, 4, 2, 1)))
KEY = jax.random.key(0)
MODULE = VariationalDequantization(17, features=5, couplings=3)


@jax.jit
def variables(scale):
    """Weights as initialised, and normal ones of a scale added."""
    fresh = MODULE.init(KEY, LEVELS, KEY)
    leaves, tree = jax.tree.flatten(fresh)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [
        leaf + scale * jax.random.normal(k, leaf.shape)
        for leaf, k in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, noisy)


@pytest.mark.usefixtures("x64")
def test_the_density_is_that_of_the_change_of_variables():
    weights = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), variables(0.3))
    noise = jax.random.logistic(jax.random.key(2), LEVELS.shape, jnp.float64)

    @jax.jit
    def placed(noise):
        return MODULE.apply(weights, LEVELS, noise, method="place")

    u, log_q = placed(noise)
    assert u.min() > 0.0 and u.max() < 1.0
    size = LEVELS[0].size
    jacobians = jax.jit(jax.jacobian(lambda noise: placed(noise)[0]))(noise)
    for i in range(len(LEVELS)):
        own = jacobians[i, ..., i, :, :, :].reshape(size, size)
        expected = logistic.logpdf(noise[i]).sum() - np.linalg.slogdet(own)[1]
        np.testing.assert_allclose(log_q[i], expected, rtol=1e-9)
    assert np.abs(log_q).max() > 0.5  # not uniform


def test_it_begins_uniform():
    x, log_q = jax.jit(MODULE.apply)(variables(0.0), LEVELS, KEY)
    np.testing.assert_allclose(log_q, 0.0, atol=1e-5)
    many = jnp.full((2000, 4, 2, 1), 16)
    x, _ = jax.jit(MODULE.apply)(variables(0.0), many, KEY)
    u = np.sort(np.asarray(x).ravel() * 17 - 16)
    assert np.abs(u - (np.arange(u.size) + 0.5) / u.size).max() < 1.95 / np.sqrt(u.size)


@pytest.mark.parametrize("scale", [0.3, 3.0, 30.0])
def test_the_levels_are_recovered_and_the_density_is_finite(scale):
    x, log_q = jax.jit(MODULE.apply)(variables(scale), LEVELS, KEY)
    np.testing.assert_array_equal(quantize(x, 17), LEVELS)
    assert np.isfinite(log_q).all()


def test_the_noise_of_an_image_is_its_own():
    """Whatever else is in the batch."""
    keys, weights = jax.random.split(KEY, 3), variables(0.3)
    x, log_q = jax.jit(MODULE.apply)(weights, LEVELS, keys)
    alone = jax.jit(MODULE.apply)(weights, LEVELS[1:2], keys[1:2])
    np.testing.assert_allclose(x[1:2], alone[0], rtol=1e-6)
    np.testing.assert_allclose(log_q[1:2], alone[1], rtol=1e-4)


@pytest.mark.parametrize(
    ("module", "levels", "error", "message"),
    [
        (VariationalDequantization(17, features=0), LEVELS, ValueError, "features .* ≥ 1; got 0"),
        (VariationalDequantization(17, couplings=0), LEVELS, ValueError, "couplings .* got 0"),
        (VariationalDequantization(1), LEVELS, ValueError, "num_levels must be ≥ 2; got 1"),
        (MODULE, LEVELS[0], ValueError, r"got shape \(4, 2, 1\)"),
        (MODULE, LEVELS + 1, ValueError, r"lie in \[0, 16\]"),
        (MODULE, LEVELS / 2.0, TypeError, "integer grey levels; got float"),
    ],
)
def test_bad_settings_and_images_are_refused(module, levels, error, message):
    with pytest.raises(error, match=message):
        module.init(KEY, levels, KEY)
