"""The monotone block as a Flax module, for stacks."""

from collections.abc import Sequence

import flax.linen as nn

from iresnet_jax.bijections import Bijection
from iresnet_jax.monotone import FORWARD_SOLVER
from iresnet_jax.monotone import Monotone as PureMonotone
from iresnet_jax.nn.branches import pure_branch
from iresnet_jax.solvers import Solver


class Monotone(nn.Module):
    """One monotone block, for :class:`Stack`: ``Stack(Monotone(branch), depth=4)``.

    Attributes:
      branch: g, any module; for what is proved of it, see :class:`~iresnet_jax.nn.Sequential`.
      solver: of the forward equation, see :class:`iresnet_jax.Monotone`.
    """

    branch: nn.Module
    solver: Solver = FORWARD_SOLVER

    def pure(self, shape: Sequence[int]) -> PureMonotone:
        """Return the block as a pytree, its weights constrained.

        Args:
          shape: of one sample, without batch axis.

        Raises:
          ValueError: for a branch that changes the shape.
          TypeError: for a module that is no branch, but a block itself.
        """
        branch = pure_branch(self.branch, shape)
        if isinstance(branch, Bijection):
            raise TypeError(
                f"A monotone block is made of a branch; {type(self.branch).__name__} is a block."
            )
        return PureMonotone(branch, solver=self.solver)
