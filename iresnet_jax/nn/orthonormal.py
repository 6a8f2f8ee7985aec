"""A Flax layer whose rows or columns are orthonormal."""

from collections.abc import Sequence

import flax.linen as nn

from iresnet_jax.nn.layers import Initializer
from iresnet_jax.operators import DenseOperator
from iresnet_jax.orthonormal import orthonormalized
from iresnet_jax.spectral import check_coeff
from iresnet_jax.stages import Affine, Sequential
from iresnet_jax.types import Batch

_HEADROOM = 1e-5  # for rounding


class OrthonormalDense(nn.Module):
    """x ↦ coeff·x W̃ + b on the last axis, W̃ nearly orthonormal: no singular value above 1.

    It stores a raw W [in, out], of which W̃ is :func:`~iresnet_jax.orthonormal.orthonormalized`.
    With :class:`~iresnet_jax.nn.GroupSort` between such layers, a branch keeps the norms of
    gradients (Anil et al. 2019). Certificates bound coeff·W̃ like any layer, and do not rest on the
    iteration; there is nothing to converge, nor to shrink.

    Attributes:
      features: output features.
      coeff: what the singular values are to be, in (0, 1), less 1e-5 for rounding; None for 1.
      num_steps: of Björck's iteration.
      use_bias: whether to add a bias.
      kernel_init: initialiser of W.
    """

    features: int
    coeff: float | None = 0.9
    num_steps: int = 20
    use_bias: bool = True
    kernel_init: Initializer = nn.initializers.orthogonal()

    def __call__(self, x: Batch) -> Batch:
        return Sequential((self.pure(x.shape[1:]),))(x)

    @nn.compact
    def pure(self, input_shape: Sequence[int]) -> Affine:
        """Return the layer's map for inputs of ``input_shape``, without batch axis."""
        check_coeff(self.coeff)
        if min(shape := (input_shape[-1], self.features)) < 1:
            raise ValueError(f"Every side of a kernel must be ≥ 1; got {shape}.")
        kernel = orthonormalized(self.param("kernel", self.kernel_init, shape), self.num_steps)
        scale = 1.0 if self.coeff is None else self.coeff * (1.0 - _HEADROOM)
        zeros = nn.initializers.zeros
        bias = self.param("bias", zeros, (self.features,)) if self.use_bias else None
        return Affine(DenseOperator(scale * kernel), bias)
