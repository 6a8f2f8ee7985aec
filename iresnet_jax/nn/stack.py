"""A stack of equal invertible blocks as a Flax module, for models of one's own too."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from iresnet_jax.actnorm import ActNorm, check_initial_batch
from iresnet_jax.bijections import Bijection, Chain
from iresnet_jax.certificates import Certificate, in_a_row
from iresnet_jax.convergence import FixedPointInfo, warn_unconverged
from iresnet_jax.logdet import Estimated, Estimator, SampleKeys
from iresnet_jax.mixing import Invertible1x1
from iresnet_jax.module_calls import record_call
from iresnet_jax.nn.branches import pure_branch, refuse_surplus
from iresnet_jax.nn.constraints import CopyAxes
from iresnet_jax.operators import STATIC
from iresnet_jax.probes import block_keys
from iresnet_jax.residual import Residual
from iresnet_jax.solvers import FixedPointIteration, Solver
from iresnet_jax.stack import Stack as PureStack
from iresnet_jax.stages import first_without_activation
from iresnet_jax.types import Branch, Samples


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class PlacedStack:
    """A stack as a model uses it.

    Attributes:
      stack: the blocks.
      copies: of shape [...copies, 0], with the axes along which lifted transforms repeat it.
      shape: of one input, without batch axis.
      copy_axes: where its copies are stacked.
    """

    stack: PureStack
    copies: Float[Array, "*copies none"]
    shape: tuple[int, ...] = dataclasses.field(metadata=STATIC)
    copy_axes: CopyAxes = dataclasses.field(default_factory=CopyAxes)

    def certify(self, suffix: str = "") -> Certificate:
        """Certify every copy; ``suffix`` tells the uses of one stack apart."""
        copies = (self._copy(at, suffix) for at in np.ndindex(self.copies.shape[:-1]))
        whole = in_a_row(copy.certify("", self.shape) for copy in copies)
        if not self.stack.takes_unit_interval:
            return whole
        return whole.with_problems(
            [f"{self.stack.name + suffix} takes data in [0, 1], and it is not known what it sees"]
        )

    def _copy(self, at: tuple[int, ...], suffix: str) -> PureStack:
        name = self.stack.name + (str(list(at)) if at else "") + suffix
        copy: PureStack = jax.tree.map(lambda leaf: leaf[at], self.stack)
        return dataclasses.replace(copy, name=name)


class Stack(nn.Module):
    """``depth`` equal invertible blocks, their parameters stacked along a leading axis.

    Call it as any module, ``y = Stack(branch, depth=4)(x)``; invert it by :meth:`inverse`. All
    methods keep the shape of what they are given.

    Attributes:
      branch: g of one residual block y = x + g(x): any module; for what is proved of it, see
        :class:`~iresnet_jax.nn.Sequential`. Or a module whose ``pure(shape)`` returns a
        :class:`~iresnet_jax.bijections.Bijection`, a block of another kind, such as
        :class:`~iresnet_jax.nn.Monotone`.
      depth: number of blocks, ≥ 1.
      actnorm: whether every block begins with ActNorm, initialised so that it normalises the batch
        that the module is initialised with.
      axis_name: mapped axis over which ActNorm's initial statistics are averaged.
      remat: whether the backward pass recomputes blocks instead of keeping what they computed.
      first_block_activated: False where the first block is to leave out the activation that its
        branch begins with, if it does: as the first of a network, which sees the data as they are.
      label: of the stack in certificates; its path in the model by default.
      mixing: whether every block mixes its channels before its branch, after ActNorm, by an
        :class:`~iresnet_jax.mixing.Invertible1x1` that begins as a random orthogonal matrix.
    """

    branch: nn.Module
    depth: int
    actnorm: bool = True
    axis_name: str | None = None
    remat: bool = False
    first_block_activated: bool = True
    label: str = ""
    mixing: bool = False

    def __call__(self, x: Samples) -> Samples:
        """Map a batch [batch, ...]."""
        return self._used(x).forward(x)

    def forward_and_log_det(
        self, x: Samples, estimator: Estimator, *, key: SampleKeys | None = None
    ) -> Estimated:
        """Map a batch, with log|det ∂y/∂x| of each sample in nats, [batch].

        ``key`` is one key, or one per sample; None for an estimator that draws none.
        """
        pure = self._used(x)
        keys = block_keys(key, pure.num_branches, x.shape[0])
        return pure.forward_and_log_det(x, estimator, keys)

    def inverse(
        self, y: Samples, solver: Solver = FixedPointIteration()
    ) -> tuple[Samples, FixedPointInfo | None]:
        """Invert a batch; with how each block's iteration ended, [blocks, batch].

        Where power iterations advance, each method call advances them once more: map and invert in
        one ``apply`` by one :meth:`pure`.
        """
        pure = self._used(y)
        x, info = pure.inverse(y, solver)
        if info is not None:
            warn_unconverged(info, pure.solve_names(""))
        return x, info

    @nn.compact
    def pure(self, shape: Sequence[int], x: Samples | None = None) -> PureStack:
        """Return the blocks as a pytree, :class:`iresnet_jax.Stack`.

        Args:
          shape: of one sample, without batch axis.
          x: a batch to initialise ActNorm from; used at initialisation alone. A batch of one row
            leaves scales at 1; see :meth:`~iresnet_jax.actnorm.ActNorm.from_data`.
        """
        record_call(self.path)
        if self.depth < 1:
            raise ValueError(f"A stack has at least one block; got depth {self.depth}.")
        self._check_depth()
        block = self._as_block(_branches(self.branch, tuple(shape), self.depth))
        links = (self._mixing(shape[-1]), block) if self.mixing else (block,)
        if self.actnorm:
            links = (self._norms(Chain(links), shape[-1], x), *links)
        block = Chain(links) if len(links) > 1 else block
        pure = PureStack(block, self.depth, self.remat, self.label or "/".join(self.path))
        self.sow("intermediates", "stack", PlacedStack(pure, jnp.zeros((0,)), tuple(shape)))
        return pure

    def _used(self, x: Samples) -> PureStack:
        return self.pure(x.shape[1:], x if self.is_initializing() else None)

    def _as_block(self, blocks: Branch | Bijection) -> Bijection:
        if isinstance(blocks, Bijection):
            return blocks
        if not self.first_block_activated:
            blocks = first_without_activation(blocks, self.depth)
        return Residual(blocks)

    def _check_depth(self) -> None:
        norms = {"log_scale", "shift"} if self.actnorm else set()
        refuse_surplus(self, {"branch"} | norms | ({"mixing"} if self.mixing else set()))
        if self.is_initializing():
            return
        leaves = jax.tree.leaves(self.variables.get("params", {}))
        if leaves and len(leaves[0]) != self.depth:
            raise ValueError(
                f"The variables hold a stack of {len(leaves[0])} blocks; this model has "
                f"{self.depth}."
            )

    def _norms(self, blocks: Bijection, channels: int, x: Samples | None) -> ActNorm:
        shape = (self.depth, channels)
        init = ActNorm(jnp.zeros(shape), jnp.zeros(shape))
        if self.is_initializing() and x is not None:
            check_initial_batch(x)
            init = _norms_from_data(blocks, x, self.axis_name)
        return ActNorm(
            self.param("log_scale", lambda _: init.log_scale),
            self.param("shift", lambda _: init.shift),
        )

    def _mixing(self, channels: int) -> Invertible1x1:
        return Invertible1x1(self.param("mixing", _rotations, (self.depth, channels)))


def _branches(branch: nn.Module, shape: tuple[int, ...], depth: int) -> Branch | Bijection:
    """Return ``depth`` pure branches, stacked, each with variables of its own.

    On a TPU they are made one after another: the convolutions of power iterations then have one
    kernel each, where those of several kernels compile many times as long, and need more memory.
    Flax draws other weights then, so that at first they are made at once.
    """
    lifted: dict[str, Any] = {
        "variable_axes": {"params": 0, "spectral": 0, "intermediates": 0},
        "split_rngs": {"params": True},
    }
    made: Branch | Bijection
    if jax.default_backend() == "tpu" and not branch.is_initializing():

        def next_one(branch: nn.Module, carry: None) -> tuple[None, Branch | Bijection]:
            return carry, pure_branch(branch, shape)

        _, made = nn.scan(next_one, length=depth, **lifted)(branch, None)
    else:
        made = nn.vmap(pure_branch, in_axes=(None,), axis_size=depth, **lifted)(branch, shape)
    return made


def _rotations(key: PRNGKeyArray, shape: tuple[int, int]) -> Float[Array, "depth n n"]:
    depth, channels = shape
    orthogonal = nn.initializers.orthogonal()
    return jax.vmap(lambda k: orthogonal(k, (channels, channels)))(jax.random.split(key, depth))


def _norms_from_data(blocks: Bijection, x: Samples, axis_name: str | None) -> ActNorm:
    def step(x: Samples, block: Bijection) -> tuple[Samples, ActNorm]:
        norm = ActNorm.from_data(x, axis_name)
        return block.forward(norm.forward(x)), norm

    return jax.lax.scan(step, x, blocks)[1]
