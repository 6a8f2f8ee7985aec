import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from iresnet_jax.priors import DiagonalGaussian, bits_per_dim

SHAPES = [(3,), (2, 2, 3)]


def example(shape, dtype=np.float32):
    rng = np.random.default_rng(0)
    mean, log_std = rng.normal(size=(2, *shape))
    return DiagonalGaussian(jnp.asarray(mean, dtype), jnp.asarray(0.5 * log_std, dtype))


@pytest.mark.parametrize("shape", SHAPES)
def test_log_prob_is_the_sum_of_normal_log_densities(x64, shape):
    prior, z = example(shape, np.float64), np.random.default_rng(1).normal(size=(4, *shape))
    densities = scipy.stats.norm.logpdf(z, prior.mean, np.exp(prior.log_std))
    log_prob = jax.jit(DiagonalGaussian.log_prob)(prior, z)
    np.testing.assert_allclose(log_prob, densities.reshape(4, -1).sum(1), rtol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_have_the_stated_moments(shape, temperature):
    prior = example(shape)
    samples = prior.sample(jax.random.key(0), 20_000, temperature)
    assert samples.shape == (20_000, *shape)
    standard = (samples - prior.mean) / (temperature * jnp.exp(prior.log_std))
    for coordinate in np.asarray(standard).reshape(20_000, -1).T:
        assert scipy.stats.kstest(coordinate, "norm").pvalue > 1e-3
    correlation = np.corrcoef(np.asarray(standard).reshape(20_000, -1).T)
    assert np.abs(correlation - np.eye(len(correlation))).max() < 0.04


def test_temperature_zero_gives_the_mean():
    prior = example((3,))
    samples = prior.sample(jax.random.key(0), 2, 0.0)
    np.testing.assert_array_equal(samples, np.broadcast_to(prior.mean, (2, 3)))


def test_samples_depend_on_the_key():
    prior = example((3,))
    first, again, other = (prior.sample(jax.random.key(i), 2) for i in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert float(jnp.abs(first - other).min()) > 0.0


def test_a_negative_temperature_is_refused():
    with pytest.raises(ValueError, match=r"temperature must be ≥ 0; got -0\.5"):
        example((3,)).sample(jax.random.key(0), 2, -0.5)
    for temperature in (math.nan, math.inf):
        with pytest.raises(ValueError, match=f"must be finite; got {temperature}"):
            example((3,)).sample(jax.random.key(0), 2, temperature)
    hot = jnp.float32(2.0)
    jax.eval_shape(lambda key: example((3,)).sample(key, 2, hot), jax.random.key(0))


@pytest.mark.parametrize("num_levels", [2, 17, 256])
def test_a_uniform_density_costs_the_logarithm_of_the_levels(num_levels):
    bits = bits_per_dim(jnp.zeros(3), 10, num_levels)  # density 1 on the unit cube
    np.testing.assert_allclose(bits, np.full(3, math.log2(num_levels)), rtol=1e-6)


def test_bits_are_the_entropy_of_a_distribution_over_levels():
    """A density constant on each level's cell: its mean bits are the discrete entropy."""
    probabilities = np.array([0.5, 0.25, 0.125, 0.125])
    log_density = jnp.asarray(np.log(4 * probabilities))  # of one pixel, cells of width 1/4
    bits = probabilities @ np.asarray(bits_per_dim(log_density, 1, 4))
    np.testing.assert_allclose(bits, 1.75, rtol=1e-6)


def test_continuous_data_have_no_levels_to_add():
    np.testing.assert_allclose(bits_per_dim(jnp.array([-4.0]), 2), [2.0 / math.log(2)], rtol=1e-6)


def test_sampling_takes_one_key_typed_or_legacy():
    prior = example((3,))
    np.testing.assert_array_equal(
        prior.sample(jax.random.PRNGKey(0), 2), prior.sample(jax.random.key(0), 2)
    )
    with pytest.raises(ValueError, match=r"one key; got \(4,\)"):
        prior.sample(jax.random.split(jax.random.key(0), 4), 2)
    with pytest.raises(TypeError, match=r"must come from jax.random.key.*; got 0"):
        prior.sample(0, 2)


@pytest.mark.parametrize(("dim", "num_levels"), [(0, 256), (10, 0), (-1, 1)])
def test_bits_per_dim_refuses_counts_below_one(dim, num_levels):
    with pytest.raises(ValueError, match=f"dim={dim}, num_levels={num_levels}"):
        bits_per_dim(jnp.zeros(3), dim, num_levels)
