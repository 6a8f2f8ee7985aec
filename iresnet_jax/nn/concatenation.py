"""The Flax module of a dense concatenation with learned, bounded weights."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn

from iresnet_jax.concatenation import DenseConcatenation as PureDenseConcatenation
from iresnet_jax.concatenation import bounded_weights
from iresnet_jax.nn.activations import named_module
from iresnet_jax.nn.branches import Sequential, pure_stages, refuse_surplus, stage_names
from iresnet_jax.nn.constraints import Normalize
from iresnet_jax.nn.layers import SpectralConv, SpectralDense
from iresnet_jax.stages import Precision
from iresnet_jax.stages import Sequential as PureSequential
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
        return PureSequential((self.pure(x.shape[1:]),))(x)

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
        return PureDenseConcatenation(PureSequential(stages), weights)


def concatenation_branch(
    channels: int,
    features: int | Sequence[int],
    *,
    coeff: float | None = 0.9,
    num_steps: int = 1,
    normalize: Normalize = "estimate",
    activation: str = "elu",
    activate_first: bool = True,
    precision: Precision = "float32",
) -> Sequential:
    """The branch of i-DenseNets (Perugachi-Diaz et al. 2021), for ``make_branch=`` of a model.

    Dense concatenations, each of a constrained layer and an activation, then a constrained layer to
    the block's channels. Its Lipschitz constant is at most coeff·Π √(η₁² + η₂²·coeff²) ≤ coeff: a
    concatenation keeps its input, so that the layers' norms do not multiply.

    Args:
      channels: of the block's input and output, or the dimensions of vectors.
      features: channels that are concatenated: of one number (images, 3×3 convolutions), a third,
        rounded down, by each of three layers, at least 1; of a row (vectors), each by a layer.
      coeff: norm to allow for each layer, in (0, 1).
      num_steps, normalize: see :class:`~iresnet_jax.nn.SpectralConv`.
      activation: a name, see :class:`~iresnet_jax.nn.Sequential`.
      activate_first: whether the branch begins with an activation.
      precision: see :class:`iresnet_jax.Sequential`.
    """
    options: dict[str, Any] = {"coeff": coeff, "num_steps": num_steps, "normalize": normalize}
    image = isinstance(features, int)
    widths = (max(1, features // 3),) * 3 if isinstance(features, int) else tuple(features)

    def layer(width: int, side: int) -> nn.Module:
        if image:
            return SpectralConv(width, side, parent=None, **options)
        return SpectralDense(width, parent=None, **options)

    grown = [DenseConcatenation((layer(width, 3), activation), parent=None) for width in widths]
    first: list[nn.Module | str] = [activation] if activate_first else []
    return Sequential((*first, *grown, layer(channels, 1)), precision, parent=None)
