"""Conditional flows: Jacobians, integrals, and certificates at every condition."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import rest_slow, sample_jacobians

import iresnet_jax as ir

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
OF_VECTORS = ir.nn.ConditionalVectorFlow(
    dim=2, depth=3, features=(8,), condition_dim=3, context_features=(5,), activation="sin"
)
OF_CLASSES = ir.nn.ConditionalVectorFlow(dim=1, depth=3, features=(8,), num_classes=4)
Y, X = RNG.normal(size=(6, 2)).astype(np.float32), RNG.normal(size=(6, 3)).astype(np.float32)


def randomized(model, scale=0.7):
    """The model's flow, with weights of the condition and the prior that are not 0."""
    variables = jax.jit(model.init)(KEY, jnp.asarray(RNG.normal(size=(50, model.dim)), jnp.float32))
    leaves, tree = jax.tree.flatten(variables["params"])
    rng = np.random.default_rng(1)
    moved = [
        np.float32(np.asarray(leaf) + 0.3 * scale * rng.normal(size=leaf.shape)) for leaf in leaves
    ]
    variables = {**variables, "params": jax.tree.unflatten(tree, moved)}
    variables = ir.nn.shrink(model, ir.nn.converge(model, variables))
    return jax.jit(model.flow)(variables), variables


@pytest.fixture(scope="module")
def of_vectors():
    return randomized(OF_VECTORS)[0]


@pytest.fixture(scope="module")
def of_classes():
    return randomized(OF_CLASSES)[0]


def test_log_prob_is_prior_and_jacobian_at_the_condition(of_vectors):
    """By the full Jacobian of the map at each condition, and the prior written out."""
    log_prob = of_vectors.log_prob(Y, X)
    context = np.asarray(of_vectors.network(X), np.float64)
    ((mean, log_std),) = of_vectors.prior_kernels
    prior = of_vectors.flow.priors[0]
    forward = jax.jit(lambda y, x: of_vectors.forward(y, x)[0])
    jacobian_at = jax.jit(jax.jacfwd(lambda y, x: of_vectors.forward(y, x)[0]))
    for i in range(len(Y)):
        z = np.asarray(forward(Y[i], X[i]), np.float64)
        jacobian = np.asarray(jacobian_at(Y[i], X[i]), np.float64)
        s = np.asarray(prior.log_std + context[i] @ np.asarray(log_std))
        m = np.asarray(prior.mean + context[i] @ np.asarray(mean))
        normal = -0.5 * ((z - m) / np.exp(s)) ** 2 - s - 0.5 * np.log(2 * np.pi)
        expected = normal.sum() + np.linalg.slogdet(jacobian)[1]
        np.testing.assert_allclose(log_prob[i], expected, atol=2e-4)


def test_the_condition_matters(of_vectors):
    other = of_vectors.log_prob(Y, X + 1.0)
    assert (np.abs(other - of_vectors.log_prob(Y, X)) > 1e-3).all()


def test_a_batch_one_example_and_the_flow_at_a_condition_agree(of_vectors):
    batch = of_vectors.log_prob(Y, X)
    one = jnp.stack([of_vectors.log_prob(y, x) for y, x in zip(Y[:2], X[:2], strict=True)])
    np.testing.assert_allclose(one, batch[:2], atol=1e-4)
    at = of_vectors.given(X[1])
    assert isinstance(at, ir.Flow)
    np.testing.assert_allclose(at.log_prob(Y[1]), batch[1], atol=1e-4)
    mapped = jax.vmap(of_vectors.log_prob)(jnp.asarray(Y), jnp.asarray(X))
    np.testing.assert_allclose(mapped, batch, atol=1e-4)


def test_the_density_integrates_to_one_at_every_class(of_classes):
    grid = np.linspace(-60.0, 60.0, 12_001, dtype=np.float32)
    density = jax.jit(of_classes.log_prob)
    for label in range(4):
        log_prob = np.asarray(density(grid[:, None], jnp.int32(label)), np.float64)
        np.testing.assert_allclose(np.trapezoid(np.exp(log_prob), grid), 1.0, atol=1e-4)


