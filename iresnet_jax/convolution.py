"""Zero-padded convolution of NHWC images by HWIO kernels, fast inside loops on every platform.

On CPU, XLA runs the convolutions that differentiation creates one to two orders of magnitude slower
inside ``while`` and ``scan`` (measured; jax issue 12868). Two forms avoid them and still support
forward, reverse and second-order differentiation: one matrix product over shifted images, if either
side has few channels, and :data:`convolution_p`, whose derivatives are forward convolutions.

On GPU the product serves where the shifted images have few channels beside the wider side: it
spares the matrix units the padding of 3 channels to a tile's width, and XLA fuses activations and
their slopes with it. Wider ones move more memory. All else is
``jax.lax.conv_general_dilated``.
"""

import math
from collections.abc import Sequence
from functools import partial
from operator import index
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

from iresnet_jax.types import AnyArray

Padding = tuple[tuple[int, int], tuple[int, int]]

#: On CPU, a direct convolution is faster than a product over shifted images from this many channels
#: on the narrower side, and this many shifted values, which no longer fit in the cache.
_WIDE, _MANY_VALUES = 16, 1 << 20

#: On GPU, shifted images may have this share of the wider side's channels.
_NARROW = 1 / 6

#: A bilinear convolution of stride 1, whose derivatives are convolutions of stride 1 too.
convolution_p = Primitive("stride_1_convolution")


