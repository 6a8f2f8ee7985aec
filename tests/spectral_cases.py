"""Operators of every shape, and their power iterations, compiled once."""

from functools import partial

import jax
import jax.numpy as jnp
from helpers import Geometry, matrix_with_singular_values

from iresnet_jax.operators import DenseOperator, conv_operator
from iresnet_jax.spectral import (
    init_singular_vectors,
    power_iteration_to_tolerance,
    sigma_estimate,
)

SAME = Geometry((6, 5), (3, 3), (2, 3))
CASES = [
    SAME,
    Geometry((6, 6), (3, 3), (3, 2), padding="VALID"),
    Geometry((7, 6), (3, 3), (2, 3), strides=(2, 2)),
    Geometry((2, 2), (5, 4), (2, 1), strides=(2, 2), padding=((3, 3), (2, 4))),
    Geometry((4, 4), (1, 1), (3, 4)),
    Geometry((4, 4), (1, 1), (3, 2), strides=(2, 2)),
]


def build(geometry, kernel=None):
    kernel = geometry.kernel() if kernel is None else kernel
    return conv_operator(jnp.asarray(kernel), geometry.image, **geometry.options)


def dense(rows, columns, values, dtype=jnp.float32):
    return DenseOperator(jnp.asarray(matrix_with_singular_values(0, rows, columns, values), dtype))


@jax.jit
def first_estimate(operator):
    return sigma_estimate(operator, start(operator))


@jax.jit
def start(operator):
    return init_singular_vectors(operator)


@partial(jax.jit, static_argnames=("rtol", "max_steps"))
def run(operator, rtol, max_steps):
    vectors, info = power_iteration_to_tolerance(
        operator, start(operator), rtol=rtol, max_steps=max_steps
    )
    return vectors, info, sigma_estimate(operator, vectors)


def converge(operator, rtol=1e-5, max_steps=5000):
    vectors, info, sigma = run(operator, rtol, max_steps)
    return vectors, info, float(sigma)