def test_it_inverts_at_each_condition(of_vectors):
    y, info = of_vectors.inverse(of_vectors.forward(Y, X), X)
    assert bool(info.converged.all())
    np.testing.assert_allclose(y, Y, atol=1e-4)


@pytest.mark.slow
def test_samples_have_the_moments_of_the_density(of_classes):
    """Means and deviations of samples, beside those of the density on a grid."""
    grid = np.linspace(-60.0, 60.0, 12_001, dtype=np.float32)
    labels = jnp.asarray([0, 3])
    samples, info = of_classes.sample(KEY, 4000, labels)
    assert samples.shape == (4000, 2, 1) and bool(info.converged.all())
    alone, _ = of_classes.sample(KEY, 4000, 3)
    density = jax.jit(of_classes.log_prob)
    for label, drawn in ((0, samples[:, 0]), (3, samples[:, 1]), (3, alone)):
        p = np.exp(np.asarray(density(grid[:, None], jnp.int32(label)), np.float64))
        mean = np.trapezoid(p * grid, grid)
        std = np.sqrt(np.trapezoid(p * (grid - mean) ** 2, grid))
        assert abs(drawn.mean() - mean) < 4.0 * std / np.sqrt(4000)
        np.testing.assert_allclose(drawn.std(), std, rtol=0.1)


def test_the_certificate_holds_at_every_condition(of_vectors):
    """Jacobians of every branch, at conditions far beyond the data, have norms within L."""
    certificate = ir.certify(of_vectors)
    assert certificate.certified
    for factor in (1.0, 1e3):
        at = of_vectors.given(factor * X[0])
        np.testing.assert_allclose(at.certify().lipschitz, certificate.lipschitz, rtol=1e-9)
        for block, bound in zip(at.blocks(), certificate.lipschitz, strict=True):
            norm, residual = block.links
            jacobians = sample_jacobians(residual.branch, norm.forward(jnp.asarray(Y)))
            assert np.linalg.norm(jacobians, 2, axis=(1, 2)).max() <= bound


def test_bounds_attach_and_inverses_state_their_error(of_vectors):
    bounded = of_vectors.with_bounds()
    latents = bounded.forward(Y, X)
    y, info = bounded.inverse(latents, X, ir.Anderson(error_tolerance=1e-3))
    assert float(info.error_bound.max()) <= 1e-3
    np.testing.assert_allclose(y, Y, atol=1e-3)


def test_a_condition_network_that_is_not_finite_is_not_certified(of_vectors):
    ((weights, bias),) = of_vectors.network.layers
    network = dataclasses.replace(of_vectors.network, layers=((weights * jnp.nan, bias),))
    certificate = dataclasses.replace(of_vectors, network=network).certify()
    assert not certificate.certified
    assert certificate.problems == ("not finite: the condition's network",)


def test_the_shift_states_its_rounding_and_its_constants():
    """In float32, against float64, from inputs that are off by as much as they say."""
    kernel = jnp.asarray(RNG.normal(size=(3, 2)), jnp.float32)
    shift = ir.ConditionalShift(kernel).given(jnp.asarray(100.0 * X))
    off = 1e-3 * RNG.normal(size=Y.shape)
    error = jnp.asarray(1.00001 * np.linalg.norm(off, axis=1), jnp.float32)
    bound = shift.rounding(jnp.asarray(Y), error, ir.Arithmetic(2.0**-24))
    exact = Y.astype(np.float64) + np.asarray(shift.shift, np.float64)
    computed = np.asarray(shift(jnp.asarray((Y + off).astype(np.float32))), np.float64)
    assert (np.linalg.norm(computed - exact, axis=1) <= bound).all()
    assert shift.lipschitz_bound() == 1.0 and shift.slopes() == (1.0, 1.0)


