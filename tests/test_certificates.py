"""Certificates against dense norms and the Jacobians of whole networks, and what breaks them."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import MODELS, actnorm_of, build, each_of, image_flow, init_shapes, quick_jit, stacks_of
from helpers import rest_slow

from iresnet_jax import (
    Activation,
    Chain,
    DenseOperator,
    Exact,
    Flow,
    Residual,
    Sequential,
    Squeeze,
    Stack,
    TruncatedSeries,
    certify,
    layers_by_path,
    to_matrix,
    truncation_error_bound,
)
from iresnet_jax.nn import VectorFlow, frozen_vectors, shrink

jacobian = quick_jit(
    lambda flow, x: jax.jacfwd(
        lambda x: jnp.concatenate([z.ravel() for z in flow.forward(x[None])])
    )(x)
)


#: Vectors, and images of several scales.
SOME = ["vector", "image-odd-channels-leave"]


@functools.cache
def certificate_of(name):
    built = build(name)
    return certify(built.flow), built


@each_of(MODELS)
def test_bounds_hold_for_the_jacobian_of_the_whole_network(name):
    """Its singular values lie between 1/inverse and forward, at every datum."""
    certificate, built = certificate_of(name)
    assert certificate.certified
    for x in built.x:
        matrix = np.asarray(jacobian(built.flow, x), np.float64)
        values = np.linalg.svd(matrix.reshape(matrix.shape[0], -1), compute_uv=False)
        assert values.max() <= certificate.forward * (1 + 1e-5)
        assert values.min() >= (1 - 1e-5) / certificate.inverse


@pytest.mark.parametrize("name", rest_slow([*SOME, "image", "classifier"], *SOME))
def test_layers_lie_between_their_estimate_and_their_bound(name):
    certificate, built = certificate_of(name)
    layers = [layer for block in certificate.blocks for layer in block.layers]
    stages = [layer for block in built.flow.blocks() for layer in layers_by_path(block).values()]
    assert len({layer.name for layer in layers}) == len(layers) == len(stages)
    for layer, stage in zip(layers, stages, strict=True):
        norm = np.linalg.norm(np.asarray(to_matrix(stage.operator), np.float64), 2)
        assert layer.sigma <= norm * (1 + 1e-5) and layer.sigma >= norm * 0.99
        assert norm * (1 - 1e-6) <= layer.upper_bound


@pytest.mark.parametrize("name", rest_slow([*SOME, "image"], *SOME))
def test_blocks_are_bounded_at_most_by_the_product_of_their_layers(name):
    certificate, built = certificate_of(name)
    for block, pure in zip(certificate.blocks, built.flow.blocks(), strict=True):
        product = math.prod(layer.upper_bound for layer in block.layers)
        assert product <= block.product <= product * (1 + 1e-9)
        assert 0.3 * product < block.lipschitz <= block.product
        scales = np.exp(np.asarray(actnorm_of(pure).log_scale, np.float64))
        assert block.forward == pytest.approx((1 + block.lipschitz) * scales.max())
        assert block.inverse == pytest.approx(1 / ((1 - block.lipschitz) * scales.min()))


def test_levels_compose_over_the_channels_that_go_on():
    """A level that shrinks: what leaves early keeps the first level's bound alone."""
    _, built = certificate_of("image-odd-channels-leave")
    one, other = (
        certify(Flow((level,), shape))
        for level, shape in zip(built.flow.levels, built.flow.level_shapes(), strict=True)
    )
    whole = certify(built.flow)
    assert min(one.forward, other.forward) > 1.0
    for name in ("forward", "inverse"):
        first, second = getattr(one, name), getattr(other, name)
        assert getattr(whole, name) == pytest.approx(first * max(1.0, second))


def test_a_vanilla_network_is_not_certified_and_its_blocks_are_named():
    model = VectorFlow(dim=3, depth=2, features=(4,), coeff=None)
    variables = quick_jit(model.init)(jax.random.key(0), jnp.ones((4, 3)))
    kernels = jax.tree.map(lambda leaf: 3.0 * jnp.ones_like(leaf), variables["params"])
    certificate = certify(model, {**variables, "params": kernels})
    assert not certificate.certified and math.isinf(certificate.inverse)
    assert [b.name for b in certificate.failures] == ["scale 0, block 0", "scale 0, block 1"]
    first = certificate.failures[0]
    bounds = [f"layer {i}: bound {layer.upper_bound:.4g}" for i, layer in enumerate(first.layers)]
    problem = f"the bound L = {first.lipschitz:.4g} is not below 1 ({', '.join(bounds)})"
    assert first.problem == problem
    assert math.isfinite(certificate.forward)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["kernel", "bias", "log_scale", "shift"])
