"""Proof that V + Vᵀ + (2/c²)PPᵀ ⪯ 2I: see :mod:`iresnet_jax.monlip`.

Dense layers, and convolutions on small images, are their own matrices. Larger images are a corner
of a torus (:mod:`iresnet_jax.symbols`). On hidden values that vanish outside of the corner, zᵀVz is
that of the corner, and ‖Pᵀz‖² can only be more on the whole torus. So it is enough that the
condition holds for the symbols of every frequency ω, 2I − M(ω) being positive definite.

**Rounding.** M̂ is computed in float64, from symbols that err by at most η·S each
(:mod:`iresnet_jax.symbols`). Let n be the size of M(ω), e_V the sum of the errors of V_k's, e_P
that of all P_k's in the root of squares, and p ≥ ‖P̂‖_F. The two triangles of V + Vᵀ err by at most
2e_V; PPᵀ by 2pe_P + e_P² from the symbols and 4(m + 8)ε·p² from the product of m columns, times
2/c². The sum of the parts errs by 8ε of each entry. The
decomposition of a matrix with a diagonal of at most 2 that completes is that of one off by at most
8n(n + 1)ε in norm (Higham 2002, theorem 10.3). All of this is taken from 2I before.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Inexact

from iresnet_jax.bounds import finite_cholesky, known
from iresnet_jax.norm_proofs import operator_digest, remembered
from iresnet_jax.operators import ConvOperator, LinearOperator
from iresnet_jax.symbols import (
    Known,
    common_grid,
    conv_matrix,
    phased_symbols,
    relative_symbol_error,
    tap_sum_norm,
)

_EPSILON = float(np.finfo(np.float64).eps)
_MOST_DENSE = 1024  # hidden entries, and data's, of an image that is written as one matrix
_CHUNK = 2**22  # entries of M held at once
_MARGIN = 1e-12
#: c²/ℓ, until a decomposition completes; then bisected so many times.
_INFLATIONS = (1.0, *(1.0 + 10.0**e for e in range(-7, 0)), *(1.5**e for e in range(1, 12)))
_BISECTIONS = 8


class _Part(NamedTuple):
    """An operator's matrices, and their error in Frobenius norm at any frequency."""

    values: Inexact[np.ndarray, "frequencies out in"]
    error: float


class _Parts(NamedTuple):
    """P_1 … P_K and V_2 … V_K at some frequencies."""

    inputs: list[_Part]
    hidden: list[_Part]


def proved_square(
    inputs: Sequence[LinearOperator], hidden: Sequence[LinearOperator], shift: Float[Array, ""]
) -> float:
    """Return 2c² − ℓ for the least c² of a few for which the condition is proved; else infinity.

    Args:
      inputs: P_1 … P_K, concrete.
      hidden: V_2 … V_K.
      shift: ℓ; the result is infinite unless 0 < ℓ < ∞.

    Raises:
      TypeError: for operators other than dense ones and convolutions.
      ValueError: for layers that do not fit one another.
    """
    own_inputs, own_hidden = fitting(inputs, hidden)
    operators = [*own_inputs, *own_hidden]
    if np.ndim(shift):
        raise ValueError(f"shift must be one number; got an array of shape {np.shape(shift)}.")
    length = float(np.asarray(shift))
    finite = all(np.isfinite(np.asarray(op.kernel, np.float64)).all() for op in operators)
    if not finite or not 0.0 < length < math.inf:
        return math.inf
    key = f"monlip {len(inputs)} {length!r} {[operator_digest(op) for op in operators]}"
    return remembered(key, lambda: _proved_square(operators, len(inputs), length))


def _proved_square(operators: Sequence[Known], num_inputs: int, length: float) -> float:
    inputs, hidden = operators[:num_inputs], operators[num_inputs:]

    def proves(inflation: float) -> bool:
        return holds(inputs, hidden, length * inflation)

    high = next(filter(proves, _INFLATIONS), math.inf)
    if high == math.inf:
        return math.inf
    low = max((i for i in _INFLATIONS if i < high), default=high)
    for _ in range(_BISECTIONS if low < high else 0):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if proves(middle) else (middle, high)
    return (2.0 * high - 1.0) * length * (1.0 + _MARGIN)


def largest_eigenvalue(inputs: Sequence[Known], hidden: Sequence[Known]) -> float:
    """Compute λ_max(V + Vᵀ + 2SSᵀ), or that of the torus, in float64: not a proof.

    Infinite where it overflows.
    """
    found = 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        for parts in _parts(inputs, hidden):
            form = -_remainder(parts, 1.0)[0]
            if not np.isfinite(form).all():
                return math.inf
            found = max(found, float(np.linalg.eigvalsh(form)[:, -1].max()))
    return found


def holds(inputs: Sequence[Known], hidden: Sequence[Known], square: float) -> bool:
    """Say whether V + Vᵀ + (2/c²)PPᵀ ⪯ 2I is proved, c² = ``square``."""
    with np.errstate(over="ignore", invalid="ignore"):
        return all(_holds(parts, square) for parts in _parts(inputs, hidden))


