"""The Flax models: initialisation from data, state, gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    CLASSIFIER,
    IMAGE,
    MODELS,
    VECTOR,
    build,
    data,
    image_flow,
    init_shapes,
    links_of,
    quick_jit,
    residual_of,
    small_variables,
    stacks_of,
    walk,
)
from helpers import rest_slow

from iresnet_jax import (
    Activation,
    Chain,
    DiagonalGaussian,
    Exact,
    FixedPointIteration,
    Squeeze,
    TruncatedSeries,
    UnconvergedWarning,
    certify,
    layers_by_path,
    logit,
    nn,
)
from iresnet_jax.activations import elu
from iresnet_jax.bounds import layer_upper_bound
from iresnet_jax.layer_walk import largest_norm
from iresnet_jax.nn import ImageFlow, InvertibleClassifier, VectorFlow, num_parameters

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def variables():
    return small_variables()


# Initialisation


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(VECTOR, marks=pytest.mark.slow),
        pytest.param(image_flow((4, 4, 3), depths=(1, 1)), marks=pytest.mark.slow),
        CLASSIFIER,
    ],
)
def test_initialisation_normalises_what_every_block_sees(model):
    """Mean 0 and deviation 1 a channel after every ActNorm, through squeezes and splits."""
    x = data(model, 64, seed=1)

    @quick_jit
    def inputs_of_branches(key, x):
        return walk(model.flow(model.init(key, x)), x).inputs

    inputs = inputs_of_branches(KEY, x)
    assert len(inputs) == (model.depth if isinstance(model, VectorFlow) else sum(model.depths))
    for i, h in enumerate(inputs):
        axes = tuple(range(h.ndim - 1))
        deviation = np.std(h, axes)
        if i == 0 and isinstance(model, InvertibleClassifier):
            np.testing.assert_array_equal(deviation[-model.padding :], 0.0)  # the padded channels
            deviation = deviation[: -model.padding]
        np.testing.assert_allclose(np.mean(h, axes), 0.0, atol=2e-5)
        np.testing.assert_allclose(deviation, 1.0, atol=2e-3)


@pytest.mark.parametrize("name", ["vector", "image"])
def test_a_fresh_model_is_converged_and_standard(name, variables):
    model = {"vector": VECTOR, "image": IMAGE}[name]
    flow = quick_jit(model.flow)(variables[name])
    for prior in flow.priors:
        np.testing.assert_array_equal(prior.mean, 0.0)
        np.testing.assert_array_equal(prior.log_std, 0.0)
    layers = [affine for block in flow.blocks() for affine in layers_by_path(block).values()]
    norms = [layer_upper_bound(affine.operator) for affine in layers]
    raw = [float(affine.sigma) for affine in layers]
    assert max(raw) > 1.1 * model.coeff  # the constraint is active
    assert max(norms) <= model.coeff * 1.005
    for norm, sigma in zip(norms, raw, strict=True):
        assert norm == pytest.approx(min(sigma, model.coeff), rel=5e-3)


def test_initialisation_uses_the_key_and_nothing_else():
    init, x = quick_jit(VECTOR.init), data(VECTOR, 16, seed=1)
    first, same, other = init(KEY, x), init(KEY, x), init(jax.random.key(1), x)
    jax.tree.map(np.testing.assert_array_equal, first, same)
    kernels = [v["params"]["scale0_blocks"]["branch"]["stages_1"]["kernel"] for v in (first, other)]
    assert jnp.abs(kernels[0] - kernels[1]).max() > 0.01


@pytest.mark.parametrize("name", rest_slow(["vector", "image", "vector-depth-1"], "vector"))
def test_only_the_first_block_sees_its_input_without_activation(name):
    flow = build(name).flow
    for i, block in enumerate(flow.blocks()):
        start, *rest = residual_of(block).branch.stages
        x = jnp.linspace(-2.0, 2.0, 9)
        np.testing.assert_array_equal(start(x), elu(x) if i else x)
        assert all(stage.active is None for stage in rest if isinstance(stage, Activation))


def test_a_scale_is_one_stack_of_all_its_blocks():
    for name, depths in (("vector", [3]), ("image-odd-channels-leave", [1, 1])):
        assert [stack.depth for stack in stacks_of(build(name).flow)] == depths


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (image_flow((8, 8, 3), depths=(1, 1, 1)), [(4, 4, 6), (2, 2, 12), (1, 1, 48)]),
        (image_flow((8, 8, 3), depths=(1, 1), factor_out=False), [(2, 2, 48)]),
        (image_flow((8, 8, 3), depths=(1, 1), squeeze_first=False), [(8, 8, 1), (4, 4, 8)]),
        (image_flow((2, 4, 1), depths=(2,)), [(1, 2, 4)]),
    ],
)
def test_latent_shapes(model, expected):
    variables = init_shapes(model, jnp.zeros((2, *model.image_shape)))
    flow = jax.eval_shape(model.flow, variables)
    assert flow.latent_shapes() == tuple(expected)
    assert [prior.mean.shape for prior in flow.priors] == expected
    latents = jax.eval_shape(
        lambda flow, x: flow.forward(x), flow, jnp.zeros((2, *flow.event_shape))
    )
    assert [z.shape for z in latents] == [(2, *shape) for shape in expected]


def test_features_are_one_number_or_one_for_each_scale():
    x = jnp.zeros((2, 4, 4, 1))
    one = init_shapes(image_flow(depths=(1, 1), features=3), x)
    each = init_shapes(image_flow(depths=(1, 1), features=(3, 3)), x)
    assert jax.tree.map(jnp.shape, one) == jax.tree.map(jnp.shape, each)
    wider = init_shapes(image_flow(depths=(1, 1), features=(3, 5)), x)
    assert wider["params"]["scale1_blocks"]["branch"]["stages_1"]["bias"].shape == (1, 5)


def test_settings_may_be_lists():
    x = jnp.zeros((2, 4, 4, 1))
    lists = ImageFlow(image_shape=[4, 4, 1], depths=[1, 1], features=[3, 3])
    tuples = ImageFlow(image_shape=(4, 4, 1), depths=(1, 1), features=(3, 3))
    flow = jax.eval_shape(lists.flow, init_shapes(lists, x))
    assert (
        flow.latent_shapes() == jax.eval_shape(tuples.flow, init_shapes(tuples, x)).latent_shapes()
    )
    assert jax.jit(lists.flow).lower(init_shapes(lists, x))


def test_num_parameters_counts_what_trains(variables):
    dims, hidden, depth = 3, 4, 2
    block = dims * hidden + hidden + hidden * dims + dims + 2 * dims
    assert num_parameters(variables["vector"]) == depth * block + 2 * dims


def test_domains_differ_by_what_comes_before_the_network():
    x = jnp.asarray([[0.0, 0.25], [0.5, 1.0]]).reshape(1, 2, 2, 1)

    def entered(domain):
        model = image_flow((2, 2, 1), depths=(1,), domain=domain)
        (level,) = jax.eval_shape(model.flow, init_shapes(model, x)).levels
        squeeze = [isinstance(link, Squeeze) for link in links_of(level)].index(True)
        return Chain(links_of(level)[:squeeze]).forward(x)

    centered, in_logits, real = map(entered, ("centered", "logit", "real"))
    np.testing.assert_allclose(centered, x - 0.5)
    np.testing.assert_allclose(real, x)
    np.testing.assert_allclose(in_logits, logit(x)[0])


# State


def test_evaluation_cannot_write_and_training_advances(variables):
    fresh = variables["vector"]
    moved = jax.tree.map(lambda a: 1.3 * a + 0.1, fresh["params"])
    stale = {**fresh, "params": moved}
    before = jax.tree.map(np.array, stale)
    flow = VECTOR.flow(stale)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, stale))

    trained, state = VECTOR.advance(stale)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, stale))
    assert set(state) == {"spectral"}
    assert any(
        jnp.abs(a - b).max() > 1e-4
        for a, b in zip(*map(jax.tree.leaves, (stale["spectral"], state["spectral"])), strict=True)
    )
    again = VECTOR.flow({**stale, **state})
    for a, b in zip(jax.tree.leaves(trained), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    assert jax.tree.structure(flow) == jax.tree.structure(trained)


def test_the_state_of_a_step_is_all_but_the_parameters(variables):
    """A classifier's statistics are handed on as they are: the flow below has no part in them."""
    own = variables["classifier"]
    _, state = CLASSIFIER.advance(own)
    assert set(state) == {"spectral", "batch_stats"} == set(own) - {"params"}
    jax.tree.map(np.testing.assert_array_equal, state["batch_stats"], own["batch_stats"])
    assert jax.tree.structure({"params": own["params"], **state}) == jax.tree.structure(dict(own))