def test_weights_that_are_not_finite_are_not_certified(value, where):
    _, variables, _, _ = build("vector")
    spoil = lambda path, leaf: (  # noqa: E731
        leaf.at[(0,) * leaf.ndim].set(value) if where in jax.tree_util.keystr(path) else leaf
    )
    params = jax.tree_util.tree_map_with_path(spoil, variables["params"])
    certificate = certify(build("vector").model, {**variables, "params": params})
    assert not certificate.certified
    assert certificate.failures[0].name == "scale 0, block 0"
    named = {
        "kernel": "the weights of layer 0",
        "bias": "the bias of layer 0",
        "log_scale": "the scales of ActNorm",
        "shift": "the shift of ActNorm",
    }[where]
    assert named in certificate.failures[0].problem
    assert math.isinf(certificate.inverse)


def test_a_branch_that_states_nothing_is_not_certified():
    @jax.tree_util.register_static
    class Silent:
        def __call__(self, x):
            return 0.5 * x

    certificate = certify(Flow((Stack(Residual(Silent()), 1),), (2,)))
    assert not certificate.certified and certificate.blocks[0].lipschitz == math.inf
    assert certificate.blocks[0].problem == "Silent states no lipschitz_bound()"


@pytest.mark.parametrize("inside_of_a_branch", [False, True])
def test_what_states_its_own_bound_is_taken_at_its_word(inside_of_a_branch):
    @jax.tree_util.register_static
    class Halving:
        def __call__(self, x):
            return 0.5 * x

        def lipschitz_bound(self):
            return 0.5

    branch = Sequential((Halving(), Activation("relu"))) if inside_of_a_branch else Halving()
    certificate = certify(Flow((Stack(Residual(branch), 1),), (2,)))
    assert certificate.certified and certificate.lipschitz == pytest.approx([0.5])
    assert certificate.inverse == pytest.approx(2.0)


def test_variables_of_another_model_are_refused():
    model = image_flow((4, 4, 1), depths=(1,), features=2)
    other = init_shapes(image_flow((4, 4, 1), depths=(2,), features=2), jnp.zeros((1, 4, 4, 1)))
    variables = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), other)
    with pytest.raises(ValueError, match="variables"):
        certify(model, variables)


@pytest.mark.parametrize("name", rest_slow(["vector", "image", "classifier"], "vector"))
def test_shrunk_variables_are_within_coeff_whatever_the_singular_vectors(name):
    """Kernels four times too large under vectors that are no use: L ≤ coeff^k all the same."""
    built = build(name)
    enlarge = lambda path, leaf: leaf * (4.0 if "kernel" in str(path[-1]) else 1.0)  # noqa: E731
    params = jax.tree_util.tree_map_with_path(enlarge, built.variables["params"])
    useless = jax.tree.map(lambda leaf: jnp.ones_like(leaf) * 1e-3, built.variables["spectral"])
    variables = {**built.variables, "params": params, "spectral": useless}
    with frozen_vectors():  # else the vectors converge first
        before = certify(built.model, variables)
    after = certify(built.model, shrink(built.model, variables))
    assert max(layer.upper_bound for block in before.blocks for layer in block.layers) > 1.1
    for block in after.blocks:
        for layer in block.layers:
            assert 0.999 * built.model.coeff <= layer.upper_bound <= built.model.coeff
        assert block.lipschitz <= built.model.coeff ** len(block.layers) * (1 + 1e-11)


def test_shrunk_variables_keep_all_but_the_kernels_that_are_too_large():
    built = build("image-odd-channels-leave")
    variables = jax.tree.map(lambda leaf: leaf, built.variables)
    shrunk = shrink(built.model, variables)
    assert jax.tree.structure(shrunk) == jax.tree.structure(variables)
    again = shrink(built.model, shrunk)
    jax.tree.map(np.testing.assert_array_equal, again, shrunk)
    same = lambda path, a, b: "kernel" in str(path[-1]) or np.array_equal(a, b)  # noqa: E731
    assert all(jax.tree.leaves(jax.tree_util.tree_map_with_path(same, variables, shrunk)))
    free = dataclasses.replace(built.model, coeff=None)
    jax.tree.map(np.testing.assert_array_equal, shrink(free, variables), variables)


