"""Rows of affine layers with activations in between: the parts of a branch that are bounded whole.

The layers of a row can be written as matrices that share an index: a frequency, a pixel, or nothing
(:func:`matrices_of`).
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Inexact

from iresnet_jax.norm_proofs import proved_norm
from iresnet_jax.operators import ConvOperator, DenseOperator
from iresnet_jax.outward import product_above
from iresnet_jax.stages import Activation, Affine, Sequential
from iresnet_jax.statements import stated_lipschitz, stated_slopes
from iresnet_jax.symbols import (
    Known,
    circular_symbols,
    common_grid,
    conv_matrix,
    relative_symbol_error,
    tap_sum_norm,
)
from iresnet_jax.types import Branch, Shape

Slopes = tuple[float, float]

#: A diagonal matrix D between two layers, [pixels, channels].
Diagonal = Float[np.ndarray, "_ _"]

#: Up to so many entries of hidden layers, and of input and output, matrices are of the whole image.
_MOST_DENSE, _MOST_OUTER = 1024, 128
#: Up to so many hidden channels a row is bounded whole; the fewer where layers in between differ by
#: frequency.
_MOST_HIDDEN, _MOST_HIDDEN_BY_FREQUENCY = 1024, 128

_ONE = np.ones((1, 1))
_EPSILON = float(np.finfo(np.float64).eps)
_SCALING = 8.0 * _EPSILON  # of two products and of what couples parts
_TINY = 1e-150  # more than underflow takes, for multipliers within MULTIPLIERS

#: Multipliers that are not within are refused: products with them could underflow unseen.
MULTIPLIERS = (1e-60, 1e60)


class AffineRow(NamedTuple):
    """x ↦ W_m φ_{m−1}(… φ_1(W_1 x + b_1) …) + b_m.

    Attributes:
      operators: W_1 … W_m, m ≥ 2.
      slopes: for each activation in between, (α, β) with α ≤ 0 ≤ β.
      shape: of one x: an image's, or that of a vector where all layers are dense.
    """

    operators: tuple[Known, ...]
    slopes: tuple[Slopes, ...]
    shape: Shape


class Frame(NamedTuple):
    """How the layers of a row are written as matrices.

    Attributes:
      grid: points of the torus that the image is a corner of; None for matrices of the image.
      pixels: of the image, where all layers but first and last act on each pixel alone; else 1.
    """

    grid: tuple[int, int] | None = None
    pixels: int = 1


class LayerMatrices(NamedTuple):
    """A layer as matrices.

    The first layer's outputs and the last one's inputs are split by pixel where the frame has
    pixels; layers in between are the same at all of them.

    Attributes:
      values: [frequencies, pixels, out, in]; either may be 1 where it is the same for all.
      error: of all pixels together, in Frobenius norm, at any frequency.
    """

    values: Inexact[np.ndarray, "frequencies pixels out in"]
    error: float


def split(branch: Sequential, shape: Shape) -> tuple[list[AffineRow], float]:
    """Split a branch into rows of at least two affine layers, and a bound on all of the rest.

    The branch's Lipschitz constant is at most the product of both. Of classes that are not this
    library's own, subclasses too, what they state counts.

    Args:
      branch: with concrete weights.
      shape: of one input.
    """
    rows: list[AffineRow] = []
    rest, row = 1.0, _RowToCome()
    for stage, before, after in _stages(branch, shape, jnp.result_type(float)):
        slopes = stated_slopes(stage) if before == after else None
        if slopes is not None:
            row.activate(slopes)
        elif type(stage) is Affine and type(stage.operator) in (DenseOperator, ConvOperator):
            row.add(cast(Known, stage.operator), before)
        else:
            rest = product_above(rest, row.end(rows), stated_lipschitz(stage))
            row = _RowToCome()
    return rows, product_above(rest, row.end(rows))


class _RowToCome:
    """Layers and activations since the last stage that was neither."""

    def __init__(self) -> None:
        self._operators: list[Known] = []
        self._between: list[Slopes] = []
        self._slopes: Slopes = (1.0, 1.0)  # since the last layer
        self._shape: Shape = ()
        self._before = 1.0

    def activate(self, slopes: Slopes) -> None:
        products = [a * b for a in self._slopes for b in slopes]
        self._slopes = min(products), max(products)

    def add(self, operator: Known, shape: Shape) -> None:
        if self._operators:
            self._between.append((min(self._slopes[0], 0.0), max(self._slopes[1], 0.0)))
        else:
            self._before, self._shape = max(map(abs, self._slopes)), shape
        self._operators.append(operator)
        self._slopes = (1.0, 1.0)

    def end(self, rows: list[AffineRow]) -> float:
        """Add to the rows if this is one; return a bound on what is not in it."""
        rest = product_above(self._before, max(map(abs, self._slopes)))
        if len(self._operators) < 2:
            return product_above(rest, *map(proved_norm, self._operators))
        mixed = any(isinstance(op, ConvOperator) for op in self._operators)
        shape = self._shape[-3:] if mixed else self._shape[-1:]  # alike along axes before these
        rows.append(AffineRow(tuple(self._operators), tuple(self._between), shape))
        return rest


def frame_of(row: AffineRow) -> Frame | None:
    """Choose how the row's layers are written; None where no way is known, or it would be too much.

    Dense layers of vectors are their own matrices. On small images, layers are the matrices of the
    whole image. On larger ones, convolutions that keep the image's size are written by frequency.
    """
    shapes = _shapes(row)
    inner, widest = row.operators[1:-1], max(shape[-1] for shape in shapes[1:-1])
    pixelwise = all(isinstance(op, DenseOperator) for op in inner)
    convolutions = [op for op in row.operators if isinstance(op, ConvOperator)]
    if widest > _MOST_HIDDEN:
        return None
    if not convolutions:
        return Frame()
    outer = math.prod(shapes[0]), math.prod(shapes[-1])
    if max(outer) <= _MOST_OUTER and max(map(math.prod, shapes)) <= _MOST_DENSE:
        return Frame(pixels=math.prod(shapes[1][:-1]) if pixelwise else 1)
    if not pixelwise and widest > _MOST_HIDDEN_BY_FREQUENCY:
        return None
    grid = common_grid(convolutions)
    return None if grid is None else Frame(grid)


def matrices_of(
    row: AffineRow,
    frame: Frame,
    diagonals: Sequence[Diagonal] | None = None,
    frequencies: Sequence[int] | None = None,
) -> list[LayerMatrices]:
    """Write W_1 … W_m, or D_k W_k D_{k−1}⁻¹ with D_0 = D_m = I, as matrices in float64.

    W_k is of the kernel over 2^:func:`exponent_of`, so that nothing overflows, and nothing that
    counts underflows.

    Args:
      row: the layers.
      frame: as of :func:`frame_of`.
      diagonals: D_1 … D_{m−1}, one number for each entry of a pixel's matrix, within MULTIPLIERS.
      frequencies: those wanted, by their index; all by default.
    """
    kernels = [_in_range(op) for op in row.operators]
    diagonals = [_ONE] * (len(kernels) - 1) if diagonals is None else diagonals
    pairs = list(itertools.pairwise([_ONE, *diagonals, _ONE]))
    if frame.grid is None:
        weights = zip(_image_matrices(row, frame, kernels), pairs, strict=True)
        return [_matrices(w * after[..., None] / before[:, None]) for w, (before, after) in weights]
    found = []
    for op, kernel, (before, after) in zip(row.operators, kernels, pairs, strict=True):
        scaled = kernel * after[0] / before[0][:, None]
        symbols = circular_symbols(op, scaled, frame.grid, frequencies)
        eta = relative_symbol_error(op, _EPSILON) + _SCALING
        found.append(LayerMatrices(symbols[:, None], eta * float(tap_sum_norm(scaled)) + _TINY))
    return found


def exponent_of(operator: Known) -> int:
    """Return the least e such that no entry of the kernel is above 2ᵉ."""
    return int(np.frexp(np.abs(np.asarray(operator.kernel, np.float64)).max())[1])


def _in_range(operator: Known) -> Float[np.ndarray, "..."]:
    return np.ldexp(np.asarray(operator.kernel, np.float64), -exponent_of(operator))


def _matrices(values: np.ndarray) -> LayerMatrices:
    return LayerMatrices(values, _SCALING * float(np.sqrt((values**2).sum())) + _TINY)


def _image_matrices(
    row: AffineRow, frame: Frame, kernels: Sequence[Float[np.ndarray, "..."]]
) -> list[Float[np.ndarray, "1 pixels out in"]]:
    shapes, last, split_up = _shapes(row), len(kernels) - 1, frame.pixels > 1
    matrices = []
    for i, (op, kernel) in enumerate(zip(row.operators, kernels, strict=True)):
        if split_up and 0 < i < last:
            matrix = kernel.T[None]
        elif isinstance(op, ConvOperator):
            matrix = conv_matrix(op, kernel, np)[None]
        else:
            matrix = np.kron(np.eye(math.prod(shapes[i][:-1])), kernel.T)[None]
        if split_up and i == 0:
            matrix = matrix.reshape(frame.pixels, -1, matrix.shape[-1])
        elif split_up and i == last:
            matrix = matrix.reshape(matrix.shape[1], frame.pixels, -1).swapaxes(0, 1)
        matrices.append(matrix[None])
    return matrices


def _shapes(row: AffineRow) -> list[Shape]:
    """Of x and of each layer's output."""
    return list(itertools.accumulate(row.operators, _mapped, initial=row.shape))


def _mapped(shape: Shape, operator: Known) -> Shape:
    codomain = operator.codomain_shape
    return (*shape[: -len(codomain)], *codomain)


def _stages(
    branch: Sequential, shape: Shape, dtype: np.dtype
) -> Iterator[tuple[Branch, Shape, Shape]]:
    """Go through all stages, those of rows within too, as used, with shapes before and after."""
    if branch.precision == "bfloat16":
        dtype = jnp.dtype(jnp.bfloat16)
    for stage in branch.stages_as_used():
        after = _shape_after(stage, shape, dtype)
        if type(stage) is Sequential:
            yield from _stages(stage, shape, dtype)
        else:
            yield stage, shape, after
        shape = after


def _shape_after(stage: Branch, shape: Shape, dtype: np.dtype) -> Shape:
    if type(stage) is Activation:
        return shape
    if type(stage) is Affine and type(stage.operator) in (DenseOperator, ConvOperator):
        return _mapped(shape, cast(Known, stage.operator))
    return jax.eval_shape(stage, jax.ShapeDtypeStruct((1, *shape), dtype)).shape[1:]
