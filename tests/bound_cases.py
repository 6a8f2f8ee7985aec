"""Kernels of every geometry and their norms, for rigorous bounds on these."""

import math

import jax.numpy as jnp
import numpy as np
from helpers import Geometry, dense_matrix, matrix_with_singular_values

from iresnet_jax.operators import DenseOperator, conv_operator

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
