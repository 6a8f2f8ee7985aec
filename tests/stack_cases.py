"""The stacks that are tested, by name, and what is made of their modules."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from cases import quick_jit

from iresnet_jax.nn import Stack as StackModule
from iresnet_jax.nn import bottleneck_branch, dense_branch

KEY = jax.random.key(0)
SHAPE = (4, 4, 2)

STACKS = {
    "dense": (StackModule(dense_branch(3, (4,)), 3), (3,)),
    "conv": (StackModule(bottleneck_branch(2, 3, activate_first=False), 2), SHAPE),
}


def draw(seed, shape, scale=1.0):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), jnp.float32)


def initialised(module, x):
    """Variables of a stack, its ActNorm from the batch."""
    return quick_jit(module.init)(KEY, x)


def blocks_of(module, variables, x):
    """The stack as a pytree."""
    return module.apply(variables, x.shape[1:], method="pure")


@functools.cache
def built(name):
    """A stack with its variables, its blocks, and the batch that it was initialised from."""
    module, shape = STACKS[name]
    x = 3.0 * draw(1, (32, *shape)) - 2.0
    variables = initialised(module, x)
    return module, variables, blocks_of(module, variables, x), x
