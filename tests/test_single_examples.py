"""One example in place of a batch: what a batch of it alone gives, without its axis."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import EXACT, IMAGE, VECTOR, build, quick_jit, small_variables
from helpers import rest_slow

from iresnet_jax import Anderson, FixedPointIteration, TruncatedSeries, UnconvergedWarning

KEY = jax.random.key(3)
SERIES = TruncatedSeries(3)

SOME = ["vector", pytest.param("image", marks=pytest.mark.slow), "image-odd-channels-leave"]
mostly_vectors = pytest.mark.parametrize(
    "name", rest_slow(["vector", "image", "image-odd-channels-leave"], "vector")
)

# Compiled once for every kind of flow, and shared by the tests.
forward = quick_jit(lambda flow, x: flow.forward(x))


@functools.partial(quick_jit, static_argnums=2)
def invert(flow, latents, solver):
    return flow.inverse(latents, solver)


def assert_first_of(one, batch):
    """The leaves of ``one`` are those of ``batch``, a batch of one."""
    assert jax.tree.structure(one) == jax.tree.structure(batch)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(batch), strict=True):
        assert a.shape == b.shape[1:] and len(b) == 1
        np.testing.assert_allclose(a, b[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [*SOME, "classifier"])
def test_one_example_is_mapped_as_a_batch_of_it(name):
    _, _, flow, x = build(name)
    assert_first_of(forward(flow, x[0]), forward(flow, x[:1]))


@mostly_vectors
def test_one_example_has_one_density(name):
    _, _, flow, x = build(name)

    @quick_jit
    def densities(flow, x):
        exact = flow.log_prob(x), flow.forward_and_log_det(x)
        return exact, flow.log_prob(x, SERIES, key=KEY)

    one = densities(flow, x[0])
    assert one[0][0].shape == one[1].shape == ()
    assert_first_of(one, densities(flow, x[:1]))


@pytest.mark.parametrize(
    ("name", "solver"),
    [
        ("vector", FixedPointIteration()),
        ("image-odd-channels-leave", Anderson()),
        pytest.param("image", Anderson(), marks=pytest.mark.slow),
    ],
)
def test_one_example_is_inverted(name, solver):
    _, _, flow, x = build(name)
    latents = forward(flow, x[0])
    back, info = invert(flow, latents, solver)
    assert back.shape == flow.event_shape
    np.testing.assert_allclose(back, x[0], atol=1e-4)
    batch, of_batch = invert(flow, jax.tree.map(lambda z: z[None], latents), solver)
    assert_first_of(back, batch)
    assert info.converged.all()
    np.testing.assert_array_equal(info.num_steps.ravel(), of_batch.num_steps.ravel())


def test_one_example_that_misses_its_tolerance_warns():
    _, _, flow, x = build("vector")
    with pytest.warns(UnconvergedWarning, match="1 of 1 inverses did not meet"):
        flow.inverse(flow.forward(x[0]), FixedPointIteration(max_steps=1))


@mostly_vectors
def test_examples_under_vmap_are_a_batch(name):
    _, _, flow, x = build(name)

    def values(x):
        latents, log_det = flow.forward_and_log_det(x, EXACT)
        return flow.forward(x), latents, log_det, flow.log_prob(x), flow.inverse(latents)[0]

    one_by_one, together = quick_jit(jax.vmap(values))(x), quick_jit(values)(x)
    assert jax.tree.structure(one_by_one) == jax.tree.structure(together)
    for a, b in zip(jax.tree.leaves(one_by_one), jax.tree.leaves(together), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_every_example_under_vmap_draws_by_its_own_key():
    _, _, flow, x = build("vector")
    keys, series = jax.random.split(KEY, len(x)), TruncatedSeries(3, probe="gaussian")
    one_by_one = quick_jit(jax.vmap(lambda x, key: flow.log_prob(x, series, key=key)))
    alone = [flow.log_prob(x[i : i + 1], series, key=keys[i])[0] for i in range(len(x))]
    np.testing.assert_allclose(one_by_one(x, keys), alone, rtol=1e-5)
    assert len(np.unique(one_by_one(jnp.stack([x[0]] * 3), keys))) == 3


def test_the_score_of_one_example_is_a_plain_gradient():
    _, _, flow, x = build("vector")
    scores = quick_jit(jax.vmap(jax.grad(flow.log_prob)))(x)
    together = quick_jit(jax.grad(lambda x: flow.log_prob(x).sum()))(x)
    np.testing.assert_allclose(scores, together, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", rest_slow(["vector", "image"], "vector"))
def test_a_model_is_applied_to_one_example(name):
    model, variables = {"vector": VECTOR, "image": IMAGE}[name], small_variables()[name]
    x = 0.25 * jnp.ones(jax.eval_shape(model.flow, variables).event_shape)
    apply = quick_jit(model.apply)
    assert_first_of(apply(variables, x), apply(variables, x[None]))


def test_latents_of_one_example_with_those_of_a_batch_are_refused():
    _, _, flow, x = build("image-odd-channels-leave")
    one, batch = flow.forward(x[0]), flow.forward(x)
    with pytest.raises(ValueError, match=r"Latent 0 must have shape \["):
        flow.inverse((one[0], batch[1]))
