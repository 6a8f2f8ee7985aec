"""Activations with a known Lipschitz constant."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

_TAYLOR = [(-1) ** k * math.pi ** (2 * k + 1) / math.factorial(2 * k + 1) for k in range(11)]


@jax.custom_jvp
def sinpi(x: jax.Array) -> jax.Array:
    """sin(πx), elementwise, for floating point ``x``.

    The argument is reduced by its nearest integer, which is exact, and then goes through the sine's
    Taylor polynomial on [−½, ½]. Nothing is rounded before the reduction, as ``sin(pi * x)`` does;
    and XLA vectorises a polynomial, where its sine on CPU takes twenty times as long.
    """
    nearest = jnp.round(x)
    odd = jnp.abs(nearest - 2.0 * jnp.round(0.5 * nearest))
    rest = x - nearest
    num_terms = 11 if x.dtype == jnp.float64 else 7
    polynomial = jnp.zeros_like(x)
    for coefficient in reversed(_TAYLOR[:num_terms]):
        polynomial = coefficient + rest * rest * polynomial
    return (1.0 - 2.0 * odd) * rest * polynomial


def cospi(x: jax.Array) -> jax.Array:
    """cos(πx) = sin(π(½ − |x|)), elementwise."""
    return sinpi(0.5 - jnp.abs(x))


@sinpi.defjvp
def _sinpi_jvp(primals, tangents):
    (x,), (tangent,) = primals, tangents
    return sinpi(x), math.pi * cospi(x) * tangent


@jax.custom_jvp
def elu(x: jax.Array) -> jax.Array:
    """x for x > 0, else eˣ − 1: the ELU, one exponential for it and all its derivatives.

    Its absolute error is of the order of ε, near zero too; on CPU ``expm1`` would take half as long
    again.
    """
    return jnp.maximum(x, 0.0) + (jnp.exp(jnp.minimum(x, 0.0)) - 1.0)


@elu.defjvp
def _elu_jvp(primals, tangents):
    (x,), (tangent,) = primals, tangents
    y = elu(x)
    return y, (1.0 + jnp.minimum(y, 0.0)) * tangent


#: By name, the function and its Lipschitz constant. "sin" is sin(πx)/π.
ACTIVATIONS: dict[str, tuple[Callable[[jax.Array], jax.Array], float]] = {
    "elu": (elu, 1.0),
    "relu": (jax.nn.relu, 1.0),
    "leaky_relu": (jax.nn.leaky_relu, 1.0),
    "softplus": (jax.nn.softplus, 1.0),
    "tanh": (jnp.tanh, 1.0),
    "sin": (lambda x: sinpi(x) / math.pi, 1.0),
    "lipswish": (lambda x: jax.nn.silu(x) / 1.1, 1.0),
}

#: (c, a) for each activation, with |fl(φ(x)) − φ(x)| ≤ u(c|φ(x)| + a) in float32 (u = 2⁻²⁴) and
#: float64 (u = 2⁻⁵³), but for underflow, which costs at most 1024 times the smallest normal number:
#: about twice the largest errors seen on CPU, over all magnitudes. In bfloat16 (u = 2⁻⁸) they hold
#: there for all of its numbers.
ACTIVATION_ULPS: dict[str, tuple[float, float]] = {
    "elu": (2.0, 2.0),
    "relu": (1.0, 0.0),
    "leaky_relu": (3.0, 0.0),
    "softplus": (8.0, 0.0),
    "tanh": (15.0, 0.0),
    "sin": (8.0, 0.0),
    "lipswish": (12.0, 0.0),
}
