"""The plain functions between data and what blocks work on."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iresnet_jax.transforms import (
    injective_pad,
    injective_unpad,
    inverse_logit,
    logit,
    squeeze,
    unsqueeze,
)

image_shapes = st.tuples(
    st.lists(st.integers(1, 3), max_size=2), *[st.integers(1, 4)] * 2, st.integers(1, 4)
)


def draw(seed, shape, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


# Squeeze


def test_squeeze_orders_channels_by_row_column_channel():
    """A 2×4 image of two channels; each entry spells its (row, column, channel)."""
    image = jnp.array([[[10 * y + x + 0.1 * c for c in (0, 1)] for x in range(4)] for y in (0, 1)])
    expected = [
        [
            [0.0, 0.1, 1.0, 1.1, 10.0, 10.1, 11.0, 11.1],
            [2.0, 2.1, 3.0, 3.1, 12.0, 12.1, 13.0, 13.1],
        ]
    ]
    np.testing.assert_array_equal(squeeze(image), np.array(expected, np.float32))


def test_squeeze_keeps_the_place_of_every_patch():
    x = draw(0, (2, 4, 6, 3))
    y = squeeze(jnp.asarray(x))
    for i, j in np.ndindex(2, 3):
        patch = x[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
        np.testing.assert_array_equal(y[:, i, j], patch.reshape(2, -1))


@settings(max_examples=8)  # each shape compiles
@given(image_shapes)
def test_squeeze_and_unsqueeze_are_inverse(shape):
    batch, height, width, channels = shape
    x = draw(0, (*batch, 2 * height, 2 * width, channels))
    y = squeeze(jnp.asarray(x))
    assert y.shape == (*batch, height, width, 4 * channels)
    np.testing.assert_array_equal(unsqueeze(y), x)
    np.testing.assert_array_equal(np.sort(y, axis=None), np.sort(x, axis=None))
    np.testing.assert_array_equal(squeeze(unsqueeze(y)), y)


def test_squeeze_preserves_volume_and_norm():
    x = jnp.asarray(draw(0, (4, 2, 1)))
    jacobian = jax.jacobian(lambda x: squeeze(x).reshape(-1))(x).reshape(8, 8)
    np.testing.assert_array_equal(jacobian @ jacobian.T, np.eye(8))


@pytest.mark.parametrize("shape", [(1, 3, 4, 2), (1, 4, 5, 2), (3, 3, 1)])
def test_squeeze_refuses_odd_sides(shape):
    message = f"height {shape[-3]}, width {shape[-2]}"
    with pytest.raises(ValueError, match=message):
        squeeze(jnp.zeros(shape))


@pytest.mark.parametrize("shape", [(4,), (4, 4)])
def test_squeeze_refuses_what_is_no_image(shape):
    with pytest.raises(ValueError, match="needs an image"):
        squeeze(jnp.zeros(shape))
    with pytest.raises(ValueError, match="multiple of 4"):
        unsqueeze(jnp.zeros(shape))


@pytest.mark.parametrize("channels", [1, 3, 6])
def test_unsqueeze_refuses_channels_that_are_no_multiple_of_four(channels):
    with pytest.raises(ValueError, match=rf"multiple of 4; got \(2, 2, {channels}\)"):
        unsqueeze(jnp.zeros((2, 2, channels)))


# Injective padding


@settings(max_examples=8)  # each shape compiles
@given(image_shapes, st.integers(0, 3))
def test_padding_appends_zeros_and_is_undone(shape, num_channels):
    batch, *image = shape
    x = draw(0, (*batch, *image))
    padded = injective_pad(jnp.asarray(x), num_channels)
    assert padded.shape == (*x.shape[:-1], x.shape[-1] + num_channels)
    np.testing.assert_array_equal(padded[..., : x.shape[-1]], x)
    np.testing.assert_array_equal(padded[..., x.shape[-1] :], 0.0)
    np.testing.assert_array_equal(injective_unpad(padded, num_channels), x)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32])
def test_padding_keeps_the_type(dtype):
    assert injective_pad(jnp.ones((1, 2), dtype), 3).dtype == dtype


def test_padding_out_of_range_is_refused():
    with pytest.raises(ValueError, match="≥ 0; got -1"):
        injective_pad(jnp.zeros((1, 2)), -1)
    for number in (-1, 2, 5):
        with pytest.raises(ValueError, match=rf"\[0, 2\); got {number}"):
            injective_unpad(jnp.zeros((1, 2)), number)


# Logit


@pytest.mark.parametrize("shape", [(3, 4), (2, 2, 2, 1)])
@pytest.mark.parametrize("alpha", [1e-6, 0.01, 0.05, 0.4])
def test_logit_log_det_is_that_of_the_full_jacobian(x64, shape, alpha):
    x = np.random.default_rng(0).uniform(size=shape)
    y, log_det = jax.jit(logit, static_argnums=1)(x, alpha)
    p = alpha + (1 - 2 * alpha) * x
    np.testing.assert_allclose(y, np.log(p / (1 - p)), rtol=1e-12)
    np.testing.assert_allclose(inverse_logit(y, alpha), x, atol=1e-12)

    def flat(sample):
        return logit(sample.reshape(1, *shape[1:]), alpha)[0].reshape(-1)

    jacobians = jax.jit(jax.vmap(jax.jacobian(flat)))(x.reshape(shape[0], -1))
    expected = np.linalg.slogdet(np.asarray(jacobians))[1]
    np.testing.assert_allclose(log_det, expected, rtol=1e-9)


def test_logit_uses_the_same_alpha_both_ways_by_default():
    x = jnp.linspace(0.0, 1.0, 11)[None]
    np.testing.assert_allclose(inverse_logit(logit(x)[0]), x, atol=1e-6)


def test_logit_is_finite_at_the_ends():
    y, log_det = logit(jnp.array([[0.0, 1.0]]), 0.01)
    np.testing.assert_allclose(y, [[math.log(0.01 / 0.99), math.log(0.99 / 0.01)]], rtol=1e-5)
    np.testing.assert_allclose(log_det, [2 * math.log(0.98 / (0.01 * 0.99))], rtol=1e-6)


def test_inverse_logit_does_not_clip():
    outside = inverse_logit(jnp.array([[-50.0, 50.0]]), 0.05)
    np.testing.assert_allclose(outside, [[-0.05 / 0.9, 0.95 / 0.9]], rtol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.5, -0.1, 1.0, math.nan])
def test_alpha_out_of_range_is_refused(alpha):
    for function in (logit, inverse_logit):
        with pytest.raises(ValueError, match=rf"\[1e-6, 0.5\); got {alpha}"):
            function(jnp.ones((1, 2)), alpha)
