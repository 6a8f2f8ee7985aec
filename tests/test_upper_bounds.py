"""Rigorous upper bounds of operator norms against the dense SVD."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    GEOMETRIES,
    Geometry,
    dense_matrix,
    matrix_with_singular_values,
    operator_norm,
    orthogonal,
)

from iresnet_jax import bounds
from iresnet_jax.bounds import gram_upper_bound, layer_upper_bound, shrink_factor
from iresnet_jax.operators import DenseOperator, conv_operator, with_kernel

pytestmark = pytest.mark.usefixtures("no_rank_promotion")

SAME = Geometry((6, 5), (3, 3), (2, 3))

# A float64 SVD is off by far less than this, relative to the norm.
ORACLE = 1e-12


def build(geometry, kernel=None, asarray=jnp.asarray):
    kernel = geometry.kernel() if kernel is None else kernel
    return conv_operator(asarray(kernel), geometry.image, **geometry.options)


def dense(rows, columns, values, dtype=jnp.float32):
    return DenseOperator(jnp.asarray(matrix_with_singular_values(0, rows, columns, values), dtype))


def random_geometry(rng):
    """A geometry with at least one output pixel, of any kind that the library takes."""
    while True:
        image, size = rng.integers(1, 9, 2), rng.integers(1, 6, 2)
        channels, strides, dilation = (rng.integers(1, 4, 2) for _ in range(3))
        padding = rng.choice(["SAME", "VALID", "explicit"])
        if padding == "explicit":
            padding = tuple(map(tuple, rng.integers(0, 6, (2, 2)).tolist()))
        parts = (tuple(part.tolist()) for part in (image, size, channels, strides))
        padding = padding if isinstance(padding, tuple) else str(padding)
        geometry = Geometry(*parts, padding, tuple(dilation.tolist()))
        pads = ((0, 0), (0, 0)) if isinstance(padding, str) else padding
        fits = [n + sum(p) >= k for n, k, p in zip(image, geometry.window, pads, strict=True)]
        if padding == "SAME" or all(fits):
            return geometry


def random_kernels(rng, shape, count):
    """Normal, constant, of alternating sign, or a single tap: the last three are extreme."""
    tap = np.zeros(shape)
    tap[tuple(rng.integers(shape))] = rng.normal()
    extreme = [np.ones(shape), (-1.0) ** np.indices(shape)[:2].sum(0), tap]
    return np.stack([*rng.normal(size=(count - 3, *shape)), *extreme]).astype(np.float32)


def matrices(geometry, kernels):
    """The dense matrices of many kernels, from that of the kernel's basis."""
    shape = geometry.kernel_shape
    basis = [dense_matrix(geometry, e.reshape(shape)) for e in np.eye(math.prod(shape))]
    flat = np.asarray(kernels, np.float64).reshape(len(kernels), -1)
    return np.tensordot(flat, np.stack(basis), axes=1)


def norms(geometry, kernels):
    return np.linalg.norm(matrices(geometry, kernels), 2, axis=(-2, -1))


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


# On the host


@pytest.mark.parametrize("max_dense_size", [0, 1024], ids=["fourier", "dense"])
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
    monkeypatch.setattr(bounds, "_CHUNK", 1)
    assert layer_upper_bound(operator, max_dense_size=0) == pytest.approx(whole, rel=1e-12)


# In a trace


@pytest.mark.parametrize("max_dense_size", [0, 256], ids=["fourier", "dense"])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_gram_bound_is_above_the_norm(geometry, max_dense_size):
    kernels = random_kernels(np.random.default_rng(4), geometry.kernel_shape, 20)

    @jax.jit
    @jax.vmap
    def bound(kernel):
        return gram_upper_bound(build(geometry, kernel), max_dense_size=max_dense_size)

    got, truth = np.asarray(bound(kernels), np.float64), norms(geometry, kernels)
    assert (got >= truth).all()
    if max_dense_size:
        assert (got <= truth * 1.02 + 1e-6).all()


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
        assert tight * (1 - 1e-9) <= float(gram_upper_bound(operator, 10)) <= 1.003 * tight


@pytest.mark.parametrize("values", [[1.0] * 30, [1.0] + [0.999] * 29, [1.0] + [1e-4] * 29])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_gram_bound_covers_its_rounding(values, size):
    operator = dense(30, 30, size * np.array(values))
    truth = operator_norm(operator.kernel)
    assert truth <= float(gram_upper_bound(operator, 12)) <= 1.005 * truth


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


@pytest.mark.parametrize("iterations", [0, 1, 6, 12])
@pytest.mark.parametrize("shape", [(1, 3), (2, 2), (5, 5), (8, 13), (30, 30), (64, 40)])
def test_gram_bound_is_above_the_norm_of_thousands_of_matrices(shape, iterations):
    rng = np.random.default_rng(shape)
    kernels = np.array([m for _ in range(12) for m in matrix_of_each_kind(rng, *shape)], np.float32)
    truth = np.linalg.svd(kernels.astype(np.float64), compute_uv=False)[:, 0]
    bounds_of = jax.jit(jax.vmap(lambda k: gram_upper_bound(DenseOperator(k), iterations)))
    found = np.asarray(bounds_of(kernels), np.float64)
    assert (found >= truth * (1 - ORACLE)).all(), (found / truth).min()
    if iterations == 12:
        assert (found <= truth * 1.003).all(), (found / truth).max()


@pytest.mark.parametrize(("size", "above"), [(64, 1.01), (256, 1.015), (512, 1.02), (1024, 1.03)])
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
    slope = jax.grad(lambda k: gram_upper_bound(DenseOperator(k)))(jnp.asarray(matrix, jnp.float32))
    np.testing.assert_allclose(slope, np.outer(u[:, 0], vh[0]), atol=1e-3)
    zero = jax.grad(lambda k: gram_upper_bound(build(SAME, k)))(jnp.zeros(SAME.kernel_shape))
    assert np.isfinite(zero).all()


def test_gram_bound_counts_as_many_iterations_as_there_can_be():
    with pytest.raises(ValueError, match="num_iterations of a Gram iteration must be ≥ 0; got -1"):
        gram_upper_bound(build(SAME), -1)


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
