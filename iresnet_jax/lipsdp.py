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
channel alone commute with. The form's cross terms are the corner's, and ‖R C Rᵀz‖ ≤ ‖C Rᵀz‖ in its
negative squares (those of y and l_k; here −α_kβ_k ≥ 0 is used). So T(ω) ⪯ 2I at every frequency is
enough.

**Rounding.** A Cholesky decomposition of τI − T̂ in floating point that completes proves
λ(T̂) ≤ τ + 4(n + 1)ε·nτ, as in :func:`~iresnet_jax.bounds.layer_upper_bound`, T̂ being T up to the
errors of :class:`~iresnet_jax.affine_rows.LayerMatrices`. It is done in blocks, the hidden parts
first: what is the same at all frequencies, or falls into pixels, is decomposed once.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Inexact
from scipy.linalg import solve_triangular

from iresnet_jax.affine_rows import (
    AffineRow,
    Frame,
    LayerMatrices,
    Scale,
    Slopes,
    frame_of,
    matrices_of,
    split,
)
from iresnet_jax.lipsdp_search import find_multipliers
from iresnet_jax.norm_proofs import proved_norm
from iresnet_jax.stages import Sequential, as_used

HostArray = Inexact[np.ndarray, "..."]

_EPSILON = float(np.finfo(np.float64).eps)
_WORTH = 1e-3  # a smaller product leaves nothing to gain
_MARGIN = 1e-12  # of a few float64 operations
_OUTER_ERRORS = 1e-6  # what the first and the last layer's may come to each
_INFLATIONS = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3)  # of L, until a decomposition succeeds
_LARGEST_EXPONENT = 80  # of the eighth root of 2: a factor of 1,024
_CHUNK = 2**23  # entries of the hidden parts' solutions held at once


def whole_bound(branch: Sequential, shape: tuple[int, ...]) -> float:
    """Bound a branch's Lipschitz constant as a whole, at most by the product of its stages'.

    Args:
      branch: with concrete weights.
      shape: of one input, without batch axis.
    """
    product = branch.lipschitz_bound()
    if (
        type(branch) is not Sequential or not _WORTH < product < math.inf
    ):  # a subclass may map otherwise
        return product
    rows, rest = split(as_used(branch), shape)
    return min(rest * math.prod(map(row_bound, rows)) * (1.0 + _MARGIN), product)


def row_bound(row: AffineRow) -> float:
    """Bound a row of layers as a whole, at most by the product of the layers' norms and slopes."""
    norms = [proved_norm(op) for op in row.operators]
    slopes = [max(-low, high) for low, high in row.slopes]
    product = math.prod(norms) * math.prod(slopes) * (1.0 + _MARGIN)
    frame = frame_of(row)
    if frame is None or not 0.0 < product < math.inf:
        return product
    return min(proved_bound(row, frame, find_multipliers(row, frame, norms)), product)


def proved_bound(row: AffineRow, frame: Frame, scales: Sequence[Scale]) -> float:
    """Prove the least L that multipliers allow; infinite where they allow none.

    Args:
      row: the layers.
      frame: how they are written as matrices.
      scales: D_1 … D_{m−1}, in float64.
    """
    if not all(np.isfinite(d).all() and (d > 0.0).all() for d in scales):
        return math.inf
    with np.errstate(over="ignore", invalid="ignore"):
        edges = matrices_of(row, frame, scales)
    if not all(math.isfinite(edge.error) for edge in edges):
        return math.inf
    couplings = [_Coupling.of(slopes) for slopes in row.slopes]
    errors = [*(c.along + c.leaf for c in couplings), 1.0]
    errors = [norm * edge.error for norm, edge in zip(errors, edges, strict=True)]
    starts = _starts(edges, couplings)
    inputs, outputs = edges[0].values.shape[-1], edges[-1].values.shape[-2]
    size = frame.pixels * starts[-1] + inputs + outputs
    slack = (1.0 + 4.0 * size * (size + 1) * _EPSILON) * (1.0 + 4.0 * _EPSILON)
    tau = (2.0 - 2.0 * _OUTER_ERRORS - sum(errors[1:-1])) / slack
    try:
        grams = _OuterGrams(
            np.concatenate(list(_outer_grams(edges, couplings, starts, tau))), inputs
        )
    except np.linalg.LinAlgError:
        return math.inf
    factor = _best_factor(grams, tau)
    guess = grams.least(tau, factor)
    if not errors[-1] / factor <= _OUTER_ERRORS:
        return math.inf
    for inflation in _INFLATIONS:
        bound = max(guess * (1.0 + inflation), 2.0 * factor * errors[0] / _OUTER_ERRORS)
        if grams.prove(tau, factor, bound):
            return bound
    return math.inf


