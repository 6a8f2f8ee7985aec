"""Stacks of residual blocks, as pytrees and as modules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import actnorm_of, quick_jit, residual_of
from helpers import rest_slow
from stack_cases import KEY, STACKS, blocks_of, built, draw, initialised

from iresnet_jax import Affine, Chain, Stack, TruncatedSeries
from iresnet_jax.nn import Stack as StackModule
from iresnet_jax.nn import converge, dense_branch

every_stack = pytest.mark.parametrize("name", STACKS)


# Stacks as pytrees


@pytest.mark.slow
@every_stack
def test_a_stack_is_its_blocks_in_a_row(name):
    _, _, stack, x = built(name)
    blocks = list(stack.unstacked())
    assert len(blocks) == stack.depth
    x = x[:3]
    keys, estimator = jax.random.split(KEY, (stack.depth, len(x))), TruncatedSeries(3)

    @quick_jit
    def both(stack, blocks, x):
        whole = (stack.forward(x), stack.forward_and_log_det(x, estimator, keys))
        y, log_det = x, 0.0
        for i, block in enumerate(blocks):
            y, part = block.forward_and_log_det(y, estimator, keys[i : i + 1])
            log_det = log_det + part
        return whole, (y, (y, log_det))

    whole, row = both(stack, blocks, x)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(row), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@every_stack
def test_a_chain_runs_its_stacks_one_after_the_other(name):
    """A stack cut in two: the same keys, the same reports."""
    _, _, stack, x = built(name)
    x, cut = x[:3], 1
    keys, estimator = jax.random.split(KEY, (stack.depth, len(x))), TruncatedSeries(3)
    halves = [
        Stack(jax.tree.map(lambda leaf, part=part: leaf[part], stack.block), depth)
        for part, depth in ((slice(None, cut), cut), (slice(cut, None), stack.depth - cut))
    ]

    @quick_jit
    def run(chain, x):
        y, log_det = chain.forward_and_log_det(x, estimator, keys)
        back, info = chain.inverse(y)
        return chain.forward(x), y, log_det, back, info.num_steps

    for a, b in zip(run(Chain((stack,)), x), run(Chain(tuple(halves)), x), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_keys_for_another_number_of_blocks_are_refused():
    _, _, stack, x = built("dense")
    keys = jax.random.split(KEY, (stack.depth + 1, len(x)))
    for part in (stack, Chain((stack,))):
        with pytest.raises(ValueError, match=f"for {stack.depth} blocks.*got .{stack.depth + 1}, "):
            part.forward_and_log_det(x, TruncatedSeries(1), keys)


@every_stack
def test_a_stack_inverts_from_last_to_first_and_reports_in_forward_order(name):
    _, _, stack, x = built(name)

    @quick_jit
    def run(stack, blocks, x):
        y = stack.forward(x)
        whole, back, infos = stack.inverse(y), y, []
        for block in reversed(blocks):
            back, info = block.inverse(back)
            infos.insert(0, info)
        return whole, (back, jax.tree.map(lambda *parts: jnp.concatenate(parts), *infos))

    (back, info), (by_hand, expected) = run(stack, list(stack.unstacked()), x)
    np.testing.assert_allclose(back, x, atol=1e-4)
    np.testing.assert_allclose(back, by_hand, atol=1e-5)
    assert info.converged.all() and info.converged.shape == (stack.depth, len(x))
    assert np.abs(info.num_steps - expected.num_steps).max() <= 1
    assert len(np.unique(info.num_steps.sum(1))) == stack.depth  # the blocks can be told apart


# Stacks as modules


@every_stack
def test_actnorm_normalises_what_every_block_sees(name):
    _, _, stack, x = built(name)
    blocks = list(stack.unstacked())
    axes = tuple(range(x.ndim - 1))
    norm = actnorm_of(blocks[0])
    first = x * jnp.exp(norm.log_scale) + norm.shift
    assert np.abs(np.mean(x, axes)).min() > 1.0  # the data are far from normalised
    np.testing.assert_allclose(np.mean(first, axes), 0.0, atol=1e-5)
    np.testing.assert_allclose(np.std(first, axes), 1.0, atol=1e-5)
    for block in blocks:
        h = actnorm_of(block).forward(x)
        np.testing.assert_allclose(np.mean(h, axes), 0.0, atol=1e-5)
        np.testing.assert_allclose(np.std(h, axes), 1.0, atol=1e-4)
        x = block.forward(x)


@every_stack
def test_blocks_of_a_stack_start_from_different_weights(name):
    _, _, stack, _ = built(name)
    branches = [residual_of(block).branch for block in stack.unstacked()]
    kernels = [branch.stages[-1].operator.kernel for branch in branches]
    for i, kernel in enumerate(kernels[1:]):
        assert jnp.abs(kernel - kernels[i]).max() > 0.01
    for branch in branches:
        assert branch.lipschitz_bound() < 0.9 ** (2 if name == "dense" else 3) * 1.01


def test_a_stack_without_data_has_an_idle_actnorm():
    module = StackModule(dense_branch(3, (4,)), 2)
    init = quick_jit(lambda key: module.init(key, (3,), method="pure"))
    variables = init(KEY)
    np.testing.assert_array_equal(variables["params"]["log_scale"], jnp.zeros((2, 3)))
    np.testing.assert_array_equal(variables["params"]["shift"], jnp.zeros((2, 3)))


def test_a_stack_without_actnorm_has_no_such_parameters():
    module = StackModule(dense_branch(3, (4,)), 2, actnorm=False)
    x = jnp.ones((4, 3))
    variables = initialised(module, x)
    assert set(variables["params"]) == {"branch"}
    assert actnorm_of(blocks_of(module, variables, x).block) is None


@every_stack
def test_data_have_no_part_after_initialisation(name):
    module, variables, stack, x = built(name)
    again = module.apply(variables, x.shape[1:], 100.0 * x, method="pure")
    for a, b in zip(jax.tree.leaves(stack), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", rest_slow(STACKS, "conv"))
def test_only_a_mutable_collection_advances_and_in_every_block(name):
    module, variables, _, x = built(name)
    rng = np.random.default_rng(5)
    noisy = jax.tree.map(
        lambda a: a + jnp.asarray(rng.normal(size=a.shape), a.dtype), variables["spectral"]
    )
    variables = {**variables, "spectral": noisy}
    _, step = module.apply(variables, x, mutable=["spectral"])
    for old, new in zip(jax.tree.leaves(noisy), jax.tree.leaves(step["spectral"]), strict=True):
        assert old.shape == new.shape
        moved = jnp.abs(new - old).reshape(len(old), -1).max(axis=1)
        assert (moved > 1e-3).all()
    converged = blocks_of(module, converge(module, variables, x), x)
    for block in converged.unstacked():
        for stage in residual_of(block).branch.stages:
            if isinstance(stage, Affine):
                assert stage.lipschitz_bound() <= 0.9 * 1.005


@pytest.mark.slow
def test_statistics_over_a_mapped_axis_are_those_of_the_whole_batch():
    """Two halves on a mapped axis give the ActNorm of the batch as one, in every block."""
    whole = StackModule(dense_branch(3, (4,)), 2)
    mapped = StackModule(dense_branch(3, (4,)), 2, axis_name="batch")
    x = 2.0 * draw(6, (8, 3)) + 1.0
    expected = initialised(whole, x)
    halves = quick_jit(jax.vmap(lambda x: mapped.init(KEY, x), axis_name="batch"))(
        x.reshape(2, 4, 3)
    )
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(halves), strict=True):
        np.testing.assert_allclose(b[0], a, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(b[1], a, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("depth", [0, -1])
def test_a_stack_has_a_block(depth):
    module = StackModule(dense_branch(3, (4,)), depth)
    with pytest.raises(ValueError, match=f"at least one block; got depth {depth}"):
        module.init(KEY, jnp.zeros((1, 3)))
