"""Conditional flows as Flax models; what they compute is :mod:`iresnet_jax.conditional`."""

from collections.abc import Sequence

import flax.linen as nn
from jaxtyping import Array

from iresnet_jax.checks import check_at_least_one
from iresnet_jax.conditional import ConditionalFlow, ContextNetwork
from iresnet_jax.conditional import ConditionalShift as PureConditionalShift
from iresnet_jax.flows import Flow, Latents
from iresnet_jax.nn.branches import Sequential
from iresnet_jax.nn.layers import SpectralDense
from iresnet_jax.nn.models import VectorFlow
from iresnet_jax.nn.variables import Variables, apply
from iresnet_jax.types import AnyArray, Samples


class ConditionalShift(nn.Module):
    """h ↦ h + V c with the context c; see :class:`iresnet_jax.ConditionalShift`.

    Attributes:
      context_dim: entries of c.
    """

    context_dim: int

    @nn.compact
    def pure(self, input_shape: Sequence[int]) -> PureConditionalShift:
        """Return the map as a stage of a branch, before a condition is given."""
        shape = (self.context_dim, input_shape[-1])
        kernel: Array = self.param("kernel", nn.initializers.lecun_normal(), shape)
        return PureConditionalShift(kernel)


class ConditionalVectorFlow(VectorFlow, kw_only=True):
    """A flow over vectors y at a condition x, a vector or a class.

    :meth:`flow` returns a :class:`~iresnet_jax.ConditionalFlow`. Every dense layer of a branch is
    followed by a shift that depends on the condition, and so does the prior.

    Attributes:
      condition_dim: dimensions of x; None where it is a class.
      num_classes: number of classes; None where x is a vector.
      context_features: widths of the tanh layers that a vector x goes through, beside x itself.
    """

    condition_dim: int | None = None
    num_classes: int | None = None
    context_features: Sequence[int] = (32, 32)

    def __call__(self, y: AnyArray) -> Latents:
        """Map data to latents before a condition is given; at initialisation ``y`` sets ActNorm."""
        return self.pure(self._checked(y) if self.is_initializing() else None).flow.forward(y)

    def flow(self, variables: Variables) -> ConditionalFlow:  # type: ignore[override]
        """Return the conditional flow that these variables describe.

        As of :meth:`~iresnet_jax.nn.models.FlowModel.flow`, power iterations stand still.

        Raises:
          ValueError, TypeError: for variables that do not fit the model.
        """
        flow: ConditionalFlow = apply(self, variables)
        return flow

    @nn.compact
    def pure(self, x: Samples | None = None) -> ConditionalFlow:  # type: ignore[override]
        self._check_condition()
        flow = self._flow(x)
        return ConditionalFlow(flow, self._network(), self._prior_kernels(flow))

    def _branch(self, channels: int, features: object) -> nn.Module:
        branch = super()._branch(channels, features)
        stages = branch.stages if isinstance(branch, Sequential) else ()
        if not any(isinstance(stage, SpectralDense) for stage in stages):
            raise ValueError(
                "A conditional branch is a Sequential of SpectralDense layers, as dense_branch "
                f"makes it; got {type(branch).__name__}."
            )
        context_dim, seen = self._context_dim(), []
        for stage in stages:
            seen.append(stage)
            if isinstance(stage, SpectralDense):
                seen.append(ConditionalShift(context_dim, parent=None))
        return branch.clone(stages=tuple(seen), parent=None)

    def _network(self) -> ContextNetwork:
        if self.condition_dim is None:
            return ContextNetwork((), self._context_dim(), classes=True)
        layers, width = [], self.condition_dim
        for i, features in enumerate(self.context_features):
            init = nn.initializers.lecun_normal()
            weights = self.param(f"context_kernel_{i}", init, (width, features))
            layers.append(
                (weights, self.param(f"context_bias_{i}", nn.initializers.zeros, features))
            )
            width = features
        return ContextNetwork(tuple(layers), self.condition_dim, classes=False)

    def _prior_kernels(self, flow: Flow) -> tuple[tuple[Array, Array], ...]:
        zeros = nn.initializers.zeros
        return tuple(
            (
                self.param(f"prior_mean_kernel_{i}", zeros, (self._context_dim(), *shape)),
                self.param(f"prior_log_std_kernel_{i}", zeros, (self._context_dim(), *shape)),
            )
            for i, shape in enumerate(flow.latent_shapes())
        )

    def _context_dim(self) -> int:
        """Entries of c: the classes, or x itself and the last layer."""
        if self.condition_dim is not None:
            return self.condition_dim + sum(self.context_features[-1:])
        return self.num_classes or 0

    def _check_condition(self) -> None:
        if (self.condition_dim is None) == (self.num_classes is None):
            raise ValueError(
                "The condition is a vector or a class: give condition_dim or num_classes; got "
                f"condition_dim={self.condition_dim}, num_classes={self.num_classes}."
            )
        name = "num_classes" if self.condition_dim is None else "condition_dim"
        check_at_least_one(name, getattr(self, name))
        for width in self.context_features:
            check_at_least_one("context_features", width)
