"""Flax modules of activations that have a weight, or act on several channels at once."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from iresnet_jax.group_sort import GroupSort as PureGroupSort
from iresnet_jax.swish import CLipSwish as PureCLipSwish
from iresnet_jax.swish import LipSwish as PureLipSwish
from iresnet_jax.types import Batch, Samples, Scalar


class LipSwish(nn.Module):
    """x ↦ x·σ(βx)/1.1 with a learned β = softplus(θ) > 0; see :class:`iresnet_jax.LipSwish`.

    θ begins at 0.5 (Chen et al. 2019).
    """

    def __call__(self, x: Samples) -> Samples:
        return self.pure(x.shape[1:])(x)

    @nn.compact
    def pure(self, input_shape: Sequence[int]) -> PureLipSwish:
        """Return the map as a stage of a branch."""
        return PureLipSwish(_beta(self))


class CLipSwish(nn.Module):
    """[LipSwish(x), LipSwish(−x)]/1.004 with a learned β: twice as many channels, 1-Lipschitz.

    See :class:`iresnet_jax.CLipSwish`; θ begins at 0.5.
    """

    def __call__(self, x: Batch) -> Batch:
        return self.pure(x.shape[1:])(x)

    @nn.compact
    def pure(self, input_shape: Sequence[int]) -> PureCLipSwish:
        """Return the map as a stage of a branch."""
        return PureCLipSwish(_beta(self))


class GroupSort(nn.Module):
    """Sort each group of channels; pairs by default: MaxMin. See :class:`iresnet_jax.GroupSort`.

    Attributes:
      group_size: channels of one group.
    """

    group_size: int = 2

    def __call__(self, x: Samples) -> Samples:
        return self.pure(x.shape[1:])(x)

    def pure(self, input_shape: Sequence[int]) -> PureGroupSort:
        """Return the map as a stage of a branch.

        Raises:
          ValueError: for channels that are no multiple of the group's.
        """
        stage = PureGroupSort(self.group_size)
        jax.eval_shape(stage, jax.ShapeDtypeStruct((1, *input_shape), jnp.result_type(float)))
        return stage


#: Beside the names in :data:`iresnet_jax.activations.ACTIVATIONS`, those of modules.
MODULES: dict[str, Callable[..., nn.Module]] = {
    "learned_lipswish": LipSwish,
    "clipswish": CLipSwish,
    "maxmin": GroupSort,
}


def named_module(stage: nn.Module | str) -> nn.Module | str:
    """Make a module of its own of a name in :data:`MODULES`; anything else stays as it is."""
    if not isinstance(stage, str) or stage not in MODULES:
        return stage
    return MODULES[stage](parent=None)


def _beta(module: nn.Module) -> Scalar:
    theta: Scalar = module.param("theta", nn.initializers.constant(0.5), ())
    return jax.nn.softplus(theta)
