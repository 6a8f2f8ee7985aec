"""An activation with a length of its own for every channel: x ↦ τ·φ(x/τ).

Its slopes are φ's, whatever τ > 0 is: d/dx τφ(x/τ) = φ′(x/τ). What τ sets is where it bends. A
layer of small weights sees a smooth φ of length 1 as all but linear; one of length τ bends τ times
as close to zero.

**Rounding.** The quotient is off by a relative u, which moves the value by at most λu|x|; φ's own
error of u(c|φ| + a) comes out as u(c|τφ| + aτ), and the product adds u|τφ|.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from iresnet_jax.activations import ACTIVATIONS, where_active
from iresnet_jax.operators import STATIC
from iresnet_jax.rounding import Arithmetic, activation_error, norm_above
from iresnet_jax.types import Batch, PerSample

_QUOTIENT = 4.0  # ulps of a quotient, which need not be rounded correctly


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ScaledActivation:
    """x ↦ τ·φ(x/τ), elementwise.

    Attributes:
      scale: τ, one for each channel, > 0.
      name: of φ, in :data:`~iresnet_jax.activations.ACTIVATIONS`.
      active: see :class:`~iresnet_jax.Activation`.

    Raises:
      ValueError: for an unknown name.
    """

    scale: Float[Array, "*stack channels"]
    name: str = dataclasses.field(default="elu", metadata=STATIC)
    active: Float[Array, "..."] | None = None

    def __post_init__(self) -> None:
        if self.name not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ValueError(f"Unknown activation {self.name!r}; known: {known}.")

    def __call__(self, x: Batch) -> Batch:
        """Compute it, at least in float32: of narrower types, the result alone is rounded.

        Raises:
          ValueError: for another number of channels.
        """
        x = jnp.asarray(x)
        if x.ndim < 2 or jnp.shape(self.scale) != x.shape[-1:]:
            raise ValueError(
                f"A ScaledActivation with τ of shape {jnp.shape(self.scale)} cannot act on an "
                f"array of shape {x.shape}: it takes one τ for each channel, and a batch "
                "[batch, ..., channels]."
            )
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        scale = jnp.asarray(self.scale, wide.dtype)
        acting = (scale * ACTIVATIONS[self.name].function(wide / scale)).astype(x.dtype)
        return where_active(self.active, acting, x)

    def lipschitz_bound(self) -> float:
        """Return the largest absolute slope; infinite unless every τ is positive and finite."""
        scale = np.asarray(self.scale, np.float64)
        usable = np.all((scale > 0.0) & np.isfinite(scale))
        return max(map(abs, self.slopes())) if usable else math.inf

    def slopes(self) -> tuple[float, float]:
        """Return bounds on the slopes from below and above; with the identity's if it is one."""
        low, high = ACTIVATIONS[self.name].slopes
        return (low, high) if self.active is None else (min(low, 1.0), max(high, 1.0))

    def rounding(self, x: Batch, error: PerSample, arithmetic: Arithmetic) -> PerSample:
        """Bound the error of the output, [batch]; infinite where nothing is known of φ's."""
        known = ACTIVATIONS[self.name]
        if known.ulps is None:
            return where_active(self.active, jnp.full_like(error, jnp.inf), error)
        relative, absolute = known.ulps
        bound = activation_error(self, known.lipschitz, (relative + 2.0, 0.0), x, error, arithmetic)
        scale = jnp.asarray(self.scale, error.dtype)
        lengths = norm_above(jnp.broadcast_to(scale, x.shape).astype(error.dtype))
        moved = _QUOTIENT * known.lipschitz * (norm_above(x.astype(error.dtype)) + 2.0 * error)
        tiny = 4096.0 * float(jnp.finfo(error.dtype).tiny)
        more = arithmetic.unit * (moved + absolute * lengths) + tiny * lengths
        total = bound + 1.01 * more
        usable = jnp.all((scale > 0.0) & jnp.isfinite(scale)) & ~jnp.isnan(total)
        return where_active(self.active, jnp.where(usable, total, jnp.inf), error)

    def silent_about_rounding(self) -> list[str]:
        """Name φ, if its rounding is not known."""
        return [self.name] if ACTIVATIONS[self.name].ulps is None else []
