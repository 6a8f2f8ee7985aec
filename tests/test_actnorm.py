import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import rest_slow, sample_jacobians

from iresnet_jax import ActNorm

SHAPES = [(50, 3), (10, 4, 5, 3)]

from_data_either_way = pytest.mark.parametrize(
    "from_data", [ActNorm.from_data, jax.jit(ActNorm.from_data)], ids=["eager", "jit"]
)


def draw(shape, dtype=np.float32):
    """Channels of different means and spreads."""
    noise = np.random.default_rng(0).normal(size=shape)
    return jnp.asarray(noise * [0.1, 1.0, 20.0] + [5.0, 0.0, -30.0], dtype)


def example(dtype=np.float32):
    return ActNorm(jnp.asarray([0.5, -1.0, 0.0], dtype), jnp.asarray([1.0, -2.0, 0.3], dtype))


@pytest.mark.parametrize("shape", SHAPES)
def test_data_come_out_with_mean_zero_and_deviation_one(shape):
    x = draw(shape)
    y, _ = ActNorm.from_data(x).forward_and_log_det(x)
    flat = np.asarray(y, np.float64).reshape(-1, 3)
    np.testing.assert_allclose(flat.mean(0), 0.0, atol=1e-4)
    np.testing.assert_allclose(flat.std(0), 1.0, rtol=1e-3)


def test_statistics_survive_a_mean_far_from_zero():
    x = jnp.asarray(1e4 + np.random.default_rng(0).normal(size=(2000, 1)), jnp.float32)
    y, _ = ActNorm.from_data(x).forward_and_log_det(x)
    np.testing.assert_allclose(np.asarray(y, np.float64).std(), 1.0, rtol=1e-2)


def moments(x):
    """In double precision, over all axes but the last."""
    flat = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    return flat.mean(0), flat.std(0)


@pytest.mark.parametrize("scale", [1e-33, 1e-25, 1e-4, 1e20, 1e37])
@from_data_either_way
def test_a_real_spread_is_normalised_whatever_its_scale(from_data, scale):
    x = draw((400, 3)) * jnp.float32(scale / 30.0)
    norm = from_data(x)
    mean, std = moments(x)
    np.testing.assert_allclose(norm.log_scale, -np.log(std), rtol=1e-5)
    np.testing.assert_allclose(norm.shift, -mean / std, rtol=1e-3, atol=1e-5)


@from_data_either_way
def test_a_channel_that_is_constant_up_to_rounding_keeps_its_scale(from_data):
    """Whatever its magnitude; and what is a few times more than rounding is normalised."""
    sign = np.where(np.arange(4096)[:, None] % 2, 1.0, -1.0)
    middle = np.array([0.1, 0.0, 3e30, 1e-30, 1e4])
    for ulps, spreads in ((0.0, False), (1.0, False), (64.0, True)):
        x = jnp.asarray(middle * (1.0 + ulps * 2.0**-23 * sign), jnp.float32)
        norm = from_data(x)
        mean, std = moments(x)
        expected = np.where(spreads & (middle != 0.0), -np.log(np.maximum(std, 1e-45)), 0.0)
        np.testing.assert_allclose(norm.log_scale, expected, rtol=2e-2)
        np.testing.assert_allclose(norm.shift, -mean * np.exp(norm.log_scale), rtol=1e-4)


@pytest.mark.parametrize("shape", [(1, 3), (1, 4, 4, 3)])
@from_data_either_way
def test_one_row_leaves_scales_at_one(from_data, shape):
    x = draw(shape)
    norm = from_data(x)
    np.testing.assert_array_equal(norm.log_scale, 0.0)
    np.testing.assert_allclose(norm.shift, -moments(x)[0], rtol=1e-5)


