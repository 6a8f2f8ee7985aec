"""The layers that are tested, by name, and their variables."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from cases import quick_jit

from iresnet_jax import DenseOperator, conv_operator
from iresnet_jax.nn import SpectralConv, SpectralDense

KEY = jax.random.key(0)


def large(key, shape, dtype=jnp.float32):
    """Kernels whose norm is far above any coeff."""
    return jax.random.normal(key, shape, dtype)


def small(key, shape, dtype=jnp.float32):
    """Kernels whose norm is far below any coeff used here."""
    return 1e-3 * jax.random.normal(key, shape, dtype)


LAYERS = {
    "dense": (SpectralDense(5, kernel_init=large), (4,)),
    "conv": (SpectralConv(3, kernel_init=large), (5, 4, 2)),
    "conv-strided": (SpectralConv(2, (2, 3), strides=(2, 1), kernel_init=large), (4, 5, 3)),
    "conv-valid": (SpectralConv(2, padding="VALID", kernel_init=large), (4, 4, 2)),
    "conv-dilated": (SpectralConv(2, dilation=2, kernel_init=large), (5, 4, 2)),
    "conv-1x1": (SpectralConv(4, 1, kernel_init=large), (3, 3, 2)),
}


def operator_of(layer, kernel, shape):
    """The layer's linear map by a kernel, built from the layer's public settings."""
    if isinstance(layer, SpectralDense):
        return DenseOperator(kernel)
    return conv_operator(
        kernel,
        shape[:2],
        strides=layer.strides,
        padding=layer.padding,
        dilation=layer.dilation,
    )


@functools.cache
def initial(name, kernel_init):
    layer, shape = LAYERS[name]
    layer = layer.clone(kernel_init=kernel_init)
    return quick_jit(layer.init)(KEY, jnp.zeros((1, *shape)))


def initialised(name, kernel_init=large, **settings):
    """A layer, its variables after init (where coeff has no part), a batch, its sample's shape."""
    layer, shape = LAYERS[name]
    layer = layer.clone(kernel_init=kernel_init, **settings)
    variables = initial(name, kernel_init)
    if not layer.use_bias:
        variables = {**variables, "params": {"kernel": variables["params"]["kernel"]}}
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, *shape)), jnp.float32)
    return layer, variables, x, shape