@pytest.mark.parametrize("name", rest_slow(["vector", "image"], "vector"))
def test_converge_restores_the_norms(name, variables):
    model, fresh = {"vector": VECTOR, "image": IMAGE}[name], variables[name]
    rng = np.random.default_rng(4)
    moved = jax.tree.map(
        lambda a: a + jnp.asarray(rng.normal(size=a.shape), a.dtype), fresh["params"]
    )
    stale = {**fresh, "params": moved}
    converged = quick_jit(lambda variables: nn.converge(model, variables))(stale)
    assert set(converged) == set(stale)
    jax.tree.map(np.testing.assert_array_equal, converged["params"], moved)
    with nn.frozen_vectors():  # else the vectors converge first
        norm = largest_norm(model.flow(stale), model.flow(converged), model.coeff)
    assert norm > 1.02 * model.coeff
    true_norms = [
        layer_upper_bound(affine.operator)
        for block in model.flow(converged).blocks()
        for affine in layers_by_path(block).values()
    ]
    assert max(true_norms) <= 1.005 * model.coeff
    assert max(certify(model, converged).lipschitz) < 1


def test_an_unconstrained_model_keeps_its_weights(variables):
    model = dataclasses.replace(VECTOR, coeff=None)
    flow = model.flow(variables["vector"])
    kernel = variables["vector"]["params"]["scale0_blocks"]["branch"]["stages_1"]["kernel"]
    first = residual_of(next(flow.blocks())).branch.stages[1]
    np.testing.assert_array_equal(first.operator.kernel, kernel[0])
    bounds = certify(flow).lipschitz
    assert bounds[0] > 1 > certify(VECTOR, variables["vector"]).lipschitz[0]
    with pytest.warns(UnconvergedWarning, match="2 of 2 inverses did not meet their tolerance"):
        _, info = flow.with_bounds().inverse((jnp.ones((2, 3)),), FixedPointIteration(max_steps=5))
    assert jnp.isinf(info.error_bound[0]).all()


