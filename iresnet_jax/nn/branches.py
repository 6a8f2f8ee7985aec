"""Flax modules for residual branches: any row of stages, and the paper's two."""

from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from iresnet_jax.bijections import Bijection
from iresnet_jax.frozen_vectors import frozen_vectors, refuse_gradient, vectors_are_frozen
from iresnet_jax.nn.activations import named_module
from iresnet_jax.nn.constraints import Normalize, refuse_surplus
from iresnet_jax.nn.layers import SpectralConv, SpectralDense
from iresnet_jax.stages import Activation, ModuleStage, Precision
from iresnet_jax.stages import Sequential as PureSequential
from iresnet_jax.types import Branch, Samples


class Sequential(nn.Module):
    """A residual branch: layers with a constrained norm, activations by name, any other module.

    Attributes:
      stages: run first to last. SpectralDense and SpectralConv are constrained and bounded by this
        library, names of activations have known constants: those in
        :data:`~iresnet_jax.activations.ACTIVATIONS`; "learned_elu" and so on, the same with a
        learned length for every channel; and "learned_lipswish" (with a learned β), "clipswish"
        (which doubles the channels) and "maxmin", of :mod:`iresnet_jax.nn.activations`. Any other
        Flax module without randomness, that treats the samples of a batch independently and keeps
        nothing but ``params`` (and, in layers of this library, ``spectral``), may state its own
        Lipschitz bound by a method ``lipschitz_bound(variables)``; one that does not leaves the
        branch without a bound, and the network not certified.
        A branch within a branch adds its stages, and computes in the outer one's precision.
      precision: see :class:`iresnet_jax.Sequential`.
    """

    stages: Sequence[nn.Module | str]
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        self.stages = tuple(map(named_module, self.stages))
        super().__post_init__()

    def __call__(self, x: Samples) -> Samples:
        return self.pure(x.shape[1:])(x)

    def pure(self, input_shape: Sequence[int]) -> PureSequential:
        """Return the branch as a pure function of batches, its weights constrained.

        Args:
          input_shape: of one input, without batch axis.

        Raises:
          ValueError: if the output's shape is not the input's, or for variables of a branch with
            more stages.
          TypeError: for a module that is not hashable.
        """
        refuse_surplus(self, stage_names(self.stages))
        shape = tuple(input_shape)
        stages, after = pure_stages(self.stages, shape)
        _check_keeps_shape(shape, after)
        return PureSequential(stages, self.precision)


def bottleneck_branch(
    channels: int,
    features: int,
    *,
    coeff: float | None = 0.9,
    num_steps: int = 1,
    normalize: Normalize = "estimate",
    activation: str = "elu",
    activate_first: bool = True,
    precision: Precision = "float32",
) -> Sequential:
    """The paper's image branch: convolutions 3×3, 1×1, 3×3, an activation before each.

    Args:
      channels: of the block's input and output.
      features: channels between the convolutions.
      coeff: norm to allow for each layer, in (0, 1), or None.
      num_steps: power-iteration steps a training step.
      normalize: "estimate" or "bound", see :class:`SpectralConv`.
      activation: a name, see :class:`Sequential`.
      activate_first: whether an activation comes before the first convolution too.
      precision: see :class:`iresnet_jax.Sequential`.
    """
    layers = [
        SpectralConv(
            width, size, coeff=coeff, num_steps=num_steps, normalize=normalize, parent=None
        )
        for size, width in ((3, features), (1, features), (3, channels))
    ]
    return Sequential(_interleave(layers, activation, activate_first), precision, parent=None)


def dense_branch(
    dim: int,
    features: Sequence[int],
    *,
    coeff: float | None = 0.9,
    num_steps: int = 1,
    normalize: Normalize = "estimate",
    activation: str = "elu",
    activate_first: bool = True,
    precision: Precision = "float32",
) -> Sequential:
    """A branch for vectors: dense layers dim → features → dim, an activation before each."""
    layers = [
        SpectralDense(width, coeff=coeff, num_steps=num_steps, normalize=normalize, parent=None)
        for width in (*features, dim)
    ]
    return Sequential(_interleave(layers, activation, activate_first), precision, parent=None)