def _holds(parts: _Parts, square: float) -> bool:
    rest, lost = _remainder(parts, square)
    diagonal = range(rest.shape[-1])
    rest[:, diagonal, diagonal] += 2.0 - lost * (1.0 + 1e-9)
    try:
        finite_cholesky(rest)
    except np.linalg.LinAlgError:
        return False
    return True


def _remainder(
    parts: _Parts, square: float
) -> tuple[Inexact[np.ndarray, "frequencies n n"], float]:
    """−M̂, and what its errors and those of a decomposition may come to."""
    widths = [part.values.shape[-2] for part in parts.inputs]
    ends = np.cumsum(widths).tolist()
    count = max(len(part.values) for part in (*parts.inputs, *parts.hidden))
    stacked = np.concatenate(
        [np.broadcast_to(p.values, (count, *p.values.shape[1:])) for p in parts.inputs], axis=1
    )
    size, columns = stacked.shape[-2:]
    rest = (-2.0 / square) * (stacked @ np.swapaxes(stacked, -1, -2).conj())
    rest = rest.astype(np.result_type(rest, *(part.values for part in parts.hidden)))
    largest = float(abs(rest).max())
    for k, part in enumerate(parts.hidden):
        before = slice(ends[k] - widths[k], ends[k])
        own = slice(ends[k], ends[k + 1])
        rest[:, own, before] -= part.values
        rest[:, before, own] -= np.swapaxes(part.values, -1, -2).conj()
        largest += float(abs(part.values).max())
    norm = math.sqrt(float((abs(stacked) ** 2).sum(axis=(-2, -1)).max()))
    error = math.hypot(*(part.error for part in parts.inputs))
    gram = 2.0 * norm * error + error**2 + 4.0 * (columns + 8) * _EPSILON * norm**2
    lost = 2.0 / square * gram + 2.0 * sum(part.error for part in parts.hidden)
    return rest, lost + 8.0 * _EPSILON * size * (size + 1 + largest)


def _parts(inputs: Sequence[Known], hidden: Sequence[Known]) -> Iterator[_Parts]:
    """The matrices, some frequencies at a time."""
    convolutions = [op for op in (*inputs, *hidden) if isinstance(op, ConvOperator)]
    if not convolutions:
        yield _Parts(*([_own_matrix(op, 1) for op in ops] for ops in (inputs, hidden)))
        return
    pixels = math.prod(convolutions[0].image_shape)
    widths = sum(op.kernel.shape[-1] for op in inputs), inputs[0].kernel.shape[-2]
    if pixels * max(widths) <= _MOST_DENSE:
        yield _Parts(*([_own_matrix(op, pixels) for op in ops] for ops in (inputs, hidden)))
        return
    grid = common_grid(convolutions)
    assert grid is not None  # fitting
    rows = max(1, _CHUNK // (widths[0] * max(widths) * grid[1]))
    for start in range(0, grid[0] // 2 + 1, rows):
        down = np.arange(start, min(start + rows, grid[0] // 2 + 1))
        yield _Parts(*([_symbols(op, grid, down) for op in ops] for ops in (inputs, hidden)))


def _own_matrix(operator: Known, pixels: int) -> _Part:
    kernel = np.asarray(operator.kernel, np.float64)
    if isinstance(operator, ConvOperator):
        return _Part(conv_matrix(operator, kernel, np)[None], 0.0)
    return _Part(np.kron(np.eye(pixels), kernel.T)[None], 0.0)


def _symbols(operator: Known, grid: tuple[int, int], down: np.ndarray) -> _Part:
    kernel = np.asarray(operator.kernel, np.float64)
    error = relative_symbol_error(operator, _EPSILON) * float(tap_sum_norm(kernel))
    return _Part(phased_symbols(operator, kernel, grid, down, np), error)


def fitting(
    inputs: Sequence[LinearOperator], hidden: Sequence[LinearOperator]
) -> tuple[tuple[Known, ...], tuple[Known, ...]]:
    """Return the layers, if they are of one image and their widths fit.

    Raises:
      TypeError: for operators other than dense ones and convolutions.
      ValueError: for layers that do not fit one another.
    """
    own = tuple(map(known, inputs)), tuple(map(known, hidden))
    _check_fit(*own)
    return own


def _check_fit(inputs: Sequence[Known], hidden: Sequence[Known]) -> None:
    """Refuse layers that are not of one image, or whose widths differ, by a ValueError."""
    convolutions = [op for op in (*inputs, *hidden) if isinstance(op, ConvOperator)]
    if convolutions and common_grid(convolutions) is None:
        told = ", ".join(f"{op.domain_shape} to {op.codomain_shape}" for op in convolutions)
        raise ValueError(
            "The convolutions of a MonLip branch map images of one size to that size, without "
            f"strides; got {told}."
        )
    if any(0 in op.kernel.shape for op in (*inputs, *hidden)):
        raise ValueError("A layer of a MonLip branch has no channels, or no taps.")
    widths = [op.kernel.shape[-1] for op in inputs]
    channels = {op.kernel.shape[-2] for op in inputs}
    found = [(op.kernel.shape[-2], op.kernel.shape[-1]) for op in hidden]
    if len(channels) > 1 or found != list(itertools.pairwise(widths)):
        raise ValueError(
            f"The hidden layers have {widths} channels, from data of {sorted(channels)}; layers "
            f"between them map {found}, which does not fit."
        )