@pytest.mark.parametrize(
    ("y", "x", "error", "told"),
    [
        (Y, X[:5], ValueError, "got 5 conditions for data of"),
        (Y, X[:, :2], ValueError, r"vectors \[batch, 3\]"),
        (Y, np.where(X > 1e9, X, np.nan), ValueError, "must be finite"),
        (Y, np.ma.masked_less(X, 0.0), ValueError, "Conditions must not be masked"),
        (np.ma.masked_less(Y, 0.0), X, ValueError, "Data must not be masked"),
        (Y, X.astype(object), TypeError, "must be numbers; got an array of object"),
        (Y, X.astype(complex), TypeError, "must be numbers; got an array of complex"),
        (Y.tolist(), X, TypeError, "Data must be an array"),
    ],
)
def test_conditions_that_do_not_fit_are_refused(of_vectors, y, x, error, told):
    with pytest.raises(error, match=told):
        of_vectors.log_prob(y, x)


@pytest.mark.parametrize("dtype", rest_slow([np.int64, np.uint8, bool], bool))
def test_vectors_of_whole_numbers_are_vectors(of_vectors, dtype):
    """As in a fit; the same density as of floats, under ``jit`` too."""
    whole = RNG.integers(0, 2, size=X.shape).astype(dtype)
    expected = of_vectors.log_prob(Y, whole.astype(np.float32))
    np.testing.assert_array_equal(of_vectors.log_prob(Y, whole), expected)
    np.testing.assert_allclose(jax.jit(of_vectors.log_prob)(Y, whole), expected, atol=1e-5)
    np.testing.assert_array_equal(of_vectors.network(whole), of_vectors.network(1.0 * whole))


def test_sampling_takes_one_key(of_vectors):
    with pytest.raises(ValueError, match="takes one key"):
        of_vectors.sample(jax.random.split(KEY), 2, X)


@pytest.mark.parametrize(
    ("label", "error", "told"),
    [
        (4, ValueError, r"\[0, 3\]; got 4 to 4"),
        (-1, ValueError, r"\[0, 3\]"),
        (1.0, TypeError, "must be integers"),
        (np.zeros((2, 2), int), ValueError, r"classes \[batch\]"),
    ],
)
def test_classes_that_are_none_are_refused(of_classes, label, error, told):
    with pytest.raises(error, match=told):
        of_classes.log_prob(np.zeros((2, 1), np.float32), label)


class Column:
    """Labels as a data frame has them: an array behind another interface."""

    def __init__(self, values):
        self.values, self.dtype, self.shape, self.ndim = values, values.dtype, values.shape, 1

    def __array__(self, dtype=None, copy=None):
        return self.values


def test_a_column_of_classes_is_taken(of_classes):
    y, labels = np.zeros((2, 1), np.float32), np.array([0, 3])
    np.testing.assert_array_equal(
        of_classes.log_prob(y, Column(labels)), of_classes.log_prob(y, labels)
    )


def test_under_jit_what_is_no_class_gives_nan_and_no_inverse(of_classes):
    labels = jnp.asarray([0, 3, 4, -1])
    y = np.zeros((4, 1), np.float32)
    log_prob = jax.jit(of_classes.log_prob)(y, labels)
    assert np.isnan(log_prob).tolist() == [False, False, True, True]
    _, info = jax.jit(of_classes.with_bounds().inverse)((jnp.asarray(y),), labels)
    assert info.converged.all(axis=0).tolist() == [True, True, False, False]
    assert np.isinf(info.error_bound[:, 2:]).any(axis=0).all()


def test_a_condition_whose_shifts_overflow_is_seen(of_vectors):
    """It is finite, and its shifts are not: no density, and no certificate at it."""
    huge = np.full(3, 3e38, np.float32)
    assert np.isnan(of_vectors.log_prob(Y, huge)).all()
    assert not of_vectors.given(huge).certify().certified


