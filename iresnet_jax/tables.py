"""Tables as they come: what is wrong with one is named, and its columns are brought to one scale.

Everything here is on the host, in float64.
"""

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from iresnet_jax.actnorm import ActNorm
from iresnet_jax.asinh import Asinh
from iresnet_jax.bijections import Bijection
from iresnet_jax.checks import refuse_masked
from iresnet_jax.types import AnyArray

Rows = Float[np.ndarray, "rows columns"]
Weights = Float[np.ndarray, " rows"]

_MOST_NAMED = 8
_FEWEST_ROWS = 10
_DEPENDENT = 1e-10  # smallest eigenvalue of a correlation matrix
_DEPENDENT_SCALE = 1e-6  # of what is left of a column, beside its own scale
_RESOLVED = 1e-3  # what rounding may take of a column's scale
_SCALES = (1e-30, 1e30)
_HEAVY = 12.0  # scales from the median to the farthest value
_DISTINCT = 20  # rows for each distinct value, from which a column counts as discrete
_ATOM = 0.25  # share of rows that hold one value, from which a column is not continuous
_NORMAL_QUARTILES = 1.349  # of the standard normal, their distance


class Table(NamedTuple):
    """Rows of numbers.

    Attributes:
      values: [rows, columns], finite.
      names: of the columns.
    """

    values: Rows
    names: tuple[str, ...]


def as_table(data: object, what: str = "data") -> Table:
    """Read an array [rows, columns], or a data frame of numbers.

    Raises:
      TypeError: for anything that is not numbers.
      ValueError: for another shape; for NaN or infinity, naming column and row; for too few rows.
    """
    columns = getattr(data, "columns", None)
    values = _as_numbers(data, what)
    if values.ndim != 2 or 0 in values.shape:
        hint = f"; one column of numbers is {what}[:, None]" if values.ndim == 1 else ""
        raise ValueError(f"{what} must be [rows, columns]; got an array of {values.shape}{hint}.")
    labels = range(values.shape[1]) if columns is None else columns
    names = tuple(repr(name) if isinstance(name, str) else str(name) for name in labels)
    if not (finite := np.isfinite(values)).all():
        bad = np.flatnonzero(~finite.all(axis=0))
        row = int(np.flatnonzero(~finite[:, bad[0]])[0])
        count = int((~finite).any(axis=1).sum())
        raise ValueError(
            f"{what} must be finite; {columns_told(names, bad)} hold NaN or infinity, first "
            f"{values[row, bad[0]]} in row {row}, {count} rows in all. Drop these, or fill them in."
        )
    return Table(values, names)


def check_table(table: Table, weights: Weights | None = None) -> None:
    """Refuse a table that has no density in float32; warn of columns that repeat few values.

    Args:
      table: to be fitted.
      weights: of its rows, > 0; by default the same for all.

    Raises:
      ValueError: naming columns that are constant, that others determine (as a duplicate), where
        there are more rows than columns, or that vary less than the numbers in use tell apart; for
        fewer than 10 rows.
    """
    values, names = table
    if len(values) < _FEWEST_ROWS:
        raise ValueError(
            f"A fit needs at least {_FEWEST_ROWS} rows of weight above 0; got {len(values)}."
        )
    if (constant := np.flatnonzero(values.min(axis=0) == values.max(axis=0))).size:
        raise ValueError(
            f"{columns_told(names, constant)} are constant: there is no density in them. Drop them."
        )
    _, scale = location_and_scale(values, np.ones(len(values)) if weights is None else weights)
    check_resolution(values, scale, names)
    _check_independent(values, scale, names)
    if few := [i for i, column in enumerate(values.T) if repeats_values(column)]:
        warnings.warn(
            f"{columns_told(names, few)} repeat few values: the density of such data has no upper "
            "bound. Add noise of the width of a step, or condition on them.",
            stacklevel=4,
        )


def repeats_values(values: Float[np.ndarray, " rows"]) -> bool:
    """Whether numbers are few distinct ones, or one of them is that of many rows."""
    counts = np.unique(values, return_counts=True)[1]
    return bool(counts.size * _DISTINCT <= values.size or counts.max() > _ATOM * values.size)


def standardizer(table: Table, weights: Weights) -> tuple[Bijection, ...]:
    """Return the bijections that bring the columns to one scale, ActNorm first.

    A column of light tails gets mean 0 and standard deviation 1. One with a value farther than 12
    standard deviations of a Gaussian with its quartiles from its median is divided by that
    deviation instead, and goes through :class:`~iresnet_jax.asinh.Asinh`.

    Args:
      table: a checked one.
      weights: of its rows, ≥ 0.
    """
    values = table.values
    middle, spread = location_and_scale(values, weights)
    heavy = np.abs(values - middle).max(axis=0) > _HEAVY * spread
    mean = np.average(values, axis=0, weights=weights)
    std = np.sqrt(np.average(np.square(values - mean), axis=0, weights=weights))
    location, scale = np.where(heavy, middle, mean), np.where(heavy, spread, std)
    norm = ActNorm(jnp.asarray(-np.log(scale), float), jnp.asarray(-location / scale, float))
    return (norm, Asinh(tuple(map(bool, heavy)))) if heavy.any() else (norm,)


