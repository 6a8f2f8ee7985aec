"""The inverse hyperbolic sine of some columns: heavy tails become light ones."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from iresnet_jax.bijections import Error, Mapped
from iresnet_jax.certificates import Certificate
from iresnet_jax.convergence import FixedPointInfo
from iresnet_jax.logdet import Estimator
from iresnet_jax.operators import STATIC
from iresnet_jax.residual import OPERATIONS
from iresnet_jax.rounding import unit_roundoff
from iresnet_jax.transforms import Transform
from iresnet_jax.types import Keys, Samples, Shape


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Asinh(Transform):
    """y = asinh(x) = log(x + √(x² + 1)) on some entries of the last axis; the others stay.

    Near 0 it is the identity, and far from it a logarithm, so that the power law of a heavy tail
    becomes an exponential one. log|det| = −½ Σ log(1 + x²) over these entries, in nats. The map is
    1-Lipschitz. Its inverse is continuous, but has no Lipschitz constant on the whole line.

    Attributes:
      columns: for each entry of the last axis, whether it is mapped.
    """

    columns: tuple[bool, ...] = dataclasses.field(metadata=STATIC)

    def forward(self, x: Samples) -> Samples:
        return jnp.where(self._mask(x), jnp.arcsinh(x), x)

    def forward_and_log_det(self, x: Samples, estimator: Estimator, keys: Keys = None) -> Mapped:
        mask = self._mask(x)
        log_slopes = -jnp.log(jnp.hypot(1.0, jnp.where(mask, x, 0.0)))
        return self.forward(x), jnp.sum(log_slopes, axis=tuple(range(1, x.ndim)))

    def backward(self, y: Samples) -> Samples:
        mask = self._mask(y)
        return jnp.where(mask, jnp.sinh(jnp.where(mask, y, 0.0)), y)

    def certify(self, name: str, shape: Shape) -> Certificate:
        """Bound the map by 1; its inverse is bounded only where every column stays as it is."""
        return Certificate((), 1.0, math.inf if any(self.columns) else 1.0)

    def inverse_error(self, error: Error, info: FixedPointInfo | None, shape: Shape) -> Error:
        """ε ← cosh(‖y‖)·ε + ρ: no entry of y or of the exact output exceeds ‖y‖ = norm + ε."""
        unit, root = unit_roundoff(error.bound.dtype), math.sqrt(math.prod(shape))
        slack = 1.0 + 4.0 * OPERATIONS * unit
        reach = (error.norm + error.bound) * slack
        # exp is of a rounded argument: a relative error of reach·u.
        steepest = jnp.exp(reach) * (1.0 + 4.0 * unit * (reach + OPERATIONS)) * slack
        # sinh is of exponentials of rounded arguments, too.
        rounding = (OPERATIONS + 4.0 * reach) * unit * root * steepest
        bound, norm = steepest * error.bound * slack + rounding, root * steepest * slack
        return Error(*(jnp.where(jnp.isnan(x), jnp.inf, x) for x in (bound, norm)))

    def _mask(self, x: Samples) -> Bool[Array, " columns"]:
        if x.shape[-1] != len(self.columns):
            raise ValueError(
                f"Asinh of {len(self.columns)} columns cannot act on an array of shape {x.shape}."
            )
        return jnp.asarray(self.columns)
