"""Grey levels to floats and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from iresnet_jax import dequantize, quantize

KEY = jax.random.key(0)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
@pytest.mark.parametrize("num_levels", [2, 17, 256])
def test_noise_is_uniform_within_each_level(num_levels, dtype):
    levels = np.random.default_rng(0).integers(0, num_levels, (20, 500)).astype(dtype)
    x = dequantize(KEY, jnp.asarray(levels), num_levels)
    assert x.dtype == jnp.float32 and float(x.min()) >= 0.0 and float(x.max()) < 1.0
    noise = (np.asarray(x, np.float64) * num_levels - levels).ravel()
    assert noise.min() >= -1e-5 and noise.max() <= 1.0
    assert scipy.stats.kstest(noise, "uniform").pvalue > 0.01
    assert abs(np.corrcoef(noise, levels.ravel())[0, 1]) < 0.05
    np.testing.assert_array_equal(quantize(x, num_levels), levels)


@pytest.mark.parametrize("level", [127, 255])
def test_quantize_undoes_dequantize_without_exception(level):
    """Two million draws: noise next to 1 must not round to the level above."""
    levels = jnp.full(2_000_000, level, jnp.uint8)
    x = np.asarray(jax.jit(dequantize, static_argnums=2)(KEY, levels, 256))
    assert x.max() < 1.0
    assert (np.asarray(quantize(x, 256)) == level).all()


@pytest.mark.parametrize("num_levels", [2, 8, 17, 25, 100, 256])
def test_quantize_of_the_lower_edge_of_each_level_is_that_level(num_levels):
    levels = np.arange(num_levels)
    edges = levels.astype(np.float32) / np.float32(num_levels)
    np.testing.assert_array_equal(quantize(jnp.asarray(edges), num_levels), levels)


def test_quantize_clips_to_the_ends():
    levels = quantize(jnp.array([-0.3, 0.0, 0.26, 0.999, 1.0, 7.0]), 4)
    np.testing.assert_array_equal(levels, [0, 0, 1, 3, 3, 3])
    assert levels.dtype == jnp.int32


def test_noise_of_a_sample_depends_on_its_key_alone():
    levels = jnp.asarray(np.random.default_rng(0).integers(0, 256, (3, 2, 2, 1)))
    keys = jax.random.split(KEY, 3)
    together = dequantize(keys, levels, 256)
    for i in range(3):
        alone = dequantize(keys[i : i + 1], levels[i : i + 1], 256)
        np.testing.assert_array_equal(alone[0], together[i])
    assert len(np.unique(np.asarray(together * 256 - levels).round(4))) == 12


def test_dequantize_gives_single_precision_under_x64(x64):
    assert dequantize(KEY, jnp.arange(4), 4).dtype == jnp.float32


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bool_])
def test_dequantize_refuses_levels_that_are_no_integers(dtype):
    with pytest.raises(TypeError, match=f"integer grey levels; got {jnp.dtype(dtype).name}"):
        dequantize(KEY, jnp.ones((2, 2), dtype), 256)


@pytest.mark.parametrize("num_levels", [1, 0, -3])
def test_dequantize_refuses_fewer_than_two_levels(num_levels):
    with pytest.raises(ValueError, match=f"≥ 2; got {num_levels}"):
        dequantize(KEY, jnp.ones((2, 2), jnp.int32), num_levels)


def test_dequantize_takes_arrays():
    with pytest.raises(TypeError, match="Grey levels must be an array; got list"):
        dequantize(jax.random.key(0), [[1, 2]], 4)


@pytest.mark.parametrize("num_levels", [2**16, 2**24 - 1, 2**24])
def test_levels_up_to_what_single_precision_holds_are_exact(num_levels):
    middle, top = num_levels // 2, num_levels
    ends = np.r_[0:1000, middle - 500 : middle + 500, top - 1000 : top]
    levels = jnp.asarray(ends[:, None], jnp.int32)
    x = dequantize(KEY, levels, num_levels)
    assert float(x.max()) < 1.0
    for back in (quantize, jax.jit(quantize, static_argnums=1)):
        np.testing.assert_array_equal(back(x, num_levels), levels)


@pytest.mark.parametrize("num_levels", [2**24 + 1, 2**31])
def test_levels_that_single_precision_cannot_tell_apart_are_refused(num_levels):
    for function in (
        lambda: dequantize(KEY, jnp.zeros((2, 2), jnp.int32), num_levels),
        lambda: quantize(jnp.zeros(2), num_levels),
    ):
        with pytest.raises(ValueError, match=f"≤ 16777216, .*; got {num_levels}"):
            function()


@pytest.mark.parametrize("level", [-1, 4, 300])
def test_a_level_out_of_range_is_refused_where_it_can_be_seen(level):
    with pytest.raises(ValueError, match=r"in \[0, 3\], by num_levels; got"):
        dequantize(KEY, np.array([[0, level]]), 4)
    jax.eval_shape(lambda levels: dequantize(KEY, levels, 4), jnp.array([[level]]))


def test_quantize_refuses_what_has_no_level():
    with pytest.raises(ValueError, match="NaN"):
        quantize(jnp.array([0.5, jnp.nan]), 4)
    with pytest.raises(TypeError, match="floating-point values; got int32"):
        quantize(jnp.arange(3), 4)


def test_quantize_takes_half_precision_and_numpy():
    np.testing.assert_array_equal(quantize(np.float16([0.0, 0.5]), 2**16), [0, 2**15])
    np.testing.assert_array_equal(quantize(np.array([0.1, 0.9]), 10), [1, 9])


def test_legacy_keys_are_as_good_as_typed_ones():
    levels = jnp.arange(12, dtype=jnp.int32).reshape(3, 4)
    old, new = jax.random.PRNGKey(0), jax.random.key(0)
    for one, other in ((old, new), (jax.random.split(old, 3), jax.random.split(new, 3))):
        np.testing.assert_array_equal(dequantize(one, levels, 12), dequantize(other, levels, 12))


@pytest.mark.parametrize(
    "key", [0, np.int32(3), jnp.zeros(3, jnp.uint32), np.zeros((3, 2), np.int64)]
)
def test_what_is_no_key_is_refused(key):
    with pytest.raises(TypeError, match=r"must come from jax.random.key\(seed\).*; got"):
        dequantize(key, jnp.zeros((3, 2), jnp.int32), 4)


def test_another_number_of_keys_is_refused():
    with pytest.raises(ValueError, match=r"levels \(3, 2\); got \(4,\)"):
        dequantize(jax.random.split(KEY, 4), jnp.zeros((3, 2), jnp.int32), 4)


def test_levels_that_a_compiled_function_closes_over_are_checked_as_well():
    levels = jnp.arange(4)[:, None]
    np.testing.assert_array_equal(
        jax.jit(lambda key: dequantize(key, levels, 4))(KEY), dequantize(KEY, levels, 4)
    )
    with pytest.raises(ValueError, match=r"in \[0, 2\], by num_levels; got 0 to 3"):
        jax.jit(lambda key: dequantize(key, levels, 3))(KEY)
