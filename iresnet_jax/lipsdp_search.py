"""Search for the multipliers that make a row of layers' whole bound small; it proves nothing.

Adam on their logarithms, in single precision, at some of the frequencies. For the theorem and the
notation see :mod:`iresnet_jax.lipsdp`, which proves whatever is found here. Nothing is compiled:
layers of any shape are bounded at once.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Inexact

from iresnet_jax.affine_rows import (
    AffineRow,
    Diagonal,
    Frame,
    Slopes,
    exponent_of,
    matrices_of,
)
from iresnet_jax.symbols import num_frequencies

#: [pixels, channels], one for each hidden layer.
Logs = list[Float[np.ndarray, "_ _"]]
#: [frequencies, pixels, rows, columns]; either of the first may be 1 where it is the same for all.
Stacked = Inexact[np.ndarray, "_ _ _ _"]
#: [frequencies, rows, columns].
Squares = Inexact[np.ndarray, "_ _ _"]

_ROUNDS = 2
_LEAST_STEPS, _MOST_STEPS = 40, 200  # of a round: the fewer the more of
_WORK = 2e10  # a round takes, in products of one step
_STEP_SIZE, _LEAST_STEP_SIZE = 0.1, 0.01
_PATIENCE, _GAIN = 8, 1e-3  # steps without a gain of the logarithm
_SQUARINGS = 6  # of the smooth maximum: the 64-norm of the eigenvalues
_FREQUENCIES = 8  # at most
_COLUMNS = 600  # of all frequencies' outer parts: fewer frequencies for wide inputs
_SLACK = 1.03  # of each hidden layer, at the start


def find_multipliers(row: AffineRow, frame: Frame, norms: Sequence[float]) -> list[Diagonal]:
    """Find D_1 … D_{m−1}, in float64, of the kernels as ``matrices_of`` scales them.

    Args:
      row: the layers.
      frame: as of :func:`~iresnet_jax.affine_rows.frame_of`.
      norms: of the layers.
    """
    exponents = map(exponent_of, row.operators)
    norms = [math.ldexp(norm, -e) for norm, e in zip(norms, exponents, strict=True)]
    with np.errstate(all="ignore"):  # whatever is found, it is proved or refused
        return _multipliers(row, frame, norms)


def _multipliers(row: AffineRow, frame: Frame, norms: Sequence[float]) -> list[Diagonal]:
    logs = _start(row, frame)
    total = 1 if frame.grid is None else num_frequencies(frame.grid)
    most = max(3, min(_FREQUENCIES, _COLUMNS // row.shape[-1]))
    for _ in range(_ROUNDS):
        chosen = list(range(total))
        if total > most:
            chosen = _steepest(logs, row, frame, norms, total)[:most]
        logs = _improved(logs, _normalised(row, frame, norms, chosen), row.slopes)
    after = np.cumprod(np.asarray(norms, np.float64)[:0:-1])[::-1]
    pairs = zip(logs, after, strict=True)
    return [np.exp(log.astype(np.float64)) * factor for log, factor in pairs]


class Bound(NamedTuple):
    """What multipliers give.

    Attributes:
      squares: S(ω), of which 4·max λ is the square of the least L.
      flows: for each log-multiplier, pairs (A, B): its derivative of Re tr(P S) is that of the sum
        of their diagonals of A P Bᴴ, over frequencies.
    """

    squares: Squares
    flows: list[list[tuple[Stacked, Stacked]]]

    def gradient(self, weights: Squares) -> Logs:
        """Differentiate Σ_ω Re tr(P(ω) S(ω)) by the logarithms, for constant P, the ``weights``."""
        return [
            np.stack([_diagonal(a, weights, b) for a, b in pairs]).sum(0) for pairs in self.flows
        ]


def bound_of(logs: Logs, weights: Sequence[Stacked], slopes: Sequence[Slopes]) -> Bound:
    """Eliminate all parts but x from 2I − T, and keep the solutions.

    Args:
      logs: log D_1 … log D_{m−1}.
      weights: W_1 … W_m.
      slopes: of the activations in between.

    Raises:
      numpy.linalg.LinAlgError: where no L will do.
    """
    scales = [np.exp(log) for log in logs]
    edges = [d[..., None] * w for d, w in zip(scales, weights[:-1], strict=True)]
    edges[1:] = [e / d[:, None] for e, d in zip(edges[1:], scales[:-1], strict=True)]
    last = weights[-1] / scales[-1][:, None]
    alongs = [low + high for low, high in slopes]
    leaves = [2.0 * (-low * high) ** 0.5 for low, high in slopes]

    # From the last hidden part to the first: y stays, as right-hand sides.
    inverses: list[Stacked | None] = [None] * len(edges)  # None for ½I
    rights = [_adjoint(last)] * len(edges)
    yy = _gram(rights[-1], _times(inverses[-1], rights[-1]))
    for k in range(len(edges) - 1, 0, -1):
        edge = alongs[k] * edges[k]
        rights[k - 1] = _times(_adjoint(edge), _times(inverses[k], rights[k]))
        schur = _twice_identity(edge) - _adjoint(edge) @ _times(inverses[k], edge)
        schur = schur - 0.5 * leaves[k] ** 2 * _adjoint(edges[k]) @ edges[k]
        np.linalg.cholesky(schur)
        inverses[k - 1] = np.linalg.inv(schur)
        yy = yy + _gram(rights[k - 1], _times(inverses[k - 1], rights[k - 1]))

    left = alongs[0] * edges[0]
    solved = _times(inverses[0], left)
    yx = _gram(rights[0], solved)
    rest = 2.0 * np.eye(yy.shape[-1], dtype=yy.dtype) - yy
    np.linalg.cholesky(rest)
    y = np.linalg.solve(rest, yx)[:, None]
    first_leaf = 0.5 * leaves[0] ** 2 * _gram(edges[0], edges[0])
    squares = 0.5 * (_gram(left, solved) + first_leaf + _adjoint(yx) @ y[:, 0])

    # Back to the last: every part, as a response to x.
    parts: list[Stacked] = []
    flows: list[list[tuple[Stacked, Stacked]]] = []
    for k, edge in enumerate(edges):
        into = edge if k == 0 else _times(edge, parts[-1])
        parts.append(_times(inverses[k], alongs[k] * into + _times(rights[k], y)))
        if k:
            back = alongs[k] * _times(_adjoint(edge), parts[k])
            back = back + 0.5 * leaves[k] ** 2 * _times(_adjoint(edge), into)
            flows[-1].append((-parts[k - 1], back))
        flows.append([(into, alongs[k] * parts[k] + 0.5 * leaves[k] ** 2 * into)])
    flows[-1].append((-parts[-1], _times(_adjoint(last), y)))
    return Bound(squares, flows)


def _improved(logs: Logs, weights: Sequence[Stacked], slopes: Sequence[Slopes]) -> Logs:
    """Run Adam; halve its steps, and go back to the best, where it gains nothing for a while."""
    best, least, size = logs, np.inf, _STEP_SIZE
    last_gain, mark, most = 0, np.inf, _steps(logs, weights)
    mean = square = [np.zeros_like(log) for log in logs]
    for step in range(1, most + 1):
        try:
            bound = bound_of(logs, weights, slopes)
            value, of_squares = _smooth_log_maximum(bound.squares)
        except np.linalg.LinAlgError:
            value = np.inf
        if value < least:
            best, least = logs, value
        if value < mark - _GAIN:
            last_gain, mark = step, value
        if not np.isfinite(value) or step - last_gain >= _PATIENCE:
            size, logs, last_gain = 0.5 * size, best, step
            if size < _LEAST_STEP_SIZE:
                break
            continue
        gradient = bound.gradient(of_squares)
        mean = [0.9 * m + 0.1 * g for m, g in zip(mean, gradient, strict=True)]
        square = [0.95 * s + 0.05 * g * g for s, g in zip(square, gradient, strict=True)]
        ending = min(1.0, 3.0 * (1.0 - step / most) + 0.1)
        factor = np.float32(ending * size * np.sqrt(1.0 - 0.95**step) / (1.0 - 0.9**step))
        triples = zip(logs, mean, square, strict=True)
        logs = [x - factor * m / (np.sqrt(s) + 1e-9) for x, m, s in triples]
    return best


def _steps(logs: Logs, weights: Sequence[Stacked]) -> int:
    frequencies = max(len(w) for w in weights)
    pixels, width = max(log.shape for log in logs)
    outer = weights[0].shape[-1] + weights[-1].shape[-2]
    work = pixels * width**2 * (width + frequencies * outer)
    return int(np.clip(_WORK / work, _LEAST_STEPS, _MOST_STEPS))


def _start(row: AffineRow, frame: Frame) -> Logs:
    weights = matrices_of(row, frame, frequencies=[0])
    sizes = [(frame.pixels, w.values.shape[-2]) for w in weights[:-1]]
    above = range(len(sizes) - 1, -1, -1)
    return [
        np.full(size, np.log(_SLACK) * k, np.float32) for k, size in zip(above, sizes, strict=True)
    ]


def _normalised(
    row: AffineRow, frame: Frame, norms: Sequence[float], frequencies: Sequence[int]
) -> list[Stacked]:
    weights = matrices_of(row, frame, frequencies=frequencies)
    values = [w.values / norm for w, norm in zip(weights, norms, strict=True)]
    return [v.astype(np.complex64 if np.iscomplexobj(v) else np.float32) for v in values]


def _steepest(
    logs: Logs, row: AffineRow, frame: Frame, norms: Sequence[float], total: int
) -> list[int]:
    """All frequencies, those that bind most first, but for a few from all over among them."""
    sizes: list[float] = []
    for start in range(0, total, _FREQUENCIES):
        group = range(start, min(start + _FREQUENCIES, total))
        try:
            bound = bound_of(logs, _normalised(row, frame, norms, group), row.slopes)
            sizes += np.linalg.eigvalsh(bound.squares)[:, -1].tolist()
        except np.linalg.LinAlgError:
            sizes += [np.inf] * len(group)
    order = np.argsort(-np.asarray(sizes))
    spread = order[[total // 3, 2 * total // 3]]
    return [*dict.fromkeys([*order[:2].tolist(), *spread.tolist(), *order.tolist()])]


def _smooth_log_maximum(squares: Squares) -> tuple[float, Squares]:
    """log (Σ λ^q)^{1/q} over all eigenvalues, and P of its derivative Σ_ω Re tr(P dS).

    q = 2^_SQUARINGS.
    """
    power, log = _in_range(squares)
    weights = np.eye(squares.shape[-1], dtype=squares.dtype)
    for _ in range(_SQUARINGS):
        weights, _ = _in_range(weights @ power)  # S^(q−1), up to a factor
        power, more = _in_range(power @ power)
        log = 2.0 * log + more
    traces = np.trace(power, axis1=-2, axis2=-1).real.sum()
    scale = (weights * np.swapaxes(squares, -1, -2)).real.sum()
    return float(log + np.log(traces)) / 2**_SQUARINGS, weights / scale


def _in_range(matrices: Squares) -> tuple[Squares, float]:
    """Divide by the largest entry; return its logarithm too."""
    largest = np.float32(max(np.abs(matrices).max(), np.finfo(np.float32).tiny))
    return matrices / largest, float(np.log(np.float64(largest)))


def _diagonal(a: Stacked, weights: Squares, b: Stacked) -> Float[np.ndarray, "_ _"]:
    products = (_times(a, weights[:, None]) * b.conj()).real
    total: np.ndarray = products.sum((0, -1))
    return total


def _gram(a: Stacked, b: Stacked) -> Squares:
    """Σ AᴴB over pixels."""
    total: np.ndarray = _times(_adjoint(a), b).sum(1)
    return total


def _adjoint(matrices: np.ndarray) -> np.ndarray:
    return np.swapaxes(matrices, -1, -2).conj()


def _twice_identity(edge: Stacked) -> np.ndarray:
    return 2.0 * np.eye(edge.shape[-1], dtype=edge.dtype)


def _times(left: Stacked | None, right: Stacked) -> Stacked:
    """The product of matrices, where None is ½I; of a real and a complex one in real arithmetic."""
    if left is None:
        return np.float32(0.5) * right
    if np.isrealobj(left) and np.iscomplexobj(right):
        real = np.ascontiguousarray(right).view(right.real.dtype)
        return (left @ real).view(right.dtype)
    return left @ right
