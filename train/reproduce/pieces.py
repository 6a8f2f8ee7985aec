"""The figures and tables, by name."""

from collections.abc import Callable
from typing import NamedTuple

from train.reproduce import (
    bounds,
    convergence,
    figure_1,
    figure_2,
    figure_3,
    figure_4,
    figure_5,
    table_1,
    table_2,
    table_3,
    table_4,
)
from train.reproduce.result import Context, Result


class Piece(NamedTuple):
    """A figure or table.

    Attributes:
      title: what it shows.
      run: makes it.
      settings: the fields of the context that it depends on, beside the scale.
    """

    title: str
    run: Callable[[Context], Result]
    settings: tuple[str, ...] = ()


#: In the order in which they are made: what trains little comes first.
PIECES = {
    "figure-1": Piece("Dynamics of a standard and of an invertible network", figure_1.run),
    "table-1": Piece("Properties of invertible networks", table_1.run),
    "figure-2": Piece("Densities in the plane, beside a coupling flow", figure_2.run),
    "figure-3": Piece("Images recovered from a classifier's features", figure_3.run),
    "convergence": Piece("Convergence of the fixed-point inverse", convergence.run),
    "table-2": Piece("Test error against c", table_2.run),
    "table-3": Piece("A coupling network as a classifier", table_3.run),
    "table-4": Piece("Bits per dimension", table_4.run),
    "figure-4": Piece("The log-det estimator, and Theorem 4", figure_4.run),
    "figure-5": Piece("Samples", figure_5.run, ("temperatures",)),
    "bounds": Piece("Lemma 2 and the log-det bounds", bounds.run),
}
