"""Bounds on whole branches: tighter than the product of their layers', and proved.

**The bound** (LipSDP; Fazlyab et al. 2019, arXiv 1906.04893). Let z_k = φ_k(W_k z_{k−1} + b_k) for
k < m, with slopes of φ_k in [α_k, β_k], α_k ≤ 0 ≤ β_k, and y = W_m z_{m−1}. For positive diagonal
D_1 … D_{m−1}, D_0 = (L/2)·I and D_m = I, let E_k = D_k W_k D_{k−1}⁻¹. Let T be the symmetric matrix
that couples z_k to z_{k−1} by (α_k + β_k)E_k for k < m, y to z_{m−1} by E_m, and for each k < m a
further part l_k, of the size of z_k, to z_{k−1} by 2√(−α_kβ_k)·E_k. If T ⪯ 2I, then y is
L-Lipschitz in z_0.

*Proof.* Write Δ for differences of two inputs, and v_k = W_kΔz_{k−1}. Let u have the parts LΔx for
x, 2D_kΔz_k for z_k, 2√(−α_kβ_k)·D_kv_k for l_k, and Δy for y. Then

    ½·uᵀ(2I − T)u = L²‖Δx‖² − ‖Δy‖² − 4·Σ_k ⟨D_k²(Δz_k − α_kv_k), β_kv_k − Δz_k⟩,

where the left is ≥ 0, and so is every entry of the products on the right. ∎

The bound is sharpest for slopes in [0, 1]. With D_k = d_k·I, it is then that of the product of the
norms of all layers at best; a number for each channel tells channels apart.

**Convolutions.** The matrices of a small image are taken whole, with a multiplier for each entry.
On a larger image, zero-padded convolutions are corners W = R C Rᵀ of circular ones (see
:mod:`~iresnet_jax.symbols`), R the restriction to the image, which multipliers that depend on the
channel alone commute with. So T is a corner of the circular convolutions' own, and is ⪯ 2I if that
is, at every frequency. Symbols are known up to a phase each. Parts are coupled along a tree (z_k
and l_k hang on z_{k−1} by the same E_k), so a diagonal unitary matrix takes all phases away.

**Rounding.** A Cholesky decomposition of τI − T̂, whose trace is nτ, that completes in floating
point proves λ(T̂) ≤ τ + 4(n + 1)ε·nτ, as in :func:`~iresnet_jax.bounds.layer_upper_bound`. It is
done in blocks, the hidden parts first: what is the same at all frequencies, or falls into pixels,
is decomposed once. The columns of x and y are scaled after the forward substitution; the few
roundings of that are within the constant, of which complex products need less than half.
T̂ is T up to the errors of :class:`~iresnet_jax.affine_rows.LayerMatrices`.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Inexact
from scipy.linalg import solve_triangular

from iresnet_jax.affine_rows import (
    MULTIPLIERS,
    AffineRow,
    Diagonal,
    Frame,
    LayerMatrices,
    Slopes,
    exponent_of,
    frame_of,
    matrices_of,
    split,
)
from iresnet_jax.bounds import finite_cholesky
from iresnet_jax.lipsdp_search import find_multipliers
from iresnet_jax.norm_proofs import operator_digest, proved_norm, remembered
from iresnet_jax.outward import product_above
from iresnet_jax.stages import Sequential
from iresnet_jax.types import Shape

HostArray = Inexact[np.ndarray, "..."]

_EPSILON = float(np.finfo(np.float64).eps)
_WORTH = 1e-3  # a smaller product leaves nothing to gain
_RANGE = (1e-200, 1e200)  # of products
_MARGIN = 1e-12  # of a few float64 operations
_OUTER_ERRORS = 1e-6  # what the first and the last layer's may come to, each
_INFLATIONS = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3)  # of L, until a decomposition succeeds
_LARGEST_EXPONENT = 80  # of the eighth root of 2: a factor of 1,024
_CHUNK = 2**22  # entries of hidden parts, or of their solutions, held at once


def whole_bound(branch: Sequential, shape: Shape) -> float:
    """Bound a branch's Lipschitz constant as a whole, at most by the product of its stages'.

    Args:
      branch: with concrete weights.
      shape: of one input, without batch axis.
    """
    product = branch.lipschitz_bound()
    if type(branch) is not Sequential or not _WORTH < product < math.inf:
        return product
    rows, rest = split(branch, shape)
    return min(product_above(rest, *map(row_bound, rows)) * (1.0 + _MARGIN), product)


def row_bound(row: AffineRow) -> float:
    """Bound a row of layers as a whole, at most by the product of norms and slopes; from memory."""
    key = f"{[operator_digest(op) for op in row.operators]} {row.slopes} {row.shape}"
    return remembered(key, lambda: _row_bound(row))


def _row_bound(row: AffineRow) -> float:
    norms = [proved_norm(op) for op in row.operators]
    slopes = [max(-low, high) for low, high in row.slopes]
    product = product_above(*norms, *slopes) * (1.0 + _MARGIN)
    frame = frame_of(row)
    if frame is None or not _RANGE[0] < product < _RANGE[1]:
        return product
    return min(proved_bound(row, frame, find_multipliers(row, frame, norms)), product)


def proved_bound(row: AffineRow, frame: Frame, diagonals: Sequence[Diagonal]) -> float:
    """Prove the least L that multipliers allow; infinite where they allow none.

    Args:
      row: the layers.
      frame: how they are written as matrices.
      diagonals: D_1 … D_{m−1}, of the kernels as :func:`~iresnet_jax.affine_rows.matrices_of`
        scales them.
    """
    low, high = MULTIPLIERS
    if not all(((low < d) & (d < high)).all() for d in diagonals):
        return math.inf
    edges = matrices_of(row, frame, diagonals)
    parts = _Parts(edges, row.slopes)
    budget = _budget(edges, parts, frame)
    try:
        grams = np.concatenate(list(_outer_grams(edges, parts, budget.tau)))
        outer = _OuterParts(grams, edges[0].values.shape[-1])
        factor = _best_factor(outer, budget.tau)
        guess = outer.least_bound(budget.tau, factor)
    except np.linalg.LinAlgError:
        return math.inf
    if not budget.last / factor <= _OUTER_ERRORS:
        return math.inf
    for inflation in _INFLATIONS:
        bound = max(guess * (1.0 + inflation), 2.0 * factor * budget.first / _OUTER_ERRORS)
        if outer.prove(budget.tau, factor, bound):
            return math.ldexp(bound, sum(map(exponent_of, row.operators))) * (1.0 + _MARGIN)
    return math.inf


class _Parts:
    """The hidden parts z_1, l_1, z_2 … of a pixel, their places, and what couples them.

    Attributes:
      along: what E_k is multiplied by for z_k, k < m.
      leaf: for l_k; where it is 0, the part is left out.
      size: of all.
    """

    def __init__(self, edges: Sequence[LayerMatrices], slopes: Sequence[Slopes]) -> None:
        self.along = [low + high for low, high in slopes]
        self.leaf = [2.0 * math.sqrt(-low * high) for low, high in slopes]
        widths = [edge.values.shape[-2] for edge in edges[:-1]]
        sizes = [s for w, leaf in zip(widths, self.leaf, strict=True) for s in (w, w * (leaf > 0))]
        ends = np.cumsum(sizes).tolist()
        self._places = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
        self.size: int = ends[-1]

    def z(self, k: int) -> slice:
        return self._places[2 * k]

    def l(self, k: int) -> slice:  # noqa: E743
        return self._places[2 * k + 1]


class _Budget(NamedTuple):
    """How the errors of T̂ and of its decomposition add up to 2.

    Attributes:
      tau: the largest eigenvalue of T̂ that is proved, such that T's is at most 2.
      first: error of the first layer's couplings, without D_0⁻¹ = 2/L; that may raise it to
        _OUTER_ERRORS.
      last: of the last layer's; likewise, where a factor divides it.
    """

    tau: float
    first: float
    last: float


def _budget(edges: Sequence[LayerMatrices], parts: _Parts, frame: Frame) -> _Budget:
    norms = [*(abs(a) + b for a, b in zip(parts.along, parts.leaf, strict=True)), 1.0]
    first, *inner, last = (n * edge.error for n, edge in zip(norms, edges, strict=True))
    outer = edges[0].values.shape[-1] + edges[-1].values.shape[-2]
    size = frame.pixels * parts.size + outer
    slack = (1.0 + 4.0 * size * (size + 1) * _EPSILON) * (1.0 + 4.0 * _EPSILON)
    return _Budget((2.0 - 2.0 * _OUTER_ERRORS - sum(inner)) / slack, first, last)


class _OuterParts(NamedTuple):
    """XᴴX, where RᴴR are the hidden parts and X = R⁻ᴴF the columns of x and y.

    F is without D_0, which comes in later, as does a common factor of D_1 … D_{m−1}: both scale
    columns.

    Attributes:
      grams: [frequencies, in + out, in + out].
      inputs: how many of them are x's.
    """

    grams: HostArray
    inputs: int

    def least_bound(self, tau: float, factor: float) -> float:
        """Compute the least L, not yet proved; infinite where there is none.

        (L/2)²·τI ⪰ G_xx + G_xy(τI − G_yy)⁻¹G_yx at all frequencies.
        """
        grams = self._scaled(factor, factor)
        xx, xy = grams[:, : self.inputs, : self.inputs], grams[:, : self.inputs, self.inputs :]
        yy = grams[:, self.inputs :, self.inputs :]
        rest = tau * np.eye(yy.shape[-1]) - yy
        try:
            finite_cholesky(rest)
            squares = xx + xy @ np.linalg.solve(rest, np.swapaxes(xy, -1, -2).conj())
            largest = float(np.linalg.eigvalsh(squares)[:, -1].max())
        except np.linalg.LinAlgError:
            return math.inf
        return 2.0 * math.sqrt(largest / tau) if 0.0 <= largest < math.inf else math.inf

    def prove(self, tau: float, factor: float, bound: float) -> bool:
        """Say whether the decomposition of τI − T̂ completes."""
        if not 0.0 < bound < math.inf:
            return False
        scaled = self._scaled(factor, 2.0 * factor / bound)
        try:
            finite_cholesky(tau * np.eye(scaled.shape[-1]) - scaled)
        except np.linalg.LinAlgError:
            return False
        return True

    def _scaled(self, factor: float, first: float) -> HostArray:
        columns = np.full(self.grams.shape[-1], 1.0 / factor)
        columns[: self.inputs] = first
        with np.errstate(over="ignore", invalid="ignore"):
            return self.grams * columns * columns[:, None]


def _best_factor(outer: _OuterParts, tau: float) -> float:
    """A number that makes the bound small where all multipliers have it, by descent on 2^(e/8)."""

    def bound(exponent: int) -> float:
        return outer.least_bound(tau, 2.0 ** (exponent / 8))

    best = next((e for e in range(0, _LARGEST_EXPONENT, 4) if bound(e) < math.inf), 0)
    value = bound(best)
    for direction in (1, -1):
        while (found := bound(best + direction)) < value:
            best, value = best + direction, found
    return float(2.0 ** (best / 8))


def _outer_grams(
    edges: Sequence[LayerMatrices], parts: _Parts, tau: float
) -> Iterator[Float[np.ndarray, "frequencies outer outer"]]:
    """See :class:`_OuterParts`, some frequencies at a time.

    Raises:
      numpy.linalg.LinAlgError: where the hidden parts are not positive definite.
    """
    frequencies = max(len(edge.values) for edge in edges)
    pixels = max(edge.values.shape[1] for edge in edges)
    columns = edges[0].values.shape[-1] + edges[-1].values.shape[-2]
    shared = all(len(edge.values) == 1 for edge in edges[1:-1])
    factors = finite_cholesky(_hidden(edges, parts, tau, slice(None))) if shared else None
    step = max(1, _CHUNK // (parts.size * (pixels * columns + (0 if shared else parts.size))))
    for start in range(0, frequencies, step):
        chosen = slice(start, start + step)
        outer = _outer(edges, parts, chosen)
        own = finite_cholesky(_hidden(edges, parts, tau, chosen)) if factors is None else factors
        solved = _solved(own, np.broadcast_to(outer, (len(outer), pixels, *outer.shape[2:])))
        flat = solved.reshape(len(outer), -1, columns)
        yield np.swapaxes(flat, -1, -2).conj() @ flat


def _hidden(
    edges: Sequence[LayerMatrices], parts: _Parts, tau: float, frequencies: slice
) -> HostArray:
    """τI − T̂ between hidden parts, lower triangle, [frequencies or 1, pixels or 1, n, n]."""
    inner = [_at(edge.values, frequencies) for edge in edges[1:-1]]
    shape = np.broadcast_shapes((1, 1), *(e.shape[:2] for e in inner))
    hidden = np.zeros((*shape, parts.size, parts.size), np.result_type(float, *inner))
    hidden[..., range(parts.size), range(parts.size)] = tau
    for k, edge in enumerate(inner, start=1):
        hidden[..., parts.z(k), parts.z(k - 1)] = -parts.along[k] * edge
        if parts.leaf[k]:
            hidden[..., parts.l(k), parts.z(k - 1)] = -parts.leaf[k] * edge
    return hidden


def _outer(edges: Sequence[LayerMatrices], parts: _Parts, frequencies: slice) -> HostArray:
    """−T̂ between hidden parts and x, y, without D_0⁻¹: [frequencies, pixels, n, in + out]."""
    first, last = (_at(edge.values, frequencies) for edge in (edges[0], edges[-1]))
    inputs = first.shape[-1]
    shape = np.broadcast_shapes(first.shape[:2], last.shape[:2])
    outer = np.zeros((*shape, parts.size, inputs + last.shape[-2]), np.result_type(first, last))
    outer[..., parts.z(0), :inputs] = -parts.along[0] * first
    if parts.leaf[0]:
        outer[..., parts.l(0), :inputs] = -parts.leaf[0] * first
    outer[..., parts.z(len(edges) - 2), inputs:] = -np.swapaxes(last, -1, -2).conj()
    return outer


def _at(values: HostArray, frequencies: slice) -> HostArray:
    return values[frequencies] if len(values) > 1 else values


def _solved(factors: HostArray, outer: HostArray) -> HostArray:
    """Forward substitution with the factors [frequencies or 1, pixels or 1, n, n]."""
    solved = np.empty(outer.shape, np.result_type(factors, outer))
    if len(factors) > 1:
        for place in np.ndindex(outer.shape[:2]):
            own = factors[place[0], min(place[1], factors.shape[1] - 1)]
            solved[place] = _substituted(own, outer[place])
        return solved
    for pixel in range(outer.shape[1]):
        columns = np.moveaxis(outer[:, pixel], 0, 1).reshape(outer.shape[2], -1)
        found = _substituted(factors[0, min(pixel, factors.shape[1] - 1)], columns)
        solved[:, pixel] = np.moveaxis(found.reshape(outer.shape[2], len(outer), -1), 1, 0)
    return solved


def _substituted(factor: HostArray, columns: HostArray) -> HostArray:
    """L⁻¹F, in real arithmetic where the factor is real."""
    if np.isrealobj(factor) and np.iscomplexobj(columns):
        return _substituted(factor, columns.real) + 1j * _substituted(factor, columns.imag)
    found: np.ndarray = solve_triangular(factor, columns, lower=True, check_finite=False)
    return found