def test_a_model_called_on_data_returns_the_latents_of_its_flow(variables):
    x = data(IMAGE, 2, seed=0)
    called = IMAGE.apply(variables["image"], x)
    for a, b in zip(called, IMAGE.flow(variables["image"]).forward(x), strict=True):
        np.testing.assert_array_equal(a, b)


def test_gradients_reach_every_parameter(variables):
    """Of the log density by the series; ActNorm, biases, kernels, prior."""
    x = data(IMAGE, 4, seed=5)

    @quick_jit
    @jax.grad
    def gradient(params):
        flow, _ = IMAGE.advance({**variables["image"], "params": params})
        return -jnp.mean(flow.log_prob(x, TruncatedSeries(3), key=KEY))

    slopes = gradient(variables["image"]["params"])
    for path, slope in jax.tree_util.tree_leaves_with_path(slopes):
        assert jnp.isfinite(slope).all(), path
        assert jnp.abs(slope).max() > 0, path


def test_statistics_over_a_mapped_axis_are_those_of_the_whole_batch(variables):
    mapped = dataclasses.replace(VECTOR, axis_name="batch")
    x = data(VECTOR, 64, seed=1).reshape(2, 32, 3)
    halves = quick_jit(jax.vmap(mapped.init, (None, 0), axis_name="batch"))(KEY, x)
    for a, b in zip(
        jax.tree.leaves(variables["vector"]["params"]),
        jax.tree.leaves(halves["params"]),
        strict=True,
    ):
        np.testing.assert_allclose(b[0], a, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(b[1], a, rtol=1e-3, atol=1e-4)


def test_a_network_without_prior_has_no_density():
    _, _, flow, x = build("classifier")
    for call in (lambda: flow.log_prob(x, Exact()), lambda: flow.sample(KEY, 1)):
        with pytest.raises(ValueError, match="no prior"):
            call()


def test_every_model_of_the_table_is_tested():
    kinds = {type(model) for model in MODELS.values()}
    assert kinds == {VectorFlow, ImageFlow, InvertibleClassifier}
    assert all(isinstance(p, DiagonalGaussian) for p in build("vector").flow.priors)
