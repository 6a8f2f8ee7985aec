"""Bounds on whole branches, against the steepest slopes that a branch could have."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from iresnet_jax import Activation, Affine, DenseOperator, Sequential, conv_operator
from iresnet_jax.affine_rows import AffineRow, Frame, frame_of, split
from iresnet_jax.certificates import certify_branch
from iresnet_jax.lipsdp import proved_bound, row_bound, whole_bound
from iresnet_jax.lipsdp_search import bound_of, find_multipliers
from iresnet_jax.operators import to_matrix

MONOTONE, LIPSWISH, SINE = (0.0, 1.0), (-0.0908, 1.0), (-1.0, 1.0)


def dense(kernel):
    return DenseOperator(jnp.asarray(kernel, jnp.float32))


def dense_row(seed, sizes, slopes):
    rng = np.random.default_rng(seed)
    pairs = itertools.pairwise(sizes)
    operators = [dense(rng.normal(size=pair) / math.sqrt(pair[0])) for pair in pairs]
    return AffineRow(tuple(operators), slopes, (sizes[0],))


def conv_row(seed, image, sizes, taps, slopes):
    rng = np.random.default_rng(seed)
    operators = []
    for size, (before, after) in zip(taps, itertools.pairwise(sizes), strict=True):
        kernel = rng.normal(size=(size, size, before, after)) / (size * math.sqrt(before))
        operators.append(conv_operator(jnp.asarray(kernel, jnp.float32), image))
    return AffineRow(tuple(operators), slopes, (*image, sizes[0]))


def weights_of(row):
    """Matrices of the whole image, in float64."""
    shape, matrices = row.shape, []
    for op in row.operators:
        matrix = np.asarray(to_matrix(op), np.float64)
        pixels = math.prod(shape[:-1]) if isinstance(op, DenseOperator) else 1
        matrices.append(np.kron(np.eye(pixels), matrix))
        shape = (*shape[:-1], op.codomain_shape[-1])
    return matrices


def steepest(row, *, starts=6, seed=0):
    """The largest ‖W_m Φ_{m−1} … Φ_1 W_1‖ found, Φ_k diagonal with entries in its slopes.

    Such a Jacobian is no more than a bound on increments allows, and activations of those slopes
    have it. Ascent one slope at a time: the gain is convex in each.
    """
    rng, weights = np.random.default_rng(seed), weights_of(row)
    best = 0.0
    for _ in range(starts):
        slopes = [
            rng.choice(pair, size=w.shape[0])
            for pair, w in zip(row.slopes, weights[:-1], strict=True)
        ]
        last = 0.0
        while True:
            left, _, right = np.linalg.svd(jacobian(weights, slopes))
            for k in range(len(slopes)):
                forward = jacobian(weights[: k + 1], slopes[:k]) @ right[0]
                backward = left[:, 0] @ jacobian(weights[k + 1 :], slopes[k + 1 :])
                slopes[k] = np.where(forward * backward > 0, row.slopes[k][1], row.slopes[k][0])
                left, sizes, right = np.linalg.svd(jacobian(weights, slopes))
            if sizes[0] <= last * (1 + 1e-9):
                break
            last = sizes[0]
        best = max(best, last)
    return best


def jacobian(weights, slopes):
    out = weights[0]
    for slope, weight in zip(slopes, weights[1:], strict=True):
        out = weight @ (slope[:, None] * out)
    return out


def product_of(row):
    norms = [np.linalg.norm(matrix, 2) for matrix in weights_of(row)]
    return math.prod(norms) * math.prod(max(-low, high) for low, high in row.slopes)


ROWS = {
    "one hidden layer": dense_row(0, (5, 9, 5), (MONOTONE,)),
    "two": dense_row(1, (4, 10, 8, 4), (MONOTONE, MONOTONE)),
    "three": dense_row(2, (3, 6, 7, 5, 3), (MONOTONE,) * 3),
    "wide outside": dense_row(3, (12, 3, 4, 12), (MONOTONE, MONOTONE)),
    "negative slopes": dense_row(4, (4, 8, 8, 4), (LIPSWISH, LIPSWISH)),
    "sines": dense_row(5, (3, 8, 6, 3), (SINE, SINE)),
    "mixed, one scaled": dense_row(6, (4, 7, 6, 5, 4), (LIPSWISH, (0.0, 2.0), (-0.5, 0.25))),
    "small image": conv_row(7, (3, 4), (2, 6, 6, 2), (3, 1, 3), (MONOTONE, LIPSWISH)),
    "small image, 3x3 inside": conv_row(8, (3, 3), (2, 4, 4, 2), (3, 3, 3), (MONOTONE,) * 2),
}
IMAGES = {
    "3x3, 1x1, 3x3": conv_row(10, (5, 6), (2, 5, 5, 2), (3, 1, 3), (MONOTONE, MONOTONE)),
    "negative slopes": conv_row(11, (5, 4), (2, 5, 4, 2), (3, 1, 3), (LIPSWISH, SINE)),
    "3x3 inside": conv_row(12, (5, 5), (2, 4, 4, 2), (3, 3, 1), (MONOTONE, MONOTONE)),
    "one hidden layer, even taps": conv_row(13, (6, 5), (2, 5, 2), (2, 4), (MONOTONE,)),
}


@pytest.mark.parametrize("name", ROWS)
def test_no_slopes_exceed_the_bound_and_it_is_below_the_product(name):
    row = ROWS[name]
    bound, product = row_bound(row), product_of(row)
    assert steepest(row) <= bound <= product * (1 + 1e-6)
    assert bound < 0.9 * product or name == "sines"  # where only the scales of channels gain


@pytest.mark.parametrize("name", IMAGES)
def test_no_slopes_exceed_the_bound_by_frequencies(name):
    row = IMAGES[name]
    frame = frame_by_frequencies(row)
    bound = proved_bound(row, frame, find_multipliers(row, frame, norms_of(row)))
    assert steepest(row, starts=3) <= bound < 2.0 * product_of(row)


def frame_by_frequencies(row):
    pads = [
        max(max(op.padding[axis]) for op in row.operators if hasattr(op, "padding"))
        for axis in (0, 1)
    ]
    return Frame((row.shape[0] + pads[0], row.shape[1] + pads[1]))


def norms_of(row):
    return [float(np.linalg.norm(matrix, 2)) for matrix in weights_of(row)]


@given(
    seed=st.integers(0, 2**31),
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    outer=st.integers(1, 5),
    lows=st.lists(st.sampled_from([0.0, 0.0, -0.1, -1.0]), min_size=3, max_size=3),
)
def test_no_slopes_of_random_branches_exceed_the_bound(seed, sizes, outer, lows):
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
    scales = find_multipliers(row, Frame(), norms_of(row))
    scales[0][0, 3] = bad
    assert proved_bound(row, Frame(), scales) >= steepest(row)


def test_the_multipliers_found_are_nearly_the_best():
    """Three layers of few channels: the same convex problem, solved by another method."""
    row = dense_row(20, (3, 4, 4, 3), (MONOTONE, MONOTONE))
    weights = [matrix[None, None] for matrix in weights_of(row)]

    def least(logs):
        try:
            found = bound_of([logs[None, :4], logs[None, 4:]], weights, row.slopes)
        except np.linalg.LinAlgError:
            return 1e3
        return 2.0 * math.sqrt(np.linalg.eigvalsh(found.squares)[0, -1])

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


# Whole branches


def layer(op):
    return Affine(op)


def branch_of(row, names):
    stages = [layer(row.operators[0])]
    for name, op in zip(names, row.operators[1:], strict=True):
        stages += [Activation(name), layer(op)]
    return Sequential(tuple(stages))


def test_a_branch_is_split_into_rows_and_the_rest():
    row = ROWS["two"]
    inner = branch_of(row, ("elu", "lipswish"))
    branch = Sequential(
        (
            Activation("sin"),
            inner,
            Activation("tanh"),
            Halved(),
            Activation("elu"),
            layer(dense(np.eye(4) * 0.3)),
        )
    )
    (found,), rest = split(branch, (4,))
    assert found.slopes == (MONOTONE, LIPSWISH) and len(found.operators) == 3
    assert rest == pytest.approx(0.15, rel=1e-6)
    assert whole_bound(branch, (4,)) == pytest.approx(0.15 * row_bound(found), rel=1e-6)
    assert whole_bound(branch, (4,)) < 0.9 * branch.lipschitz_bound()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Halved:
    def __call__(self, x):
        return 0.5 * x

    def lipschitz_bound(self):
        return 0.5


def test_activations_in_a_row_have_the_slopes_of_their_composition():
    row = ROWS["one hidden layer"]
    first, second = map(layer, row.operators)
    branch = Sequential((first, Activation("sin"), Activation("lipswish"), second))
    (found,), _ = split(branch, (5,))
    assert found.slopes == ((-1.0, 1.0),)
    branch = Sequential((first, second))
    (found,), _ = split(branch, (5,))
    assert found.slopes == (MONOTONE,)  # the identity's, and 0


def test_the_certificate_has_both_bounds_and_stands_by_the_better_one():
    row = ROWS["two"]
    scaled = [
        dense(np.asarray(op.kernel) * 0.95 / n)
        for op, n in zip(row.operators, norms_of(row), strict=True)
    ]
    branch = branch_of(AffineRow(tuple(scaled), row.slopes, row.shape), ("elu", "tanh"))
    found = certify_branch(branch, "it", (4,))
    assert found.product == pytest.approx(0.95**3, rel=1e-5) and found.lipschitz < 0.8
    x = jnp.asarray(np.random.default_rng(1).normal(size=(64, 4)), jnp.float32)
    slopes = jax.vmap(jax.jacobian(lambda x: branch(x[None])[0]))(x)
    assert np.linalg.norm(np.asarray(slopes, np.float64), 2, axis=(1, 2)).max() < found.lipschitz


def test_a_branch_whose_product_is_above_one_can_be_certified():
    row = ROWS["two"]
    whole = row_bound(row)
    assert whole < 0.9 * product_of(row)
    first = dense(np.asarray(row.operators[0].kernel) * 0.95 / whole)
    branch = branch_of(
        AffineRow((first, *row.operators[1:]), row.slopes, row.shape), ("elu", "elu")
    )
    found = certify_branch(branch, "it", (4,))
    assert found.product > 1.05 and not found.problem and found.lipschitz < 0.96


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_of_weights_that_are_not_finite_nothing_is_certified(bad):
    row = ROWS["two"]
    kernel = np.array(row.operators[1].kernel)
    kernel[2, 3] = bad
    operators = (row.operators[0], dense(kernel), row.operators[2])
    found = certify_branch(
        branch_of(AffineRow(operators, row.slopes, row.shape), ("elu", "elu")), "it", (4,)
    )
    assert "not finite" in found.problem and not found.lipschitz < 1.0


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
