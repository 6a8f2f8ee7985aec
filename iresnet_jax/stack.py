"""Equal bijections in a row, their weights stacked, run by ``lax.scan``."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from iresnet_jax.bijections import (
    MISPLACED,
    Bijection,
    BranchBounds,
    Error,
    Inverted,
    Mapped,
    check_keys,
)
from iresnet_jax.certificates import Certificate, in_a_row
from iresnet_jax.convergence import FixedPointInfo
from iresnet_jax.logdet import Estimator
from iresnet_jax.operators import STATIC
from iresnet_jax.recomputation import kept_for_backward
from iresnet_jax.solvers import FixedPointIteration, Solver
from iresnet_jax.types import Batch, Keys, Shape

Carry = TypeVar("Carry")
Xs = TypeVar("Xs")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Stack(Bijection):
    """Equal blocks in a row, their leaves stacked along a leading axis, run by ``lax.scan``.

    Attributes:
      block: a bijection that keeps shapes, whose leaves have a leading axis of length ``depth``.
      depth: the number of blocks.
      remat: whether the backward pass recomputes blocks, keeping only their inputs and series'
        vectors; otherwise it keeps all products and convolutions too, and recomputes the rest.
      name: of the stack in certificates, such as "scale 0"; its place in the network by default.
    """

    block: Bijection
    depth: int = dataclasses.field(metadata=STATIC)
    remat: bool = dataclasses.field(default=False, metadata=STATIC)
    name: str = dataclasses.field(default="", metadata=STATIC)

    @property
    def num_branches(self) -> int:
        return self.depth * self.block.num_branches

    @property
    def num_solves(self) -> int:
        return self.depth * self.block.num_solves

    @property
    def contracts(self) -> bool:
        return self.block.contracts

    @property
    def takes_unit_interval(self) -> bool:
        return self.block.takes_unit_interval

    def forward(self, x: Batch) -> Batch:
        return self._scan(lambda x, block: (block.forward(x), None), x, self.block)

    def forward_and_log_det(self, x: Batch, estimator: Estimator, keys: Keys = None) -> Mapped:
        def step(carry: Mapped, block_and_keys: tuple[Bijection, Keys]) -> tuple[Mapped, None]:
            x, log_det = carry
            block, own = block_and_keys
            y, term = block.forward_and_log_det(x, estimator, own)
            return (y, log_det + term), None

        check_keys(keys, self.num_branches)
        keys = None if keys is None else self._rows(keys, self.block.num_branches)
        start = x, jnp.zeros(x.shape[0], x.dtype)
        return self._scan(step, start, (self.block, keys))

    def inverse(self, y: Batch, solver: Solver = FixedPointIteration()) -> Inverted:
        def step(y: Batch, block: Bijection) -> Inverted:
            return block.inverse(y, solver)

        x, info = lax.scan(step, y, self.block, self.depth, reverse=True)
        return x, jax.tree.map(lambda rows: rows.reshape(self.num_solves, *rows.shape[2:]), info)

    def certify(self, name: str, shape: Shape) -> Certificate:
        names = [f"{self.name or name}, block {i}" for i in range(self.depth)]
        blocks = zip(jax.device_get(self).unstacked(), names, strict=True)
        whole = in_a_row(block.certify(own, shape).as_block(own) for block, own in blocks)
        late = names[1:2] if self.takes_unit_interval else []
        return whole.with_problems(f"{own} {MISPLACED}" for own in late)

    def inverse_error(self, error: Error, info: FixedPointInfo | None, shape: Shape) -> Error:
        def step(
            error: Error, block_and_info: tuple[Bijection, FixedPointInfo | None]
        ) -> tuple[Error, None]:
            block, own = block_and_info
            return block.inverse_error(error, own, shape), None

        rows = jax.tree.map(lambda leaf: self._rows(leaf, self.block.num_solves), info)
        before: Error = lax.scan(step, error, (self.block, rows), self.depth, reverse=True)[0]
        return before

    def with_bounds(self, bounds: Iterator[BranchBounds]) -> Self:
        count = self.block.num_branches
        own = [[next(bounds) for _ in range(count)] for _ in range(self.depth)]
        columns = [jax.tree.map(_stacked, *column) for column in zip(*own, strict=True)]
        return dataclasses.replace(self, block=self.block.with_bounds(iter(columns)))

    def blocks(self) -> Iterator[Bijection]:
        return self.unstacked()

    def solve_names(self, name: str) -> list[str]:
        each = self.block.num_solves
        label = self.name or name
        return [f"{label}, block {i}" for i in range(self.depth) for _ in range(each)]

    def unstacked(self) -> Iterator[Bijection]:
        """Go through the blocks one by one, first to last."""
        lengths = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(self.block)}
        if lengths - {(self.depth,)}:
            raise ValueError(
                f"A stack of depth {self.depth} needs weights of that leading length; got "
                f"{sorted(lengths)}."
            )
        for i in range(self.depth):
            yield jax.tree.map(lambda leaf, i=i: leaf[i], self.block)

    def _scan(
        self, step: Callable[[Carry, Xs], tuple[Carry, None]], start: Carry, blocks: Xs
    ) -> Carry:
        step = jax.checkpoint(step, prevent_cse=False, policy=kept_for_backward(self.remat))
        end: Carry = lax.scan(step, start, blocks, self.depth)[0]
        return end

    def _rows(self, leaf: Array, each: int) -> Array:
        return leaf.reshape(self.depth, each, *leaf.shape[1:])


def _stacked(*rows: np.ndarray) -> np.ndarray:
    """Along a new last axis: that of an inner stack, whose leaves have the outer ones' first."""
    return np.stack(rows, axis=-1)