@pytest.mark.usefixtures("no_rank_promotion")
def test_ranks_are_not_promoted(of_vectors, of_classes):
    assert np.isfinite(of_vectors.log_prob(Y, X)).all()
    assert np.isfinite(of_classes.log_prob(Y[:, :1], jnp.zeros(len(Y), int))).all()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, "give condition_dim or num_classes"),
        ({"condition_dim": 2, "num_classes": 3}, "give condition_dim or num_classes"),
        ({"condition_dim": 0}, "condition_dim must be ≥ 1"),
        ({"num_classes": 2, "make_branch": ir.nn.monlip_branch}, "Sequential of SpectralDense"),
    ],
)
def test_models_that_cannot_be_are_refused(change, told):
    model = ir.nn.ConditionalVectorFlow(dim=2, depth=1, features=(4,), **change)
    with pytest.raises(ValueError, match=told):
        model.init(KEY, jnp.asarray(Y))


@pytest.mark.slow
def test_it_trains_by_value_and_grad():
    """To a regression y = 2x + noise: better than any density that does not see x."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 1)).astype(np.float32)
    y = 2.0 * x + 0.3 * rng.normal(size=x.shape).astype(np.float32)
    model = ir.nn.ConditionalVectorFlow(
        dim=1, depth=2, features=(8,), condition_dim=1, context_features=()
    )
    variables = jax.jit(model.init)(KEY, y)
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(variables, opt_state):
        loss = lambda flow: -flow.log_prob(y, x).mean()  # noqa: E731
        nats, grads, state = ir.nn.value_and_grad(model, loss, variables)
        updates, opt_state = optimizer.update(grads, opt_state)
        params = optax.apply_updates(variables["params"], updates)
        return {**state, "params": params}, opt_state, nats

    opt_state = optimizer.init(variables["params"])
    for _ in range(200):
        variables, opt_state, nats = step(variables, opt_state)
    unconditional = 0.5 * np.log(2 * np.pi * np.e * float(y.var()))
    assert float(nats) < unconditional - 0.5


class AtImages(nn.Module):
    """A flow at the embedding of an image, which an encoder finds."""

    @nn.compact
    def __call__(self, images, y):
        embedding = nn.Dense(3, name="encoder")(nn.tanh(images.reshape(len(images), -1)))
        flow = ir.nn.ConditionalVectorFlow(
            dim=1, depth=2, features=(6,), condition_dim=3, context_features=(), name="flow"
        )
        return flow.pure(y if self.is_initializing() else None), embedding


@pytest.mark.slow
def test_an_encoder_of_the_condition_is_trained_with_the_flow():
    """Its gradients are those of finite differences, and the flow's power iterations advance."""
    images = RNG.normal(size=(20, 3, 3, 1)).astype(np.float32)
    y = images.mean(axis=(1, 2)) + 0.1 * RNG.normal(size=(20, 1)).astype(np.float32)
    model = AtImages()
    variables = jax.jit(model.init)(KEY, images, y)

    @jax.jit
    def differentiated(encoder):
        params = {**variables["params"], "encoder": encoder}
        loss = lambda out: -out[0].log_prob(y, out[1]).mean()  # noqa: E731
        own = {**variables, "params": params}
        return ir.nn.value_and_grad(model, loss, own, images, y)

    encoder = variables["params"]["encoder"]
    _, grads, state = differentiated(encoder)
    along, step = grads["encoder"]["kernel"], 1e-2
    moved = [{**encoder, "kernel": encoder["kernel"] + s * along} for s in (step, -step)]
    above, below = (float(differentiated(own)[0]) for own in moved)
    slope = float(np.sum(np.square(along)))
    assert slope > 1e-3
    np.testing.assert_allclose((above - below) / (2.0 * step), slope, rtol=0.02)
    before, after = (jax.tree.leaves(tree["spectral"]) for tree in (variables, state))
    assert not all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    flow, _ = model.apply(ir.nn.shrink(model, variables, images, y), images, y)
    assert ir.certify(flow).certified
