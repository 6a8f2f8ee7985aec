"""Residual blocks as pure pytrees: one, equal ones in a row, and all of a resolution.

:class:`~iresnet_jax.flows.Flow` is made of them.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from iresnet_jax.actnorm import ActNorm
from iresnet_jax.fixed_point import FixedPointInfo, fixed_point_inverse
from iresnet_jax.logdet import Estimator
from iresnet_jax.operators import STATIC
from iresnet_jax.recomputation import kept_for_backward
from iresnet_jax.transforms import squeeze, unsqueeze


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ResidualBlock:
    """y = h + g(h), where h is x after ActNorm.

    Attributes:
      branch: g, a pytree that is callable on batches; Lip(g) < 1 makes the block invertible.
      actnorm: or None.
      lipschitz: a rigorous bound L ≥ Lip(g), or None where none was computed.
    """

    branch: Callable[[jax.Array], jax.Array]
    actnorm: ActNorm | None = None
    lipschitz: jax.Array | None = None

    def forward(self, x: jax.Array) -> jax.Array:
        """y of a batch ``x`` [batch, ...], of the same shape."""
        h = x if self.actnorm is None else self.actnorm.forward_and_log_det(x)[0]
        return h + self.branch(h)

    def forward_and_log_det(self, x: jax.Array, estimator: Estimator, key: jax.Array | None):
        """y, and log|det ∂y/∂x| of each sample in nats, [batch]: ActNorm's and the estimate.

        Args:
          x: [batch, ...].
          estimator: of log|det(I + J)|, such as ``truncated_series(10)``.
          key: of the estimator's probes; None where it draws none.
        """
        log_det = jnp.zeros(x.shape[0], x.dtype)
        if self.actnorm is not None:
            x, log_det = self.actnorm.forward_and_log_det(x)
        residual, branch_log_det = estimator(self.branch, x, key)
        return x + residual, log_det + branch_log_det

    def inverse(self, y: jax.Array, **options) -> tuple[jax.Array, FixedPointInfo]:
        """x of a batch ``y`` [batch, ...], and how the iteration ended.

        Options are those of :func:`iresnet_jax.fixed_point.fixed_point_inverse`.
        """
        h, info = fixed_point_inverse(self.branch, y, lipschitz=self.lipschitz, **options)
        return (h if self.actnorm is None else self.actnorm.inverse(h)), info


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class BlockStack:
    """Equal blocks in a row, their leaves stacked along a leading axis, run by ``lax.scan``.

    Attributes:
      block: a :class:`ResidualBlock` whose leaves have a leading axis of length ``depth``.
      depth: the number of blocks.
      remat: whether the backward pass recomputes blocks, keeping only their inputs and series'
        vectors; otherwise it keeps all products and convolutions too, and recomputes the rest.
    """

    block: ResidualBlock
    depth: int = dataclasses.field(metadata=STATIC)
    remat: bool = dataclasses.field(default=False, metadata=STATIC)

    def forward(self, x: jax.Array) -> jax.Array:
        """What the last block makes of a batch ``x`` [batch, ...], of the same shape."""
        return self._scan(lambda x, block: (block.forward(x), None), x, self.block)

    def forward_and_log_det(self, x: jax.Array, estimator: Estimator, keys: jax.Array | None):
        """The last block's output, and the sum of the blocks' log-determinants, [batch] nats.

        Args:
          x: [batch, ...].
          estimator: of log|det(I + J)|.
          keys: for each block one key, or one per sample, [depth] or [depth, batch]; None where the
            estimator draws none.

        Raises:
          ValueError: for keys of another number of blocks.
        """

        def step(carry, block_and_key):
            x, log_det = carry
            block, key = block_and_key
            y, block_log_det = block.forward_and_log_det(x, estimator, key)
            return (y, log_det + block_log_det), None

        _check_keys(keys, self.depth)
        start = (x, jnp.zeros(x.shape[0], x.dtype))
        return self._scan(step, start, (self.block, keys))

    def inverse(self, y: jax.Array, **options) -> tuple[jax.Array, FixedPointInfo]:
        """x of a batch ``y`` [batch, ...], and how each block's iteration ended, [depth, batch]."""

        def step(y, block):
            return block.inverse(y, **options)

        return lax.scan(step, y, self.block, reverse=True)

    def _scan(self, step, start, blocks):
        step = jax.checkpoint(step, prevent_cse=False, policy=kept_for_backward(self.remat))
        return lax.scan(step, start, blocks)[0]

    def unstacked(self) -> Iterator[ResidualBlock]:
        """The blocks one by one, first to last."""
        for i in range(self.depth):
            yield jax.tree.map(lambda leaf, i=i: leaf[i], self.block)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Scale:
    """One resolution: an optional squeeze, then stacks of blocks.

    Attributes:
      stacks: run one after the other.
      squeeze: whether space is first traded for channels.
    """

    stacks: tuple[BlockStack, ...]
    squeeze: bool = dataclasses.field(default=False, metadata=STATIC)

    @property
    def depth(self) -> int:
        """The number of blocks."""
        return sum(stack.depth for stack in self.stacks)

    def enter(self, x: jax.Array) -> jax.Array:
        """What the first block sees."""
        return squeeze(x) if self.squeeze else x

    def forward(self, x: jax.Array) -> jax.Array:
        """What the last block makes of a batch ``x``."""
        x = self.enter(x)
        for stack in self.stacks:
            x = stack.forward(x)
        return x

    def forward_and_log_det(self, x: jax.Array, estimator: Estimator, keys: jax.Array | None):
        """The last block's output, and the sum of the stacks' log-determinants, [batch] nats.

        Arguments are as of :meth:`BlockStack.forward_and_log_det`, with keys for all blocks.
        """
        _check_keys(keys, self.depth)
        x = self.enter(x)
        log_det = jnp.zeros(x.shape[0], x.dtype)
        for stack, own in zip(self.stacks, shares_of_keys(keys, self.stacks), strict=True):
            x, stack_log_det = stack.forward_and_log_det(x, estimator, own)
            log_det = log_det + stack_log_det
        return x, log_det

    def inverse(self, y: jax.Array, **options) -> tuple[jax.Array, list[FixedPointInfo]]:
        """x of a batch ``y``, and one report a stack, its fields [depth, batch]."""
        infos = []
        for stack in reversed(self.stacks):
            y, info = stack.inverse(y, **options)
            infos.append(info)
        return (unsqueeze(y) if self.squeeze else y), infos[::-1]


def _check_keys(keys: jax.Array | None, depth: int) -> None:
    if keys is not None and keys.shape[:1] != (depth,):
        raise ValueError(
            f"Keys are needed for {depth} blocks, [{depth}] or [{depth}, batch]; got {keys.shape}."
        )


def shares_of_keys(keys: jax.Array | None, parts: Sequence[Any]) -> list[Any]:
    """The keys of each part's blocks, out of those of all blocks in a row; None of None.

    Args:
      keys: [blocks] or [blocks, batch], or None.
      parts: stacks or scales, first to last.
    """
    if keys is None:
        return [None] * len(parts)
    ends = itertools.accumulate(part.depth for part in parts)
    return [keys[end - part.depth : end] for part, end in zip(parts, ends, strict=True)]
