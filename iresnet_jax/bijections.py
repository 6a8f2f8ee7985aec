"""Invertible maps, each with its guarantees, and chains of them.

Bijections compose in three ways: in a row (:class:`Chain`), repeated
(:class:`~iresnet_jax.stack.Stack`), and with half of the channels leaving on the way
(:class:`~iresnet_jax.flows.Flow`).
"""

import abc
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from iresnet_jax.certificates import BranchCertificate, Certificate, in_a_row
from iresnet_jax.checks import typed_key
from iresnet_jax.convergence import FixedPointInfo
from iresnet_jax.logdet import Estimator
from iresnet_jax.solvers import FixedPointIteration, Solver
from iresnet_jax.types import Batch, Keys, PerSample, Shape

Rows = TypeVar("Rows", Array, FixedPointInfo)

#: An output, and log|det ∂y/∂x| of each sample.
Mapped = tuple[Batch, PerSample]

#: An input, and how it was solved for; None where nothing was.
Inverted = tuple[Batch, FixedPointInfo | None]

MISPLACED = "is to see the data, and follows others"


class Error(NamedTuple):
    """How far a computed array can be from the exact one, for each sample.

    Attributes:
      bound: rigorous bound on the distance ‖x̂ − x‖₂, [batch].
      norm: bound on ‖x̂‖₂, [batch]; infinite where none is known.
    """

    bound: PerSample
    norm: PerSample


class BranchBounds(NamedTuple):
    """Rigorous bounds of one branch, or of a stack of branches along leading axes.

    Attributes:
      lipschitz: L.
      layers: path in the branch -> bound on the layer's norm.
      digest: hash of the branch that they are of.
    """

    lipschitz: np.ndarray
    layers: dict[str, np.ndarray]
    digest: np.ndarray


class Bijection(abc.ABC):
    """An invertible map of batches [batch, ...], a pytree of its weights.

    A subclass is a frozen dataclass, registered as a pytree. What is not abstract here is right for
    a transform without branches; see :class:`~iresnet_jax.residual.Residual` for one with.
    """

    @property
    def takes_unit_interval(self) -> bool:
        """Whether the data must lie in [0, 1]."""
        return False

    @property
    def keeps_values(self) -> bool:
        """Whether the entries of an output are entries of the input, or zero."""
        return False

    @property
    def num_branches(self) -> int:
        """How many branches log-determinants are estimated of: each takes a row of keys."""
        return 0

    @property
    def num_solves(self) -> int:
        """How many fixed-point equations the inverse solves: each gives a row of its report."""
        return 0

    @abc.abstractmethod
    def forward(self, x: Batch) -> Batch:
        """Map a batch ``x`` [batch, ...]."""

    @abc.abstractmethod
    def forward_and_log_det(self, x: Batch, estimator: Estimator, keys: Keys = None) -> Mapped:
        """Map a batch, with log|det ∂y/∂x| of each sample in nats, [batch].

        Args:
          x: [batch, ...].
          estimator: of log|det(I + J)|, such as ``TruncatedSeries(10)``.
          keys: [num_branches] or [num_branches, batch], as of
            :func:`~iresnet_jax.probes.block_keys`; None where the estimator draws none.
        """

    @abc.abstractmethod
    def inverse(self, y: Batch, solver: Solver = FixedPointIteration()) -> Inverted:
        """Invert a batch; with how it went, fields [num_solves, batch], or None without a solve."""

    @abc.abstractmethod
    def certify(self, name: str, shape: Shape) -> Certificate:
        """Bound the map and its inverse, on the host.

        Args:
          name: of its place in the network.
          shape: of one input, without batch axis.
        """

    @abc.abstractmethod
    def inverse_error(self, error: Error, info: FixedPointInfo | None, shape: Shape) -> Error:
        """Turn the error of an output, as it was inverted, into that of the computed input.

        Args:
          error: of the output.
          info: how the inverse went.
          shape: of one input, without batch axis.
        """

    def out_shape(self, shape: Shape) -> Shape:
        """Return the shape of one output for inputs of ``shape``, both without batch axis."""
        return shape

    def with_bounds(self, bounds: Iterator[BranchBounds]) -> Self:
        """Attach rigorous bounds, which come in order; :meth:`bounded_by` takes a certificate."""
        del bounds
        return self

    def bounded_by(self, certificate: Certificate) -> Self:
        """Attach the bounds of a certificate: inverses then report their error bound.

        Args:
          certificate: of this very bijection, such as ``self.certify("stack", shape)``; of a stack
            in a model of your own, also its part ``Certificate(blocks)`` of the model's blocks.

        Raises:
          ValueError: for a certificate of other weights, where their values can be seen.
        """
        return self.with_bounds(checked_bounds(certificate, self.num_branches))

    @property
    def contracts(self) -> bool:
        """Whether every fixed-point equation has an attached bound L < 1; on the host."""
        return True

    def blocks(self) -> Iterator["Bijection"]:
        """Go through the parts that have branches, unstacked, first to last."""
        if self.num_branches:
            yield self

    def solve_names(self, name: str) -> list[str]:
        """Name every solve, in order."""
        return [name] * self.num_solves


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Chain(Bijection):
    """Bijections in a row, first to last: log-determinants add, bounds multiply.

    Attributes:
      links: what is composed.
    """

    links: tuple[Bijection, ...]

    @property
    def num_branches(self) -> int:
        return sum(link.num_branches for link in self.links)

    @property
    def num_solves(self) -> int:
        return sum(link.num_solves for link in self.links)

    @property
    def takes_unit_interval(self) -> bool:
        return any(link.takes_unit_interval for link in self.links[: self._reach_of_data()])

    @property
    def contracts(self) -> bool:
        return all(link.contracts for link in self.links)

    def forward(self, x: Batch) -> Batch:
        for link in self.links:
            x = link.forward(x)
        return x

    def forward_and_log_det(self, x: Batch, estimator: Estimator, keys: Keys = None) -> Mapped:
        check_keys(keys, self.num_branches)
        shared = shares(keys, [link.num_branches for link in self.links])
        log_det = jnp.zeros(x.shape[0], x.dtype)
        for link, own in zip(self.links, shared, strict=True):
            x, term = link.forward_and_log_det(x, estimator, own)
            log_det = log_det + term
        return x, log_det

    def inverse(self, y: Batch, solver: Solver = FixedPointIteration()) -> Inverted:
        infos: list[FixedPointInfo] = []
        for link in reversed(self.links):
            y, info = link.inverse(y, solver)
            infos = infos if info is None else [info, *infos]
        return y, joined(infos)

    def certify(self, name: str, shape: Shape) -> Certificate:
        steps = zip(self.links, self._names(name), self._shapes(shape), strict=True)
        whole = in_a_row(link.certify(own, at) for link, own, at in steps)
        late = (link for link in self.links[self._reach_of_data() :] if link.takes_unit_interval)
        return whole.with_problems(f"{type(link).__name__} {MISPLACED}" for link in late)

    def inverse_error(self, error: Error, info: FixedPointInfo | None, shape: Shape) -> Error:
        infos = shares(info, [link.num_solves for link in self.links])
        steps = list(zip(self.links, infos, self._shapes(shape), strict=True))
        for link, own, at in reversed(steps):
            error = link.inverse_error(error, own, at)
        return error

    def out_shape(self, shape: Shape) -> Shape:
        for link in self.links:
            shape = link.out_shape(shape)
        return shape

    def with_bounds(self, bounds: Iterator[BranchBounds]) -> Self:
        return dataclasses.replace(self, links=tuple(x.with_bounds(bounds) for x in self.links))

    def blocks(self) -> Iterator[Bijection]:
        return itertools.chain.from_iterable(link.blocks() for link in self.links)

    def solve_names(self, name: str) -> list[str]:
        pairs = zip(self.links, self._names(name), strict=True)
        return [solve for link, own in pairs for solve in link.solve_names(own)]

    def _reach_of_data(self) -> int:
        """How many links see values of the data themselves."""
        keeping = itertools.takewhile(lambda link: link.keeps_values, self.links)
        return 1 + sum(1 for _ in keeping)

    def _names(self, name: str) -> list[str]:
        """Parts with branches by their number where there are several."""
        count = sum(link.num_branches > 0 for link in self.links)
        numbers = itertools.count()
        return [
            f"{name}, part {next(numbers)}" if count > 1 and link.num_branches else name
            for link in self.links
        ]

    def _shapes(self, shape: Shape) -> list[Shape]:
        shapes = itertools.accumulate(self.links, lambda s, link: link.out_shape(s), initial=shape)
        return list(shapes)[:-1]


