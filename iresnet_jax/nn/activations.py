"""Flax modules of activations that have a weight, or act on several channels at once."""

import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from iresnet_jax.activations import ACTIVATIONS, LEARNED
from iresnet_jax.group_sort import GroupSort as PureGroupSort
from iresnet_jax.scaled_activation import ScaledActivation as PureScaledActivation
from iresnet_jax.swish import CLipSwish as PureCLipSwish
from iresnet_jax.swish import LipSwish as PureLipSwish
from iresnet_jax.types import Array, Batch, Samples, Scalar


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


class ScaledActivation(nn.Module):
    """x ↦ τ·φ(x/τ) with a learned length τ > 0 for every channel, and the slopes of φ.

    Weights of constrained norm spread over many channels are small, and a smooth φ is all but
    linear for what they let through: τ says where it bends. See
    :class:`iresnet_jax.ScaledActivation`.

    Attributes:
      activation: name of φ, in :data:`iresnet_jax.activations.ACTIVATIONS`.
      length: where every τ begins, within [10⁻⁸, 10⁸], where all of them stay.
    """

    activation: str = "elu"
    length: float = 0.1

    def __call__(self, x: Batch) -> Batch:
        return self.pure(x.shape[1:])(x)

    @nn.compact
    def pure(self, input_shape: Sequence[int]) -> PureScaledActivation:
        """Return the map as a stage of a branch.

        Raises:
          ValueError: for an unknown name, or a length that is out of range.
        """
        (length,) = learned_lengths(self, self.length, (input_shape[-1],))
        return PureScaledActivation(length, self.activation)


def learned_lengths(module: nn.Module, length: float, widths: Sequence[int]) -> tuple[Array, ...]:
    """Return τ = exp(θ) for the channels of some layers, with a parameter θ for each layer.

    θ is clipped, so that τ stays within [10⁻⁸, 10⁸].

    Raises:
      ValueError: for a length that is not within.
    """
    if not 1e-8 <= length <= 1e8:
        raise ValueError(
            f"length of a {type(module).__name__} must lie in [1e-8, 1e8]; got {length}."
        )
    begin = nn.initializers.constant(math.log(length))
    logs = [module.param(f"{LOG_LENGTH}{k}", begin, (w,)) for k, w in enumerate(widths)]
    return tuple(jnp.exp(jnp.clip(log, -_FARTHEST, _FARTHEST)) for log in logs)


#: Name of the parameter θ, before the number of its layer.
LOG_LENGTH = "log_length_"
_FARTHEST = 8.0 * math.log(10.0)

#: Beside the names in :data:`iresnet_jax.activations.ACTIVATIONS`, those of modules.
MODULES: dict[str, Callable[..., nn.Module]] = {
    "learned_lipswish": LipSwish,
    "clipswish": CLipSwish,
    "maxmin": GroupSort,
}


def named_module(stage: nn.Module | str) -> nn.Module | str:
    """Make a new module where ``stage`` is the name of one; return anything else as it is."""
    if not isinstance(stage, str):
        return stage
    if stage in MODULES:
        return MODULES[stage](parent=None)
    plain = stage.removeprefix(LEARNED)
    if stage != plain and plain in ACTIVATIONS:
        return ScaledActivation(plain, parent=None)
    return stage


def _beta(module: nn.Module) -> Scalar:
    theta: Scalar = module.param("theta", nn.initializers.constant(0.5), ())
    return jax.nn.softplus(theta)
