"""Matrices whose norms are that of a linear operator, or bound it: its own, or Fourier symbols.

**Which matrices.** A dense operator, or a convolution on a small image, has the norm of its matrix.
A zero-padded convolution on a larger image is a corner of a circular one. Let an axis have n
pixels, taps i = 0 … k−1 spaced by the dilation d, stride s, and padding lo before and hi after.
Output p reads the positions r = p·s + i·d − lo, all in [−lo, n + hi). On a cycle of
m ≥ n + max(lo, hi) points, positions outside the image stay outside: r < 0 becomes
r + m ≥ m − lo ≥ n, and r ≥ n stays, below n + hi ≤ m. So output p is that of the circular
convolution at p·s − lo (mod m). Two outputs that share a place there read nothing but padding,
since r and r + m are not both in the image. Let m be a multiple of s, and keep every s-th place of
the circular convolution. Its norm is the largest singular value over frequencies ω of the symbols
K̂(ω + a·m/s), a = 0 … s−1, side by side, divided by √s per axis (Sedghi, Gupta, Long 2019).

**Their rounding.** Let ε be the machine epsilon, twice the unit roundoff u. A sum of n complex
products, in any order, has an error of at most √2·γ(2n)·Σ|xᵢ||yᵢ|, γ(j) = ju/(1 − ju) (Higham 2002,
§3.6), here bounded by 4nε·Σ|xᵢ||yᵢ|. A factor exp(−2πi·j/m)/√s, |j| ≤ m/2, has an error of at most
8ε: 5ε from its angle, one unit in the last place from sine and cosine, 2ε from the division. The
symbols of a kernel of h×w taps thus have an error of at most η·S in Frobenius norm, with
η = 4(hw + 8)·ε and S = ‖Σ_taps |K_tap|‖_F. Matrices of copies of the kernel's entries have none.
"""

import math
from collections.abc import Iterator, Sequence
from types import ModuleType

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float, Inexact

from iresnet_jax.operators import ConvOperator, DenseOperator, LinearOperator
from iresnet_jax.types import Matrices, SameArray

Known = DenseOperator | ConvOperator

_CHUNK = 2**22  # symbol entries held at once


def is_small(operator: LinearOperator, max_dense_size: int) -> bool:
    """Say whether the operator's own matrix is taken instead of symbols."""
    sides = math.prod(operator.domain_shape), math.prod(operator.codomain_shape)
    small = min(sides) <= max_dense_size and max(sides) <= 8 * max_dense_size
    return small or isinstance(operator, DenseOperator)


