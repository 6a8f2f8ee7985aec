"""Branches, residual blocks, and stacks of them."""

import dataclasses
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import quick_jit

from iresnet_jax import (
    Activation,
    Affine,
    ConvOperator,
    DenseOperator,
    Exact,
    Sequential,
    Stack,
    TruncatedSeries,
)
from iresnet_jax.nn import (
    Sequential,
    SpectralConv,
    SpectralDense,
    Stack,
    bottleneck_branch,
    dense_branch,
)
from iresnet_jax.residual import Scale

KEY = jax.random.key(0)
SHAPE = (4, 4, 2)

STACKS = {
    "dense": (Stack(dense_branch(3, (4,)), 3), (3,)),
    "conv": (Stack(bottleneck_branch(2, 3, activate_first=False), 2), SHAPE),
}
every_stack = pytest.mark.parametrize("name", STACKS)


def draw(seed, shape, scale=1.0):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), jnp.float32)


def stage_of(stage):
    """(kind, size) of a pure stage."""
    if isinstance(stage, Activation):
        return stage.name
    operator = stage.operator
    size = operator.kernel_size if isinstance(operator, ConvOperator) else (1, 1)
    return (*size, *operator.kernel.shape[-2:])


def pure(branch, shape):
    variables = quick_jit(branch.init)(KEY, jnp.zeros((1, *shape)))
    return variables, branch.apply(variables, shape, method="constrained")


@pytest.fixture(scope="module")
def built():
    """Every stack with its variables, its blocks, and the batch that it was initialised from."""

    def build(stack, shape):
        x = 3.0 * draw(1, (32, *shape)) - 2.0
        variables = quick_jit(stack.init, static_argnums=1)(KEY, shape, x)
        return stack, variables, stack.apply(variables, shape), x

    return {name: build(*entry) for name, entry in STACKS.items()}


# Branches


@pytest.mark.parametrize("activate_first", [True, False])
def test_the_image_branch_is_3x3_1x1_3x3(activate_first):
    branch = bottleneck_branch(2, 5, activation="softplus", activate_first=activate_first)
    _, g = pure(branch, SHAPE)
    kernels = [(3, 3, 2, 5), (1, 1, 5, 5), (3, 3, 5, 2)]
    expected = [part for kernel in kernels for part in ("softplus", kernel)]
    assert [stage_of(stage) for stage in g.stages] == expected[not activate_first :]


@pytest.mark.parametrize("activate_first", [True, False])
@pytest.mark.parametrize("features", [(), (5,), (4, 6)])
def test_the_dense_branch_has_the_widths_asked_for(features, activate_first):
    _, g = pure(dense_branch(3, features, activate_first=activate_first), (3,))
    sizes = (3, *features, 3)
    kernels = [(1, 1, a, b) for a, b in itertools.pairwise(sizes)]
    expected = [part for kernel in kernels for part in ("elu", kernel)]
    assert [stage_of(stage) for stage in g.stages] == expected[not activate_first :]
    assert all(isinstance(s.operator, DenseOperator) for s in g.stages if isinstance(s, Affine))


@pytest.mark.parametrize("depth", [1, 3])
def test_a_stack_may_leave_out_the_first_activation(depth):
    """Of its first block alone, forward and in derivatives."""
    branch, x = dense_branch(3, (4,), activation="softplus"), draw(1, (5, 3))
    usual, other = (
        Stack(branch, depth, actnorm=False, first_block_activated=first) for first in (True, False)
    )
    variables = quick_jit(usual.init, static_argnums=1)(KEY, (3,), x)
    blocks = zip(*(s.apply(variables, (3,)).unstacked() for s in (usual, other)), strict=True)
    for i, (block, spared) in enumerate(blocks):
        stages = block.branch.stages if i else block.branch.stages[1:]
        plain = Sequential(stages)
        for function in (
            lambda g: g(x),
            lambda g: jax.jacobian(lambda y: g(y).sum(0))(x),
            lambda g: jax.hessian(lambda y: g(y).sum(0))(x[:1]),
        ):
            np.testing.assert_array_equal(function(spared.branch), function(plain))


