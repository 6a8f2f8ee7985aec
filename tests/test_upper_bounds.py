"""Rigorous upper bounds of operator norms against the dense SVD, proved on the host."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from bound_cases import (
    ORACLE,
    SAME,
    build,
    dense,
    matrices,
    norms,
    random_geometry,
    random_kernels,
)
from helpers import GEOMETRIES, Geometry, dense_matrix, operator_norm, rest_slow

from iresnet_jax import bounds, symbols
from iresnet_jax.bounds import gram_upper_bound, layer_upper_bound, shrink_factor
from iresnet_jax.operators import DenseOperator, with_kernel

pytestmark = pytest.mark.usefixtures("no_rank_promotion")


def flattened(geometry, kernels, steps=3):
    """Kernels whose operators have much of their spectrum at the norm, as training makes them.

    Projected in turn onto singular values of at most half of the norm and onto convolutions.
    """
    for _ in range(steps):
        u, s, vh = np.linalg.svd(matrices(geometry, kernels), full_matrices=False)
        clipped = (u * np.minimum(s, 0.5 * s[:, :1])[:, None, :]) @ vh
        basis = matrices(geometry, np.eye(kernels[0].size)).reshape(kernels[0].size, -1)
        weights = (basis**2).sum(axis=1)  # taps do not overlap: the basis is orthogonal
        kernels = (clipped.reshape(len(kernels), -1) @ basis.T / weights).reshape(kernels.shape)
    return kernels.astype(np.float32)


@pytest.mark.parametrize("max_dense_size", rest_slow([0, 1024], 0), ids=["fourier", "dense"])
def test_the_bound_is_above_the_norm_for_thousands_of_kernels(max_dense_size):
    rng = np.random.default_rng(0)
    for _ in range(150):
        geometry = random_geometry(rng)
        kernels = random_kernels(rng, geometry.kernel_shape, 14)
        for kernel, truth in zip(kernels, norms(geometry, kernels), strict=True):
            operator = build(geometry, kernel, np.asarray)  # in NumPy: nothing compiles
            bound = layer_upper_bound(operator, max_dense_size=max_dense_size)
            assert bound >= truth * (1 - ORACLE), (geometry, kernel.tolist())
            if max_dense_size:
                assert bound <= truth * (1.0 + 1e-9) + 1e-30, (geometry, kernel.tolist())


def test_the_bound_covers_kernels_whose_spectrum_is_flat_at_the_norm():
    geometry, rng = Geometry((5, 6), (3, 3), (2, 2)), np.random.default_rng(1)
    kernels = flattened(geometry, rng.normal(size=(60, *geometry.kernel_shape)))
    values = np.linalg.svd(matrices(geometry, kernels), compute_uv=False)
    assert np.median(values / values[:, :1]) > 0.6
    for kernel, truth in zip(kernels, values[:, 0], strict=True):
        operator = build(geometry, kernel, np.asarray)
        assert truth * (1 - ORACLE) <= layer_upper_bound(operator) <= truth * (1 + 1e-9)
        assert truth * (1 - ORACLE) <= layer_upper_bound(operator, max_dense_size=0)


def test_the_fourier_bound_is_within_6_percent_at_8_where_it_is_taken():
    """The fewest channels at which the matrix itself would be too large: 17."""
    geometry, rng = Geometry((8, 8), (3, 3), (17, 17)), np.random.default_rng(2)
    for _ in range(2):
        kernel = rng.normal(size=geometry.kernel_shape).astype(np.float32)
        operator = build(geometry, kernel, np.asarray)
        truth = layer_upper_bound(operator, max_dense_size=2048)
        assert truth < layer_upper_bound(operator) <= 1.06 * truth


@pytest.mark.slow
def test_the_fourier_bound_is_within_5_percent_at_32():
    geometry, rng = Geometry((32, 32), (3, 3), (1, 1)), np.random.default_rng(2)
    for kernel in random_kernels(rng, geometry.kernel_shape, 24):
        matrix = dense_matrix(geometry, kernel)
        truth = math.sqrt(np.linalg.eigvalsh(matrix @ matrix.T)[-1])
        bound = layer_upper_bound(build(geometry, kernel, np.asarray), max_dense_size=0)
        assert truth * (1 - 1e-9) <= bound <= 1.05 * truth


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("max_dense_size", [0, 1, 1024])
def test_upper_bound_is_above_the_norm_in_every_geometry(geometry, max_dense_size):
    for kernel in (geometry.kernel(), np.ones(geometry.kernel_shape)):
        truth = operator_norm(dense_matrix(geometry, kernel))
        bound = layer_upper_bound(build(geometry, kernel), max_dense_size=max_dense_size)
        assert bound >= truth * (1 - ORACLE)


@pytest.mark.parametrize("shape", [(5, 5), (3, 7), (7, 3), (1, 4), (90, 80)])
def test_upper_bound_of_a_matrix_is_tight(shape):
    operator = dense(*shape, 1.3 * 0.5 ** np.arange(min(shape)))
    truth = operator_norm(operator.kernel)
    assert truth * (1 - ORACLE) <= layer_upper_bound(operator) <= truth * (1.0 + 1e-8)


@pytest.mark.parametrize("size", [4, 80], ids=["batched", "one by one"])
def test_the_proof_covers_the_largest_of_many_matrices(size):
    """Wherever it stands, and where an earlier bound already covers it."""
    rng = np.random.default_rng(3)
    roots = rng.normal(size=(5, size, size)) + 1j * rng.normal(size=(5, size, size))
    grams = roots @ roots.conj().swapaxes(-1, -2)
    largest = np.linalg.eigvalsh(grams)[:, -1]
    for order in (np.argsort(largest), np.argsort(-largest)):
        tau = bounds._proved_eigenvalue(grams[order], 0.0)
        assert largest.max() <= tau <= largest.max() * (1 + 1e-9)
    assert bounds._proved_eigenvalue(grams, 2 * largest.max()) == 2 * largest.max()


def test_a_wrong_eigenvalue_is_not_believed(monkeypatch):
    """The solver only proposes: what it misses, the Cholesky decomposition finds."""
    operator = dense(6, 5, [2.0, 1.0, 0.5, 0.2, 0.1])
    truth = operator_norm(operator.kernel)
    honest = np.linalg.eigvalsh
    monkeypatch.setattr(np.linalg, "eigvalsh", lambda a: honest(a) * (1 - 1e-10))
    assert layer_upper_bound(operator) >= truth * (1 - ORACLE)


def test_fourier_bound_of_a_patch_embedding_is_its_matrix():
    geometry = Geometry((6, 6), (3, 3), (2, 4), strides=(3, 3), padding="VALID")
    truth = operator_norm(geometry.kernel().reshape(-1, 4))
    bound = layer_upper_bound(build(geometry), max_dense_size=0)
    assert truth * (1 - ORACLE) <= bound <= truth * (1.0 + 1e-6)


def test_large_convolutions_take_the_fourier_branch():
    operator = build(Geometry((9, 9), (3, 3), (1, 1)))
    tight = layer_upper_bound(operator)
    assert layer_upper_bound(operator, max_dense_size=81) == tight
    fourier = layer_upper_bound(operator, max_dense_size=80)
    assert tight < fourier == layer_upper_bound(operator, max_dense_size=0)


def test_chunks_of_frequencies_give_the_same_bound(monkeypatch):
    operator = build(Geometry((9, 9), (3, 3), (2, 3)))
    whole = layer_upper_bound(operator, max_dense_size=0)
    monkeypatch.setattr(symbols, "_CHUNK", 1)
    assert layer_upper_bound(operator, max_dense_size=0) == pytest.approx(whole, rel=1e-12)


# Scaling to a norm


@pytest.mark.parametrize("operator", [build(SAME), dense(4, 3, [2, 1, 1])], ids=["conv", "dense"])
def test_shrunk_kernels_are_within_coeff(operator):
    for coeff in (0.1, 0.9, 0.999):
        factor = np.float32(shrink_factor(operator, coeff))
        bound = layer_upper_bound(with_kernel(operator, np.asarray(operator.kernel) * factor))
        assert coeff * (1 - 1e-4) <= bound <= coeff
        shrunk = with_kernel(operator, np.asarray(operator.kernel) * factor)
        assert shrink_factor(shrunk, coeff) == 1.0
    assert shrink_factor(with_kernel(operator, operator.kernel * jnp.nan), 0.9) == 1.0


# Special values


BOUNDS = {
    "fourier": lambda operator: layer_upper_bound(operator, max_dense_size=0),
    "dense": layer_upper_bound,
    "gram": lambda operator: float(gram_upper_bound(operator)),
}


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("operator", [build(SAME), dense(4, 3, [1, 1, 1])], ids=["conv", "dense"])
def test_upper_bound_of_special_values(operator, name):
    def bound(value):
        kernel = np.array(operator.kernel)
        kernel.flat[1] = value
        return BOUNDS[name](with_kernel(operator, jnp.asarray(kernel)))

    assert math.isnan(bound(np.nan))
    assert not math.isfinite(bound(np.inf)) and not math.isfinite(bound(-np.inf))
    assert math.isfinite(bound(1e30)) and bound(1e30) >= 1e30
    zero = with_kernel(operator, jnp.zeros_like(operator.kernel))
    assert 0.0 <= BOUNDS[name](zero) <= 1e-30


def test_upper_bound_of_an_infinite_kernel_is_infinite_unless_it_holds_a_nan():
    assert layer_upper_bound(DenseOperator(np.array([[1.0, -np.inf]]))) == math.inf
    assert math.isnan(layer_upper_bound(DenseOperator(np.array([[np.nan, np.inf]]))))


@pytest.mark.parametrize("size", [1e-200, 1e200])
def test_upper_bound_of_a_kernel_whose_squares_leave_the_range(size):
    operator = DenseOperator(np.diag([3.0, 1.0]) * size)
    assert 3.0 * size <= layer_upper_bound(operator) <= 3.0 * size * (1 + 1e-12)


def test_upper_bound_that_overflows_is_infinite():
    assert layer_upper_bound(DenseOperator(np.full((2, 2), 1e308))) == math.inf


@pytest.mark.parametrize("bound", [layer_upper_bound, gram_upper_bound])
def test_upper_bound_of_an_unknown_operator_is_refused(bound):
    class Other:
        kernel = np.ones((2, 2))

    with pytest.raises(TypeError, match="Other"):
        bound(Other())
