"""Flax modules for residual branches and for stacks of equal residual blocks."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from iresnet_jax.actnorm import ActNorm
from iresnet_jax.branches import (
    Activation,
    ModuleStage,
    Normalize,
    Precision,
    Sequential,
    first_without_activation,
)
from iresnet_jax.layers import SpectralConv, SpectralDense
from iresnet_jax.residual import BlockStack, ResidualBlock


class Branch(nn.Module):
    """A residual branch: layers with a constrained norm, activations by name, any other module.

    Attributes:
      stages: run first to last. SpectralDense and SpectralConv are constrained and bounded by this
        library, names of activations have known constants. Any other Flax module without
        randomness, that treats the samples of a batch independently and keeps nothing but
        ``params`` (and, in layers of this library, ``spectral``), may state its own Lipschitz bound
        by a method ``lipschitz_bound(variables)``; one that does not leaves the branch without a
        bound, and the network not certified.
        A branch within a branch adds its stages, and computes in the outer one's precision.
      precision: see :class:`iresnet_jax.branches.Sequential`.
    """

    stages: Sequence[nn.Module | str]
    precision: Precision = "float32"

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.constrained(x.shape[1:])(x)

    def constrained(self, input_shape: Sequence[int], *, converge: bool = False) -> Sequential:
        """The branch as a pure function, its weights constrained.

        Raises:
          ValueError: if the output's shape is not the input's, or for variables of a branch with
            more stages.
          TypeError: for a module that is not hashable.
        """
        _refuse_surplus(self, {str(s.name) for s in self.stages if isinstance(s, nn.Module)})
        built: list[Any] = []
        shape = tuple(input_shape)
        for stage in self.stages:
            pure = _pure_stage(stage, shape, converge)
            sample = jax.ShapeDtypeStruct((1, *shape), float)
            shape = jax.eval_shape(pure, sample).shape[1:]
            built += pure.stages if isinstance(pure, Sequential) else [pure]
        if shape != tuple(input_shape):
            raise ValueError(
                f"A residual branch must map a shape to itself; this one maps {input_shape} "
                f"to {shape}."
            )
        return Sequential(tuple(built), self.precision)


def bottleneck_branch(
    channels: int,
    features: int,
    *,
    coeff: float | None = 0.9,
    num_steps: int = 1,
    normalize: Normalize = "power",
    activation: str = "elu",
    activate_first: bool = True,
    precision: Precision = "float32",
) -> Branch:
    """The paper's image branch: convolutions 3×3, 1×1, 3×3, an activation before each.

    Args:
      channels: of the block's input and output.
      features: channels between the convolutions.
      coeff: norm to allow for each layer, in (0, 1), or None.
      num_steps: power-iteration steps a training step.
      normalize: "power" or "certified", see :class:`iresnet_jax.layers.SpectralConv`.
      activation: a name in :data:`iresnet_jax.activations.ACTIVATIONS`.
      activate_first: whether an activation comes before the first convolution too.
      precision: see :class:`iresnet_jax.branches.Sequential`.
    """
    sizes = ((3, features), (1, features), (3, channels))
    options: dict[str, Any] = {"coeff": coeff, "num_steps": num_steps, "normalize": normalize}
    layers = [SpectralConv(width, size, **options, parent=None) for size, width in sizes]
    return Branch(_interleave(layers, activation, activate_first), precision, parent=None)


def dense_branch(
    dim: int,
    features: Sequence[int],
    *,
    coeff: float | None = 0.9,
    num_steps: int = 1,
    normalize: Normalize = "power",
    activation: str = "elu",
    activate_first: bool = True,
    precision: Precision = "float32",
) -> Branch:
    """A branch for vectors: dense layers dim → features → dim, an activation before each."""
    options: dict[str, Any] = {"coeff": coeff, "num_steps": num_steps, "normalize": normalize}
    layers = [SpectralDense(width, **options, parent=None) for width in (*features, dim)]
    return Branch(_interleave(layers, activation, activate_first), precision, parent=None)


class ResidualStack(nn.Module):
    """``depth`` equal residual blocks, their parameters stacked along a leading axis.

    Attributes:
      branch: the branch of one block, a module with ``constrained(input_shape, converge=…)``.
      depth: number of blocks, ≥ 1.
      actnorm: whether every block begins with ActNorm.
      axis_name: mapped axis over which ActNorm's initial statistics are averaged.
      remat: whether the backward pass recomputes blocks instead of keeping what they computed.
      first_block_activated: False where the first block is to leave out the activation that its
        branch begins with, if it does: as the first of a network, which sees the data as they are.
    """

    branch: nn.Module
    depth: int
    actnorm: bool = True
    axis_name: str | None = None
    remat: bool = False
    first_block_activated: bool = True

    @nn.compact
    def __call__(
        self, input_shape: Sequence[int], x: jax.Array | None = None, *, converge: bool = False
    ) -> BlockStack:
        """The blocks as pure functions; ActNorm is initialised so that it normalises ``x``.

        Args:
          input_shape: of one sample.
          x: a batch to initialise from; used at initialisation alone.
          converge: advance power iterations to their tolerance.
        """
        if self.depth < 1:
            raise ValueError(f"A stack has at least one block; got depth {self.depth}.")
        self._check_depth()
        norm = {"log_scale", "shift"} if self.actnorm else set()
        _refuse_surplus(self, {str(self.branch.name)} | norm)
        collect = nn.vmap(
            lambda branch: branch.constrained(input_shape, converge=converge),
            variable_axes={"params": 0, "spectral": 0, "intermediates": 0},
            split_rngs={"params": True},
            axis_size=self.depth,
        )
        branches = collect(self.branch)
        if not self.first_block_activated:
            branches = first_without_activation(branches, self.depth)
        norms = self._norms(branches, input_shape[-1], x) if self.actnorm else None
        return BlockStack(ResidualBlock(branches, norms), self.depth, self.remat)

    def _check_depth(self) -> None:
        if self.is_initializing():
            return
        leaves = jax.tree.leaves(self.variables.get("params", {}))
        stored = len(leaves[0]) if leaves else 0
        if stored != self.depth:
            raise ValueError(
                f"The variables hold a stack of {stored} blocks; this model has {self.depth}."
            )

    def _norms(self, branches: Any, channels: int, x: jax.Array | None) -> ActNorm:
        shape = (self.depth, channels)
        init = ActNorm(jnp.zeros(shape), jnp.zeros(shape))
        if self.is_initializing() and x is not None:
            init = self._norms_from_data(branches, x)
        return ActNorm(
            self.param("log_scale", lambda _: init.log_scale),
            self.param("shift", lambda _: init.shift),
        )

    def _norms_from_data(self, branches: Any, x: jax.Array) -> ActNorm:
        def step(x, branch):
            norm = ActNorm.from_data(x, self.axis_name)
            return ResidualBlock(branch, norm).forward(x), norm

        return jax.lax.scan(step, x, branches)[1]


def _refuse_surplus(module: nn.Module, known: set[str]) -> None:
    """Refuse parameters that a module would leave unused.

    Raises:
      ValueError: naming them.
    """
    if surplus := sorted(set(module.variables.get("params", {})) - known):
        raise ValueError(
            f"The variables hold {', '.join(surplus)} in {'/'.join(module.path)}, which this model "
            "does not have: they are of another model."
        )


def as_branch(module: nn.Module) -> nn.Module:
    """The module itself if it can be ``constrained``, else a Branch of it alone; unbound."""
    unbound = module.clone(parent=None, _deep_clone=True, _reset_names=True)
    return unbound if hasattr(unbound, "constrained") else Branch((unbound,), parent=None)


def _pure_stage(stage: nn.Module | str, shape: Sequence[int], converge: bool) -> Any:
    """A stage as a pure function of batches [batch, *shape]."""
    if isinstance(stage, str):
        return Activation(stage)
    if hasattr(stage, "constrained"):
        return stage.constrained(shape, converge=converge)
    if stage.is_mutable_collection("params") or stage.is_mutable_collection("spectral"):
        stage(jnp.zeros((1, *shape)))  # makes its parameters, advances its power iterations
    module, variables = stage.unbind()
    try:
        hash(module)
    except TypeError as error:
        raise TypeError(
            f"{type(module).__name__} must be hashable to be part of a branch: give its attributes "
            f"as numbers, strings and tuples ({error})."
        ) from None
    return ModuleStage(module, variables)


def _interleave(layers: Sequence[nn.Module], activation: str, activate_first: bool):
    stages: list[nn.Module | str] = []
    for layer in layers:
        stages += [activation, layer]
    return tuple(stages if activate_first else stages[1:])
