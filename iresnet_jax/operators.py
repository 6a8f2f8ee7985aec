"""Linear operators whose norm is constrained: dense matrices and convolutions on an image.

An operator is a pytree: its kernel is a leaf, its geometry is static. It can therefore be
stacked, passed through ``jit``, ``scan`` and ``vmap``, and differentiated like any array.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from operator import index
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from iresnet_jax.convolution import (
    Padding,
    convolve,
    output_size,
    resolve_padding,
    window_size,
)

#: Marks a dataclass field as geometry, which is part of the tree's structure and not a leaf.
STATIC = {"static": True}


@runtime_checkable
class LinearOperator(Protocol):
    """A linear map A between spaces of arrays, given by a kernel."""

    @property
    def kernel(self) -> jax.Array:
        """The array that the map is linear in."""

    @property
    def domain_shape(self) -> tuple[int, ...]:
        """Shape of one input, without batch axes."""

    @property
    def codomain_shape(self) -> tuple[int, ...]:
        """Shape of one output, without batch axes."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """A x, over any leading batch axes."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class DenseOperator:
    """x ↦ x W on the last axis.

    It is also the 1×1 convolution: acting on each pixel alone, it has the norm of its matrix.

    Attributes:
      kernel: W, shape [in_features, out_features].
    """

    kernel: jax.Array

    @property
    def domain_shape(self) -> tuple[int, ...]:
        return (self.kernel.shape[-2],)

    @property
    def codomain_shape(self) -> tuple[int, ...]:
        return (self.kernel.shape[-1],)

    def __call__(self, x: jax.Array) -> jax.Array:
        out = x.reshape(-1, x.shape[-1]) @ self.kernel
        return out.reshape(*x.shape[:-1], self.kernel.shape[-1])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ConvOperator:
    """Zero-padded convolution (cross-correlation, as in deep learning) on images of one size.

    Build it with :func:`conv_operator`, which checks the geometry and resolves the padding.

    Attributes:
      kernel: shape [kernel_height, kernel_width, in_channels, out_channels].
      image_shape: (height, width) of the input image.
      strides: steps between output pixels, (vertical, horizontal).
      padding: zeros added ((top, bottom), (left, right)).
      dilation: pixels from one tap of the kernel to the next, (vertical, horizontal).
    """

    kernel: jax.Array
    image_shape: tuple[int, int] = dataclasses.field(metadata=STATIC)
    strides: tuple[int, int] = dataclasses.field(default=(1, 1), metadata=STATIC)
    padding: Padding = dataclasses.field(default=((0, 0), (0, 0)), metadata=STATIC)
    dilation: tuple[int, int] = dataclasses.field(default=(1, 1), metadata=STATIC)

    @property
    def kernel_size(self) -> tuple[int, int]:
        return self.kernel.shape[-4], self.kernel.shape[-3]

    @property
    def domain_shape(self) -> tuple[int, ...]:
        return (*self.image_shape, self.kernel.shape[-2])

    @property
    def codomain_shape(self) -> tuple[int, ...]:
        window = window_size(self.kernel_size, self.dilation)
        spatial = output_size(self.image_shape, window, self.strides, self.padding)
        return (*spatial, self.kernel.shape[-1])

    def __call__(self, x: jax.Array) -> jax.Array:
        if x.shape[-3:] != self.domain_shape:
            raise ValueError(
                f"The convolution acts on images of shape {self.domain_shape}; "
                f"got an array of shape {x.shape}."
            )
        images = x.reshape(-1, *x.shape[-3:])
        out = convolve(
            images,
            self.kernel,
            strides=self.strides,
            padding=self.padding,
            dilation=self.dilation,
        )
        return out.reshape(*x.shape[:-3], *out.shape[1:])


def conv_operator(
    kernel: jax.Array,
    image_shape: Sequence[int],
    *,
    strides: int | tuple[int, int] = 1,
    padding: str | Padding = "SAME",
    dilation: int | tuple[int, int] = 1,
) -> LinearOperator:
    """The convolution by ``kernel`` as a linear operator on images of ``image_shape``.

    Args:
      kernel: shape [kernel_height, kernel_width, in_channels, out_channels].
      image_shape: (height, width) of the image it acts on; the norm depends on it.
      strides: one step for both axes, or (vertical, horizontal).
      padding: ``"SAME"``, ``"VALID"`` or explicit ((top, bottom), (left, right)).
      dilation: pixels from one tap to the next, for both axes or (vertical, horizontal).

    Returns:
      A :class:`ConvOperator`; for a 1×1 kernel with stride 1 and no padding, the equal but
      cheaper :class:`DenseOperator` on the channels.

    Raises:
      ValueError: where the geometry gives no output, or padding, strides or dilation are unknown.
    """
    if kernel.ndim != 4:
        raise ValueError(
            "A convolution kernel has shape [height, width, in_channels, out_channels]; "
            f"got {kernel.shape}."
        )
    height, width = _pair(image_shape, "image_shape")
    strides = _pair(strides, "strides")
    dilation = _pair(dilation, "dilation")
    window = window_size(kernel.shape[:2], dilation)
    pads = resolve_padding((height, width), window, strides, padding)
    if kernel.shape[:2] == (1, 1) and strides == (1, 1) and pads == ((0, 0), (0, 0)):
        return DenseOperator(kernel[0, 0])
    operator = ConvOperator(kernel, (height, width), strides, pads, dilation)
    if min(operator.codomain_shape[:2]) < 1:
        raise ValueError(
            f"A {window[0]}x{window[1]} convolution with padding {padding} does not "
            f"fit on an image of {height}x{width}: no output pixel is left."
        )
    return operator


def adjoint(operator: LinearOperator, y: jax.Array) -> jax.Array:
    """Aᵀ y for one ``y`` of the operator's codomain shape, or a batch of them."""
    batch = y.shape[: y.ndim - len(operator.codomain_shape)]
    x = jax.ShapeDtypeStruct((*batch, *operator.domain_shape), y.dtype)
    (out,) = jax.linear_transpose(operator, x)(y)
    return out


def to_matrix(operator: LinearOperator) -> jax.Array:
    """The operator as a dense matrix [codomain size, domain size], by applying it to a basis."""
    size = math.prod(operator.domain_shape)
    basis = jnp.eye(size, dtype=operator.kernel.dtype).reshape(size, *operator.domain_shape)
    return operator(basis).reshape(size, -1).T


def with_kernel(operator: LinearOperator, kernel: jax.Array) -> LinearOperator:
    """The same operator with another kernel of the same shape."""
    return dataclasses.replace(operator, kernel=kernel)  # type: ignore[type-var]


def _pair(value, name: str) -> tuple[int, int]:
    try:
        pair = tuple(index(v) for v in (value if isinstance(value, Iterable) else (value, value)))
    except TypeError:
        pair = ()
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"{name} must be one or two integers ≥ 1; got {value}.")
    return pair
