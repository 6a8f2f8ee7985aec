"""Activations with known slopes."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from iresnet_jax.types import AnyArray

_TAYLOR = [(-1) ** k * math.pi ** (2 * k + 1) / math.factorial(2 * k + 1) for k in range(11)]


@jax.custom_jvp
def sinpi(x: Float[AnyArray, "*shape"]) -> Float[Array, "*shape"]:
    """Compute sin(πx) elementwise, for floating-point ``x``.

    The nearest integer is subtracted, which is exact, and the sine's Taylor polynomial evaluated on
    [−½, ½]. ``sin(pi * x)`` would round before its reduction. XLA vectorises the polynomial, while
    its own sine takes twenty times as long on CPU.
    """
    nearest = jnp.round(x)
    odd = jnp.abs(nearest - 2.0 * jnp.round(0.5 * nearest))
    rest = x - nearest
    num_terms = 11 if x.dtype == jnp.float64 else 7
    polynomial = jnp.zeros_like(x)
    for coefficient in reversed(_TAYLOR[:num_terms]):
        polynomial = coefficient + rest * rest * polynomial
    return (1.0 - 2.0 * odd) * rest * polynomial


def cospi(x: Float[AnyArray, "*shape"]) -> Float[Array, "*shape"]:
    """Compute cos(πx) = sin(π(½ − |x|)) elementwise."""
    return sinpi(0.5 - jnp.abs(x))


@sinpi.defjvp
def _sinpi_jvp(
    primals: tuple[Float[AnyArray, "*shape"]], tangents: tuple[Float[AnyArray, "*shape"]]
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    (x,), (tangent,) = primals, tangents
    return sinpi(x), math.pi * cospi(x) * tangent


@jax.custom_jvp
def elu(x: Float[AnyArray, "*shape"]) -> Float[Array, "*shape"]:
    """Compute the ELU elementwise: x for x > 0, else eˣ − 1.

    One exponential serves the value and all derivatives. The absolute error is of order ε, also
    near zero. ``expm1`` would take 1.5 times as long on CPU.
    """
    return jnp.maximum(x, 0.0) + (jnp.exp(jnp.minimum(x, 0.0)) - 1.0)


@elu.defjvp
def _elu_jvp(
    primals: tuple[Float[AnyArray, "*shape"]], tangents: tuple[Float[AnyArray, "*shape"]]
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    (x,), (tangent,) = primals, tangents
    y = elu(x)
    return y, (1.0 + jnp.minimum(y, 0.0)) * tangent


class Elementwise(NamedTuple):
    """What is known of an elementwise function φ.

    Attributes:
      function: φ, in JAX.
      slopes: (α, β) with α ≤ (φ(x) − φ(y))/(x − y) ≤ β everywhere.
      ulps: (c, a) with |fl(φ(x)) − φ(x)| ≤ u(c|φ(x)| + a) in float32 (u = 2⁻²⁴) and float64
        (u = 2⁻⁵³), and at most 1024 times the smallest normal number more, for underflow; None
        where it is not known. Those of this library are about twice the largest errors measured on
        CPU, over all magnitudes. For bfloat16 (u = 2⁻⁸) they were checked there on all of its
        numbers.
    """

    function: Callable[[Array], Array]
    slopes: tuple[float, float]
    ulps: tuple[float, float] | None = None

    @property
    def lipschitz(self) -> float:
        """The largest absolute slope."""
        return max(map(abs, self.slopes))


def where_active(
    active: Float[AnyArray, "..."] | None,
    acting: Float[Array, "*shape"],
    idle: Float[Array, "*shape"],
) -> Float[Array, "*shape"]:
    """Choose ``acting`` where an activation acts: always, or where ``active`` is 1 and not 0."""
    return acting if active is None else jnp.where(jnp.asarray(active) > 0.5, acting, idle)


#: Before the name of an activation: the same with a learned length for every channel.
LEARNED = "learned_"
_OF_MODULES = ("clipswish", "maxmin")

#: What is known of activations, by name. "sin" is sin(πx)/π; "lipswish" is x·sigmoid(x)/1.1, of
#: slopes within −0.0998/1.1 and 1.0998/1.1.
ACTIVATIONS: dict[str, Elementwise] = {
    "elu": Elementwise(elu, (0.0, 1.0), (2.0, 2.0)),
    "relu": Elementwise(jax.nn.relu, (0.0, 1.0), (1.0, 0.0)),
    "leaky_relu": Elementwise(jax.nn.leaky_relu, (0.01 - 1e-9, 1.0), (3.0, 0.0)),
    "softplus": Elementwise(jax.nn.softplus, (0.0, 1.0), (8.0, 0.0)),
    "tanh": Elementwise(jnp.tanh, (0.0, 1.0), (15.0, 0.0)),
    "sin": Elementwise(lambda x: sinpi(x) / math.pi, (-1.0, 1.0), (8.0, 0.0)),
    "lipswish": Elementwise(lambda x: jax.nn.silu(x) / 1.1, (-0.0908, 1.0), (12.0, 0.0)),
}


def register_activation(
    name: str,
    function: Callable[[Array], Array],
    lipschitz: float,
    ulps: tuple[float, float] | None = None,
    *,
    slopes: tuple[float, float] | None = None,
) -> None:
    """Make an elementwise function known by a name, wherever names of activations are taken.

    Args:
      name: under which it is known from now on.
      function: φ, elementwise, in JAX.
      lipschitz: λ ≥ |φ(x) − φ(y)|/|x − y| everywhere; it is taken at its word, but for a look at
        slopes between −10⁶ and 10⁶.
      ulps: (c, a), with |fl(φ(x)) − φ(x)| ≤ u(c|φ(x)| + a), as in :class:`Elementwise`; None where
        it is not known: then no inverse through it states an error bound.
      slopes: (α, β), −λ ≤ α ≤ β ≤ λ, between which all slopes lie, taken at its word likewise;
        (−λ, λ) by default. A monotone activation, α = 0, has tighter certificates.

    Raises:
      ValueError: for a name that is taken or begins with "learned_", a constant that is not
        positive and finite, or bounds that the function's slopes exceed.
    """
    if name in ACTIVATIONS or name in _OF_MODULES:
        raise ValueError(f"An activation {name!r} is known already; choose another name.")
    if name.startswith(LEARNED):
        raise ValueError(
            f"A name that begins with {LEARNED!r} stands for an activation with learned lengths; "
            f"got {name!r}. Choose another name."
        )
    if not 0.0 < lipschitz < math.inf:
        raise ValueError(f"lipschitz must lie in (0, inf); got {lipschitz} for {name!r}.")
    low, high = (-lipschitz, lipschitz) if slopes is None else slopes
    if not -lipschitz <= low <= high <= lipschitz:
        raise ValueError(
            f"slopes must be two numbers in [-{lipschitz}, {lipschitz}], the smaller first; got "
            f"{slopes} for {name!r}."
        )
    if ulps is not None and not 0.0 <= min(ulps) <= max(ulps) < math.inf:
        raise ValueError(f"ulps must be two numbers in [0, inf); got {ulps} for {name!r}.")
    far = np.geomspace(20.0, 1e6, 2000)
    x = np.concatenate([-far[::-1], np.linspace(-20.0, 20.0, 4001)[1:-1], far]).astype(np.float32)
    y = np.asarray(function(jnp.asarray(x)), np.float64)
    if y.shape != x.shape:
        raise ValueError(f"{name!r} must be elementwise; it maps shape {x.shape} to {y.shape}.")
    found = np.diff(y) / np.diff(x.astype(np.float64))
    steepest = np.abs(found).max()
    if not steepest <= lipschitz * 1.01:
        raise ValueError(f"{name!r} has slopes of {steepest:.4g}, above lipschitz = {lipschitz}.")
    slack = 1e-3 * lipschitz  # more than float32 makes of differences
    if not low - slack <= found.min() <= found.max() <= high + slack:
        raise ValueError(
            f"{name!r} has slopes from {found.min():.4g} to {found.max():.4g}, not within {slopes}."
        )
    ACTIVATIONS[name] = Elementwise(function, (float(low), float(high)), ulps)
