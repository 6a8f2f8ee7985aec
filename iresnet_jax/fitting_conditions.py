"""The conditions of a fit: vectors in any units, or classes; checked, and brought to one scale."""

from typing import Any, NamedTuple

import numpy as np

from iresnet_jax.bijections import Bijection
from iresnet_jax.checks import refuse_masked
from iresnet_jax.tables import (
    Table,
    Weights,
    as_table,
    check_resolution,
    columns_told,
    location_and_scale,
    standardizer,
)


class Conditions(NamedTuple):
    """A condition for each row of data.

    Attributes:
      values: vectors [rows, columns], or classes [rows], integers ≥ 0.
      names: of a vector's columns; () for classes.
    """

    values: np.ndarray
    names: tuple[str, ...]


def as_conditions(condition: Any, rows: int, what: str = "condition") -> Conditions:
    """Read vectors, an array [rows, columns] or a data frame, or classes, integers [rows].

    Raises:
      TypeError: for anything else than numbers; for one number a row that is no integer.
      ValueError: for another shape; for NaN or infinity, naming column and row; for classes below
        0; where there is not one condition for each row.
    """
    if np.ndim(condition) == 1:
        found = Conditions(_as_classes(condition, what), ())
    else:
        values, names = as_table(condition, what)
        found = Conditions(values, tuple(f"{name} of the condition" for name in names))
    if len(found.values) != rows:
        raise ValueError(
            f"{what} must have a row for each of the data's {rows}; got {len(found.values)}."
        )
    return found


def like(conditions: Conditions, others: Conditions) -> np.ndarray:
    """Return the values of others; a ValueError where they are not of the same columns."""
    if others.values.shape[1:] != conditions.values.shape[1:]:
        columns = len(conditions.names)
        told = f"vectors [rows, {columns}]" if columns else "classes [rows]"
        raise ValueError(
            f"The conditions of validation must be {told}, like those of the data; got "
            f"{others.values.shape}."
        )
    return others.values


def condition_entrance(
    conditions: Conditions, weights: Weights, standardize: bool
) -> tuple[Bijection, ...]:
    """Return the bijections that bring vectors to one scale, as :func:`standardizer` does.

    Columns that determine one another are not refused: a condition needs no density.

    Args:
      conditions: that are trained on.
      weights: of the rows, > 0.
      standardize: whether to.

    Raises:
      ValueError: naming columns that are constant, or vary less than the numbers in use tell apart.
    """
    values, names = conditions
    if values.ndim == 1:
        return ()
    if (constant := np.flatnonzero(values.min(axis=0) == values.max(axis=0))).size:
        raise ValueError(
            f"{columns_told(names, constant)} are constant among the rows that are trained on: "
            "nothing can be learned from them. Drop them."
        )
    _, scale = location_and_scale(values, weights)
    check_resolution(values, scale, names)
    return standardizer(Table(values, names), weights) if standardize else ()


def _as_classes(condition: object, what: str) -> np.ndarray:
    refuse_masked(condition, what)
    values = np.asarray(condition)
    if values.dtype.kind not in "iu":
        raise TypeError(
            f"{what} must be vectors [rows, columns], or classes [rows] as integers; got an array "
            f"of {values.dtype} {values.shape}. One column of numbers is {what}[:, None]."
        )
    if values.size and values.min() < 0:
        raise ValueError(f"Classes must be numbered 0, 1, 2, …; {what} has {values.min()}.")
    return values.astype(np.int64)