def _best_factor(grams: "_OuterGrams", tau: float) -> float:
    """A number that makes the bound small where all multipliers have it, by descent on 2^(e/8)."""

    def least(exponent: int) -> float:
        return grams.least(tau, 2.0 ** (exponent / 8))

    best = next((e for e in range(0, _LARGEST_EXPONENT, 4) if least(e) < math.inf), 0)
    value = least(best)
    for direction in (1, -1):
        while (found := least(best + direction)) < value:
            best, value = best + direction, found
    return float(2.0 ** (best / 8))


class _OuterGrams(NamedTuple):
    """XᴴX, where RᴴR are the hidden parts and X = R⁻ᴴF the outer ones' columns.

    F is without D_0, which comes in later, as does a common factor of D_1 … D_{m−1}: both scale
    columns.

    Attributes:
      values: [frequencies, in + out, in + out].
      inputs: how many of them are x's.
    """

    values: HostArray
    inputs: int

    def least(self, tau: float, factor: float) -> float:
        """Compute the least L, not yet proved; infinite where there is none.

        (L/2)²·τI ⪰ G_xx + G_xy(τI − G_yy)⁻¹G_yx at all frequencies.
        """
        grams = self.values * self._scale(factor, factor)
        xx, xy = grams[:, : self.inputs, : self.inputs], grams[:, : self.inputs, self.inputs :]
        yy = grams[:, self.inputs :, self.inputs :]
        rest = tau * np.eye(yy.shape[-1]) - yy
        try:
            np.linalg.cholesky(rest)
        except np.linalg.LinAlgError:
            return math.inf
        squares = xx + xy @ np.linalg.solve(rest, np.swapaxes(xy, -1, -2).conj())
        return 2.0 * math.sqrt(max(float(np.linalg.eigvalsh(squares)[:, -1].max()), 0.0) / tau)

    def prove(self, tau: float, factor: float, bound: float) -> bool:
        """Say whether the decomposition of τI − T̂ completes."""
        if not 0.0 < bound < math.inf:
            return False
        scaled = self.values * self._scale(factor, 2.0 * factor / bound)
        try:
            np.linalg.cholesky(tau * np.eye(scaled.shape[-1]) - scaled)
        except np.linalg.LinAlgError:
            return False
        return True

    def _scale(self, factor: float, first: float) -> Float[np.ndarray, "outer outer"]:
        scale = np.full(self.values.shape[-1], 1.0 / factor)
        scale[: self.inputs] = first
        return scale * scale[:, None]


class _Coupling(NamedTuple):
    """What E_k is multiplied by, for z_k and for l_k."""

    along: float
    leaf: float

    @classmethod
    def of(cls, slopes: Slopes) -> "_Coupling":
        low, high = slopes
        return cls(low + high, 2.0 * math.sqrt(-low * high))


def _starts(edges: Sequence[LayerMatrices], couplings: Sequence[_Coupling]) -> list[int]:
    """Where z_1, l_1, z_2, l_2 … begin among a pixel's hidden parts; last, how many there are.

    A part l_k that nothing couples to is empty.
    """
    sizes = [
        size
        for edge, coupling in zip(edges, couplings, strict=False)
        for size in (edge.values.shape[-2], edge.values.shape[-2] if coupling.leaf else 0)
    ]
    return [0, *np.cumsum(sizes).tolist()]