def convolve(
    x: Float[AnyArray, "batch height width in_channels"],
    kernel: Float[AnyArray, "kernel_height kernel_width in_channels out_channels"],
    *,
    strides: tuple[int, int],
    padding: Padding,
    dilation: tuple[int, int] = (1, 1),
) -> Float[Array, "batch out_height out_width out_channels"]:
    """Convolve (cross-correlate) images with a kernel, with explicit zero padding.

    Args:
      x: images [batch, height, width, in_channels].
      kernel: [kernel_height, kernel_width, in_channels, out_channels].
      strides: steps between output pixels, (vertical, horizontal).
      padding: zeros added, ((top, bottom), (left, right)).
      dilation: pixels between adjacent taps of the kernel, (vertical, horizontal).

    Returns:
      Images [batch, out_height, out_width, out_channels].
    """
    backend = jax.default_backend()
    if backend == "gpu" and strides == (1, 1) and _narrow(kernel):
        return _product(x, kernel, strides, padding, dilation)
    if backend == "cpu":
        if strides == dilation == (1, 1) and _better_directly(x, kernel):
            return _bind(x, kernel, padding)
        return _product(x, kernel, strides, padding, dilation)
    return lax.conv_general_dilated(
        jnp.asarray(x),
        jnp.asarray(kernel),
        strides,
        padding,
        rhs_dilation=dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


@partial(jax.jit, static_argnames=("strides", "padding", "dilation"), inline=True)
def convolve_as_product(
    x: Float[Array, "batch height width in_channels"],
    kernel: Float[Array, "kernel_height kernel_width in_channels out_channels"],
    *,
    strides: tuple[int, int],
    padding: Padding,
    dilation: tuple[int, int] = (1, 1),
) -> Float[Array, "batch out_height out_width out_channels"]:
    """Compute :func:`convolve` as one matrix product, with the taps on the narrower side.

    Taps are laid out along one axis, then along the other. For a 3×3 kernel this halves the number
    of shifts, which runs as fast and compiles sooner.
    """
    window = window_size(kernel.shape[:2], dilation)
    out_size = output_size(x.shape[1:3], window, strides, padding)
    kernel, padding = _crop_unused_taps(kernel, x.shape[1:3], strides, padding, dilation, out_size)
    height, width, in_channels, out_channels = kernel.shape
    vertical, horizontal = _axes((height, width), strides, padding, dilation, out_size)
    if in_channels <= out_channels:
        patches = _joined(_joined(x, horizontal), vertical)
        out = patches.reshape(-1, patches.shape[-1]) @ kernel.reshape(-1, out_channels)
        return out.reshape(*patches.shape[:-1], out_channels)
    columns = kernel.transpose(2, 0, 1, 3).reshape(in_channels, -1)
    products = (x.reshape(-1, in_channels) @ columns).reshape(*x.shape[:-1], -1)
    return _summed(_summed(products, vertical), horizontal)


def _product(
    x: Float[AnyArray, "b h w i"],
    kernel: Float[AnyArray, "kh kw i o"],
    strides: tuple[int, int],
    padding: Padding,
    dilation: tuple[int, int],
) -> Float[Array, "b h2 w2 o"]:
    out: Array = convolve_as_product(x, kernel, strides=strides, padding=padding, dilation=dilation)
    return out


def window_size(kernel_size: Sequence[int], dilation: Sequence[int]) -> tuple[int, int]:
    """Compute the receptive field of one output pixel: (k − 1)·dilation + 1 on each axis."""
    height, width = ((k - 1) * d + 1 for k, d in zip(kernel_size, dilation, strict=True))
    return height, width


def output_size(
    image_shape: Sequence[int],
    window: Sequence[int],
    strides: Sequence[int],
    padding: Padding,
) -> tuple[int, int]:
    """Compute (height, width) of the output; below 1 where the window does not fit."""
    sizes = zip(image_shape, window, strides, padding, strict=True)
    height, width = ((n + low + high - k) // s + 1 for n, k, s, (low, high) in sizes)
    return height, width


def resolve_padding(
    image_shape: Sequence[int],
    window: Sequence[int],
    strides: Sequence[int],
    padding: str | Padding,
) -> Padding:
    """Turn padding into numbers, ((top, bottom), (left, right)); see :func:`window_size`.

    Raises:
      ValueError: if ``padding`` is not "SAME", "VALID" or two pairs of integers ≥ 0.
    """
    if isinstance(padding, str):
        if padding.upper() not in ("SAME", "VALID"):
            raise ValueError(f'padding must be "SAME", "VALID" or explicit pairs; got {padding!r}.')
        pairs: Sequence[tuple[int, int]] = lax.padtype_to_pads(
            image_shape, window, strides, padding.upper()
        )
    else:
        pairs = padding
    try:
        (top, bottom), (left, right) = ((index(low), index(high)) for low, high in pairs)
    except (TypeError, ValueError):
        raise ValueError(f"padding must be two pairs of integers; got {padding!r}.") from None
    if min(top, bottom, left, right) < 0:
        raise ValueError(f"padding must be ≥ 0 on every side; got {padding}.")
    return (top, bottom), (left, right)


class _Axis(NamedTuple):
    """How a kernel's taps meet one axis of the image.

    Attributes:
      axis: of the image.
      taps: for each, the pixel that its first output meets.
      stride: pixels from one output to the next.
      out: outputs.
    """

    axis: int
    taps: list[int]
    stride: int
    out: int


def _axes(
    kernel_size: Sequence[int],
    strides: Sequence[int],
    padding: Padding,
    dilation: Sequence[int],
    out_size: Sequence[int],
) -> tuple[_Axis, _Axis]:
    """Vertical, horizontal."""
    sizes = zip(kernel_size, padding, dilation, strict=True)
    taps = [[i * d - low for i in range(k)] for k, (low, _), d in sizes]
    vertical, horizontal = map(_Axis, (1, 2), taps, strides, out_size)
    return vertical, horizontal


def _joined(x: Float[Array, "b h w c"], axis: _Axis) -> Float[Array, "b h2 w2 c2"]:
    """What every tap sees, side by side: [..., taps · channels]."""
    return jnp.concatenate([_seen_by_tap(x, axis, tap) for tap in axis.taps], axis=-1)


def _summed(products: Float[Array, "b h w c"], axis: _Axis) -> Float[Array, "b h2 w2 c2"]:
    """The transpose's counterpart: [..., taps · channels], each tap's as seen by it, summed."""
    count = len(axis.taps)
    parts = lax.split(products, (products.shape[-1] // count,) * count, axis=3)
    seen = [_seen_by_tap(part, axis, tap) for part, tap in zip(parts, axis.taps, strict=True)]
    return sum(seen[1:], start=seen[0])


def _seen_by_tap(x: Float[Array, "b h w c"], axis: _Axis, tap: int) -> Float[Array, "b h2 w2 c"]:
    """What a tap multiplies: from pixel ``tap`` on, every ``stride``-th; zero outside the image.

    As one ``lax.pad``, by negative widths where it crops: then the transpose of many such, joined
    or summed, is again many such, summed or joined.
    """
    end = tap + (axis.out - 1) * axis.stride + 1
    widths = [(0, 0, 0)] * x.ndim
    widths[axis.axis] = (-tap, end - x.shape[axis.axis], 0)
    shifted = lax.pad(x, jnp.zeros((), x.dtype), widths)
    return lax.slice_in_dim(shifted, 0, None, axis.stride, axis.axis)


def _crop_unused_taps(
    kernel: Float[Array, "h w i o"],
    image_shape: Sequence[int],
    strides: Sequence[int],
    padding: Padding,
    dilation: Sequence[int],
    out_size: Sequence[int],
) -> tuple[Float[Array, "h2 w2 i o"], Padding]:
    """Leave out the kernel's outer rows and columns that meet nothing but padding."""
    keep, pads = [], []
    sizes = zip(image_shape, kernel.shape[:2], strides, padding, dilation, out_size, strict=True)
    for n, k, s, (low, high), d, out in sizes:
        positions = range(0, out * s, s)
        used = [i for i in range(k) if any(0 <= p + i * d - low < n for p in positions)] or [0]
        first, stop = used[0], used[-1] + 1
        keep.append(slice(first, stop))
        pads.append((low - first * d, high - (k - stop) * d))
    return kernel[keep[0], keep[1]], (pads[0], pads[1])


def _better_directly(x: Float[AnyArray, "b h w i"], kernel: Float[AnyArray, "kh kw i o"]) -> bool:
    narrower = min(kernel.shape[2:])
    pixels, taps = math.prod(x.shape[:3]), math.prod(kernel.shape[:2])
    return narrower >= _WIDE and pixels * taps * narrower >= _MANY_VALUES


def _narrow(kernel: Float[AnyArray, "kh kw i o"]) -> bool:
    height, width, *channels = kernel.shape
    return height * width * min(channels) <= _NARROW * max(channels)


def _bind(
    x: Float[AnyArray, "b h w i"], kernel: Float[AnyArray, "kh kw i o"], padding: Padding
) -> Float[Array, "b h2 w2 o"]:
    out: Array = convolution_p.bind(x, kernel, padding=padding)
    return out


def _convolve(
    x: Float[Array, "b h w i"], kernel: Float[Array, "kh kw i o"], *, padding: Padding
) -> Float[Array, "b h2 w2 o"]:
    return lax.conv_general_dilated(
        x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _out_aval(x: ShapedArray, kernel: ShapedArray, *, padding: Padding) -> ShapedArray:
    out = jax.eval_shape(partial(_convolve, padding=padding), x, kernel)
    aval: ShapedArray = x.update(shape=out.shape, dtype=out.dtype, weak_type=False)
    return aval


def _image_gradient(
    ct: Float[Array, "b h2 w2 o"],
    x: object,
    kernel: Float[AnyArray, "kh kw i o"],
    *,
    padding: Padding,
) -> Float[Array, "b h w i"]:
    """The cotangent convolved with the kernel, flipped, channels swapped."""
    del x
    flipped = lax.rev(jnp.asarray(kernel), (0, 1)).transpose(0, 1, 3, 2)
    sizes = zip(kernel.shape, padding, strict=False)
    vertical, horizontal = ((k - 1 - low, k - 1 - high) for k, (low, high) in sizes)
    return _bind(ct, flipped, (vertical, horizontal))


def _kernel_gradient(
    ct: Float[Array, "b h2 w2 o"],
    x: Float[AnyArray, "b h w i"],
    kernel: object,
    *,
    padding: Padding,
) -> Float[Array, "kh kw i o"]:
    """Channels as images, images as channels: the cotangent is a kernel as large as the output."""
    del kernel
    channels, cotangent = jnp.asarray(x).transpose(3, 1, 2, 0), ct.transpose(1, 2, 0, 3)
    return _bind(channels, cotangent, padding).transpose(1, 2, 0, 3)


def _batched(
    arguments: tuple[Array, Array], axes: tuple[int | None, int | None], *, padding: Padding
) -> tuple[Array, int]:
    """Batches of images are more images; batches of kernels, a batch of products."""
    (x, kernel), (of_x, of_kernel) = arguments, axes
    if of_x is not None and of_kernel is None:
        x = jnp.moveaxis(x, of_x, 0)
        out = _bind(x.reshape(-1, *x.shape[2:]), kernel, padding)
        return out.reshape(*x.shape[:2], *out.shape[1:]), 0
    product = partial(convolve_as_product, strides=(1, 1), padding=padding)
    return jax.vmap(product, axes)(x, kernel), 0


convolution_p.def_impl(jax.jit(_convolve, static_argnames="padding"))
convolution_p.def_abstract_eval(_out_aval)
ad.defbilinear(convolution_p, _image_gradient, _kernel_gradient)
batching.primitive_batchers[convolution_p] = _batched
mlir.register_lowering(convolution_p, mlir.lower_fun(_convolve, multiple_results=False))
