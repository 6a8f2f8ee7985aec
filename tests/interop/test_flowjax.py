"""flowjax both ways: log-determinants against full Jacobians, inverses, training, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import iresnet_jax as ir
from iresnet_jax.interop.densities import TermwiseSeries

pytestmark = pytest.mark.slow
flowjax = pytest.importorskip("flowjax")
import equinox as eqx  # noqa: E402
import paramax  # noqa: E402
from flowjax import bijections as theirs  # noqa: E402
from flowjax.distributions import Normal, Transformed  # noqa: E402
from flowjax.train import fit_to_data  # noqa: E402

from iresnet_jax.interop.flowjax import FromFlowjax, ToFlowjax  # noqa: E402

KEY = jax.random.key(3)


def coupling(dim=2):
    return theirs.Coupling(
        KEY, transformer=theirs.Affine(), untransformed_dim=1, dim=dim, nn_width=8, nn_depth=1
    )


def log_abs_det(function, x):
    return np.linalg.slogdet(np.asarray(jax.jacfwd(function)(x), np.float64))[1]


def test_ours_in_their_chain(flow, x):
    chain = theirs.Chain([coupling(), ToFlowjax(flow.levels[0], (2,)), coupling()])
    y, log_det = chain.transform_and_log_det(x[0])
    np.testing.assert_allclose(log_det, log_abs_det(chain.transform, x[0]), atol=1e-5)
    back, inverse_log_det = chain.inverse_and_log_det(y)
    np.testing.assert_allclose(back, x[0], atol=1e-4)
    np.testing.assert_allclose(inverse_log_det, log_abs_det(chain.inverse, y), atol=1e-4)
    rows = jax.vmap(chain.transform)(x[:4])
    assert rows.shape == (4, 2) and eqx.filter_jit(chain.transform)(x[0]).shape == (2,)


def test_ours_as_their_distribution(flow, x):
    """Their distributions map the base to the data: ours goes in inverted."""
    ours = theirs.Invert(ToFlowjax(flow.levels[0], (2,)))
    prior = flow.priors[0]
    distribution = Transformed(Normal(prior.mean, jnp.exp(prior.log_std)), ours)
    np.testing.assert_allclose(distribution.log_prob(x[:8]), flow.log_prob(x[:8]), atol=1e-4)
    draws = distribution.sample(KEY, (16,))
    assert draws.shape == (16, 2) and np.isfinite(draws).all()


def test_a_series_in_their_chain_is_one_function(flow, x):
    ours = ToFlowjax(flow.levels[0], (2,), TermwiseSeries(8), key=KEY)
    log_det = jax.vmap(lambda x: ours.transform_and_log_det(x)[1])(x[:2])
    again = [ours.transform_and_log_det(row)[1] for row in x[:2]]
    np.testing.assert_allclose(log_det, again, rtol=1e-4, atol=1e-5)
    y, forward = ours.transform_and_log_det(x[0])
    np.testing.assert_allclose(ours.inverse_and_log_det(y)[1], -forward, atol=1e-4)


def test_theirs_before_ours(flow, x):
    both = ir.Flow((ir.Chain((FromFlowjax.of(coupling()), *flow.levels)),), (2,), flow.priors)
    latents, log_det = jax.jit(lambda f, x: f.forward_and_log_det(x))(both, x[:4])
    expected = [log_abs_det(lambda x: both.forward(x)[0], row) for row in x[:4]]
    np.testing.assert_allclose(log_det, expected, atol=1e-5)
    back, info = both.inverse(latents)
    np.testing.assert_allclose(back, x[:4], atol=1e-4)
    assert bool(info.converged.all())


def test_theirs_are_never_called_certified(flow, x):
    both = ir.Flow((ir.Chain((FromFlowjax.of(coupling()), *flow.levels)),), (2,), flow.priors)
    certificate = ir.certify(both)
    assert ir.certify(flow).certified and not certificate.certified
    assert "flowjax's Coupling states no Lipschitz bound" in certificate.problems
    bounded = both.with_bounds(certificate)
    latents = bounded.forward(x[:4])
    _, info = bounded.inverse(latents)
    assert np.isinf(ir.inverse_error_bound(bounded, info, latents)).all()


def test_their_parameters_are_differentiated(flow, x):
    """Their raw parameters, wrapped by paramax, are leaves of our flow."""
    scale = theirs.Affine(jnp.zeros(2), jnp.full(2, 1.5))
    both = ir.Flow((ir.Chain((FromFlowjax.of(scale), *flow.levels)),), (2,), flow.priors)
    grads = jax.grad(lambda f: f.log_prob(x).mean())(both)
    raw = jax.tree.leaves(grads.levels[0].links[0])
    assert len(raw) == 2 and all(np.abs(leaf).max() > 1e-3 for leaf in raw)


def test_our_weights_stand_still_in_their_training(flow, x):
    ours = ToFlowjax(flow.levels[0], (2,))
    distribution = Transformed(
        Normal(jnp.zeros(2)), theirs.Invert(theirs.Chain([ours, coupling()]))
    )
    fitted, _ = fit_to_data(KEY, distribution, x, max_epochs=1, batch_size=32, show_progress=False)
    chains = distribution.bijection.bijection, fitted.bijection.bijection
    own, coupled = zip(*(chain.bijections for chain in chains), strict=True)
    assert same_leaves(*own) and not same_leaves(*coupled)


def same_leaves(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs if eqx.is_inexact_array(x))


def test_our_parameters_train_under_their_constraint(bounded_model, variables, x):
    params, state = variables["params"], {k: v for k, v in variables.items() if k != "params"}
    build = lambda params: bounded_model.flow({**state, "params": params}).levels[0]  # noqa: E731
    ours = ToFlowjax.trainable(build, params, (2,))
    fitted, losses = fit_to_data(
        KEY,
        Transformed(Normal(jnp.zeros(2)), theirs.Invert(ours)),
        x,
        learning_rate=1e-2,
        max_epochs=6,
        batch_size=16,
        show_progress=False,
    )
    assert losses["train"][-1] < losses["train"][0]
    level = paramax.unwrap(fitted.bijection.bijection.bijection)
    assert level.certify("trained", (2,)).certified
    assert not same_leaves(level, build(params))


def test_a_missed_inverse_is_nan(flow, x):
    hasty = ToFlowjax(flow.levels[0], (2,), solver=ir.FixedPointIteration(max_steps=1))
    x, log_det = hasty.inverse_and_log_det(x[0] + 3.0)
    assert np.isnan(x).all() and np.isnan(log_det)


def test_what_is_refused(flow):
    with pytest.raises(ValueError, match=r"maps \(2, 2, 1\) to \(1, 1, 4\)"):
        ToFlowjax(ir.Squeeze(), (2, 2, 1))
    with pytest.raises(ValueError, match="draws its probes once"):
        ToFlowjax(flow.levels[0], (2,), ir.TruncatedSeries(5))
    with pytest.raises(TypeError, match=r"bijection of flowjax.*Squeeze"):
        FromFlowjax.of(ir.Squeeze())
    conditional = theirs.Coupling(
        KEY,
        transformer=theirs.Affine(),
        untransformed_dim=1,
        dim=2,
        cond_dim=3,
        nn_width=4,
        nn_depth=1,
    )
    with pytest.raises(ValueError, match=r"no condition.*\(3,\)"):
        FromFlowjax.of(conditional)