def location_and_scale(values: Rows, weights: Weights) -> tuple[np.ndarray, np.ndarray]:
    """Return each column's median, and its standard deviation were it a Gaussian's by quartiles.

    Where more than half of a column is one value, it is the plain standard deviation.
    """
    low, middle, high = (_quantile(values, weights, q) for q in (0.25, 0.5, 0.75))
    scale = (high - low) / _NORMAL_QUARTILES
    mean = np.average(values, axis=0, weights=weights)
    std = np.sqrt(np.average(np.square(values - mean), axis=0, weights=weights))
    return middle, np.where(scale > 0.0, scale, std)


def as_weights(weights: AnyArray | None, rows: int) -> Weights:
    """Return the rows' weights in float64, the largest 1; ones for None.

    Raises:
      ValueError: unless there is one for each row, finite and ≥ 0, at least one above 0.
    """
    if weights is None:
        return np.ones(rows)
    values = _as_numbers(weights, "sample_weight")
    if values.shape != (rows,):
        raise ValueError(f"sample_weight must be [{rows}], one a row; got {values.shape}.")
    if not (np.isfinite(values).all() and values.min() >= 0.0 and values.max() > 0.0):
        raise ValueError(
            "sample_weight must be finite and ≥ 0, with one above 0; got values from "
            f"{values.min():.4g} to {values.max():.4g}."
        )
    scaled: np.ndarray = values / values.max()
    return scaled


def _as_numbers(data: object, what: str) -> np.ndarray:
    refuse_masked(data, what)
    values = np.asarray(data)
    if values.dtype.kind not in "fiub":
        raise TypeError(f"{what} must be numbers; got an array of {values.dtype}.")
    return values.astype(np.float64)


def _quantile(values: Rows, weights: Weights, q: float) -> np.ndarray:
    """Of each column: the smallest value that has the fraction ``q`` of the weight up to it."""
    order = np.argsort(values, axis=0)
    below = np.cumsum(weights[order], axis=0)
    at = np.argmax(below >= q * below[-1], axis=0)
    return np.take_along_axis(values, np.take_along_axis(order, at[None], 0), 0)[0]


def check_resolution(values: Rows, scale: np.ndarray, names: Sequence[str]) -> None:
    """Refuse columns that vary less than the numbers in use tell apart, or by a scale beyond them.

    Args:
      values: of a table.
      scale: of each column, as :func:`location_and_scale` finds it.
      names: of the columns.

    Raises:
      ValueError: naming them.
    """
    dtype = jax.dtypes.canonicalize_dtype(np.float64)
    error = float(np.finfo(dtype).eps) * np.abs(values).max(axis=0)
    far = np.abs(np.median(values, axis=0)) * float(np.finfo(dtype).eps)
    if (lost := np.flatnonzero(np.minimum(far, error) > _RESOLVED * scale)).size:
        at = int(lost[0])
        raise ValueError(
            f"{columns_told(names, lost)} vary too little for {dtype}, {names[at]} by "
            f"{scale[at]:.3g} around {np.median(values[:, at]):.6g}. Subtract that first."
        )
    low, high = _SCALES
    if (odd := np.flatnonzero(~((low < scale) & (scale < high)))).size:
        raise ValueError(
            f"{columns_told(names, odd)} vary by {scale[odd[0]]:.3g}, which must lie in "
            f"({low:g}, {high:g}). Change their units."
        )


def _check_independent(values: Rows, scale: np.ndarray, names: Sequence[str]) -> None:
    rows, columns = values.shape
    if rows <= columns:
        return
    centred = values - values.mean(axis=0)
    std = np.sqrt(np.mean(np.square(centred), axis=0))
    standard = centred / std
    eigenvalues, vectors = np.linalg.eigh(standard.T @ standard / rows)
    if eigenvalues[0] > _DEPENDENT:
        return
    weights = vectors[:, 0]
    left = standard @ weights
    part_scale = np.abs(weights) * scale / std  # of each term of the sum, outliers aside
    if np.median(np.abs(left - np.median(left))) > _DEPENDENT_SCALE * part_scale.max():
        return
    involved = np.flatnonzero(np.abs(weights) > 1e-4 * np.abs(weights).max())
    told = "repeat one another" if len(involved) == 2 else "are linearly dependent"
    raise ValueError(
        f"{columns_told(names, involved)} {told}, up to scale and offset: there is no density over "
        "all of them. Drop one."
    )


def columns_told(names: Sequence[str], places: Sequence[int] | np.ndarray) -> str:
    """Name the columns at these places, for a message; eight at most."""
    told = [names[i] for i in places[:_MOST_NAMED]]
    more = f" and {len(places) - len(told)} more" if len(places) > len(told) else ""
    return f"columns {', '.join(told)}{more}"


def mean_and_stderr(values: Weights, weights: Weights) -> tuple[float, float]:
    """Return the weighted mean of independent values, and its standard error; NaN of one value.

    The error is √(Σ sᵢ² (xᵢ − m)² / (1 − Σ sᵢ²)) with shares s of the weight: of equal ones, that
    of n − 1 degrees of freedom.
    """
    share = weights / weights.sum()
    mean = float(share @ values)
    freedom = 1.0 - float(share @ share)
    if len(values) < 2 or freedom <= 0.0:
        return mean, math.nan
    return mean, math.sqrt(float(np.square(share) @ np.square(values - mean)) / freedom)