def check_keys(keys: Keys, count: int) -> None:
    """Refuse keys of another number of branches, by a ValueError; a TypeError for no keys."""
    if keys is None:
        return
    if not hasattr(keys, "dtype"):
        typed_key(keys)
    if keys.shape[:1] != (count,):
        raise ValueError(
            f"Keys are needed for {count} blocks, [{count}] or [{count}, batch]; got {keys.shape}."
        )


def shares(rows: Rows | None, counts: Sequence[int]) -> list[Rows | None]:
    """Split a pytree's leading axis into parts of so many rows; None and empty parts are None."""
    if rows is None:
        return [None] * len(counts)
    ends = itertools.accumulate(counts)
    places = [slice(end - n, end) for end, n in zip(ends, counts, strict=True)]
    return [_rows(rows, place) if place.start < place.stop else None for place in places]


def _rows(rows: Rows, place: slice) -> Rows:
    part: Rows = jax.tree.map(lambda leaf: leaf[place], rows)
    return part


def joined(infos: Sequence[FixedPointInfo]) -> FixedPointInfo | None:
    """Join reports along their first axis; None of none."""
    if not infos:
        return None
    return FixedPointInfo(*(jnp.concatenate(fields) for fields in zip(*infos, strict=True)))


def branch_bounds(branches: Sequence[BranchCertificate]) -> Iterator[BranchBounds]:
    """Go through what certificates state, as :meth:`Bijection.with_bounds` takes it."""
    for branch in branches:
        layers = {x.path: np.asarray(x.upper_bound) for x in branch.layers}
        yield BranchBounds(np.asarray(branch.lipschitz), layers, np.asarray(branch.digest))


def checked_bounds(certificate: Certificate, count: int) -> Iterator[BranchBounds]:
    """Go through a certificate's bounds; a ValueError unless they are of ``count`` branches."""
    if len(certificate.branches) != count:
        raise ValueError(
            f"The certificate is of {len(certificate.branches)} branches; this network has {count}."
        )
    return branch_bounds(certificate.branches)
