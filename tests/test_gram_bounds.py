"""Rigorous upper bounds of operator norms in a trace: above the SVD's, close, differentiable."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bound_cases import ORACLE, SAME, build, dense, norms, random_kernels
from helpers import (
    GEOMETRIES,
    Geometry,
    matrix_with_singular_values,
    operator_norm,
    orthogonal,
    rest_slow,
)

from iresnet_jax.bounds import gram_upper_bound, layer_upper_bound
from iresnet_jax.operators import DenseOperator, conv_operator
from iresnet_jax.spectral import spectral_normalize

pytestmark = pytest.mark.usefixtures("no_rank_promotion")


#: Padded by hand, larger than the image, strided, and most of it at once.
FEWER = [GEOMETRIES[i] for i in (6, 8, 10, 21)]


@pytest.mark.parametrize("geometry", rest_slow(GEOMETRIES, *FEWER), ids=str)
def test_gram_bound_is_above_the_norm(geometry):
    """By symbols and by the dense matrix, which is close as well."""
    kernels = random_kernels(np.random.default_rng(4), geometry.kernel_shape, 20)

    @jax.jit
    @jax.vmap
    def bounds(kernel):
        operator = build(geometry, kernel)
        return [gram_upper_bound(operator, max_dense_size=size) for size in (0, 256)]

    truth = norms(geometry, kernels)
    by_symbols, by_matrix = (np.asarray(bound, np.float64) for bound in bounds(kernels))
    assert (by_symbols >= truth).all() and (by_matrix >= truth).all()
    assert (by_matrix <= truth * 1.02 + 1e-6).all()


@pytest.mark.parametrize("num_iterations", [0, 1, 3, 8])
def test_gram_bound_converges_as_stated(num_iterations):
    """An orthogonal projection is its own Gram matrix: only the root of its norm changes."""
    basis = orthogonal(np.random.default_rng(0), 40)[:, :20]
    projection = basis @ basis.T
    operator = DenseOperator(jnp.asarray(projection, jnp.float32))
    norm = min(operator_norm(np.abs(projection)), math.sqrt(20))
    expected = norm ** (0.5 ** (num_iterations + 1))
    bound = float(gram_upper_bound(operator, num_iterations))
    assert expected * (1 - 1e-6) <= bound <= 1.03 * expected
    assert bound <= 40 ** (0.5 ** (num_iterations + 2))


@pytest.mark.parametrize("num_iterations", [0, 6])
def test_gram_bound_of_the_identity_needs_no_iteration(num_iterations):
    bound = float(gram_upper_bound(DenseOperator(jnp.eye(40)), num_iterations))
    assert 1.0 <= bound <= 1.0 + 1e-4


def test_gram_bound_comes_close_to_the_one_on_the_host():
    for geometry in (Geometry((16, 16), (3, 3), (4, 24)), Geometry((4, 4), (3, 3), (8, 16))):
        operator = build(geometry)
        tight = layer_upper_bound(operator, max_dense_size=256)
        bound = float(jax.jit(lambda o: gram_upper_bound(o, 10))(operator))
        assert tight * (1 - 1e-9) <= bound <= 1.003 * tight


@pytest.mark.parametrize("values", [[1.0] * 30, [1.0] + [0.999] * 29, [1.0] + [1e-4] * 29])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_gram_bound_covers_its_rounding(values, size):
    operator = dense(30, 30, size * np.array(values))
    truth = operator_norm(operator.kernel)
    assert truth <= float(gram_upper_bound(operator, 12)) <= 1.005 * truth


@pytest.mark.parametrize("max_dense_size", [0, 256], ids=["fourier", "dense"])
@pytest.mark.parametrize("size", rest_slow([1e-45, 1e-42, 1e-39], 1e-45))
def test_gram_bound_counts_numbers_that_are_flushed_to_zero(size, max_dense_size):
    """Alone, and beside one that is not."""
    for first in (0.0, 2e-38):
        kernel = size * np.ones(SAME.kernel_shape, np.float32)
        kernel[0, 0, 0, 0] += first
        operator = build(SAME, jnp.asarray(kernel))
        bound = jax.jit(lambda o: gram_upper_bound(o, max_dense_size=max_dense_size))(operator)
        assert norms(SAME, kernel[None])[0] <= float(bound) <= 1e-36


COEFFS = (1e-30, 0.5, 0.9, 0.97, 1.0 - 1e-9)


SHAPES = [(1, 1), (1, 2), (1, 4096), (3, 20_000), (20_000, 2)]


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        *((jnp.float32, shape) for shape in SHAPES),
        (jnp.bfloat16, SHAPES[2]),
        *(
            pytest.param(jnp.bfloat16, shape, marks=pytest.mark.slow)
            for shape in SHAPES
            if shape != SHAPES[2]
        ),
    ],
    ids=str,
)
def test_a_kernel_scaled_by_its_gram_bound_is_within_coeff_as_rounded(dtype, shape):
    rng = np.random.default_rng(shape)

    @jax.jit
    def scaled(operator):
        bound = gram_upper_bound(operator)
        return [spectral_normalize(operator, bound, coeff) for coeff in COEFFS]

    with_outlier = np.full(shape, 1e-39) + (np.arange(math.prod(shape)) == 0).reshape(shape)
    for values in (rng.normal(size=shape), np.ones(shape), with_outlier):
        for size in (3.0, 1e30, 1e-20):
            operator = DenseOperator(jnp.asarray(size * values, dtype))
            for coeff, within in zip(COEFFS, scaled(operator), strict=True):
                assert layer_upper_bound(within) <= coeff, coeff


#: Shapes with numbers of iterations: the fewest and the most, of a row, and of both sorts of width.
TELLING = [((1, 3), 12), ((8, 13), 12), ((64, 40), 12), ((8, 13), 0), ((64, 40), 0)]


def matrix_of_each_kind(rng, rows, columns):
    """Orthogonal, flat in part, random, of one sign, low rank, badly scaled, sparse, identities."""
    small = min(rows, columns)
    left, right = orthogonal(rng, rows), orthogonal(rng, columns)
    diagonal = np.eye(rows, columns)
    tail = np.where(np.arange(small) < rng.integers(1, small + 1), 1.0, rng.uniform(0, 1, small))
    rank = rng.integers(1, small + 1)
    gaussian = rng.normal(size=(rows, columns))
    yield left @ diagonal @ right
    yield (left[:, :small] * tail) @ right[:small]
    yield gaussian
    yield np.abs(gaussian)
    yield gaussian[:, :rank] @ rng.normal(size=(rank, columns))
    yield 10.0 ** rng.uniform(-12, 0, rows)[:, None] * gaussian
    yield gaussian * 10.0 ** rng.uniform(-12, 0, columns)
    yield 10.0 ** rng.uniform(-20, 18) * left @ diagonal @ right
    yield np.where(rng.uniform(size=gaussian.shape) < 0.1, gaussian, 0.0)
    yield diagonal * 10.0 ** rng.uniform(-30, 0, columns)
    yield rng.permutation(diagonal) + 1e-7 * gaussian


@pytest.mark.parametrize(
    ("shape", "iterations"),
    [
        pytest.param(shape, n, marks=[] if (shape, n) in TELLING else pytest.mark.slow)
        for shape in [(1, 3), (2, 2), (5, 5), (8, 13), (30, 30), (64, 40)]
        for n in (0, 1, 6, 12)
    ],
)
def test_gram_bound_is_above_the_norm_of_thousands_of_matrices(shape, iterations):
    rng = np.random.default_rng(shape)
    kernels = np.array([m for _ in range(12) for m in matrix_of_each_kind(rng, *shape)], np.float32)
    truth = np.linalg.svd(kernels.astype(np.float64), compute_uv=False)[:, 0]
    bounds_of = jax.jit(jax.vmap(lambda k: gram_upper_bound(DenseOperator(k), iterations)))
    found = np.asarray(bounds_of(kernels), np.float64)
    assert (found >= truth * (1 - ORACLE)).all(), (found / truth).min()
    if iterations == 12:
        assert (found <= truth * 1.003 + 1e-33).all(), (found - truth).max()


@pytest.mark.parametrize(
    ("size", "above"),
    [
        (64, 1.01),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [(256, 1.015), (1024, 1.03)]),
        (512, 1.02),
    ],
)
def test_gram_bound_of_a_wide_flat_spectrum_is_close(size, above):
    """Of orthogonal matrices, whose norm is 1 but for the rounding of their entries."""
    kernel = orthogonal(np.random.default_rng(size), size).astype(np.float32)
    truth = operator_norm(kernel)
    assert truth <= float(jax.jit(gram_upper_bound)(DenseOperator(jnp.asarray(kernel)))) <= above


def test_gram_bound_of_wide_symbols_that_are_flat_is_close():
    """A 1×1 tap in the middle of a 3×3 kernel: every symbol is the same orthogonal matrix."""
    kernel = np.zeros((3, 3, 128, 128), np.float32)
    kernel[1, 1] = orthogonal(np.random.default_rng(0), 128)
    truth = operator_norm(kernel[1, 1])
    operator = conv_operator(jnp.asarray(kernel), (8, 8))
    assert truth <= float(jax.jit(gram_upper_bound)(operator)) <= 1.015


def test_gram_bound_has_the_gradient_of_the_norm():
    """∂σ/∂A = u vᵀ, for a norm that stands apart."""
    matrix = matrix_with_singular_values(5, 4, 6, [1.0, 0.4, 0.3, 0.1])
    u, _, vh = np.linalg.svd(matrix)
    gradient = jax.jit(jax.grad(lambda k: gram_upper_bound(DenseOperator(k))))
    slope = gradient(jnp.asarray(matrix, jnp.float32))
    np.testing.assert_allclose(slope, np.outer(u[:, 0], vh[0]), atol=1e-3)
    of_images = jax.jit(jax.grad(lambda k: gram_upper_bound(build(SAME, k))))
    zero = of_images(jnp.zeros(SAME.kernel_shape))
    assert np.isfinite(zero).all()


def test_gram_bound_counts_as_many_iterations_as_there_can_be():
    with pytest.raises(ValueError, match="num_iterations of a Gram iteration must be ≥ 0; got -1"):
        gram_upper_bound(build(SAME), -1)
