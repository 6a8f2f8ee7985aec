"""distrax both ways: log-determinants against full Jacobians, inverses, refusals."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import iresnet_jax as ir

pytestmark = pytest.mark.slow
with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of TensorFlow Probability, as it loads
    distrax = pytest.importorskip("distrax")

from iresnet_jax.interop.distrax import FromDistrax, ToDistrax  # noqa: E402


def coupling():
    """Shifts and scales the second number by functions of the first."""
    return distrax.MaskedCoupling(
        mask=jnp.array([True, False]),
        conditioner=lambda x: jnp.stack([jnp.sin(x).sum(-1), jnp.cos(x).sum(-1)], -1)[..., None, :],
        bijector=lambda p: distrax.ScalarAffine(p[..., 0], log_scale=p[..., 1]),
    )


def log_abs_det(function, x):
    jacobian = jax.jacfwd(lambda flat: function(flat.reshape(x.shape)).reshape(-1))(x.reshape(-1))
    return np.linalg.slogdet(np.asarray(jacobian, np.float64))[1]


def test_ours_in_their_chain(flow, x):
    chain = distrax.Chain([coupling(), ToDistrax(flow.levels[0], (2,)), coupling()])
    y, log_det = chain.forward_and_log_det(x[:4])
    np.testing.assert_allclose(log_det, [log_abs_det(chain.forward, r) for r in x[:4]], atol=1e-5)
    back, inverse = chain.inverse_and_log_det(y)
    np.testing.assert_allclose(back, x[:4], atol=1e-4)
    np.testing.assert_allclose(inverse, [log_abs_det(chain.inverse, r) for r in y], atol=1e-4)


def test_ours_as_their_distribution(flow, x):
    prior = flow.priors[0]
    base = distrax.MultivariateNormalDiag(prior.mean, jnp.exp(prior.log_std))
    ours = distrax.Inverse(ToDistrax(flow.levels[0], (2,)))
    distribution = distrax.Transformed(base, ours)
    np.testing.assert_allclose(distribution.log_prob(x[:8]), flow.log_prob(x[:8]), atol=1e-4)
    draws, log_prob = distribution.sample_and_log_prob(seed=jax.random.key(0), sample_shape=(3, 4))
    assert draws.shape == (3, 4, 2)
    np.testing.assert_allclose(log_prob.ravel(), flow.log_prob(draws.reshape(12, 2)), atol=1e-3)


def test_batch_axes_and_other_shapes():
    """A squeeze changes the number of no axis here, but every length."""
    ours = ToDistrax(ir.Chain((ir.Squeeze(), ir.Logit(0.1))), (2, 2, 1))
    assert (ours.event_ndims_in, ours.event_ndims_out) == (3, 3)
    x = np.random.default_rng(0).uniform(size=(2, 3, 2, 2, 1)).astype(np.float32)
    y, log_det = jax.jit(lambda b, x: b.forward_and_log_det(x))(ours, x)
    assert y.shape == (2, 3, 1, 1, 4) and log_det.shape == (2, 3)
    np.testing.assert_allclose(log_det[1, 2], log_abs_det(ours.forward, x[1, 2]), rtol=1e-5)
    back, inverse = ours.inverse_and_log_det(y)
    np.testing.assert_allclose(back, x, atol=1e-5)
    np.testing.assert_allclose(inverse, -log_det, atol=1e-4)
    assert ours.forward(x[:0]).shape == (0, 3, 1, 1, 4)


@pytest.mark.parametrize(
    "bijector",
    [
        coupling(),
        distrax.Block(distrax.Tanh(), 1),
        distrax.Tanh(),
        distrax.ScalarAffine(0.5, 2.0),
        distrax.DiagLinear(jnp.array([0.5, 3.0])),
    ],
    ids=["coupling", "block", "scalar", "constant", "linear"],
)
def test_theirs_before_ours(flow, x, bijector):
    both = ir.Flow((ir.Chain((FromDistrax.of(bijector), *flow.levels)),), (2,), flow.priors)
    latents, log_det = jax.jit(lambda f, x: f.forward_and_log_det(x))(both, x[:4])
    expected = [log_abs_det(lambda x: both.forward(x)[0], row) for row in x[:4]]
    np.testing.assert_allclose(log_det, expected, atol=1e-4)
    np.testing.assert_allclose(both.inverse(latents)[0], x[:4], atol=1e-3)
    certificate = ir.certify(both)
    assert not certificate.certified and "distrax's" in certificate.problems[0]


def test_a_missed_inverse_is_nan(flow, x):
    hasty = ToDistrax(flow.levels[0], (2,), solver=ir.FixedPointIteration(max_steps=1))
    back, log_det = hasty.inverse_and_log_det(x[:4] + 3.0)
    assert np.isnan(back).any(axis=1).tolist() == np.isnan(log_det).tolist()
    assert np.isnan(log_det).any()


def test_what_is_refused(flow, x):
    with pytest.raises(ValueError, match="draws its probes once"):
        ToDistrax(flow.levels[0], (2,), ir.TruncatedSeries(5))
    with pytest.raises(ValueError, match=r"\[\.\.\., \(2,\)\]; got \(64, 1\)"):
        ToDistrax(flow.levels[0], (2,)).forward(x[:, :1])
    with pytest.raises(TypeError, match=r"bijector of distrax.*Squeeze"):
        FromDistrax.of(ir.Squeeze())
    batched = FromDistrax.of(distrax.ScalarAffine(jnp.zeros((3, 1, 2)), 1.0))
    with pytest.raises(ValueError, match="must keep the shape of a batch"):
        batched.forward(x)
