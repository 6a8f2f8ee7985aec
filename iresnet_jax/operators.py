"""Linear operators with a constrained norm: dense matrices and convolutions on an image.

An operator is a pytree with its kernel as a leaf and static geometry. It can be stacked, passed
through ``jit``, ``scan`` and ``vmap``, and differentiated like any array.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from operator import index
from typing import Protocol, SupportsIndex, cast, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from iresnet_jax.convolution import (
    Padding,
    convolve,
    output_size,
    resolve_padding,
    window_size,
)
from iresnet_jax.types import AnyArray

#: Marks a dataclass field as geometry, which belongs to the tree's structure.
STATIC = {"static": True}


@runtime_checkable
class LinearOperator(Protocol):
    """A linear map A between spaces of arrays, given by a kernel."""

    @property
    def kernel(self) -> Float[Array, "..."]:
        """The array that parameterises A, linearly."""

    @property
    def domain_shape(self) -> tuple[int, ...]:
        """Shape of one input, without batch axes."""

    @property
    def codomain_shape(self) -> tuple[int, ...]:
        """Shape of one output, without batch axes."""

    def __call__(self, x: Float[AnyArray, "..."]) -> Float[Array, "..."]:
        """Compute A x, over any leading batch axes."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class DenseOperator:
    """The map x ↦ x W on the last axis.

    On images it is the 1×1 convolution, which acts on each pixel alone and has the norm of W.

    Attributes:
      kernel: W, shape [in, out].
    """

    kernel: Float[Array, "*stack in out"]

    @property
    def domain_shape(self) -> tuple[int, ...]:
        return (self.kernel.shape[-2],)

    @property
    def codomain_shape(self) -> tuple[int, ...]:
        return (self.kernel.shape[-1],)

    def __call__(self, x: Float[AnyArray, "*batch in"]) -> Float[Array, "*batch out"]:
        out = jnp.asarray(x).reshape(-1, x.shape[-1]) @ self.kernel
        return out.reshape(*x.shape[:-1], self.kernel.shape[-1])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ConvOperator:
    """A zero-padded convolution (cross-correlation, as in deep learning) on images of one size.

    Build it with :func:`conv_operator`, which checks the geometry and resolves the padding.

    Attributes:
      kernel: shape [kernel_height, kernel_width, in_channels, out_channels].
      image_shape: (height, width) of the input image.
      strides: steps between output pixels, (vertical, horizontal).
      padding: zeros added, ((top, bottom), (left, right)).
      dilation: pixels between adjacent taps of the kernel, (vertical, horizontal).
    """

    kernel: Float[Array, "*stack kernel_height kernel_width in_channels out_channels"]
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

    def __call__(self, x: Float[AnyArray, "..."]) -> Float[Array, "*batch height width channels"]:
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
    kernel: Float[AnyArray, "..."],
    image_shape: Sequence[int],
    *,
    strides: int | tuple[int, int] = 1,
    padding: str | Padding = "SAME",
    dilation: int | tuple[int, int] = 1,
) -> LinearOperator:
    """Build the convolution with ``kernel`` on images of ``image_shape``.

    Args:
      kernel: shape [kernel_height, kernel_width, in_channels, out_channels].
      image_shape: (height, width) of the input image; the norm depends on it.
      strides: one step for both axes, or (vertical, horizontal).
      padding: ``"SAME"``, ``"VALID"`` or explicit ((top, bottom), (left, right)).
      dilation: pixels between adjacent taps, for both axes or (vertical, horizontal).

    Returns:
      A :class:`ConvOperator`, or the equal but cheaper :class:`DenseOperator` on the channels for a
      1×1 kernel with stride 1 and no padding.

    Raises:
      ValueError: if the output is empty, or the kernel, image shape, padding, strides or dilation
        are invalid.
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
    operator = ConvOperator(cast(Array, kernel), (height, width), strides, pads, dilation)
    if min(operator.codomain_shape[:2]) < 1:
        raise ValueError(
            f"A {window[0]}x{window[1]} convolution with padding {padding} does not "
            f"fit on an image of {height}x{width}: no output pixel is left."
        )
    return operator


def adjoint(operator: LinearOperator, y: Float[AnyArray, "..."]) -> Float[Array, "..."]:
    """Compute Aᵀ y, over any leading batch axes."""
    batch = y.shape[: y.ndim - len(operator.codomain_shape)]
    x = jax.ShapeDtypeStruct((*batch, *operator.domain_shape), y.dtype)
    out: Array
    (out,) = jax.linear_transpose(operator, x)(y)
    return out


def to_matrix(operator: LinearOperator) -> Float[Array, "codomain domain"]:
    """Build the dense matrix [codomain size, domain size] by applying A to a basis."""
    size = math.prod(operator.domain_shape)
    basis = jnp.eye(size, dtype=operator.kernel.dtype).reshape(size, *operator.domain_shape)
    return operator(basis).reshape(size, -1).T


def with_kernel(operator: LinearOperator, kernel: Float[AnyArray, "..."]) -> LinearOperator:
    """Replace the kernel of an operator by one of the same shape."""
    return dataclasses.replace(operator, kernel=kernel)  # type: ignore[type-var]


def _pair(value: SupportsIndex | Iterable[SupportsIndex], name: str) -> tuple[int, int]:
    try:
        pair = tuple(index(v) for v in (value if isinstance(value, Iterable) else (value, value)))
    except TypeError:
        pair = ()
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"{name} must be one or two integers ≥ 1; got {value}.")
    return pair
