"""One deterministic function with its own derivatives: against finite differences in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import contraction, directional_difference, random_like

import iresnet_jax as ir
from iresnet_jax.interop.densities import TermwiseSeries, log_density

KEY = jax.random.key(7)
SERIES = TermwiseSeries(6, num_probes=2)
ESTIMATORS = [(ir.Exact(), None), (SERIES, KEY)]
IDS = ["exact", "series"]
SECOND_ORDER = [pytest.param(ir.Exact(), None, marks=pytest.mark.slow), (SERIES, KEY)]


def double_flow():
    """Two blocks with Lipschitz constants near one, in float64."""
    blocks = tuple(ir.Residual(contraction(seed, 3, 0.9, np.float64)) for seed in range(2))
    prior = ir.DiagonalGaussian(jnp.full(3, 0.2), jnp.full(3, -0.1))
    return ir.Flow((ir.Chain(blocks),), (3,), (prior,))


@pytest.fixture
def point():
    return np.random.default_rng(3).normal(size=3)


@pytest.mark.parametrize(("estimator", "key"), ESTIMATORS, ids=IDS)
def test_the_gradient_is_that_of_the_value(x64, point, estimator, key):
    density = log_density(double_flow(), estimator, key=key)
    slope = jax.grad(density)(point)
    for seed in range(3):
        direction = random_like(seed, point)
        expected = directional_difference(density, point, direction)
        np.testing.assert_allclose(slope @ direction, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("estimator", "key"), SECOND_ORDER, ids=IDS)
def test_the_hessian_is_that_of_the_value(x64, point, estimator, key):
    density = log_density(double_flow(), estimator, key=key)
    hessian = jax.hessian(density)(point)
    np.testing.assert_allclose(hessian, hessian.T, rtol=1e-12, atol=1e-13)
    slope = jax.grad(density)
    for i, unit in enumerate(np.eye(3)):
        difference = (slope(point + 1e-5 * unit) - slope(point - 1e-5 * unit)) / 2e-5
        np.testing.assert_allclose(hessian[i], difference, rtol=1e-7, atol=1e-8)


def test_the_gradient_by_the_weights_is_that_of_the_value(x64, point):
    flow = double_flow()
    value = jax.jit(lambda flow: log_density(flow, SERIES, key=KEY)(point))
    slope, direction = jax.grad(value)(flow), random_like(0, flow)
    pairs = zip(jax.tree.leaves(slope), jax.tree.leaves(direction), strict=True)
    found = sum(float(jnp.vdot(a, b)) for a, b in pairs)
    np.testing.assert_allclose(found, directional_difference(value, flow, direction), rtol=1e-7)


@pytest.mark.parametrize(("estimator", "key"), SECOND_ORDER, ids=IDS)
def test_energy_is_kept_to_the_square_of_the_step(x64, point, estimator, key):
    """A leapfrog of duration 1: half the step, a quarter of the error."""
    density = log_density(double_flow(), estimator, key=key)
    momentum = np.random.default_rng(4).normal(size=3)
    energy = lambda q, p: 0.5 * p @ p - density(q)  # noqa: E731
    slope = jax.jit(jax.grad(density))

    def error(steps):
        q, p, size = point, momentum, 1.0 / steps
        for _ in range(steps):
            p = p + 0.5 * size * slope(q)
            q = q + size * p
            p = p + 0.5 * size * slope(q)
        return abs(float(energy(q, p) - energy(point, momentum)))

    assert 3.5 < error(64) / error(128) < 4.5


def test_the_neumann_gradient_is_not_that_of_its_value(x64, point):
    """What is refused, and why: the value agrees, and the gradient does not."""
    flow = double_flow()
    series = ir.TruncatedSeries(SERIES.num_terms, SERIES.num_probes)
    keys = KEY[None]
    neumann = lambda x: flow.log_prob(x[None], series, key=keys)[0]  # noqa: E731
    termwise = log_density(flow, SERIES, key=KEY)
    np.testing.assert_allclose(neumann(point), termwise(point), rtol=1e-13)
    slopes = jax.jit(lambda x: (jax.grad(neumann)(x), jax.grad(termwise)(x)))
    assert np.abs(np.subtract(*slopes(point))).max() > 1e-3
    with pytest.raises(ValueError, match=r"gradient of TruncatedSeries.*TermwiseSeries"):
        log_density(flow, series, key=KEY)


def test_the_mean_over_keys_is_the_exact_log_density_up_to_the_bias(flow, x):
    series = TermwiseSeries(20)
    keys = jax.random.split(jax.random.key(1), 200)
    draws = jax.jit(jax.vmap(lambda key: log_density(flow, series, key=key)(x[:4])))(keys)
    stderr = np.std(draws, axis=0, ddof=1) / np.sqrt(len(keys))
    bias = ir.certify(flow).bias_bound(series)
    exact = jax.jit(flow.log_prob)(x[:4])
    assert np.all(np.abs(draws.mean(axis=0) - exact) <= 5.0 * stderr + bias + 1e-5)


def test_a_point_has_one_density_wherever_it_stands(flow, x):
    density = log_density(flow, SERIES, key=KEY)
    rows = density(x[:6])
    assert rows.shape == (6,)
    np.testing.assert_allclose(density(x[:6][::-1])[::-1], rows, rtol=1e-5)
    np.testing.assert_allclose(density(x[:6].reshape(2, 3, 2)).ravel(), rows, rtol=1e-5)
    np.testing.assert_allclose(jax.vmap(density)(x[:6]), rows, rtol=1e-5)
    np.testing.assert_allclose([density(row) for row in x[:6]], rows, rtol=1e-5)
    assert density(x[0]).shape == () and density(x[:0]).shape == (0,)


def test_it_is_a_pytree_and_takes_a_legacy_key(flow, x):
    density = log_density(flow, SERIES, key=jax.random.PRNGKey(7))
    value = jax.jit(lambda f, x: f(x))(density, x[:3])
    np.testing.assert_allclose(value, log_density(flow, SERIES, key=KEY)(x[:3]), rtol=1e-6)


def test_what_is_refused(flow, x):
    bare = ir.Flow(flow.levels, flow.event_shape)
    for arguments, options, kind, message in [
        ((bare,), {}, ValueError, "no prior"),
        ((flow.levels[0],), {}, TypeError, "flow is needed"),
        ((flow, ir.BoundedSeries(0.1)), {"key": KEY}, ValueError, "gradient of BoundedSeries"),
        ((flow, ir.Roulette(0.5, lipschitz=0.2)), {"key": KEY}, ValueError, "gradient of Roulette"),
        ((flow, "exact"), {}, TypeError, "estimator must be"),
        ((flow, SERIES), {}, ValueError, "draws its probes once"),
        ((flow, SERIES), {"key": jax.random.split(KEY, 2)}, ValueError, "one key"),
        ((flow, SERIES), {"key": 3}, TypeError, "A key must come from"),
    ]:
        with pytest.raises(kind, match=message):
            log_density(*arguments, **options)
    for wrong in (x[:, :1], x[0, 0]):
        with pytest.raises(ValueError, match=r"must have shape \[\.\.\., \(2,\)\]"):
            log_density(flow)(wrong)