def test_the_first_activation_is_left_out_in_a_scan_and_in_bfloat16():
    branch, x = dense_branch(3, (4,), activation="softplus", precision="bfloat16"), draw(1, (5, 3))
    module = Stack(branch, 3, actnorm=False, first_block_activated=False)
    variables = quick_jit(module.init, static_argnums=1)(KEY, (3,), x)
    stack, y = module.apply(variables, (3,)), x
    for i, block in enumerate(stack.unstacked()):
        stages = block.branch.stages if i else block.branch.stages[1:]
        y = y + Sequential(stages, "bfloat16")(y)
    np.testing.assert_allclose(stack.forward(x), y, atol=0.02)
    usual = Stack(branch, 3, actnorm=False).apply(variables, (3,))
    assert np.abs(stack.forward(x) - usual.forward(x)).max() > 0.1


@pytest.mark.parametrize("first", [nn.Dense(3), SpectralDense(3)], ids=["Dense", "SpectralDense"])
def test_a_branch_that_begins_with_a_layer_has_nothing_to_leave_out(first):
    stack = Stack(Sequential((first, "elu", SpectralDense(3))), 2, first_block_activated=False)
    variables = quick_jit(stack.init, static_argnums=1)(KEY, (3,), draw(1, (5, 3)))
    stages = stack.apply(variables, (3,)).block.branch.stages
    assert [stage.active for stage in stages if isinstance(stage, Activation)] == [None]


def test_settings_reach_every_layer():
    for branch in (
        bottleneck_branch(2, 3, coeff=0.4, num_steps=7),
        dense_branch(3, (4,), coeff=0.4, num_steps=7),
    ):
        layers = [stage for stage in branch.stages if not isinstance(stage, str)]
        assert {(layer.coeff, layer.num_steps) for layer in layers} == {(0.4, 7)}


