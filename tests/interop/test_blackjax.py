"""log p of a flow under a sampler of BlackJAX, one chain and several."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import iresnet_jax as ir
from iresnet_jax.interop.densities import TermwiseSeries, log_density

pytestmark = pytest.mark.slow
blackjax = pytest.importorskip("blackjax")

KEY = jax.random.key(11)


def moments_on_a_grid(density):
    """Mean and standard deviations, by quadrature in float64."""
    axis = np.linspace(-6.0, 8.0, 401)
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)
    log = np.asarray(density(jnp.asarray(grid, jnp.float32)), np.float64)
    weights = np.exp(log - log.max())
    weights /= weights.sum()
    mean = weights @ grid
    return mean, np.sqrt(weights @ (grid - mean) ** 2)


@pytest.mark.parametrize(
    ("estimator", "key"),
    [(ir.Exact(), None), (TermwiseSeries(8, num_probes=2), KEY)],
    ids=["exact", "series"],
)
def test_hmc_samples_the_density_it_is_given(flow, x, estimator, key):
    density = log_density(flow, estimator, key=key)
    sampler = blackjax.hmc(density, 0.3, jnp.ones(2), num_integration_steps=8)
    states = jax.vmap(sampler.init)(x[:16])

    def step(states, key):
        states, info = jax.vmap(sampler.step)(jax.random.split(key, 16), states)
        return states, (states.position, info.acceptance_rate)

    _, (draws, rates) = jax.lax.scan(step, states, jax.random.split(jax.random.key(0), 300))
    chains = np.asarray(draws[50:], np.float64).mean(axis=0)  # a mean for each chain
    mean, _ = moments_on_a_grid(jax.jit(density))
    stderr = chains.std(axis=0, ddof=1) / np.sqrt(len(chains))
    assert np.all(np.abs(chains.mean(axis=0) - mean) <= 4.5 * stderr)
    assert rates.mean() > 0.6