@pytest.mark.parametrize("name", rest_slow(["vector", "image"], "vector"))
def test_a_model_that_divides_by_bounds_is_certified_under_any_vectors(name):
    built = build(name)
    useless = jax.tree.map(lambda leaf: jnp.ones_like(leaf) * 1e-3, built.variables["spectral"])
    model = dataclasses.replace(built.model, normalize="bound")
    certificate = certify(model, {**built.variables, "spectral": useless})
    layers = [layer for block in certificate.blocks for layer in block.layers]
    assert max(layer.upper_bound for layer in layers) <= model.coeff * (1 + 1e-6)


def test_a_certificate_is_written_as_json():
    certificate, _ = certificate_of("image-odd-channels-leave")
    content = json.loads(json.dumps(certificate.as_dict(), allow_nan=False))
    assert content["certified"] is True
    layer = content["blocks"][0]["layers"][0]
    assert set(layer) == {"name", "sigma", "upper_bound", "path"}
    assert content["blocks"][0]["problem"] == ""
    assert content["blocks"][1]["lipschitz"] == certificate.blocks[1].lipschitz


@pytest.mark.parametrize("name", rest_slow([*SOME, "image"], *SOME))
def test_biases_add_over_the_branches(name):
    certificate, built = certificate_of(name)
    shapes = built.flow.level_shapes()
    dims = {level: math.prod(level_shape) for level, level_shape in enumerate(shapes)}
    expected = 0.0
    for block in certificate.blocks:
        level = int(block.name.split(",")[0].removeprefix("scale "))
        expected += float(truncation_error_bound(block.lipschitz, dims[level], 4))
    bound = certificate.bias_bound(TruncatedSeries(4))
    assert expected <= bound <= expected * (1 + 1e-9)
    assert certificate.bias_bound(Exact()) == 0.0


# Bounds that are handed on


@pytest.mark.parametrize("name", rest_slow([*SOME, "image"], *SOME))
def test_a_certificate_is_attached_as_one_that_is_made_anew(name):
    flow = build(name).flow
    handed, anew = flow.with_bounds(certify(flow)), flow.with_bounds()
    assert handed.contracts and not flow.contracts
    jax.tree.map(np.testing.assert_array_equal, handed, anew)


def test_a_certificate_of_another_networks_weights_is_refused():
    flow = build("vector").flow
    certificate = certify(flow)
    nudge = lambda leaf: np.nextafter(leaf, np.float32(np.inf))  # noqa: E731
    for i in range(len(layers_by_path(flow))):
        places = iter(range(len(layers_by_path(flow))))

        def nudged(node, i=i, places=places):
            if not isinstance(node, DenseOperator) or next(places) != i:
                return node
            return jax.tree.map(nudge, node)

        is_operator = lambda node: isinstance(node, DenseOperator)  # noqa: E731
        other = jax.tree.map(nudged, flow, is_leaf=is_operator)
        with pytest.raises(ValueError, match="certificate is of other weights than this network"):
            other.with_bounds(certificate)


def test_a_certificate_of_the_same_blocks_in_another_order_is_refused():
    flow = build("vector").flow
    (stack,) = stacks_of(flow)
    turned = dataclasses.replace(stack, block=jax.tree.map(lambda leaf: leaf[::-1], stack.block))
    with pytest.raises(ValueError, match="certificate is of other weights than this network"):
        dataclasses.replace(flow, levels=(turned,)).with_bounds(certify(flow))


@pytest.mark.parametrize(
    ("name", "other", "message"),
    [
        ("vector", SOME[1], "certificate is of 2 branches; this network has 3"),
        ("vector-without-actnorm", SOME[1], "certificate is of other weights than this network"),
    ],
)
def test_a_certificate_of_another_architecture_is_refused(name, other, message):
    with pytest.raises(ValueError, match=message):
        build(name).flow.with_bounds(certificate_of(other)[0])


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Chain(()), r"A Chain does not know .* certify ir\.Flow\(\(bijection,\), event_shape\)"),
        (Squeeze(), "A Squeeze does not know the shape of its inputs"),
        (jnp.tanh, r"an ir\.Flow, or a Flax model with its variables; got tanh\. A bijection is"),
        (Sequential(()), r"got Sequential\. .* a branch g as that of ir\.Residual\(g\)"),
        (VectorFlow, "got VectorFlow"),
        (None, "got NoneType"),
    ],
    ids=["chain", "transform", "function", "branch", "class", "nothing"],
)
@pytest.mark.parametrize("variables", [None, {}], ids=str)
def test_what_is_no_network_is_told_how_to_be_one(network, message, variables):
    with pytest.raises(TypeError, match=message):
        certify(network, variables)
