"""Zero-padded convolution of NHWC images by HWIO kernels, fast inside loops on every platform.

On CPU it is computed as one matrix product over shifted images. XLA's own CPU convolution has
no fast path for its derivatives inside ``while`` and ``scan`` (jax issue 12868: measured, two
orders of magnitude slower there); products are fast everywhere, and keep forward, reverse and
second-order differentiation. Accelerators use ``jax.lax.conv_general_dilated``.
"""

from collections.abc import Sequence
from operator import index

import jax
import jax.numpy as jnp
from jax import lax

Padding = tuple[tuple[int, int], tuple[int, int]]


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    *,
    strides: tuple[int, int],
    padding: Padding,
    dilation: tuple[int, int] = (1, 1),
) -> jax.Array:
    """Convolution (cross-correlation) with explicit zero padding.

    Args:
      x: images [batch, height, width, in_channels].
      kernel: [kernel_height, kernel_width, in_channels, out_channels].
      strides: steps between output pixels, (vertical, horizontal).
      padding: zeros added ((top, bottom), (left, right)).
      dilation: pixels from one tap of the kernel to the next, (vertical, horizontal).

    Returns:
      Images [batch, out_height, out_width, out_channels].
    """
    if jax.default_backend() == "cpu":
        return convolve_as_product(x, kernel, strides=strides, padding=padding, dilation=dilation)
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        rhs_dilation=dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def convolve_as_product(
    x: jax.Array,
    kernel: jax.Array,
    *,
    strides: tuple[int, int],
    padding: Padding,
    dilation: tuple[int, int] = (1, 1),
) -> jax.Array:
    """:func:`convolve` as one matrix product, the kernel's taps laid out on the narrower side."""
    window = window_size(kernel.shape[:2], dilation)
    out_size = output_size(x.shape[1:3], window, strides, padding)
    kernel, padding = _crop_unused_taps(kernel, x.shape[1:3], strides, padding, dilation, out_size)
    height, width, in_channels, out_channels = kernel.shape
    taps = _taps((height, width), padding, dilation)
    if in_channels <= out_channels:
        seen = [_seen_by_tap(x, tap, strides, out_size) for tap in taps]
        patches = jnp.concatenate(seen, axis=-1)
        out = patches.reshape(-1, patches.shape[-1]) @ kernel.reshape(-1, out_channels)
        return out.reshape(*patches.shape[:-1], out_channels)
    columns = kernel.transpose(2, 0, 1, 3).reshape(in_channels, -1)
    products = (x.reshape(-1, in_channels) @ columns).reshape(*x.shape[:-1], -1)
    parts = lax.split(products, (out_channels,) * len(taps), axis=3)
    pairs = zip(parts, taps, strict=True)
    first, *others = (_seen_by_tap(part, tap, strides, out_size) for part, tap in pairs)
    return sum(others, start=first)


def window_size(kernel_size: Sequence[int], dilation: Sequence[int]) -> tuple[int, int]:
    """(height, width) of what one output pixel sees: (k − 1)·dilation + 1 on each axis."""
    height, width = ((k - 1) * d + 1 for k, d in zip(kernel_size, dilation, strict=True))
    return height, width


def output_size(
    image_shape: Sequence[int],
    window: Sequence[int],
    strides: Sequence[int],
    padding: Padding,
) -> tuple[int, int]:
    """(height, width) of the convolution's output; below 1 where the window does not fit."""
    sizes = zip(image_shape, window, strides, padding, strict=True)
    height, width = ((n + low + high - k) // s + 1 for n, k, s, (low, high) in sizes)
    return height, width


def resolve_padding(
    image_shape: Sequence[int],
    window: Sequence[int],
    strides: Sequence[int],
    padding: str | Padding,
) -> Padding:
    """Padding as numbers: ((top, bottom), (left, right)); ``window`` is :func:`window_size`.

    Raises:
      ValueError: if ``padding`` is neither "SAME", "VALID" nor two pairs of sizes ≥ 0.
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


def _taps(kernel_size, padding, dilation) -> list[tuple[int, int]]:
    """For every tap of the kernel, row by row, the image's pixel that its first output meets."""
    rows, columns = (
        [i * d - low for i in range(k)]
        for k, (low, _), d in zip(kernel_size, padding, dilation, strict=True)
    )
    return [(row, column) for row in rows for column in columns]


def _seen_by_tap(x, tap, strides, out_size) -> jax.Array:
    """What a tap multiplies: from pixel ``tap`` on, every ``strides``-th; zero outside the image.

    As one ``lax.pad``, by negative widths where it crops: then the transpose of many such, joined
    or summed, is again many such, summed or joined.
    """
    ends = [first + (out - 1) * s + 1 for first, s, out in zip(tap, strides, out_size, strict=True)]
    widths = [(-low, end - n, 0) for low, end, n in zip(tap, ends, x.shape[1:3], strict=True)]
    shifted = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *widths, (0, 0, 0)])
    return shifted[:, :: strides[0], :: strides[1]]


def _crop_unused_taps(kernel, image_shape, strides, padding, dilation, out_size):
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
