"""One table of bijections: transforms, a residual block, and what can be composed of them."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from helpers import Geometry, dense_matrix, matrix_with_singular_values, operator_norm

from iresnet_jax import (
    Activation,
    ActNorm,
    Affine,
    Center,
    Chain,
    DenseOperator,
    Invertible1x1,
    Logit,
    Monotone,
    Residual,
    Sequential,
    Squeeze,
    Stack,
    conv_operator,
)
from iresnet_jax.bijections import Bijection, branch_bounds


class Case(NamedTuple):
    """A bijection in float32, the shape of one input, and whether it takes data in [0, 1]."""

    bijection: Bijection
    shape: tuple[int, ...]
    unit_interval: bool = False

    def draw(self, batch, seed=0):
        """A batch of data, as NumPy in float32."""
        rng = np.random.default_rng(seed)
        draw = rng.uniform if self.unit_interval else rng.normal
        return draw(size=(batch, *self.shape)).astype(np.float32)

    def bounded(self):
        """The bijection with its branches' bounds attached, and its certificate."""
        certificate = self.bijection.certify("it", self.shape)
        bounds = branch_bounds(certificate.branches)
        return self.bijection.with_bounds(bounds), certificate


def actnorm(seed, channels=3):
    rng = np.random.default_rng(seed)
    log_scale, shift = 0.4 * rng.normal(size=channels), rng.normal(size=channels)
    return ActNorm(jnp.asarray(log_scale, jnp.float32), jnp.asarray(shift, jnp.float32))


def mixing(seed, channels=3):
    """Of condition 4."""
    rng = np.random.default_rng(seed)
    values = np.geomspace(0.5, 2.0, channels)
    kernel = matrix_with_singular_values(rng, channels, channels, values)
    return Invertible1x1(jnp.asarray(kernel, jnp.float32))


def residual(seed, dim=3, lipschitz=0.7):
    """x + g(x) on vectors, two dense layers whose norms have the product ``lipschitz``."""
    rng = np.random.default_rng(seed)
    values = np.sqrt(lipschitz) * np.linspace(1.0, 0.4, dim)
    shapes = (dim, dim + 1), (dim + 1, dim)
    first, second = (dense(matrix_with_singular_values(rng, *s, values), rng) for s in shapes)
    return Residual(Sequential((first, Activation("tanh"), second)))


def dense(kernel, rng):
    bias = 0.3 * rng.normal(size=kernel.shape[1])
    return Affine(DenseOperator(jnp.asarray(kernel, jnp.float32)), jnp.asarray(bias, jnp.float32))


def image_residual(seed, image, channels, lipschitz=0.6):
    """x + g(x) on images: a 3×3 convolution after an ELU."""
    geometry = Geometry(image, (3, 3), (channels, channels))
    kernel = geometry.kernel(seed, np.float64)
    kernel *= lipschitz / operator_norm(dense_matrix(geometry, kernel))
    operator = conv_operator(jnp.asarray(kernel, jnp.float32), image)
    return Residual(Sequential((Activation("elu"), Affine(operator))))


def monotone(seed):
    return Monotone(residual(seed).branch)


def stacked(*blocks, **settings):
    """Equal blocks in a row, run by a scan."""
    leaves = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
    return Stack(leaves, len(blocks), **settings)


def block(seed):
    return Chain((actnorm(seed), residual(seed)))


def image_block(seed, image, channels):
    return Chain((actnorm(seed, channels), image_residual(seed, image, channels)))


def image_stack(depth, image, channels):
    return stacked(*(image_block(seed, image, channels) for seed in range(depth)))


@functools.cache
def cases():
    return {
        "center": Case(Center(), (3,), True),
        "logit": Case(Logit(), (2, 2, 1), True),
        "logit of its own alpha": Case(Logit(0.2), (3,), True),
        "squeeze": Case(Squeeze(), (2, 4, 1)),
        "actnorm of vectors": Case(actnorm(0), (3,)),
        "actnorm of images": Case(actnorm(1), (2, 2, 3)),
        "mixing of vectors": Case(mixing(0), (3,)),
        "mixing of images": Case(mixing(1), (2, 2, 3)),
        "residual": Case(residual(0), (3,)),
        "residual of images": Case(image_residual(0, (3, 2), 2), (3, 2, 2)),
        "monotone": Case(monotone(2), (3,)),
        "monotone of images": Case(Monotone(image_residual(2, (3, 2), 2).branch), (3, 2, 2)),
        "stack of monotones": Case(
            stacked(*(Chain((actnorm(seed), monotone(seed))) for seed in range(2))), (3,)
        ),
        "empty chain": Case(Chain(()), (3,)),
        "chain": Case(Chain((residual(0), actnorm(0), residual(1), actnorm(1))), (3,)),
        "nested chain": Case(Chain((Chain((residual(0), block(1))), Chain((block(2),)))), (3,)),
        "stack of residuals": Case(stacked(residual(0), residual(1)), (3,)),
        "stack of transforms": Case(stacked(actnorm(0), actnorm(1)), (3,)),
        "stack with mixing": Case(
            stacked(*(Chain((actnorm(i), mixing(i), residual(i))) for i in range(2))), (3,)
        ),
        "stack of chains": Case(stacked(block(0), block(1), block(2)), (3,)),
        "stack that recomputes": Case(stacked(block(0), block(1), remat=True), (3,)),
        "stack of stacks": Case(
            stacked(*(stacked(*(block(10 * i + j) for j in range(2))) for i in range(3))), (3,)
        ),
        "chain of squeeze and stacks": Case(
            Chain(
                (
                    *(Center(), Squeeze(), image_stack(2, (2, 4), 4)),
                    *(Squeeze(), image_stack(1, (1, 2), 16)),
                )
            ),
            (4, 8, 1),
            True,
        ),
        "logit after a squeeze": Case(
            Chain((Squeeze(), Logit(), image_residual(1, (1, 2), 4))), (2, 4, 1), True
        ),
    }


NAMES = list(cases())
BRANCHED = [name for name, case in cases().items() if case.bijection.num_branches]


@functools.cache
def bounded(name):
    """A case's bijection with its branches' bounds attached, and its certificate."""
    return cases()[name].bounded()
