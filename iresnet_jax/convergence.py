"""How inverses ended, and what is said of those that did not reach their tolerance."""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


class UnconvergedWarning(UserWarning):
    """An inverse stopped before its tolerance."""


class UnconvergedError(RuntimeError):
    """An inverse stopped before its tolerance."""


class FixedPointInfo(NamedTuple):
    """How the iteration ended, for each sample: fields [batch], or [solves, batch] of a network.

    The solves are in forward order.

    Attributes:
      num_steps: evaluations of the branch until the sample stopped.
      residual: ‖y − g(x) − x‖₂ at the returned x, over the non-batch axes, as computed.
      converged: whether the tolerance was met.
      error_bound: (residual + rounding) / (1 − L), a rigorous bound on the distance ‖x − x*‖₂ to
        the exact preimage; infinite where L is not given or ≥ 1, or the rounding is not known.
      rounding: δ, a rigorous bound on the distance of ``residual`` to the exact one; infinite where
        none is known.
      norm: ‖x‖₂ of the returned x.
    """

    num_steps: Int[Array, "*solves batch"]
    residual: Float[Array, "*solves batch"]
    converged: Bool[Array, "*solves batch"]
    error_bound: Float[Array, "*solves batch"]
    rounding: Float[Array, "*solves batch"]
    norm: Float[Array, "*solves batch"]

    def check(self, names: Sequence[str] = ()) -> None:
        """Refuse an inverse that missed its tolerance; of use after ``jit``, on concrete values.

        Solves are named as :meth:`iresnet_jax.flows.Flow.solve_names` does.

        Raises:
          UnconvergedError: naming how many samples, and the worst.
        """
        if message := unconverged_message(self, names):
            raise UnconvergedError(message)


def warn_unconverged(info: FixedPointInfo, names: Sequence[str] = ()) -> None:
    """Warn where a sample missed its tolerance; silent while values are traced."""
    if not _is_traced(info) and (message := unconverged_message(info, names)):
        warnings.warn(message, UnconvergedWarning, stacklevel=3)


def unconverged_message(info: FixedPointInfo, names: Sequence[str] = ()) -> str:
    """Say how many samples missed their tolerance and which is the worst; nothing of none."""
    if np.all(info.converged):
        return ""
    batch = np.shape(info.converged)[-1]
    converged = np.reshape(info.converged, (-1, batch))
    residual = np.asarray(info.residual, np.float64).reshape(-1, batch)
    missed = np.where(converged, -np.inf, np.nan_to_num(residual, nan=np.inf, posinf=np.inf))
    solve, sample = (int(i) for i in np.unravel_index(np.argmax(missed), missed.shape))
    place = f" at {names[solve]}" if len(names) > solve else ""
    steps = int(np.reshape(info.num_steps, (-1, batch))[solve, sample])
    return (
        f"{int((~converged).any(axis=0).sum())} of {converged.shape[1]} inverses did not meet "
        f"their tolerance. The worst is sample {sample}{place}, with a residual of "
        f"{residual[solve, sample]:.3g} after {steps} steps. Raise max_steps or the tolerance, or "
        "use the solver Anderson; a branch that is no contraction has no inverse to find."
    )


def refuse_out_of_reach(
    info: FixedPointInfo, error_tolerance: float, names: Sequence[str] = ()
) -> None:
    """Refuse an error tolerance below the rounding floor δ/(1 − L) of a sample that missed it.

    Nothing is refused while values are traced: the sample is reported as not converged.

    Raises:
      ValueError: naming the sample, and its block, whose floor is highest.
    """
    if _is_traced(info):
        return
    share = info.rounding / (info.residual + info.rounding)
    floor = jnp.where(jnp.isfinite(info.error_bound), info.error_bound * share, jnp.inf)
    floor = jnp.where(info.converged | ~jnp.isfinite(info.residual), 0.0, floor)
    if not floor.size or (highest := float(floor.max())) <= error_tolerance:
        return
    *solve, sample = (int(i) for i in jnp.unravel_index(jnp.argmax(floor), floor.shape))
    where = f"sample {sample}" + (f" at {names[solve[0]]}" if solve and names else "")
    if highest == float("inf"):
        raise ValueError(
            f"error_tolerance {error_tolerance:g} cannot be met: nothing is known of the error of "
            f"{where}. Its branch must be a proved contraction (lipschitz < 1), and bound its "
            "rounding: a branch in bfloat16 does so only for sums of fewer than 48 products."
        )
    raise ValueError(
        f"error_tolerance {error_tolerance:g} is below what rounding allows: the error bound of "
        f"{where} cannot fall below about {highest:.3g}."
    )


def _is_traced(info: FixedPointInfo) -> bool:
    return any(isinstance(field, jax.core.Tracer) for field in info)
