"""Raw weights of branches that are normalised as a whole, and the matrices of their forms."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import iresnet_jax as ir
from iresnet_jax.monlip import hidden_form, scaled

#: Shape of the data, hidden channels, side of the kernels between them.
DENSE, ONE, TWO, WIDE = (
    ((6,), (9, 8, 7), 1),
    ((4, 5, 2), (6,), 1),
    ((4, 5, 2), (6, 5), 1),
    (
        (4, 5, 2),
        (3, 4, 2),
        3,
    ),
)
CASES = [DENSE, ONE, TWO, WIDE]
L = 0.9


def raw(case, seed=0):
    shape, widths, side = case
    rng = np.random.default_rng(seed)
    image = len(shape) == 3

    def operator(inputs, outputs, side):
        sides = (side, side) if image else ()
        kernel = jnp.asarray(rng.normal(size=(*sides, inputs, outputs)))
        return ir.conv_operator(kernel, shape[:2]) if image else ir.DenseOperator(kernel)

    inputs = tuple(operator(shape[-1], width, 3) for width in widths)
    hidden = tuple(operator(a, b, side) for a, b in itertools.pairwise(widths))
    return inputs, hidden


def dense_form(case, layers):
    shape, widths, _ = case
    flat, tree = ravel_pytree(tuple(jnp.zeros((*shape[:-1], width)) for width in widths))
    jacobian = jax.jacobian(lambda z: ravel_pytree(hidden_form(*layers, tree(z)))[0])
    return np.asarray(jax.jit(jacobian)(flat))


def circular_form(case, layers):
    """V + Vᵀ + 2SSᵀ with every convolution circular, as a matrix."""

    def circular(operator, x):
        kernel = operator.kernel if operator.kernel.ndim == 4 else operator.kernel[None, None]
        sides = [((k - 1) // 2, (k - 1) // 2) for k in kernel.shape[:2]]
        wrapped = jnp.pad(x, ((0, 0), *sides, (0, 0)), mode="wrap")
        names = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            wrapped, kernel, (1, 1), "VALID", dimension_numbers=names
        )

    shape, widths, _ = case
    inputs, hidden = layers
    flat, tree = ravel_pytree(tuple(jnp.zeros((1, *shape[:-1], width)) for width in widths))
    x = jnp.zeros((1, *shape))
    data = jax.jacobian(lambda x: ravel_pytree([circular(op, x) for op in inputs])[0])
    data = np.asarray(jax.jit(data)(x)).reshape(flat.size, -1)

    def along(z):
        parts = tree(z)
        moved = [circular(op, parts[k]) for k, op in enumerate(hidden)]
        return ravel_pytree([jnp.zeros_like(parts[0]), *moved])[0]

    v = np.asarray(jax.jit(jax.jacobian(along))(flat))
    return v + v.T + 2.0 * data @ data.T


@functools.cache
def normalised(case, activation="elu", seed=0, room=1e-7):
    with jax.enable_x64(True):
        layers = raw(case, seed)
        largest = np.linalg.eigvalsh(dense_form(case, layers))[-1]
        inputs, hidden = scaled(*layers, largest * (1.0 + room), L)
        rng = np.random.default_rng(seed + 1)
        biases = tuple(jnp.asarray(rng.normal(size=width)) for width in case[1])
        return ir.MonLip(inputs, hidden, biases, jnp.asarray(L), activation)


def jacobians(branch, case, count=12):
    shape, rng = case[0], np.random.default_rng(7)
    one = jax.jit(jax.jacfwd(lambda x: branch(x[None]).ravel()))
    scales = 10.0 ** rng.uniform(-1, 1, count)
    points = [jnp.asarray(rng.normal(size=shape) * scale) for scale in scales]
    return [np.asarray(one(x)).reshape(np.prod(shape), -1) for x in points]
