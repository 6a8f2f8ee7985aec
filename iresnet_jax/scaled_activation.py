"""An activation with a length of its own for every channel: x ↦ τ·φ(x/τ).

Its slopes are φ's, whatever τ > 0 is: d/dx τφ(x/τ) = φ′(x/τ). τ says where it bends: at a distance
of τ from zero. A layer of small weights sees a smooth φ of length 1 as all but linear.

**Rounding.** With λ = Lip(φ), and u for one operation: τ, 1/τ and the product with it are off by a
relative 4u together at most, or 6u where quotients are not rounded correctly, which moves the value
by as much of λ|x|.
φ's own error of u(c|φ| + a) comes out as u(c|τφ| + aτ), and the product adds u|τφ|. Of what is
flushed to zero, the quotient costs λτ times the smallest normal number, and φ's value τ times.
Lengths outside of [10⁻¹², 10¹²] are not bounded: there a quotient may leave the range of float32.
"""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from iresnet_jax.activations import ACTIVATIONS, Elementwise, where_active
from iresnet_jax.operators import STATIC
from iresnet_jax.rounding import Arithmetic, activation_error, norm_above
from iresnet_jax.types import Batch, PerSample

#: Between which lengths an activation is bounded.
SHORTEST, LONGEST = 1e-12, 1e12

_QUOTIENT = 8.0  # in u: 6, and room for what is of second order


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ScaledActivation:
    """x ↦ τ·φ(x/τ), elementwise.

    Attributes:
      length: τ, one for each channel, in [10⁻¹², 10¹²].
      activation: name of φ, in :data:`~iresnet_jax.activations.ACTIVATIONS`.
      active: see :class:`~iresnet_jax.Activation`.

    Raises:
      ValueError: for an unknown name.
    """

    length: Float[Array, "*stack channels"]
    activation: str = dataclasses.field(default="elu", metadata=STATIC)
    active: Float[Array, "..."] | None = None

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ValueError(f"Unknown activation {self.activation!r}; known: {known}.")

    def __call__(self, x: Batch) -> Batch:
        """Compute it, at least in float32: of narrower types, the result alone is rounded.

        Raises:
          ValueError: for another number of channels.
        """
        x = jnp.asarray(x)
        if x.ndim < 2 or jnp.shape(self.length) != x.shape[-1:]:
            raise ValueError(
                f"A ScaledActivation with τ of shape {jnp.shape(self.length)} cannot act on an "
                f"array of shape {x.shape}: it takes one τ for each channel, and a batch "
                "[batch, ..., channels]."
            )
        wide = x.astype(_computed_in(x.dtype))
        length = jnp.asarray(self.length, wide.dtype)
        acting = _scaled(self.activation, wide, length).astype(x.dtype)
        return where_active(self.active, acting, x)

    def lipschitz_bound(self) -> float:
        """Return the largest absolute slope; infinite for a length that is out of range."""
        length = np.asarray(self.length, np.float64)
        usable = np.all((length >= SHORTEST) & (length <= LONGEST))
        return max(map(abs, self.slopes())) if usable else math.inf

    def slopes(self) -> tuple[float, float]:
        """Return bounds on the slopes from below and above; with the identity's if it is one."""
        low, high = self._known.slopes
        return (low, high) if self.active is None else (min(low, 1.0), max(high, 1.0))

    def rounding(self, x: Batch, error: PerSample, arithmetic: Arithmetic) -> PerSample:
        """Bound the error of the output, [batch]; infinite where nothing is known of φ's.

        It is infinite, too, for a length or a quotient that is out of range.
        """
        known = self._known
        if known.ulps is None:
            return where_active(self.active, jnp.full_like(error, jnp.inf), error)
        relative, absolute = known.ulps
        length = jnp.asarray(self.length, error.dtype)
        lengths = norm_above(jnp.broadcast_to(length, x.shape).astype(error.dtype))
        ulps = (relative + 2.0, 0.0)
        bound = activation_error(self._acting, known.lipschitz, ulps, x, error, arithmetic)
        size = norm_above(x.astype(error.dtype)) + 2.0 * error
        more = arithmetic.unit * (_QUOTIENT * known.lipschitz * size + absolute * lengths)
        more = more + _flushed(known, x, lengths)
        usable = self._in_range(x, size, bound + more)
        return where_active(self.active, jnp.where(usable, bound + 1.01 * more, jnp.inf), error)

    def silent_about_rounding(self) -> list[str]:
        """Name φ, if its rounding is not known."""
        return [self.activation] if self._known.ulps is None else []

    @property
    def _known(self) -> Elementwise:
        return ACTIVATIONS[self.activation]

    def _acting(self, x: Batch) -> Batch:
        return dataclasses.replace(self, active=None)(x)

    def _in_range(self, x: Batch, size: PerSample, error: PerSample) -> Bool[Array, " batch"]:
        """Whether lengths are within theirs, and no value or quotient can overflow."""
        length = jnp.asarray(self.length, error.dtype)
        shortest = jnp.minimum(jnp.min(length), 1.0)
        out = norm_above(self._acting(x).astype(error.dtype)) + error
        farthest = (out + (1.0 + self._known.lipschitz) * size) / shortest
        wide = jnp.finfo(_computed_in(x.dtype)).max
        fits = (farthest < float(wide) / 4.0) & (out < float(jnp.finfo(x.dtype).max) / 4.0)
        return fits & jnp.all((length >= SHORTEST) & (length <= LONGEST))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _scaled(name: str, x: Batch, length: Array) -> Batch:
    return length * ACTIVATIONS[name].function(x * (1.0 / length))


def _scaled_jvp(name: str, primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> tuple[Any, Any]:
    """The slope is φ′(w), w = x/τ, without τ and 1/τ around it; along τ it is φ(w) − wφ′(w)."""
    (x, length), (along_x, along_length) = primals, tangents
    w = x * (1.0 / length)
    value, slope = jax.jvp(ACTIVATIONS[name].function, (w,), (jnp.ones_like(w),))
    tangent = jnp.zeros_like(x)
    if not isinstance(along_x, SymbolicZero):
        tangent = slope * along_x
    if not isinstance(along_length, SymbolicZero):
        tangent = tangent + (value - w * slope) * along_length
    return length * value, tangent


_scaled.defjvp(_scaled_jvp, symbolic_zeros=True)


def _computed_in(dtype: DTypeLike) -> DTypeLike:
    return jnp.promote_types(dtype, jnp.float32)


def _flushed(known: Elementwise, x: Batch, lengths: PerSample) -> PerSample:
    """What numbers that are flushed to zero take from the result: within, and at its end."""
    within = float(jnp.finfo(_computed_in(x.dtype)).tiny)
    end = 4.0 * (within + float(jnp.finfo(x.dtype).tiny)) * math.sqrt(math.prod(x.shape[1:]))
    return (4096.0 + 4.0 * known.lipschitz) * within * lengths + end
