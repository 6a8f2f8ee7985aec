"""What stages state of themselves, read in one way for all: nothing that is inherited wrongly.

See :mod:`iresnet_jax.stages` for what a stage may state.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array

from iresnet_jax.rounding import Arithmetic
from iresnet_jax.types import Batch, Branch, PerSample


def states(part: object, name: str, *, about: tuple[str, ...] = ("__call__",)) -> bool:
    """Whether a stage or a module has a method ``name`` that is about its own map.

    A subclass that overrides one of ``about`` does not inherit it: it has to state it again.
    """
    for base in type(part).__mro__:
        if name in vars(base):
            return True
        if any(method in vars(base) for method in about):
            break
    return name in getattr(part, "__dict__", {})


def stated_lipschitz(stage: Branch) -> float:
    """Return what a stage states as L ≥ Lip; infinite where it states nothing.

    Raises:
      ValueError: for a bound below 0.
    """
    if not states(stage, "lipschitz_bound"):
        return math.inf
    bound = stage.lipschitz_bound()  # type: ignore[attr-defined]
    return not_negative(bound, f"{type(stage).__name__}.lipschitz_bound()")


def stated_slopes(stage: Branch) -> tuple[float, float] | None:
    """Return the slopes that an elementwise stage states, within ±L; None where it states none.

    Raises:
      ValueError: for slopes of which the first is above the second.
    """
    own = states(stage, "slopes", about=("__call__", "lipschitz_bound"))
    if not own or not callable(getattr(stage, "slopes", None)):
        return None
    low, high = map(float, stage.slopes())  # type: ignore[attr-defined]
    if low > high:
        raise ValueError(f"{type(stage).__name__}.slopes() must be (α, β), α ≤ β: ({low}, {high}).")
    steepest = stated_lipschitz(stage)
    if not math.isfinite(low + high + steepest):
        return None
    return max(min(low, steepest), -steepest), min(max(high, -steepest), steepest)


def not_negative(bound: float, name: str) -> float:
    """Return a bound as a float; refuse one below 0, by a ValueError."""
    if bound < 0.0:
        raise ValueError(f"{name} must be ≥ 0; got {float(bound)}.")
    return float(bound)


def stated_rounding(stage: Branch, x: Batch, error: PerSample, arithmetic: Arithmetic) -> PerSample:
    """Return what a stage states of its rounding, [batch]; infinite where it states nothing."""
    if not states(stage, "rounding"):
        return jnp.full_like(error, jnp.inf)
    bound: Array = stage.rounding(x, error, arithmetic)  # type: ignore[attr-defined]
    return bound