def pure_branch(branch: nn.Module, shape: Sequence[int]) -> Branch:
    """Return a module as a pure branch, or a block of another kind, where its ``pure`` says so.

    Raises:
      ValueError: for a branch that changes the shape.
    """
    pure = pure_stage(branch, shape)
    if isinstance(pure, Bijection):
        return pure
    _check_keeps_shape(tuple(shape), _mapped_shape(pure, shape))
    return PureSequential((pure,)) if isinstance(pure, ModuleStage) else pure


def pure_stages(
    stages: Sequence[nn.Module | str], shape: Sequence[int]
) -> tuple[tuple[Branch, ...], tuple[int, ...]]:
    """Return a row of stages as pure functions, and the shape that they map ``shape`` to."""
    built: list[Branch] = []
    shape = tuple(shape)
    for stage in stages:
        pure = pure_stage(stage, shape)
        shape = _mapped_shape(pure, shape)
        built += pure.stages if isinstance(pure, PureSequential) else [pure]
    return tuple(built), shape


def stage_names(stages: Sequence[nn.Module | str]) -> set[str]:
    """Return under which names the stages' variables are stored."""
    return {str(stage.name) for stage in stages if isinstance(stage, nn.Module)}


def _mapped_shape(stage: Branch, shape: Sequence[int]) -> tuple[int, ...]:
    sample = jax.ShapeDtypeStruct((1, *shape), jnp.result_type(float))
    out: tuple[int, ...] = jax.eval_shape(stage, sample).shape[1:]
    return out


def _check_keeps_shape(before: tuple[int, ...], after: tuple[int, ...]) -> None:
    if before != after:
        raise ValueError(
            f"A residual branch must map a shape to itself; this one maps {before} to {after}."
        )


def pure_stage(stage: nn.Module | str, shape: Sequence[int]) -> Branch:
    """Return a stage as a pure function of batches [batch, *shape].

    Raises:
      TypeError: for a module that is not hashable, or cannot be part of a branch.
    """
    if isinstance(stage, str):
        return Activation(stage)
    _check_stage(stage)
    if hasattr(stage, "pure"):
        pure: Branch = stage.pure(shape)
        return pure
    if any(map(stage.is_mutable_collection, ("params", "spectral", "intermediates"))):
        with frozen_vectors():
            stage(jnp.zeros((1, *shape)))  # makes parameters, advances power iterations, sows
    module, variables = _unbound(stage)
    try:
        hash(module)
    except TypeError as error:
        raise TypeError(
            f"{type(module).__name__} must be hashable to be part of a branch: give its attributes "
            f"as numbers, strings and tuples ({error})."
        ) from None
    advanced = stage.is_mutable_collection("spectral")
    return ModuleStage(module, variables, advanced or vectors_are_frozen())


def _check_stage(stage: object) -> None:
    """Refuse what is no stage, or does not treat each sample alone and alike, by a TypeError."""
    kind = type(stage).__name__
    if not isinstance(stage, nn.Module):
        name = getattr(stage, "__name__", kind)
        raise TypeError(
            f"A stage of a branch is a Flax module or the name of an activation; got {name}. Give "
            "a function of your own a name: register_activation(name, function, lipschitz)."
        )
    if isinstance(stage, nn.BatchNorm):
        raise TypeError(
            f"{kind} cannot be part of a branch: its statistics mix the samples of a batch, and "
            "its scale has no bound. Blocks begin with ActNorm (actnorm=True)."
        )
    if isinstance(stage, nn.Dropout):
        raise TypeError(
            f"{kind} cannot be part of a branch: it is random, and an inverse would draw anew."
        )


def _unbound(stage: nn.Module) -> tuple[nn.Module, Mapping[str, object]]:
    """A foreign module and its variables, which are to advance if they are to be trained."""
    module, variables = stage.unbind()
    variables = {name: value for name, value in variables.items() if name != "intermediates"}
    if "spectral" in variables and not stage.is_mutable_collection("spectral"):
        variables["params"] = refuse_gradient(variables["params"], type(module).__name__)
    return module, variables


def _interleave(
    layers: Sequence[nn.Module], activation: str, activate_first: bool
) -> tuple[nn.Module | str, ...]:
    stages = [stage for layer in layers for stage in (activation, layer)]
    return tuple(stages if activate_first else stages[1:])
