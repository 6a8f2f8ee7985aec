"""Branches, and residual blocks."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import actnorm_of, quick_jit, residual_of
from helpers import rest_slow
from stack_cases import KEY, SHAPE, blocks_of, built, draw, initialised

from iresnet_jax import Activation, Affine, ConvOperator, DenseOperator, Exact, Sequential
from iresnet_jax.nn import Sequential as BranchModule
from iresnet_jax.nn import SpectralConv, SpectralDense, bottleneck_branch, dense_branch
from iresnet_jax.nn import Stack as StackModule


def stage_of(stage):
    """(kind, size) of a pure stage."""
    if isinstance(stage, Activation):
        return stage.name
    operator = stage.operator
    size = operator.kernel_size if isinstance(operator, ConvOperator) else (1, 1)
    return (*size, *operator.kernel.shape[-2:])


def pure_by_shapes(branch, shape):
    """The pure branch, without its numbers."""
    variables = jax.eval_shape(branch.init, KEY, jnp.zeros((1, *shape)))
    return jax.eval_shape(lambda v: branch.apply(v, shape, method="pure"), variables)


# Branches


@pytest.mark.parametrize("activate_first", [True, False])
def test_the_image_branch_is_3x3_1x1_3x3(activate_first):
    branch = bottleneck_branch(2, 5, activation="softplus", activate_first=activate_first)
    g = pure_by_shapes(branch, SHAPE)
    kernels = [(3, 3, 2, 5), (1, 1, 5, 5), (3, 3, 5, 2)]
    expected = [part for kernel in kernels for part in ("softplus", kernel)]
    assert [stage_of(stage) for stage in g.stages] == expected[not activate_first :]


@pytest.mark.parametrize("activate_first", [True, False])
@pytest.mark.parametrize("features", [(), (5,), (4, 6)])
def test_the_dense_branch_has_the_widths_asked_for(features, activate_first):
    g = pure_by_shapes(dense_branch(3, features, activate_first=activate_first), (3,))
    sizes = (3, *features, 3)
    kernels = [(1, 1, a, b) for a, b in itertools.pairwise(sizes)]
    expected = [part for kernel in kernels for part in ("elu", kernel)]
    assert [stage_of(stage) for stage in g.stages] == expected[not activate_first :]
    assert all(isinstance(s.operator, DenseOperator) for s in g.stages if isinstance(s, Affine))


@pytest.mark.parametrize("depth", rest_slow([1, 3], 3))
def test_a_stack_may_leave_out_the_first_activation(depth):
    """Of its first block alone, forward and in derivatives."""
    branch, x = dense_branch(3, (4,), activation="softplus"), draw(1, (5, 3))
    usual, other = (
        StackModule(branch, depth, actnorm=False, first_block_activated=first)
        for first in (True, False)
    )
    variables = initialised(usual, x)
    stacks = (blocks_of(module, variables, x).unstacked() for module in (usual, other))
    blocks = zip(*stacks, strict=True)
    for i, (block, spared) in enumerate(blocks):
        stages = block.branch.stages if i else block.branch.stages[1:]
        plain = Sequential(stages)
        for ours, expected in zip(
            derivatives(spared.branch, x), derivatives(plain, x), strict=True
        ):
            np.testing.assert_array_equal(ours, expected)


@quick_jit
def derivatives(branch, x):
    """Values, and first and second derivatives."""

    def total(y):
        return branch(y).sum(0)

    return branch(x), jax.jacobian(total)(x), jax.hessian(total)(x[:1])


def test_the_first_activation_is_left_out_in_a_scan_and_in_bfloat16():
    branch, x = dense_branch(3, (4,), activation="softplus", precision="bfloat16"), draw(1, (5, 3))
    module = StackModule(branch, 3, actnorm=False, first_block_activated=False)
    variables = initialised(module, x)
    stack, y = blocks_of(module, variables, x), x
    for i, block in enumerate(stack.unstacked()):
        stages = block.branch.stages if i else block.branch.stages[1:]
        y = y + Sequential(stages, "bfloat16")(y)
    np.testing.assert_allclose(stack.forward(x), y, atol=0.02)
    usual = blocks_of(StackModule(branch, 3, actnorm=False), variables, x)
    assert np.abs(stack.forward(x) - usual.forward(x)).max() > 0.1


@pytest.mark.parametrize("first", [nn.Dense(3), SpectralDense(3)], ids=["Dense", "SpectralDense"])
def test_a_branch_that_begins_with_a_layer_has_nothing_to_leave_out(first):
    branch, x = BranchModule((first, "elu", SpectralDense(3))), draw(1, (5, 3))
    module = StackModule(branch, 2, first_block_activated=False)
    stages = residual_of(blocks_of(module, initialised(module, x), x).block).branch.stages
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
    variables = quick_jit(branch.init)(KEY, x)
    of_module = quick_jit(branch.apply)(variables, x)
    of_pytree = quick_jit(lambda v, x: branch.apply(v, SHAPE, method="pure")(x))(variables, x)
    np.testing.assert_allclose(of_module, of_pytree, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("stages", "shape", "message"),
    [
        ((SpectralDense(4),), (3,), r"maps \(3,\) to \(4,\)"),
        ((SpectralConv(2, padding="VALID"),), SHAPE, r"maps \(4, 4, 2\) to \(2, 2, 2\)"),
        ((SpectralConv(2), "elu", SpectralDense(3)), SHAPE, r"maps \(4, 4, 2\) to \(4, 4, 3\)"),
    ],
)
def test_a_branch_must_map_a_shape_to_itself(stages, shape, message):
    branch = BranchModule(tuple(s.clone() if isinstance(s, nn.Module) else s for s in stages))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(branch.init, KEY, jnp.zeros((1, *shape)))


def test_an_unknown_activation():
    with pytest.raises(ValueError, match=r"Unknown activation 'gelu'; known: elu, .*lipswish"):
        jax.eval_shape(dense_branch(2, (3,), activation="gelu").init, KEY, jnp.zeros((1, 2)))


# One block

exact = quick_jit(lambda branch, x: Exact()(branch, x))
exact_of_block = quick_jit(lambda block, x: block.forward_and_log_det(x, Exact(), None))


def test_a_block_is_actnorm_then_the_residual():
    block = next(built("dense")[2].unstacked())
    x = draw(3, (5, 3))
    norm, branch = actnorm_of(block), residual_of(block).branch
    h = x * jnp.exp(norm.log_scale) + norm.shift
    g, log_det_of_branch = exact(branch, h)
    np.testing.assert_allclose(block.forward(x), h + g, rtol=1e-6, atol=1e-6)
    y, log_det = exact_of_block(block, x)
    np.testing.assert_allclose(y, block.forward(x), rtol=1e-6, atol=1e-6)
    expected = jnp.sum(norm.log_scale) + log_det_of_branch
    np.testing.assert_allclose(log_det, expected, rtol=1e-6)


def test_a_block_without_actnorm_is_the_residual_alone():
    block = residual_of(next(built("dense")[2].unstacked()))
    x = draw(3, (5, 3))
    np.testing.assert_allclose(block.forward(x), x + block.branch(x), rtol=1e-6, atol=1e-6)
    log_det = exact_of_block(block, x)[1]
    np.testing.assert_allclose(log_det, exact(block.branch, x)[1], rtol=1e-6, atol=1e-7)
    back, info = quick_jit(lambda block, y: block.inverse(y))(block, block.forward(x))
    assert info.converged.all()
    np.testing.assert_allclose(back, x, atol=1e-5)