def _hidden(
    edges: Sequence[LayerMatrices],
    couplings: Sequence[_Coupling],
    starts: Sequence[int],
    tau: float,
) -> HostArray:
    """τI − T̂ between hidden parts, lower triangle, [frequencies or 1, pixels or 1, n, n]."""
    inner = [edge.values for edge in edges[1:-1]]
    shape = np.broadcast_shapes((1, 1), *(e.shape[:2] for e in inner))
    hidden = np.zeros((*shape, starts[-1], starts[-1]), np.result_type(float, *inner))
    hidden[..., range(starts[-1]), range(starts[-1])] = tau
    for k, edge in enumerate(inner, start=1):
        columns = slice(starts[2 * k - 2], starts[2 * k - 1])
        hidden[..., starts[2 * k] : starts[2 * k + 1], columns] = -couplings[k].along * edge
        if couplings[k].leaf:
            hidden[..., starts[2 * k + 1] : starts[2 * k + 2], columns] = -couplings[k].leaf * edge
    return hidden


def _outer(
    edges: Sequence[LayerMatrices],
    couplings: Sequence[_Coupling],
    starts: Sequence[int],
    frequencies: slice,
) -> HostArray:
    """−T̂ between hidden parts and x, y, without D_0⁻¹: [frequencies, pixels, n, in + out]."""
    first, last = edges[0].values, edges[-1].values
    inputs = first.shape[-1]
    first, last = (e[frequencies] if len(e) > 1 else e for e in (first, last))
    shape = np.broadcast_shapes(first.shape[:2], last.shape[:2])
    outer = np.zeros((*shape, starts[-1], inputs + last.shape[-2]), np.result_type(first, last))
    outer[..., : starts[1], :inputs] = -couplings[0].along * first
    if couplings[0].leaf:
        outer[..., starts[1] : starts[2], :inputs] = -couplings[0].leaf * first
    outer[..., starts[-3] : starts[-2], inputs:] = -np.swapaxes(last, -1, -2).conj()
    return outer


def _outer_grams(
    edges: Sequence[LayerMatrices],
    couplings: Sequence[_Coupling],
    starts: Sequence[int],
    tau: float,
) -> Iterator[HostArray]:
    """See :class:`_OuterGrams`, some frequencies at a time.

    Raises:
      numpy.linalg.LinAlgError: where the hidden parts are not positive definite.
    """
    factors = np.linalg.cholesky(_hidden(edges, couplings, starts, tau))
    frequencies = max(len(edge.values) for edge in edges)
    columns = edges[0].values.shape[-1] + edges[-1].values.shape[-2]
    pixels = max(edge.values.shape[1] for edge in edges)
    step = max(1, _CHUNK // (pixels * starts[-1] * columns))
    if len(factors) > 1:
        step = 1
    for start in range(0, frequencies, step):
        outer = _outer(edges, couplings, starts, slice(start, start + step))
        factor = factors[start] if len(factors) > 1 else factors[0]
        solved = _solved(factor, np.broadcast_to(outer, (len(outer), pixels, *outer.shape[2:])))
        flat = solved.reshape(len(outer), -1, columns)
        yield np.swapaxes(flat, -1, -2).conj() @ flat


def _solved(factors: HostArray, outer: HostArray) -> HostArray:
    """Forward substitution with each pixel's factor [n, n], for all frequencies at once."""
    solved = np.empty(outer.shape, np.result_type(factors, outer))
    for pixel in range(outer.shape[1]):
        factor = factors[min(pixel, len(factors) - 1)]
        columns = np.moveaxis(outer[:, pixel], 0, 1).reshape(outer.shape[2], -1)
        if np.isrealobj(factor) and np.iscomplexobj(columns):
            parts = np.concatenate([columns.real, columns.imag], axis=1)
            real = solve_triangular(factor, parts, lower=True, check_finite=False)
            found = real[:, : columns.shape[1]] + 1j * real[:, columns.shape[1] :]
        else:
            found = solve_triangular(factor, columns, lower=True, check_finite=False)
        by_frequency = found.reshape(outer.shape[2], len(outer), -1)
        solved[:, pixel] = np.moveaxis(by_frequency, 1, 0)
    return solved
