"""Oracles: dense matrices by definition, full Jacobians, finite differences, known spectra.

Everything that is called an oracle here is NumPy in float64 and shares no code with the library.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iresnet_jax.convergence import UnconvergedWarning


class Geometry(NamedTuple):
    """A convolution without its kernel's values."""

    image: tuple[int, int]
    size: tuple[int, int]
    channels: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    padding: str | tuple[tuple[int, int], tuple[int, int]] = "SAME"
    dilation: tuple[int, int] = (1, 1)

    def __str__(self):
        return "-".join(str(part).replace(" ", "") for part in self)

    @property
    def kernel_shape(self):
        return (*self.size, *self.channels)

    @property
    def window(self):
        """How far a dilated kernel reaches, (height, width)."""
        return tuple((k - 1) * d + 1 for k, d in zip(self.size, self.dilation, strict=True))

    @property
    def options(self):
        """What a convolution on an image takes beside its kernel."""
        return {"strides": self.strides, "padding": self.padding, "dilation": self.dilation}

    def kernel(self, seed=0, dtype=np.float32):
        return np.random.default_rng(seed).normal(size=self.kernel_shape).astype(dtype)


#: Odd, even and flat kernels; all paddings; strides; dilations; kernels larger than the image;
#: outputs that see nothing but padding.
GEOMETRIES = [
    Geometry((5, 5), (3, 3), (2, 3)),
    Geometry((5, 4), (3, 3), (3, 2)),
    Geometry((5, 5), (2, 2), (2, 2)),
    Geometry((4, 6), (4, 1), (2, 1)),
    Geometry((6, 6), (3, 3), (1, 2), padding="VALID"),
    Geometry((7, 6), (3, 2), (2, 1), strides=(2, 1)),
    Geometry((6, 7), (3, 3), (2, 3), strides=(2, 2)),
    Geometry((7, 7), (2, 3), (1, 1), strides=(3, 2), padding="VALID"),
    Geometry((4, 4), (3, 3), (2, 2), padding=((0, 2), (1, 0))),
    Geometry((3, 3), (3, 3), (2, 1), strides=(2, 3), padding=((2, 1), (3, 4))),
    Geometry((2, 3), (5, 5), (1, 2)),
    Geometry((2, 2), (5, 4), (2, 1), strides=(2, 2), padding=((3, 3), (2, 4))),
    Geometry((1, 1), (3, 3), (3, 2)),
    Geometry((1, 1), (4, 4), (1, 1), padding=((2, 1), (1, 2))),
    Geometry((1, 1), (3, 3), (1, 2), strides=(2, 2)),
    Geometry((4, 4), (1, 1), (2, 3), strides=(2, 2)),
    Geometry((1, 2), (1, 1), (1, 1), strides=(2, 2), padding=((1, 0), (1, 0))),
    Geometry((3, 2), (2, 2), (1, 1), padding=((4, 4), (5, 3))),
    Geometry((6, 5), (3, 3), (2, 1), dilation=(2, 2)),
    Geometry((7, 7), (2, 3), (1, 2), strides=(2, 3), dilation=(3, 1)),
    Geometry((8, 7), (3, 2), (1, 2), padding="VALID", dilation=(3, 4)),
    Geometry((3, 3), (3, 3), (1, 1), strides=(1, 2), padding=((4, 3), (5, 5)), dilation=(3, 4)),
]


def rest_slow(cases, *telling):
    """Cases as parameters of a test, all but the most telling ones marked slow."""
    assert all(case in cases for case in telling)
    return [
        case if case in telling else pytest.param(case, marks=pytest.mark.slow) for case in cases
    ]


#: Of each kind one: odd, even, strided, padded by hand, larger than the image, dilated.
FEW_GEOMETRIES = [GEOMETRIES[i] for i in (0, 2, 6, 8, 10, 18, 21)]


