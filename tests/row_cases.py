"""Rows of layers, and the steepest slopes that they could have, by dense matrices in float64."""

import itertools
import math

import jax.numpy as jnp
import numpy as np

from iresnet_jax import DenseOperator, conv_operator
from iresnet_jax.affine_rows import AffineRow
from iresnet_jax.operators import to_matrix

MONOTONE, LIPSWISH, SINE = (0.0, 1.0), (-0.0908, 1.0), (-1.0, 1.0)


def dense(kernel):
    return DenseOperator(jnp.asarray(kernel, jnp.float32))


def dense_row(seed, sizes, slopes):
    rng = np.random.default_rng(seed)
    pairs = itertools.pairwise(sizes)
    operators = [dense(rng.normal(size=pair) / math.sqrt(pair[0])) for pair in pairs]
    return AffineRow(tuple(operators), slopes, (sizes[0],))


def conv_row(seed, image, sizes, taps, slopes, geometry=()):
    """Geometry: of each layer, options of its convolution."""
    rng = np.random.default_rng(seed)
    operators, at = [], image
    layers = itertools.zip_longest(taps, itertools.pairwise(sizes), geometry, fillvalue={})
    for size, (before, after), options in layers:
        kernel = rng.normal(size=(size, size, before, after)) / (size * math.sqrt(before))
        operators.append(conv_operator(jnp.asarray(kernel, jnp.float32), at, **options))
        at = getattr(operators[-1], "codomain_shape", (*at, 0))[:2] if size > 1 else at
    return AffineRow(tuple(operators), slopes, (*image, sizes[0]))


def weights_of(row):
    """Matrices of the whole image, in float64."""
    shape, matrices = row.shape, []
    for op in row.operators:
        matrix = np.asarray(to_matrix(op), np.float64)
        if isinstance(op, DenseOperator):
            matrix = np.kron(np.eye(math.prod(shape[:-1])), matrix)
            shape = (*shape[:-1], *op.codomain_shape)
        else:
            shape = op.codomain_shape
        matrices.append(matrix)
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


def norms_of(row):
    return [float(np.linalg.norm(matrix, 2)) for matrix in weights_of(row)]


ROWS = {
    "one hidden layer": dense_row(0, (5, 9, 5), (MONOTONE,)),
    "two": dense_row(1, (4, 10, 8, 4), (MONOTONE, MONOTONE)),
    "three": dense_row(2, (3, 6, 7, 5, 3), (MONOTONE,) * 3),
    "wide outside": dense_row(3, (12, 3, 4, 12), (MONOTONE, MONOTONE)),
    "negative slopes": dense_row(4, (4, 8, 8, 4), (LIPSWISH, LIPSWISH)),
    "sines": dense_row(5, (3, 8, 6, 3), (SINE, SINE)),
    "mixed, one scaled": dense_row(6, (4, 7, 6, 5, 4), (LIPSWISH, (0.0, 2.0), (-0.5, 0.25))),
    "small image": conv_row(7, (3, 4), (2, 6, 6, 2), (3, 1, 3), (MONOTONE, LIPSWISH)),
    "slopes below zero": dense_row(9, (4, 6, 5, 4), ((-1.0, 0.0), (-1.0, 0.25))),
    "another size inside": conv_row(
        14,
        (5, 5),
        (2, 5, 5, 2),
        (3, 1, 3),
        (MONOTONE, MONOTONE),
        ({"padding": "VALID"}, {}, {"padding": ((2, 2), (2, 2))}),
    ),
    "strides": conv_row(
        15, (4, 4), (2, 6, 6), (2, 3), (MONOTONE,), ({"strides": 2, "padding": "VALID"}, {})
    ),
    "small image, 3x3 inside": conv_row(8, (3, 3), (2, 4, 4, 2), (3, 3, 3), (MONOTONE,) * 2),
}
IMAGES = {
    "3x3, 1x1, 3x3": conv_row(10, (5, 6), (2, 5, 5, 2), (3, 1, 3), (MONOTONE, MONOTONE)),
    "negative slopes": conv_row(11, (5, 4), (2, 5, 4, 2), (3, 1, 3), (LIPSWISH, SINE)),
    "3x3 inside": conv_row(12, (5, 5), (2, 4, 4, 2), (3, 3, 1), (MONOTONE, MONOTONE)),
    "dilated, padded on one side": conv_row(
        16,
        (6, 6),
        (2, 4, 4, 2),
        (2, 1, 3),
        (MONOTONE, MONOTONE),
        ({"padding": ((1, 0), (0, 1))}, {}, {"dilation": 2}),
    ),
    "one hidden layer, even taps": conv_row(13, (6, 5), (2, 5, 2), (2, 4), (MONOTONE,)),
}
