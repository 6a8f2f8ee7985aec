"""Certificates against dense norms and the Jacobians of whole networks, and what breaks them."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import MODELS, build, image_flow, init_shapes, quick_jit

from iresnet_jax import (
    Activation,
    Flow,
    Residual,
    Scale,
    Sequential,
    Stack,
    certify,
    layers_by_path,
    to_matrix,
)
from iresnet_jax.nn import VectorFlow

jacobian = quick_jit(
    lambda flow, x: jax.jacfwd(
        lambda x: jnp.concatenate([z.ravel() for z in flow.forward(x[None])])
    )(x)
)


@functools.cache
def certificate_of(name):
    built = build(name)
    return certify(built.model, built.variables), built


@pytest.mark.parametrize("name", MODELS)
def test_bounds_hold_for_the_jacobian_of_the_whole_network(name):
    """Its singular values lie between 1/inverse and forward, at every datum."""
    certificate, built = certificate_of(name)
    assert certificate.certified
    for x in built.x:
        matrix = np.asarray(jacobian(built.flow, x), np.float64)
        values = np.linalg.svd(matrix.reshape(matrix.shape[0], -1), compute_uv=False)
        assert values.max() <= certificate.forward * (1 + 1e-5)
        assert values.min() >= (1 - 1e-5) / certificate.inverse


@pytest.mark.parametrize("name", ["vector", "image", "classifier"])
def test_layers_lie_between_their_estimate_and_their_bound(name):
    certificate, built = certificate_of(name)
    layers = [layer for block in certificate.blocks for layer in block.layers]
    stages = [layer for block in built.flow.blocks() for layer in layers_by_path(block)]
    assert len({layer.name for layer in layers}) == len(layers) == len(stages)
    for layer, stage in zip(layers, stages, strict=True):
        norm = np.linalg.norm(np.asarray(to_matrix(stage.operator), np.float64), 2)
        assert layer.sigma <= norm * (1 + 1e-5) and layer.sigma >= norm * 0.99
        assert norm * (1 - 1e-6) <= layer.upper_bound


@pytest.mark.parametrize("name", ["vector", "image"])
def test_blocks_are_bounded_by_the_product_of_their_layers(name):
    certificate, built = certificate_of(name)
    for block, pure in zip(certificate.blocks, built.flow.blocks(), strict=True):
        product = math.prod(layer.upper_bound for layer in block.layers)
        assert product <= block.lipschitz <= product * (1 + 1e-9)
        scales = np.exp(np.asarray(pure.actnorm.log_scale, np.float64))
        assert block.forward == pytest.approx((1 + block.lipschitz) * scales.max())
        assert block.inverse == pytest.approx(1 / ((1 - block.lipschitz) * scales.min()))


def test_scales_compose_over_the_channels_that_go_on():
    """A scale that shrinks: what leaves early keeps the first scale's bound alone."""
    _, built = certificate_of("image")
    first, second = built.flow.scales
    alone = [
        certify(dataclasses.replace(built.flow, scales=(scale,), input_shape=shape))
        for scale, shape in zip(
            (first, dataclasses.replace(second, squeeze=False)),
            (built.flow.input_shape, built.flow.scale_shapes()[1]),
            strict=True,
        )
    ]
    whole = certify(built.flow)
    for name in ("forward", "inverse"):
        one, other = (getattr(c, name) for c in alone)
        assert getattr(whole, name) == pytest.approx(one * max(1.0, other))


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
    _, _, flow, _ = build("vector-depth-1")
    (stack,) = flow.scales[0].stacks

    @jax.tree_util.register_static
    class Silent:
        def __call__(self, x):
            return 0.5 * x

    silent = dataclasses.replace(
        stack, block=dataclasses.replace(stack.block, branch=Silent(), actnorm=None)
    )
    certificate = certify(Flow((Scale((silent,)),), (2,)))
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
    flow = Flow((Scale((Stack(Residual(branch), 1),)),), (2,))
    certificate = certify(flow)
    assert certificate.certified and certificate.lipschitz == pytest.approx([0.5])
    assert certificate.inverse == pytest.approx(2.0)


def test_variables_of_another_model_are_refused():
    model = image_flow((4, 4, 1), depths=(1,), features=2)
    other = init_shapes(image_flow((4, 4, 1), depths=(2,), features=2), jnp.zeros((1, 4, 4, 1)))
    variables = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), other)
    with pytest.raises(ValueError, match="variables"):
        certify(model, variables)


@pytest.mark.parametrize("name", ["vector", "image", "classifier"])
def test_certified_variables_are_within_coeff_whatever_the_singular_vectors(name):
    """Kernels four times too large under vectors that are no use: L ≤ coeff^k all the same."""
    built = build(name)
    enlarge = lambda path, leaf: leaf * (4.0 if "kernel" in str(path[-1]) else 1.0)  # noqa: E731
    params = jax.tree_util.tree_map_with_path(enlarge, built.variables["params"])
    useless = jax.tree.map(lambda leaf: jnp.ones_like(leaf) * 1e-3, built.variables["spectral"])
    variables = {**built.variables, "params": params, "spectral": useless}
    before = certify(built.model, variables)
    after = certify(built.model, built.model.certified(variables))
    assert max(layer.upper_bound for block in before.blocks for layer in block.layers) > 1.1
    for block in after.blocks:
        for layer in block.layers:
            assert 0.999 * built.model.coeff <= layer.upper_bound <= built.model.coeff
        assert block.lipschitz <= built.model.coeff ** len(block.layers) * (1 + 1e-11)


def test_certified_variables_keep_all_but_the_kernels_that_are_too_large():
    built = build("image")
    variables = jax.tree.map(lambda leaf: leaf, built.variables)
    shrunk = built.model.certified(variables)
    assert jax.tree.structure(shrunk) == jax.tree.structure(variables)
    again = built.model.certified(shrunk)
    jax.tree.map(np.testing.assert_array_equal, again, shrunk)
    same = lambda path, a, b: "kernel" in str(path[-1]) or np.array_equal(a, b)  # noqa: E731
    assert all(jax.tree.leaves(jax.tree_util.tree_map_with_path(same, variables, shrunk)))
    free = dataclasses.replace(built.model, coeff=None)
    jax.tree.map(np.testing.assert_array_equal, free.certified(variables), variables)


@pytest.mark.parametrize("name", ["vector", "image"])
def test_a_model_that_divides_by_bounds_is_certified_under_any_vectors(name):
    built = build(name)
    useless = jax.tree.map(lambda leaf: jnp.ones_like(leaf) * 1e-3, built.variables["spectral"])
    model = dataclasses.replace(built.model, normalize="certified")
    certificate = certify(model, {**built.variables, "spectral": useless})
    layers = [layer for block in certificate.blocks for layer in block.layers]
    assert max(layer.upper_bound for layer in layers) <= model.coeff * (1 + 1e-6)


def test_a_certificate_is_written_as_json():
    certificate, _ = certificate_of("image")
    content = json.loads(json.dumps(certificate.as_dict(), allow_nan=False))
    assert content["certified"] is True
    layer = content["blocks"][0]["layers"][0]
    assert set(layer) == {"name", "sigma", "upper_bound"}
    assert content["blocks"][0]["problem"] == ""
    assert content["blocks"][1]["lipschitz"] == certificate.blocks[1].lipschitz