def explicit_padding(geometry: Geometry):
    """((top, bottom), (left, right)), from TensorFlow's definition of SAME."""
    if geometry.padding == "VALID":
        return ((0, 0), (0, 0))
    if geometry.padding != "SAME":
        return geometry.padding
    pads = []
    for n, k, s in zip(geometry.image, geometry.window, geometry.strides, strict=True):
        total = max((-(-n // s) - 1) * s + k - n, 0)
        pads.append((total // 2, total - total // 2))
    return tuple(pads)


def output_shape(geometry: Geometry):
    """(height, width, channels) of the output, by counting the windows that fit."""
    pads = explicit_padding(geometry)
    sizes = zip(geometry.image, geometry.window, geometry.strides, pads, strict=True)
    spatial = (len(range(0, n + sum(pad) - k + 1, s)) for n, k, s, pad in sizes)
    return (*spatial, geometry.channels[1])


def dense_matrix(geometry: Geometry, kernel) -> np.ndarray:
    """The convolution's matrix [codomain size, domain size], entry by entry from its definition."""
    kernel = np.asarray(kernel, np.float64)
    (top, _), (left, _) = explicit_padding(geometry)
    (height, width), (down, across) = geometry.image, geometry.strides
    (dilate_down, dilate_across) = geometry.dilation
    rows, columns, channels_out = output_shape(geometry)
    matrix = np.zeros((rows, columns, channels_out, height, width, geometry.channels[0]))
    window = list(np.ndindex(*geometry.size))
    for (p, q), (i, j) in itertools.product(np.ndindex(rows, columns), window):
        y, x = p * down + i * dilate_down - top, q * across + j * dilate_across - left
        if 0 <= y < height and 0 <= x < width:
            matrix[p, q, :, y, x, :] += kernel[i, j].T
    return matrix.reshape(rows * columns * channels_out, -1)


def operator_norm(matrix) -> float:
    """The largest singular value, in float64."""
    return float(np.linalg.norm(np.asarray(matrix, np.float64), 2))


def orthogonal(rng: np.random.Generator, size: int) -> np.ndarray:
    return np.linalg.qr(rng.normal(size=(size, size)))[0]


def matrix_with_singular_values(seed, rows: int, columns: int, values) -> np.ndarray:
    """A dense matrix [rows, columns] with these singular values and random vectors."""
    rng = np.random.default_rng(seed)
    diagonal = np.zeros((rows, columns))
    np.fill_diagonal(diagonal, values)
    return orthogonal(rng, rows) @ diagonal @ orthogonal(rng, columns)


def matrix_with_eigenvalues(seed, values) -> np.ndarray:
    """A symmetric matrix with these eigenvalues: its norm is the largest of their sizes."""
    basis = orthogonal(np.random.default_rng(seed), len(values))
    return basis @ np.diag(values) @ basis.T


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Contraction:
    """g(x) = tanh(x W₁ + b) W₂ on vectors: Lip(g) ≤ ‖W₁‖‖W₂‖."""

    first: jax.Array
    bias: jax.Array
    second: jax.Array

    def __call__(self, x):
        return jnp.tanh(x @ self.first + self.bias[None]) @ self.second


def contraction(seed, dim: int, lipschitz: float, dtype=np.float32) -> Contraction:
    """A nonlinear branch whose Lipschitz constant is at most ``lipschitz``."""
    rng = np.random.default_rng(seed)
    root = np.sqrt(lipschitz)
    values = root * np.linspace(1.0, 0.3, dim)
    first = matrix_with_singular_values(rng, dim, dim + 1, values)
    second = matrix_with_singular_values(rng, dim + 1, dim, values)
    bias = 0.3 * rng.normal(size=dim + 1)
    return Contraction(*(jnp.asarray(w, dtype) for w in (first, bias, second)))


def sample_jacobians(branch: Callable, x) -> np.ndarray:
    """The full Jacobian [batch, dim, dim] of each sample alone, as NumPy in float64."""
    if jax.tree_util.all_leaves([branch]):  # a function
        branch = jax.tree_util.Partial(branch)
    return np.asarray(_jacobians(branch, x), np.float64)


@jax.jit
def _jacobians(branch, x):
    """Compiled once for branches of one structure."""

    def flat(sample):
        return branch(sample.reshape(1, *x.shape[1:])).reshape(-1)

    return jax.vmap(jax.jacrev(flat))(x.reshape(len(x), x[0].size))


def trace_series(jacobian, num_terms: int):
    """Σ_{k=1}^{n} (−1)^{k+1}/k · tr Jᵏ of one matrix, by matrix powers; differentiable."""
    power, total = jacobian, jnp.trace(jacobian)
    for k in range(2, num_terms + 1):
        power = power @ jacobian
        total = total + (-1.0) ** (k + 1) / k * jnp.trace(power)
    return total


def directional_difference(f: Callable, x, direction, step: float = 1e-5) -> float:
    """d/dt f(x + t·direction) at 0 by a central difference; x and direction are equal pytrees."""

    def at(t):
        return float(f(jax.tree.map(lambda a, d: a + t * d, x, direction)))

    return (at(step) - at(-step)) / (2.0 * step)


def random_like(seed, tree):
    """A pytree of normal numbers of the same shapes and types."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype), tree)


def tree_dot(a, b) -> float:
    return float(sum(jnp.vdot(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)))


def unconverged(count: int, batch: int):
    """The warning that is due where so many samples of a batch miss their tolerance."""
    return pytest.warns(UnconvergedWarning, match=f"^{count} of {batch} inverses did not meet")


#: Options of an inverse as if its branch were computed exactly.
EXACT = {"rounding": lambda x: 0.0 * x.sum(axis=tuple(range(1, x.ndim)))}


def slopes(*values, dtype=np.float32):
    """g(x) = sᵢ sin(x) for sample i: sample i contracts at its own rate."""
    per_sample = jnp.asarray(values, dtype)[:, None]
    return lambda x: jnp.broadcast_to(per_sample, x.shape) * jnp.sin(x)


def inner_jaxprs(equation):
    """The jaxprs among an equation's parameters.

    From jax 0.12 on, ``custom_root`` keeps its own inside of a primitive of a higher level.
    """
    params = equation.params
    params = params["_prim"].params if "_prim" in params else params
    for leaf in jax.tree.leaves(list(params.values())):
        inner = getattr(leaf, "jaxpr", leaf)
        if hasattr(inner, "eqns"):
            yield inner
