"""Bounds on whole rows of layers, against the steepest slopes that they could have."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import rest_slow
from hypothesis import given, settings
from hypothesis import strategies as st
from row_cases import (
    IMAGES,
    LIPSWISH,
    MONOTONE,
    ROWS,
    conv_row,
    dense,
    dense_row,
    norms_of,
    product_of,
    steepest,
)
from scipy.optimize import minimize

from iresnet_jax import Affine, ConvOperator, conv_operator
from iresnet_jax.affine_rows import AffineRow, Frame, exponent_of, frame_of, matrices_of
from iresnet_jax.bounds import finite_cholesky
from iresnet_jax.lipsdp import proved_bound, row_bound
from iresnet_jax.lipsdp_search import bound_of, find_multipliers
from iresnet_jax.symbols import common_grid


@pytest.mark.parametrize(
    "name",
    rest_slow(ROWS, "one hidden layer", "three", "sines", "mixed, one scaled", "strides"),
)
def test_no_slopes_exceed_the_bound_and_it_is_below_the_product(name):
    row = ROWS[name]
    bound, product = row_bound(row), product_of(row)
    assert steepest(row) <= bound <= product * (1 + 1e-6)
    assert bound < 0.9 * product or name == "sines"  # where only the scales of channels gain


@pytest.mark.parametrize(
    "name", rest_slow(IMAGES, "negative slopes", "3x3 inside", "dilated, padded on one side")
)
def test_no_slopes_exceed_the_bound_by_frequencies(name):
    row = IMAGES[name]
    frame = frame_by_frequencies(row)
    bound = proved_bound(row, frame, find_multipliers(row, frame, norms_of(row)))
    assert steepest(row, starts=3) <= bound < 2.0 * product_of(row)


def frame_by_frequencies(row):
    return Frame(common_grid([op for op in row.operators if isinstance(op, ConvOperator)]))


random_branches = given(
    seed=st.integers(0, 2**31),
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    outer=st.integers(1, 5),
    lows=st.lists(st.sampled_from([0.0, 0.0, -0.1, -1.0]), min_size=3, max_size=3),
)


@settings(max_examples=5)
@random_branches
def test_no_slopes_of_random_branches_exceed_the_bound(seed, sizes, outer, lows):
    steepest_is_within_the_bound(seed, sizes, outer, lows)


@pytest.mark.slow
@settings(max_examples=60)
@random_branches
def test_no_slopes_of_many_random_branches_exceed_the_bound(seed, sizes, outer, lows):
    steepest_is_within_the_bound(seed, sizes, outer, lows)


def steepest_is_within_the_bound(seed, sizes, outer, lows):
    row = dense_row(seed, (outer, *sizes, outer), tuple((low, 1.0) for low in lows[: len(sizes)]))
    assert steepest(row, starts=2) <= row_bound(row) * (1 + 1e-12)


@pytest.mark.parametrize("name", ["two", "negative slopes", "small image"])
def test_whatever_the_multipliers_are_the_bound_holds(name):
    row = ROWS[name]
    frame, rng, finite = frame_of(row), np.random.default_rng(0), 0
    found = find_multipliers(row, frame, norms_of(row))
    for spread in (0.03, 0.3, 1.0, 3.0):
        scales = [d * np.exp(spread * rng.normal(size=d.shape)) for d in found]
        bound = proved_bound(row, frame, scales)
        assert bound >= steepest(row, starts=2)
        finite += bound < math.inf
    assert finite


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf, 1e-200, 1e200])
def test_multipliers_that_are_none_prove_nothing(bad):
    row = ROWS["two"]
    diagonals = find_multipliers(row, Frame(), norms_of(row))
    diagonals[0][0, 3] = bad
    assert proved_bound(row, Frame(), diagonals) >= steepest(row)


def test_the_multipliers_found_are_nearly_the_best():
    """Three layers of few channels: the same convex problem, solved by another method."""
    row = dense_row(20, (3, 4, 4, 3), (MONOTONE, MONOTONE))
    weights = [layer.values for layer in matrices_of(row, Frame())]
    factor = 2.0 ** sum(map(exponent_of, row.operators))

    def least(logs):
        try:
            found = bound_of([logs[None, :4], logs[None, 4:]], weights, row.slopes)
        except np.linalg.LinAlgError:
            return 1e3
        return 2.0 * factor * math.sqrt(np.linalg.eigvalsh(found.squares)[0, -1])

    starts = np.log(np.concatenate([d[0] for d in find_multipliers(row, Frame(), norms_of(row))]))
    best = least(starts)
    for _ in range(4):
        found = minimize(least, starts, method="Nelder-Mead", options={"maxfev": 4_000})
        best, starts = min(best, found.fun), found.x
    assert best * (1 - 1e-3) <= row_bound(row) <= best * 1.005


def test_a_scalar_branch_has_the_bound_of_its_product():
    row = AffineRow(tuple(dense([[w]]) for w in (0.8, -0.7, 0.9)), (MONOTONE, MONOTONE), (1,))
    assert row_bound(row) == pytest.approx(0.504, rel=1e-6)


def test_weights_of_any_size_are_bounded():
    row = ROWS["two"]
    factors = (1e12, 1e-20, 1e8)
    other = AffineRow(
        tuple(
            dense(np.asarray(op.kernel) * f) for op, f in zip(row.operators, factors, strict=True)
        ),
        row.slopes,
        row.shape,
    )
    assert row_bound(other) == pytest.approx(row_bound(row), rel=1e-4)
    zero = AffineRow((*row.operators[:2], dense(np.zeros((8, 4)))), row.slopes, row.shape)
    assert row_bound(zero) == 0.0


def test_channels_that_are_never_used_do_no_harm():
    row = ROWS["two"]
    kernels = [np.array(op.kernel) for op in row.operators]
    kernels[0][:, 2] = kernels[1][:, 5] = kernels[2][1] = 0.0
    other = AffineRow(tuple(map(dense, kernels)), row.slopes, row.shape)
    assert steepest(other) <= row_bound(other) < 0.9 * product_of(other)


@pytest.mark.parametrize("strides", [1, 2])
def test_geometry_that_has_no_frame_falls_back_to_the_product(strides):
    """A hidden image of another size, too large for matrices."""
    rng = np.random.default_rng(0)
    first = conv_operator(
        jnp.asarray(rng.normal(size=(3, 3, 2, 40)), jnp.float32),
        (16, 16),
        strides=strides,
        padding="VALID",
    )
    second = conv_operator(
        jnp.asarray(rng.normal(size=(1, 1, 40, 3)), jnp.float32), first.codomain_shape[:2]
    )
    row = AffineRow((first, second), (MONOTONE,), (16, 16, 2))
    assert frame_of(row) is None
    assert row_bound(row) == pytest.approx(
        math.prod(Affine(op).lipschitz_bound() for op in row.operators), rel=1e-9
    )


def test_frames_of_an_image_agree():
    """By pixel, and with one matrix for all of them."""
    row = conv_row(30, (2, 3), (2, 4, 4, 2), (3, 1, 3), (LIPSWISH, MONOTONE))
    frame = frame_of(row)
    assert frame == Frame(pixels=6)
    diagonals = find_multipliers(row, frame, norms_of(row))
    whole = proved_bound(row, Frame(), [d.reshape(1, -1) for d in diagonals])
    assert proved_bound(row, frame, diagonals) == pytest.approx(whole, rel=1e-6)


def test_decompositions_of_what_is_not_finite_prove_nothing():
    for bad in (math.nan, math.inf):
        for size in (1, 3, 70):
            matrix = np.eye(size)
            matrix[-1, 0] = matrix[0, -1] = bad
            with pytest.raises(np.linalg.LinAlgError):
                finite_cholesky(matrix[None])


def test_rows_that_would_take_too_long_keep_the_product():
    kernel = jnp.zeros((3, 3, 200, 200)).at[1, 1].set(jnp.eye(200) * 0.5)
    inside = conv_operator(kernel, (16, 16))
    row = AffineRow((inside,) * 3, (MONOTONE,) * 2, (16, 16, 200))
    assert frame_of(row) is None