def test_a_branch_module_is_its_pure_branch():
    branch, x = bottleneck_branch(2, 3), draw(2, (2, *SHAPE))
    variables, g = pure(branch, SHAPE)
    np.testing.assert_allclose(branch.apply(variables, x), g(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("stages", "shape", "message"),
    [
        ((SpectralDense(4),), (3,), r"maps \(3,\) to \(4,\)"),
        ((SpectralConv(2, padding="VALID"),), SHAPE, r"maps \(4, 4, 2\) to \(2, 2, 2\)"),
        ((SpectralConv(2), "elu", SpectralDense(3)), SHAPE, r"maps \(4, 4, 2\) to \(4, 4, 3\)"),
    ],
)
def test_a_branch_must_map_a_shape_to_itself(stages, shape, message):
    branch = Sequential(tuple(s.clone() if isinstance(s, nn.Module) else s for s in stages))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(branch.init, KEY, jnp.zeros((1, *shape)))


def test_an_unknown_activation():
    with pytest.raises(ValueError, match=r"Unknown activation 'gelu'; known: elu, .*lipswish"):
        jax.eval_shape(dense_branch(2, (3,), activation="gelu").init, KEY, jnp.zeros((1, 2)))


# One block


def test_a_block_is_actnorm_then_the_residual(built):
    block = next(built["dense"][2].unstacked())
    x = draw(3, (5, 3))
    h = x * jnp.exp(block.actnorm.log_scale) + block.actnorm.shift
    np.testing.assert_allclose(block.forward(x), h + block.branch(h), rtol=1e-6, atol=1e-6)
    y, log_det = block.forward_and_log_det(x, Exact(), None)
    np.testing.assert_allclose(y, block.forward(x), rtol=1e-6, atol=1e-6)
    expected = jnp.sum(block.actnorm.log_scale) + Exact()(block.branch, h)[1]
    np.testing.assert_allclose(log_det, expected, rtol=1e-6)


def test_a_block_without_actnorm_is_the_residual_alone(built):
    block = dataclasses.replace(next(built["dense"][2].unstacked()), actnorm=None)
    x = draw(3, (5, 3))
    np.testing.assert_allclose(block.forward(x), x + block.branch(x), rtol=1e-6, atol=1e-6)
    log_det = block.forward_and_log_det(x, Exact(), None)[1]
    np.testing.assert_allclose(log_det, Exact()(block.branch, x)[1], rtol=1e-6, atol=1e-7)
    back, info = block.inverse(block.forward(x))
    assert info.converged.all()
    np.testing.assert_allclose(back, x, atol=1e-5)


# Stacks as pytrees


@every_stack
def test_a_stack_is_its_blocks_in_a_row(name, built):
    _, _, stack, x = built[name]
    blocks = list(stack.unstacked())
    assert len(blocks) == stack.depth
    x = x[:3]
    keys, estimator = jax.random.split(KEY, (stack.depth, len(x))), TruncatedSeries(3)

    @quick_jit
    def both(stack, blocks, x):
        whole = (stack.forward(x), stack.forward_and_log_det(x, estimator, keys))
        y, log_det = x, 0.0
        for i, block in enumerate(blocks):
            y, part = block.forward_and_log_det(y, estimator, keys[i])
            log_det = log_det + part
        return whole, (y, (y, log_det))

    whole, row = both(stack, blocks, x)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(row), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@every_stack
def test_a_scale_runs_its_stacks_one_after_the_other(name, built):
    """A stack cut in two: the same keys, the same reports."""
    _, _, stack, x = built[name]
    x, cut = x[:3], 1
    keys, estimator = jax.random.split(KEY, (stack.depth, len(x))), TruncatedSeries(3)
    halves = [
        Stack(jax.tree.map(lambda leaf, part=part: leaf[part], stack.block), depth)
        for part, depth in ((slice(None, cut), cut), (slice(cut, None), stack.depth - cut))
    ]

    @quick_jit
    def run(scale, x):
        y, log_det = scale.forward_and_log_det(x, estimator, keys)
        back, infos = scale.inverse(y)
        info = jax.tree.map(lambda *parts: jnp.concatenate(parts), *infos)
        return scale.forward(x), y, log_det, back, info.num_steps

    for a, b in zip(run(Scale((stack,)), x), run(Scale(tuple(halves)), x), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_keys_for_another_number_of_blocks_are_refused(built):
    _, _, stack, x = built["dense"]
    keys = jax.random.split(KEY, (stack.depth + 1, len(x)))
    for part in (stack, Scale((stack,))):
        with pytest.raises(ValueError, match=f"for {stack.depth} blocks.*got .{stack.depth + 1}, "):
            part.forward_and_log_det(x, TruncatedSeries(1), keys)


@every_stack
def test_a_stack_inverts_from_last_to_first_and_reports_in_forward_order(name, built):
    _, _, stack, x = built[name]

    @quick_jit
    def run(stack, blocks, x):
        y = stack.forward(x)
        whole, back, infos = stack.inverse(y), y, []
        for block in reversed(blocks):
            back, info = block.inverse(back)
            infos.insert(0, info)
        return whole, (back, jax.tree.map(lambda *parts: jnp.stack(parts), *infos))

    (back, info), (by_hand, expected) = run(stack, list(stack.unstacked()), x)
    np.testing.assert_allclose(back, x, atol=1e-4)
    np.testing.assert_allclose(back, by_hand, atol=1e-5)
    assert info.converged.all() and info.converged.shape == (stack.depth, len(x))
    assert np.abs(info.num_steps - expected.num_steps).max() <= 1
    assert len(np.unique(info.num_steps.sum(1))) == stack.depth  # the blocks can be told apart


# Stacks as modules


@every_stack
def test_actnorm_normalises_what_every_block_sees(name, built):
    _, _, stack, x = built[name]
    blocks = list(stack.unstacked())
    axes = tuple(range(x.ndim - 1))
    first = x * jnp.exp(blocks[0].actnorm.log_scale) + blocks[0].actnorm.shift
    assert np.abs(np.mean(x, axes)).min() > 1.0  # the data are far from normalised
    np.testing.assert_allclose(np.mean(first, axes), 0.0, atol=1e-5)
    np.testing.assert_allclose(np.std(first, axes), 1.0, atol=1e-5)
    for block in blocks:
        h = block.actnorm.forward_and_log_det(x)[0]
        np.testing.assert_allclose(np.mean(h, axes), 0.0, atol=1e-5)
        np.testing.assert_allclose(np.std(h, axes), 1.0, atol=1e-4)
        x = block.forward(x)


@every_stack
def test_blocks_of_a_stack_start_from_different_weights(name, built):
    _, _, stack, _ = built[name]
    kernels = [block.branch.stages[-1].operator.kernel for block in stack.unstacked()]
    for i, kernel in enumerate(kernels[1:]):
        assert jnp.abs(kernel - kernels[i]).max() > 0.01
    for block in stack.unstacked():
        assert block.branch.lipschitz_bound() < 0.9 ** (2 if name == "dense" else 3) * 1.01


def test_a_stack_without_data_has_an_idle_actnorm():
    module = Stack(dense_branch(3, (4,)), 2)
    variables = quick_jit(module.init, static_argnums=1)(KEY, (3,))
    np.testing.assert_array_equal(variables["params"]["log_scale"], jnp.zeros((2, 3)))
    np.testing.assert_array_equal(variables["params"]["shift"], jnp.zeros((2, 3)))


def test_a_stack_without_actnorm_has_no_such_parameters():
    module = Stack(dense_branch(3, (4,)), 2, actnorm=False)
    variables = quick_jit(module.init, static_argnums=1)(KEY, (3,), jnp.ones((4, 3)))
    assert set(variables["params"]) == {"branch"}
    assert module.apply(variables, (3,)).block.actnorm is None


@every_stack
def test_data_have_no_part_after_initialisation(name, built):
    module, variables, stack, x = built[name]
    again = module.apply(variables, x.shape[1:], 100.0 * x)
    for a, b in zip(jax.tree.leaves(stack), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


@every_stack
def test_only_a_mutable_collection_advances_and_in_every_block(name, built):
    module, variables, _, x = built[name]
    rng = np.random.default_rng(5)
    noisy = jax.tree.map(
        lambda a: a + jnp.asarray(rng.normal(size=a.shape), a.dtype), variables["spectral"]
    )
    variables = {**variables, "spectral": noisy}
    shape = x.shape[1:]
    _, step = module.apply(variables, shape, mutable=["spectral"])
    for old, new in zip(jax.tree.leaves(noisy), jax.tree.leaves(step["spectral"]), strict=True):
        assert old.shape == new.shape
        moved = jnp.abs(new - old).reshape(len(old), -1).max(axis=1)
        assert (moved > 1e-3).all()
    converged, _ = module.apply(variables, shape, converge=True, mutable=["spectral"])
    for block in converged.unstacked():
        for stage in block.branch.stages:
            if isinstance(stage, Affine):
                assert stage.lipschitz_bound() <= 0.9 * 1.005


def test_statistics_over_a_mapped_axis_are_those_of_the_whole_batch():
    """Two halves on a mapped axis give the ActNorm of the batch as one, in every block."""
    whole = Stack(dense_branch(3, (4,)), 2)
    mapped = Stack(dense_branch(3, (4,)), 2, axis_name="batch")
    x = 2.0 * draw(6, (8, 3)) + 1.0
    expected = quick_jit(whole.init, static_argnums=1)(KEY, (3,), x)
    halves = quick_jit(jax.vmap(lambda x: mapped.init(KEY, (3,), x), axis_name="batch"))(
        x.reshape(2, 4, 3)
    )
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(halves), strict=True):
        np.testing.assert_allclose(b[0], a, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(b[1], a, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("depth", [0, -1])
def test_a_stack_has_a_block(depth):
    module = Stack(dense_branch(3, (4,)), depth)
    with pytest.raises(ValueError, match=f"at least one block; got depth {depth}"):
        module.init(KEY, (3,))
