"""Rigorous upper bounds of operator norms against the dense SVD."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.linalg
from helpers import (
    GEOMETRIES,
    Geometry,
    dense_matrix,
    matrix_with_singular_values,
    operator_norm,
)

from iresnet_jax.bounds import layer_upper_bound
from iresnet_jax.operators import DenseOperator, conv_operator, with_kernel

pytestmark = pytest.mark.usefixtures("no_rank_promotion")

SAME = Geometry((6, 5), (3, 3), (2, 3))


def build(geometry, kernel=None):
    kernel = geometry.kernel() if kernel is None else kernel
    return conv_operator(
        jnp.asarray(kernel), geometry.image, strides=geometry.strides, padding=geometry.padding
    )


def dense(rows, columns, values, dtype=jnp.float32):
    return DenseOperator(jnp.asarray(matrix_with_singular_values(0, rows, columns, values), dtype))


# Bounds from above


def random_geometry(rng):
    """A geometry with at least one output pixel, of any kind that the library takes."""
    while True:
        image, size = rng.integers(1, 7, 2), rng.integers(1, 6, 2)
        channels, strides = rng.integers(1, 4, 2), rng.integers(1, 4, 2)
        padding = rng.choice(["SAME", "VALID", "explicit"])
        if padding == "explicit":
            padding = tuple(map(tuple, rng.integers(0, 6, (2, 2)).tolist()))
        parts = (tuple(part.tolist()) for part in (image, size, channels, strides))
        geometry = Geometry(*parts, padding if isinstance(padding, tuple) else str(padding))
        fits = isinstance(padding, str) or all(
            n + sum(pad) >= k for n, k, pad in zip(image, size, padding, strict=True)
        )
        if fits and not (padding == "VALID" and (size > image).any()):
            return geometry


def random_kernel(rng, shape):
    """Normal, constant, of alternating sign, or a single tap: the last three are extreme."""
    kind = rng.integers(4)
    if kind == 0:
        return rng.normal(size=shape)
    if kind == 1:
        return np.ones(shape)
    if kind == 2:
        return (-1.0) ** np.indices(shape)[:2].sum(0)
    kernel = np.zeros(shape)
    kernel[tuple(rng.integers(shape))] = rng.normal()
    return kernel


@pytest.mark.parametrize("max_dense_size", [0, 1024], ids=["fourier", "dense"])
def test_upper_bound_is_above_the_norm_for_hundreds_of_kernels(max_dense_size):
    rng = np.random.default_rng(0)
    for _ in range(400):
        geometry = random_geometry(rng)
        kernel = random_kernel(rng, geometry.kernel_shape).astype(np.float32)
        truth = operator_norm(dense_matrix(geometry, kernel))
        operator = conv_operator(  # of a NumPy kernel: nothing compiles
            kernel, geometry.image, strides=geometry.strides, padding=geometry.padding
        )
        bound = layer_upper_bound(operator, max_dense_size=max_dense_size)
        assert bound >= truth, (geometry, kernel.tolist())
        if max_dense_size:
            assert bound <= truth * (1.0 + 1e-6) + 1e-30, (geometry, kernel.tolist())


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("max_dense_size", [0, 1, 1024])
def test_upper_bound_is_above_the_norm_in_every_geometry(geometry, max_dense_size):
    for kernel in (geometry.kernel(), np.ones(geometry.kernel_shape)):
        truth = operator_norm(dense_matrix(geometry, kernel))
        bound = layer_upper_bound(build(geometry, kernel), max_dense_size=max_dense_size)
        assert bound >= truth * (1.0 if kernel.dtype == np.float32 else 1.0 - 1e-7)


@pytest.mark.parametrize("shape", [(5, 5), (3, 7), (7, 3), (1, 4)])
def test_upper_bound_of_a_matrix_is_tight(shape):
    operator = dense(*shape, 1.3 * 0.5 ** np.arange(min(shape)))
    truth = operator_norm(operator.kernel)
    assert truth <= layer_upper_bound(operator) <= truth * (1.0 + 1e-6)


def test_fourier_bound_is_tight_on_images_of_usual_size():
    geometry = Geometry((32, 32), (3, 3), (1, 2))
    matrix = dense_matrix(geometry, geometry.kernel())
    (truth,) = scipy.sparse.linalg.svds(scipy.sparse.csr_array(matrix), k=1)[1]
    bound = layer_upper_bound(build(geometry), max_dense_size=0)
    assert truth <= bound <= 1.05 * truth


def test_fourier_bound_of_a_patch_embedding_is_its_matrix():
    geometry = Geometry((6, 6), (3, 3), (2, 4), strides=(3, 3), padding="VALID")
    truth = operator_norm(geometry.kernel().reshape(-1, 4))
    bound = layer_upper_bound(build(geometry), max_dense_size=0)
    assert truth <= bound <= truth * (1.0 + 1e-6)


def test_large_convolutions_take_the_fourier_branch():
    operator = build(Geometry((9, 9), (3, 3), (1, 1)))
    tight = layer_upper_bound(operator)
    assert layer_upper_bound(operator, max_dense_size=81) == tight
    fourier = layer_upper_bound(operator, max_dense_size=80)
    assert tight < fourier == layer_upper_bound(operator, max_dense_size=0)


@pytest.mark.parametrize("max_dense_size", [0, 1024])
@pytest.mark.parametrize("operator", [build(SAME), dense(4, 3, [1, 1, 1])], ids=["conv", "dense"])
def test_upper_bound_of_special_values(operator, max_dense_size):
    def bound(value):
        kernel = np.array(operator.kernel)
        kernel.flat[1] = value
        return layer_upper_bound(with_kernel(operator, kernel), max_dense_size=max_dense_size)

    assert math.isnan(bound(np.nan))
    assert bound(np.inf) == math.inf and bound(-np.inf) == math.inf
    assert math.isfinite(bound(1e30)) and bound(1e30) >= 1e30
    zero = with_kernel(operator, jnp.zeros_like(operator.kernel))
    assert layer_upper_bound(zero, max_dense_size=max_dense_size) == 0.0


def test_upper_bound_sees_nan_before_infinity():
    assert math.isnan(layer_upper_bound(DenseOperator(np.array([[np.nan, np.inf]]))))


def test_upper_bound_of_an_unknown_operator_is_refused():
    class Other:
        kernel = np.ones((2, 2))

    with pytest.raises(TypeError, match="Other"):
        layer_upper_bound(Other())
