"""Flows as NumPyro distributions: prior, likelihood, guide, and what NumPyro asks of a pytree."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import iresnet_jax as ir
from iresnet_jax.interop.densities import TermwiseSeries

pytestmark = pytest.mark.slow
numpyro = pytest.importorskip("numpyro")
from numpyro import distributions as dist  # noqa: E402
from numpyro import handlers  # noqa: E402
from numpyro.distributions import constraints, transforms  # noqa: E402
from numpyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO  # noqa: E402

from iresnet_jax.interop.numpyro import FlowDistribution, flow_param  # noqa: E402

KEY = jax.random.key(5)
NOISE = 0.4
OBSERVED = 2.5


@pytest.fixture(params=["exact", "series"])
def distribution(flow, request):
    if request.param == "exact":
        return FlowDistribution(flow)
    return FlowDistribution(flow, TermwiseSeries(8, num_probes=2), key=KEY)


def test_shapes_values_and_support(flow, distribution, x):
    assert (distribution.batch_shape, distribution.event_shape) == ((), (2,))
    assert distribution.support is constraints.real_vector
    assert distribution.has_rsample
    for shape in [(), (3,), (2, 3)]:
        draws = distribution.sample(KEY, shape)
        assert draws.shape == (*shape, 2) and distribution.log_prob(draws).shape == shape
    if distribution.key is None:
        np.testing.assert_allclose(distribution.log_prob(x), flow.log_prob(x), rtol=1e-5)


def test_samples_are_those_of_the_flow(flow):
    draws = FlowDistribution(flow).sample(KEY, (3, 4))
    np.testing.assert_array_equal(draws.reshape(12, 2), flow.sample(KEY, 12)[0])


def test_it_is_a_pytree(distribution, x):
    leaves, structure = jax.tree.flatten(distribution)
    again = jax.tree.unflatten(structure, leaves)
    np.testing.assert_array_equal(again.log_prob(x), distribution.log_prob(x))
    assert again.event_shape == (2,)
    jitted = jax.jit(lambda d, x: d.log_prob(x))(distribution, x)
    np.testing.assert_allclose(jitted, distribution.log_prob(x), rtol=1e-5, atol=1e-5)


def test_several_flows_at_once(flow, x):
    """vmap over the distribution itself: weights differ along the leading axis."""
    other = jax.tree.map(lambda leaf: 0.5 * leaf, flow)
    both = jax.tree.map(lambda a, b: jnp.stack([a, b]), *map(FlowDistribution, (flow, other)))
    values = jax.vmap(lambda d: d.log_prob(x[:5]))(both)
    np.testing.assert_allclose(values[0], flow.log_prob(x[:5]), rtol=1e-4)
    np.testing.assert_allclose(values[1], other.log_prob(x[:5]), rtol=1e-4)
    assert jax.vmap(lambda d, k: d.sample(k))(both, jax.random.split(KEY, 2)).shape == (2, 2)


def test_what_numpyro_makes_of_a_distribution(flow, distribution, x):
    expanded = distribution.expand((4,))
    assert expanded.sample(KEY).shape == (4, 2)
    np.testing.assert_allclose(expanded.log_prob(x[:4]), distribution.log_prob(x[:4]), rtol=1e-5)
    joint = expanded.to_event(1).log_prob(x[:4])
    np.testing.assert_allclose(joint, distribution.log_prob(x[:4]).sum(), rtol=1e-5)
    scaled = dist.TransformedDistribution(distribution, transforms.AffineTransform(0.0, 2.0))
    expected = distribution.log_prob(x) - 2.0 * np.log(2.0)
    np.testing.assert_allclose(scaled.log_prob(2.0 * x), expected, rtol=1e-4, atol=1e-4)


def test_a_missed_inverse_is_nan(flow):
    hasty = FlowDistribution(flow, solver=ir.FixedPointIteration(max_steps=1))
    draws = jax.jit(lambda key: hasty.sample(key, (8,)))(KEY)
    _, info = jax.jit(lambda key: flow.sample(key, 8, solver=hasty.solver))(KEY)
    missed = ~np.all(info.converged, axis=0)
    assert missed.any()
    np.testing.assert_array_equal(np.isnan(draws).all(axis=1), missed)


def posterior():
    """p(z | y) for a flow as prior, and its oracle below."""

    def model(distribution):
        z = numpyro.sample("z", distribution)
        numpyro.sample("y", dist.Normal(z.sum(), NOISE), obs=OBSERVED)

    return model


def moments_on_a_grid(log_prob):
    """Mean and standard deviations of z under the posterior, by quadrature in float64."""
    axis = np.linspace(-4.0, 6.0, 401)
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)
    log = np.asarray(log_prob(jnp.asarray(grid, jnp.float32)), np.float64)
    log = log - 0.5 * ((OBSERVED - grid.sum(axis=1)) / NOISE) ** 2
    weights = np.exp(log - log.max())
    weights /= weights.sum()
    mean = weights @ grid
    return mean, np.sqrt(weights @ (grid - mean) ** 2)


def test_nuts_samples_the_posterior_of_a_flow_as_prior(distribution):
    mcmc = MCMC(NUTS(posterior()), num_warmup=300, num_samples=1000, progress_bar=False)
    mcmc.run(jax.random.key(0), distribution, extra_fields=("diverging",))
    draws = np.asarray(mcmc.get_samples()["z"], np.float64)
    mean, std = moments_on_a_grid(jax.jit(distribution.log_prob))
    size = numpyro.diagnostics.effective_sample_size(draws[None])
    assert size.min() > 100
    assert np.all(np.abs(draws.mean(axis=0) - mean) <= 4.0 * std / np.sqrt(size))
    assert mcmc.get_extra_fields()["diverging"].mean() < 0.05


def test_as_a_likelihood_under_a_plate_and_handlers(flow, x):
    """log p(y − m) of a batch, summed, by the trace of the model."""

    def model(y):
        shift = numpyro.sample("shift", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
        move = transforms.AffineTransform(shift, 1.0)
        moved = dist.TransformedDistribution(FlowDistribution(flow), move)
        with numpyro.plate("data", None if y is None else len(y)):
            numpyro.sample("y", moved, obs=y)

    at = {"shift": jnp.array([0.3, -0.2])}
    log_joint, _ = numpyro.infer.util.log_density(model, (x,), {}, at)
    expected = flow.log_prob(x - at["shift"]).sum() + dist.Normal(0, 1).log_prob(at["shift"]).sum()
    np.testing.assert_allclose(log_joint, expected, rtol=1e-5)
    with handlers.seed(rng_seed=0), handlers.condition(data=at):
        trace = handlers.trace(model).get_trace(x)
    assert trace["y"]["is_observed"] and trace["shift"]["value"] is at["shift"]


def test_predictive_draws(flow):
    draws = Predictive(lambda: numpyro.sample("z", FlowDistribution(flow)), num_samples=6)(KEY)
    assert draws["z"].shape == (6, 2) and np.isfinite(draws["z"]).all()


def test_as_a_guide(bounded_model, variables):
    """Its divergence from a Gaussian falls to a tenth, stays ≥ 0, and the constraint holds."""
    mean, covariance = jnp.array([0.5, -0.5]), jnp.array([[0.4, 0.3], [0.3, 0.4]])
    target = dist.MultivariateNormal(mean, covariance)

    def guide():
        numpyro.sample("z", FlowDistribution(flow_param("flow", bounded_model, variables)))

    svi = SVI(
        lambda: numpyro.sample("z", target), guide, optax.adam(1e-2), Trace_ELBO(num_particles=16)
    )
    start = svi.init(jax.random.key(1))
    state, losses = jax.lax.scan(lambda s, _: svi.update(s), start, length=300)
    assert np.isfinite(losses).all()

    def divergence(state):
        """KL to the target and its standard error, by samples."""
        params = svi.get_params(state)["flow"]
        flow = bounded_model.flow({**variables, "params": params})
        assert ir.certify(flow).certified
        draws = flow.sample(KEY, 4000)[0]
        terms = np.asarray(flow.log_prob(draws) - target.log_prob(draws))
        return terms.mean(), terms.std() / np.sqrt(4000)

    (before, _), (after, stderr) = map(divergence, (start, state))
    assert -4.0 * stderr <= after < 0.1 * before


def test_a_guide_whose_vectors_would_stand_still_is_refused(model, variables):
    def guide():
        numpyro.sample("z", FlowDistribution(flow_param("flow", model, variables)))

    target = lambda: numpyro.sample("z", dist.Normal(jnp.zeros(2), 1.0).to_event(1))  # noqa: E731
    svi = SVI(target, guide, optax.adam(1e-2), Trace_ELBO())
    with pytest.raises(ValueError, match='normalize="bound"'):
        svi.update(svi.init(KEY))


def test_the_support_of_flows_over_images():
    prior = (ir.DiagonalGaussian(jnp.zeros((1, 1, 4)), jnp.zeros((1, 1, 4))),)
    flow = ir.Flow((ir.Chain((ir.Squeeze(), ir.Logit(0.1))),), (2, 2, 1), prior)
    logit = FlowDistribution(flow)
    support = logit.support
    draws = logit.sample(KEY, (50,))
    assert bool(support(draws).all()) and not bool(support(draws + 1.3).any())
    assert np.isfinite(logit.log_prob(draws)).all()
    centered = ir.Flow((ir.Chain((ir.Center(), ir.Squeeze())),), (2, 2, 1), prior)
    distribution = FlowDistribution(centered)
    assert distribution.support.event_dim == 3
    draws = distribution.sample(KEY, (50,))
    assert not ((draws >= 0) & (draws <= 1)).all()  # log_prob is of these too
    assert np.isfinite(distribution.log_prob(draws)).all()


def test_a_density_over_its_support_integrates_to_one():
    """In one dimension: what the logit's α leaves beside [0, 1] belongs to it."""
    prior = (ir.DiagonalGaussian(jnp.zeros(1), jnp.full(1, 0.7)),)
    distribution = FlowDistribution(ir.Flow((ir.Chain((ir.Logit(0.1),)),), (1,), prior))
    base = distribution.support.base_constraint
    grid = np.linspace(float(base.lower_bound), float(base.upper_bound), 20001)[1:-1]
    values = np.exp(np.asarray(distribution.log_prob(grid[:, None]), np.float64))
    assert abs(np.trapezoid(values, grid) - 1.0) < 1e-3
    inside = (grid >= 0) & (grid <= 1)
    assert np.trapezoid(values[inside], grid[inside]) < 0.9


def test_what_is_refused(flow):
    with pytest.raises(ValueError, match="gradient of TruncatedSeries"):
        FlowDistribution(flow, ir.TruncatedSeries(5), key=KEY)
    with pytest.raises(ValueError, match="draws its probes once"):
        FlowDistribution(flow, TermwiseSeries(5))
    with pytest.raises(ValueError, match="no prior"):
        FlowDistribution(ir.Flow(flow.levels, (2,)))
    with pytest.raises(TypeError, match="flow is needed"):
        FlowDistribution(flow.levels[0])
