"""Rows of affine layers with activations in between: the parts of a branch that are bounded whole.

Along a row, sizes and geometry are such that its layers can be written as matrices that share an
index: a frequency, a pixel, or nothing (:func:`matrices_of`).
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Inexact

from iresnet_jax.norm_proofs import proved_norm
from iresnet_jax.operators import ConvOperator, DenseOperator
from iresnet_jax.stages import Affine, Sequential, stated_lipschitz, stated_slopes
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

#: A diagonal matrix D between two layers.
Scale = Float[np.ndarray, "pixels channels"]

_MOST_DENSE = 1024  # entries of a hidden layer up to which matrices are those of the whole image
_MOST_OUTER = 256  # and of the input and output
_ONE = np.ones((1, 1))
_EPSILON = float(np.finfo(np.float64).eps)
_SCALING = 8.0 * _EPSILON  # of two products and an activation's factor
_TINY = 1e-150  # more than what underflow takes


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


class AffineRow(NamedTuple):
    """x ↦ W_m φ_{m−1}(… φ_1(W_1 x + b_1) …) + b_m.

    Attributes:
      operators: W_1 … W_m, m ≥ 2.
      slopes: for each activation in between, (α, β) with α ≤ 0 ≤ β.
      shape: of one x.
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


def split(branch: Sequential, shape: Shape) -> tuple[list[AffineRow], float]:
    """Split a branch into rows of at least two affine layers, and a bound on all of the rest.

    The branch's Lipschitz constant is at most the product of both.

    Args:
      branch: with its weights as used.
      shape: of one input.
    """
    rows: list[AffineRow] = []
    rest, row = 1.0, _RowToCome()
    for stage, before, after in _with_shapes(_flat(branch), shape):
        slopes = stated_slopes(stage) if before == after else None
        if slopes is not None:
            row.activate(slopes)
        elif type(stage) is Affine and type(stage.operator) in (DenseOperator, ConvOperator):
            row.add(cast(Known, stage.operator), before)
        else:
            rest *= row.end(rows) * stated_lipschitz(stage)
            row = _RowToCome()
    return rows, rest * row.end(rows)


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
        rest = self._before * max(map(abs, self._slopes))
        if len(self._operators) < 2:
            return rest * math.prod(proved_norm(op) for op in self._operators)
        mixed = any(isinstance(op, ConvOperator) for op in self._operators)
        shape = self._shape if mixed else self._shape[-1:]
        rows.append(AffineRow(tuple(self._operators), tuple(self._between), shape))
        return rest


def frame_of(row: AffineRow) -> Frame | None:
    """Choose how the row's layers are written; None where no way is known.

    Dense layers of vectors are their own matrices. On small images, layers are the matrices of the
    whole image. On larger ones, convolutions that keep the image's size are written by frequency.
    """
    convolutions = [op for op in row.operators if isinstance(op, ConvOperator)]
    if not convolutions:
        return Frame()
    shapes = [row.shape, *_shapes_after(row)]
    outer = math.prod(shapes[0]), math.prod(shapes[-1])
    if max(outer) <= _MOST_OUTER and max(map(math.prod, shapes)) <= _MOST_DENSE:
        pixelwise = all(isinstance(op, DenseOperator) for op in row.operators[1:-1])
        return Frame(pixels=math.prod(shapes[1][:-1]) if pixelwise else 1)
    grid = common_grid(convolutions)
    return None if grid is None else Frame(grid)


def matrices_of(
    row: AffineRow,
    frame: Frame,
    scales: Sequence[Scale] | None = None,
    frequencies: Sequence[int] | None = None,
) -> list[LayerMatrices]:
    """Write W_1 … W_m, or D_k W_k D_{k−1}⁻¹ with D_0 = D_m = I, as matrices in float64.

    Args:
      row: the layers.
      frame: as of :func:`frame_of`.
      scales: D_1 … D_{m−1}, positive, one number for each entry of a pixel's matrix.
      frequencies: those wanted, by their index; all by default.
    """
    kernels = [np.asarray(op.kernel, np.float64) for op in row.operators]
    pairs = _pairs([_ONE] * (len(kernels) - 1) if scales is None else scales)
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


def _matrices(values: np.ndarray) -> LayerMatrices:
    return LayerMatrices(values, _SCALING * float(np.sqrt((values**2).sum())) + _TINY)


def _pairs(scales: Sequence[Scale]) -> list[tuple[Scale, Scale]]:
    return list(itertools.pairwise([_ONE, *scales, _ONE]))


def _image_matrices(
    row: AffineRow, frame: Frame, kernels: Sequence[Float[np.ndarray, "..."]]
) -> list[Float[np.ndarray, "1 pixels out in"]]:
    shapes = [row.shape, *_shapes_after(row)]
    last, split_up, matrices = len(kernels) - 1, frame.pixels > 1, []
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


def _shapes_after(row: AffineRow) -> list[Shape]:
    shape, shapes = row.shape, []
    for op in row.operators:
        codomain = op.codomain_shape
        shape = (*shape[:-1], *codomain) if isinstance(op, DenseOperator) else codomain
        shapes.append(shape)
    return shapes


def _flat(branch: Sequential) -> list[Branch]:
    flat: list[Branch] = []
    for stage in branch.stages:
        flat += _flat(stage) if type(stage) is Sequential else [stage]
    return flat


def _with_shapes(stages: Sequence[Branch], shape: Shape) -> list[tuple[Branch, Shape, Shape]]:
    found = []
    for stage in stages:
        before = shape
        sample = jax.ShapeDtypeStruct((1, *shape), jnp.result_type(float))
        shape = jax.eval_shape(stage, sample).shape[1:]
        found.append((stage, before, shape))
    return found