def host_matrices(
    operator: Known, kernel: Float[np.ndarray, "..."], max_dense_size: int
) -> Iterator[Inexact[np.ndarray, "number rows columns"]]:
    """Build matrices [number, n, c], n ≤ c, in chunks: the largest norm is the operator's bound."""
    if isinstance(operator, DenseOperator):
        yield _wide(kernel[None])
    elif is_small(operator, max_dense_size):
        yield _wide(conv_matrix(operator, kernel, np)[None])
    else:
        down, across = _fourier_factors(operator)
        order = np.random.default_rng(0)  # neighbours are alike: in random order few set a record
        down, across = order.permutation(down), order.permutation(across)
        size = math.prod((*across.shape[:2], down.shape[1], *kernel.shape[2:]))
        step = max(1, _CHUNK // size)
        for start in range(0, len(down), step):
            yield _wide(_symbols(kernel, down[start : start + step], across, np))


def traced_matrices(operator: Known, kernel: Float[Array, "..."], max_dense_size: int) -> Matrices:
    """Build the same in one piece, inside a traced computation."""
    if isinstance(operator, DenseOperator):
        return _wide(kernel[None])
    if is_small(operator, max_dense_size):
        return _wide(conv_matrix(operator, kernel, jnp)[None])
    dtype = jnp.promote_types(kernel.dtype, jnp.complex64)
    down, across = (jnp.asarray(factors, dtype) for factors in _fourier_factors(operator))
    return _wide(_symbols(kernel.astype(dtype), down, across, jnp))


def _wide(matrices: Inexact[SameArray, "number _ _"]) -> Inexact[SameArray, "number rows columns"]:
    """The matrices, transposed where they have more rows than columns: their norms are equal."""
    rows, columns = matrices.shape[-2:]
    return matrices if rows <= columns else matrices.swapaxes(-1, -2)


def _axes(
    operator: ConvOperator,
) -> Iterator[tuple[int, int, int, int, tuple[int, int], int]]:
    """For each axis: input and output pixels, taps, stride, padding and dilation."""
    return zip(
        operator.image_shape,
        operator.codomain_shape[:2],
        operator.kernel_size,
        operator.strides,
        operator.padding,
        operator.dilation,
        strict=True,
    )


def conv_matrix(
    operator: ConvOperator, kernel: Float[SameArray, "h w in out"], xp: ModuleType
) -> Float[SameArray, "codomain domain"]:
    """Build the convolution's matrix [codomain size, domain size], of copies of its entries."""
    rows, columns = (
        # [taps, out, in]: whether the output reads this input pixel through this tap
        np.arange(n) == s * np.arange(out)[:, None] + d * np.arange(k)[:, None, None] - low
        for n, out, k, s, (low, _), d in _axes(operator)
    )
    reads = (xp.asarray(axis, kernel.dtype) for axis in (rows, columns))
    matrix: SameArray = xp.einsum("iph,jqw,ijab->pqbhwa", *reads, kernel, optimize=True)
    return matrix.reshape(math.prod(operator.codomain_shape), -1)


def common_grid(operators: Sequence[ConvOperator]) -> tuple[int, int] | None:
    """Find a torus of which the image of all these convolutions is a corner, as above.

    None unless all of them map images of one size to images of that size, without strides.
    """
    sizes = {op.image_shape for op in operators} | {op.codomain_shape[:2] for op in operators}
    if len(sizes) != 1 or any(op.strides != (1, 1) for op in operators):
        return None
    (height, width) = sizes.pop()
    down, across = (max(max(op.padding[axis]) for op in operators) for axis in (0, 1))
    return height + down, width + across


def circular_symbols(
    operator: Known,
    kernel: Float[np.ndarray, "..."],
    grid: tuple[int, int],
    frequencies: Sequence[int] | None = None,
) -> Inexact[np.ndarray, "frequencies out in"]:
    """Build the symbols on a :func:`common_grid`, up to a phase; one for all where W is 1×1.

    The phase, of the padding, is the same for all entries of a symbol.

    Args:
      operator: the geometry.
      kernel: in the shape of the operator's.
      grid: of the torus.
      frequencies: those wanted, by their index; by default half of all, which conjugation doubles.
    """
    if isinstance(operator, DenseOperator):
        return kernel.T[None]
    down, across = _fourier_factors(operator, grid)
    which = np.arange(len(down) * len(across)) if frequencies is None else np.asarray(frequencies)
    down, across = down[which // len(across), 0], across[which % len(across), 0]
    symbols: np.ndarray = np.einsum("xi,xj,ijcd->xdc", down, across, kernel, optimize=True)
    return symbols


def phased_symbols(
    operator: Known,
    kernel: Float[SameArray, "..."],
    grid: tuple[int, int],
    down: np.ndarray,
    xp: ModuleType,
) -> Inexact[SameArray, "frequencies out in"]:
    """Build the symbols with the phase of the padding, which layers of other kernels do not share.

    Args:
      operator: the geometry.
      kernel: in the shape of the operator's.
      grid: of the torus.
      down: frequencies wanted of the first axis, by their index; with all of the second.
      xp: NumPy, or JAX's.
    """
    if isinstance(operator, DenseOperator):
        return kernel.T[None]
    factors = []
    for axis, frequencies in enumerate((down, np.arange(grid[1]))):
        taps = operator.dilation[axis] * np.arange(kernel.shape[axis]) - operator.padding[axis][0]
        turns = frequencies[:, None] * taps % grid[axis]
        turns = np.where(turns > grid[axis] // 2, turns - grid[axis], turns)
        factors.append(np.exp(-2j * np.pi * (turns / grid[axis])))
    dtype = xp.promote_types(kernel.dtype, np.complex64)
    across = [xp.asarray(factor, dtype) for factor in factors]
    wide = kernel.astype(dtype)
    symbols: SameArray = xp.einsum("xi,yj,ijcd->xydc", *across, wide, optimize=True)
    return symbols.reshape(-1, *symbols.shape[2:])


def num_frequencies(grid: tuple[int, int]) -> int:
    """Count the frequencies of which conjugation gives all others."""
    return (grid[0] // 2 + 1) * grid[1]


def _fourier_factors(
    operator: ConvOperator, grid: tuple[int, int] | None = None
) -> Iterator[Complex[np.ndarray, "frequencies aliases taps"]]:
    """For each axis exp(−2πi·ω·tap/m), [frequencies ω mod m/s, aliases s, taps], over √s.

    By conjugate symmetry half of the first axis' frequencies will do.
    """
    for axis, (n, _, k, s, pad, d) in enumerate(_axes(operator)):
        m = -(-(n + max(pad)) // s) * s if grid is None else grid[axis]
        frequencies = np.arange(m).reshape(s, m // s).T
        turns = frequencies[..., None] * (d * np.arange(k)) % m
        turns = np.where(turns > m // 2, turns - m, turns)
        kept = m // s // 2 + 1 if axis == 0 else m // s
        yield np.exp(-2j * np.pi * (turns[:kept] / m)) / math.sqrt(s)


def _symbols(
    kernel: Inexact[SameArray, "h w in out"],
    down: Complex[SameArray, "x a h"],
    across: Complex[SameArray, "y b w"],
    xp: ModuleType,
) -> Complex[SameArray, "frequencies out aliased_in"]:
    """Matrices [frequencies, out, aliases·in] of the factors of both axes and a kernel."""
    symbols: SameArray = xp.einsum("xai,ybj,ijcd->xydabc", down, across, kernel, optimize=True)
    return symbols.reshape(len(down) * len(across), kernel.shape[-1], -1)


def symbol_error(
    operator: LinearOperator, kernel: Float[SameArray, "..."], max_dense_size: int, epsilon: float
) -> float | Float[SameArray, ""]:
    """Compute η·S of the module's docstring; zero where no symbols are used."""
    if is_small(operator, max_dense_size):
        return 0.0
    return relative_symbol_error(operator, epsilon) * tap_sum_norm(kernel)


def relative_symbol_error(operator: LinearOperator, epsilon: float) -> float:
    """Compute η of the module's docstring; zero of a DenseOperator."""
    if isinstance(operator, DenseOperator):
        return 0.0
    return 4.0 * (math.prod(operator.kernel.shape[:2]) + 8) * epsilon


def tap_sum_norm(kernel: Float[SameArray, "..."]) -> float | Float[SameArray, ""]:
    """Compute S of the module's docstring."""
    norm: SameArray = (abs(kernel).sum(axis=tuple(range(kernel.ndim - 2))) ** 2).sum() ** 0.5
    return norm