def test_rows_are_counted_over_a_mapped_axis():
    x = draw((6, 3))
    by_row = jax.vmap(lambda row: ActNorm.from_data(row, "devices"), axis_name="devices")
    np.testing.assert_allclose(
        by_row(x[:, None]).log_scale[0], ActNorm.from_data(x).log_scale, rtol=1e-4
    )


def test_what_is_not_finite_is_refused_or_leaves_its_channel_alone():
    x = draw((50, 3)).at[4, 1].set(jnp.nan).at[5, 2].set(jnp.inf)
    with pytest.raises(ValueError, match=r"finite; the first offending value is nan at .*\(4, 1\)"):
        ActNorm.from_data(x)
    norm = jax.jit(ActNorm.from_data)(x)
    for leaf, expected in zip(
        jax.tree.leaves(norm), jax.tree.leaves(ActNorm.from_data(draw((50, 3)))), strict=True
    ):
        np.testing.assert_allclose(leaf, np.where([True, False, False], expected, 0.0), rtol=1e-6)


@pytest.mark.parametrize("shape", [(0, 3), (3,), (4, 0, 2, 3)])
def test_a_batch_without_rows_is_refused(shape):
    message = re.escape(f"at least one row; got an array of shape {shape}")
    with pytest.raises(ValueError, match=message):
        ActNorm.from_data(jnp.zeros(shape))


@pytest.mark.parametrize("shape", SHAPES)
def test_forward_is_scale_and_shift_of_the_last_axis(shape):
    norm, x = example(), draw(shape)
    y, _ = jax.jit(ActNorm.forward_and_log_det)(norm, x)
    expected = np.asarray(x) * np.exp([0.5, -1.0, 0.0]) + [1.0, -2.0, 0.3]
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_inverse_returns_the_input(x64, shape):
    norm, x = example(np.float64), draw(shape, np.float64)
    np.testing.assert_allclose(norm.inverse(norm.forward(x))[0], x, rtol=1e-13)
    np.testing.assert_allclose(norm.forward(norm.inverse(x)[0]), x, rtol=1e-13)
    assert norm.inverse(x)[1] is None


@pytest.mark.parametrize("shape", [(4, 3), (2, 2, 3, 3)])
def test_log_det_is_that_of_the_full_jacobian(x64, shape):
    norm, x = example(np.float64), draw(shape, np.float64)
    _, log_det = norm.forward_and_log_det(x)
    jacobians = sample_jacobians(lambda x: norm.forward_and_log_det(x)[0], x)
    assert log_det.shape == shape[:1]
    np.testing.assert_allclose(log_det, np.linalg.slogdet(jacobians)[1], rtol=1e-12)


@pytest.mark.parametrize("shape", rest_slow([(12, 3), (12, 2, 2, 3)], (12, 2, 2, 3)))
def test_statistics_over_a_mapped_axis_are_the_global_ones(shape):
    x = draw(shape).at[:3].add(50.0)  # shards whose own means differ
    whole = ActNorm.from_data(x)
    shards = x.reshape(4, 3, *shape[1:])
    parts = jax.vmap(lambda part: ActNorm.from_data(part, "devices"), axis_name="devices")(shards)
    for global_leaf, leaves in zip(*map(jax.tree.leaves, (whole, parts)), strict=True):
        np.testing.assert_allclose(leaves, np.broadcast_to(global_leaf, leaves.shape), rtol=1e-4)
    alone = ActNorm.from_data(shards[0])
    assert float(jnp.abs(alone.shift - whole.shift).max()) > 0.5


def test_gradient_reaches_scale_and_shift():
    def loss(norm):
        y, log_det = norm.forward_and_log_det(jnp.ones((2, 4, 4, 3)))
        return jnp.sum(y) + jnp.sum(log_det)

    gradient = jax.grad(loss)(example())
    np.testing.assert_allclose(gradient.shift, 32.0)
    np.testing.assert_allclose(gradient.log_scale, 32 * np.exp([0.5, -1.0, 0.0]) + 32, rtol=1e-5)
