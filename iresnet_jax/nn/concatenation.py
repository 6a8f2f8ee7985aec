"""The Flax module of a dense concatenation with learned, bounded weights."""

from collections.abc import Sequence

import flax.linen as nn

from iresnet_jax.concatenation import DenseConcatenation as PureDenseConcatenation
from iresnet_jax.concatenation import bounded_weights
from iresnet_jax.nn.activations import named_module
from iresnet_jax.nn.branches import pure_stages, refuse_surplus, stage_names
from iresnet_jax.stages import Sequential
from iresnet_jax.types import Batch


class DenseConcatenation(nn.Module):
    """x ↦ [η₁·x, η₂·f(x)] with a learned η, ‖η‖ ≤ 1: 1-Lipschitz where f is.

    η = softplus(w)/‖softplus(w)‖ begins at (1, 1)/√2. See :class:`iresnet_jax.DenseConcatenation`.

    Attributes:
      stages: of f, as of :class:`~iresnet_jax.nn.Sequential`, such as
        ``(SpectralDense(16), "elu")``.
    """

    stages: Sequence[nn.Module | str]

    def __post_init__(self) -> None:
        self.stages = tuple(map(named_module, self.stages))
        super().__post_init__()

    def __call__(self, x: Batch) -> Batch:
        return Sequential((self.pure(x.shape[1:]),))(x)

    @nn.compact
    def pure(self, input_shape: Sequence[int]) -> PureDenseConcatenation:
        """Return the map as a stage of a branch, for inputs of ``input_shape``.

        Raises:
          ValueError: for stages that change more of the shape than the last axis.
        """
        refuse_surplus(self, {"weights", *stage_names(self.stages)})
        shape = tuple(input_shape)
        stages, after = pure_stages(self.stages, shape)
        if after[:-1] != shape[:-1]:
            raise ValueError(
                f"What is concatenated differs in its last axis alone; {shape} is mapped to "
                f"{after}."
            )
        raw = self.param("weights", nn.initializers.ones, (2,))
        weights = bounded_weights(raw)
        return PureDenseConcatenation(Sequential(stages), weights)
