"""The inverse of y = x + g(x) by fixed-point iteration (Behrmann et al. 2019, Algorithm 1).

The branch ``g`` is any pure function on batches ``[batch, ...]`` that treats samples
independently. Nothing here knows about networks.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from iresnet_jax.convergence import FixedPointInfo, refuse_out_of_reach, warn_unconverged
from iresnet_jax.iterations import Flags, Rule, expand, plain, sample_norm
from iresnet_jax.solvers import FixedPointIteration, Solver
from iresnet_jax.types import AnyArray, Branch, PerSample, Samples, Scalar

_LINEAR_ROUNDINGS = 8

#: x [batch, ...] -> a bound on the rounding of g(x), [batch].
Rounding = Callable[[Array], Array]
Lipschitz = float | Float[AnyArray, "..."]
TotalRounding = Callable[[Samples, PerSample], PerSample]


def fixed_point_inverse(
    branch: Branch,
    y: AnyArray,
    solver: Solver = FixedPointIteration(),
    *,
    lipschitz: Lipschitz | None = None,
    rounding: Rounding | None = None,
) -> tuple[Float[Array, "batch ..."], FixedPointInfo]:
    """Solve x + g(x) = y for x by x ← y − g(x), starting from y.

    A sample that has met the solver's tolerance stays frozen from then on: its answer does not
    depend on the others in its batch. A sample that becomes NaN or infinite stops too, unconverged.
    Outside of ``jit`` a sample that did not converge causes a warning.

    The result is differentiable in ``y`` and in whatever ``branch`` closes over, by the implicit
    function theorem: dx = (I + J)⁻¹(dy − dg), the linear system solved by the same kind of
    iteration, to ``rtol`` or rounding, relative to its own size. Forward, reverse and second-order
    derivatives work where the branch's operations allow them. Where a sample, or its linear
    system, did not converge, the derivative is NaN.

    The bound on the rounding holds for arithmetic that rounds correctly or contracts products and
    sums into one operation, in any order of summation.

    Args:
      branch: g, a contraction on batches [batch, ...].
      y: floating point, [batch, ...].
      solver: the iteration, and its tolerances.
      lipschitz: a rigorous upper bound L on Lip(g), for ``error_bound``, and for the safeguard of
        :class:`~iresnet_jax.solvers.Anderson`.
      rounding: x [batch, ...] -> a bound on ‖fl(g(x)) − g(x)‖₂, [batch], where fl(g) is g as it is
        computed; by default the branch's own method ``rounding_bound``, if it has one.

    Returns:
      x of the shape of y, and a :class:`FixedPointInfo`.

    Raises:
      ValueError: for an input without a batch axis; outside of ``jit``, for an ``error_tolerance``
        that rounding keeps out of reach.
      TypeError: for an input that is not floating point, or a solver that is none.
    """
    x, info = solve(branch, y, solver, lipschitz=lipschitz, rounding=rounding)
    if solver.error_tolerance is not None:
        refuse_out_of_reach(info, solver.error_tolerance)
    warn_unconverged(info)
    return x, info


def solve(
    branch: Branch,
    y: AnyArray,
    solver: Solver,
    *,
    lipschitz: Lipschitz | None = None,
    rounding: Rounding | None = None,
    scale: PerSample | float = 0.0,
) -> tuple[Float[Array, "batch ..."], FixedPointInfo]:
    """Solve as :func:`fixed_point_inverse` does, and leave the report to the caller.

    ``rtol`` is relative to ‖x‖ + ``scale``: of use where x may be far smaller than what it is
    computed from, whose rounding no residual can fall below.
    """
    _check(y, solver)
    y = jnp.asarray(y)
    _check_lipschitz(lipschitz)
    rounding = getattr(branch, "rounding_bound", None) if rounding is None else rounding
    gap = None if lipschitz is None else contraction_gap(lipschitz, y.dtype)
    total_rounding = _total_rounding(None if gap is None else rounding)
    rule = _relative_rule(solver.rtol, solver.atol, lax.stop_gradient(scale))
    error_tolerance = solver.error_tolerance
    if error_tolerance is not None:
        _check_error_tolerance(error_tolerance, lipschitz, rounding)
        if rounding == getattr(branch, "rounding_bound", None):
            _check_known_rounding(error_tolerance, branch)
        assert gap is not None
        rule = _certified_rule(error_tolerance, gap, total_rounding)

    def iterate(_: Branch, start: Samples) -> tuple[Samples, tuple[PerSample, ...]]:
        solution = solver.iterate(lambda x: y - branch(x), start, rule, lipschitz)
        delta = total_rounding(solution.x, solution.residual)
        return solution.x, (*solution[1:], delta, sample_norm(solution.x))

    with jax.default_matmul_precision("highest"):
        x, aux = lax.custom_root(
            lambda x: x + branch(x) - y,
            lax.stop_gradient(y),
            iterate,
            lambda linear, b: _solve_linear(linear, b, solver.rtol, solver.max_steps),
            has_aux=True,
        )
    num_steps, residual, converged, delta, norm = lax.stop_gradient(aux)
    x = _nan_derivative_unless(x, converged)
    bound = _error_bound(residual, delta, gap)
    steps = num_steps.astype(jnp.int32)
    return x, FixedPointInfo(steps, residual, converged > 0, bound, delta, norm)


def _relative_rule(rtol: float, atol: float, scale: PerSample | float) -> Rule:
    def rule(x: Samples, residual: PerSample) -> tuple[Flags, Flags]:
        size = sample_norm(x) + scale  # infinite where it overflows: that must not meet a tolerance
        met = (residual <= atol + rtol * size) & jnp.isfinite(size)
        return met, ~jnp.isfinite(residual)

    return rule


def _certified_rule(error_tolerance: float, gap: Scalar, total_rounding: TotalRounding) -> Rule:
    """Stop where (residual + δ)/(1 − L) is within the tolerance, or δ alone keeps it above."""

    def rule(x: Samples, residual: PerSample) -> tuple[Flags, Flags]:
        limit = error_tolerance * gap * (1.0 - 4.0 * _slack(x))
        near = residual <= limit
        unknown = jnp.full_like(residual, jnp.inf)
        delta = lax.cond(jnp.any(near), lambda: total_rounding(x, residual), lambda: unknown)
        hopeless = (near & ~(delta <= limit)) | ~jnp.isfinite(residual)
        return residual + delta <= limit, hopeless

    return rule


def _total_rounding(rounding: Rounding | None) -> TotalRounding:
    """(x, computed residual) -> δ: of the branch, of y − g(x) − x and of its norm.

    With f = fl(y − ĝ) and d = fl(f − x), what is computed is within u‖f‖ + u‖d‖ + ‖ĝ − g‖ of the
    exact y − g(x) − x, and ‖f‖ ≤ (1 + u)(‖x‖ + ‖d‖). Norms over n entries are within γₙ₊₄ of exact;
    γₙ₊₁₆ also covers the operations here. Squares that underflow cost √(n·tiny).
    """
    if rounding is None:
        return lambda x, residual: jnp.full_like(residual, jnp.inf)

    def total(x: Samples, residual: PerSample) -> PerSample:
        size = x[0].size if x.shape[0] else 1
        unit, tiny = float(jnp.finfo(x.dtype).eps) / 2, float(jnp.finfo(x.dtype).tiny)
        count = (size + 16) * unit
        gamma = count / (1.0 - count) if count < 0.25 else jnp.inf
        delta = rounding(x) + unit * sample_norm(x) + (2.0 * unit + gamma) * residual
        delta = (delta + 2.0 * (size * tiny) ** 0.5) * (1.0 + 2.0 * gamma)
        return jnp.where(jnp.isnan(delta), jnp.inf, delta).astype(residual.dtype)

    return total


def _solve_linear(linear: Branch, b: Samples, rtol: float, max_steps: int) -> Samples:
    """Solve z + Jz = b, where ``linear`` is z ↦ z + Jz; NaN where it does not converge.

    The tolerance is relative to ‖b‖ + ‖z‖, whatever their size: derivatives are linear in b.
    """
    tolerance = max(rtol, _LINEAR_ROUNDINGS * float(jnp.finfo(b.dtype).eps))

    def neumann(matvec: Branch, b: Samples) -> Samples:
        def rule(z: Samples, residual: PerSample) -> tuple[Flags, Flags]:
            size = sample_norm(b) + sample_norm(z)
            met = (residual <= tolerance * size) & jnp.isfinite(size)
            return met, ~jnp.isfinite(residual)

        solution = plain(lambda z: b - (matvec(z) - z), b, rule, max_steps)
        return jnp.where(expand(solution.converged, b) > 0, solution.x, jnp.nan)

    solution: Array = lax.custom_linear_solve(linear, b, neumann, neumann)
    return solution


@jax.custom_jvp
def _nan_derivative_unless(x: Samples, valid: PerSample) -> Samples:
    return x


@_nan_derivative_unless.defjvp
def _(
    primals: tuple[Samples, PerSample], tangents: tuple[Samples, PerSample]
) -> tuple[Samples, Samples]:
    x, valid = primals
    return x, tangents[0] * expand(jnp.where(valid > 0, 1.0, jnp.nan), x).astype(x.dtype)


def _check(y: AnyArray, solver: Solver) -> None:
    if not hasattr(y, "ndim") or not hasattr(y, "dtype"):
        raise TypeError(f"y must be an array (jax.Array or numpy); got {type(y).__name__}.")
    if y.ndim < 2:
        raise ValueError(f"y needs a batch axis and at least one more; got shape {y.shape}.")
    if not jnp.issubdtype(y.dtype, jnp.floating):
        raise TypeError(f"y must be floating point; got {y.dtype}.")
    check_solver(solver)


def check_solver(solver: Solver) -> None:
    """Refuse anything but a solver, by a TypeError."""
    if not isinstance(solver, Solver):
        raise TypeError(
            "solver must be a Solver, such as FixedPointIteration(rtol=1e-6) or Anderson(); got "
            f"{solver!r}."
        )


def _check_lipschitz(lipschitz: Lipschitz | None) -> None:
    """Refuse a bound below 0, where its value can be seen."""
    if lipschitz is None or isinstance(lipschitz, jax.core.Tracer):
        return
    if (np.asarray(lipschitz) < 0).any():
        raise ValueError(f"lipschitz must be ≥ 0; got {lipschitz}.")


def _check_error_tolerance(
    error_tolerance: float, lipschitz: Lipschitz | None, rounding: Rounding | None
) -> None:
    if lipschitz is None:
        raise ValueError(
            f"error_tolerance {error_tolerance:g} needs a bound on the branch's Lipschitz "
            "constant: pass lipschitz, or invert flow.with_bounds()."
        )
    if rounding is None:
        raise ValueError(
            f"error_tolerance {error_tolerance:g} needs a bound on the branch's rounding: pass "
            "rounding, or a branch with a method rounding_bound."
        )


def _check_known_rounding(error_tolerance: float, branch: Branch) -> None:
    """Refuse a branch that names parts whose rounding it can not bound."""
    silent: list[str] = getattr(branch, "silent_about_rounding", list)()
    if silent:
        raise ValueError(
            f"error_tolerance {error_tolerance:g} needs a bound on the branch's rounding, and that "
            f"of {', '.join(silent)} is not known: only this library's layers and activations "
            "state theirs. Use rtol and atol, or give the whole branch a method rounding_bound(x), "
            "or fixed_point_inverse a rounding: a bound on ‖fl(g(x)) − g(x)‖₂ of each sample."
        )


def contraction_gap(lipschitz: Lipschitz, dtype: DTypeLike) -> Scalar:
    """1 − L, rounded down; 0 where that is not in (0, 1], or L is NaN."""
    contraction = lax.stop_gradient(jnp.asarray(lipschitz, dtype))
    contraction = jnp.nextafter(contraction, jnp.full_like(contraction, jnp.inf))  # rounded up
    return jnp.where(
        (lax.stop_gradient(lipschitz) >= 0) & (contraction < 1), 1.0 - contraction, 0.0
    )


def _error_bound(residual: PerSample, delta: PerSample, gap: Scalar | None) -> PerSample:
    if gap is None:
        return jnp.full_like(residual, jnp.inf)
    known = (gap > 0) & jnp.isfinite(residual + delta)
    bound = (residual + delta) / jnp.where(gap > 0, gap, 1.0) * (1.0 + _slack(residual))
    return jnp.where(known, bound, jnp.inf)


def _slack(x: Float[Array, "..."]) -> float:
    """Relative, more than the rounding of the few operations with L and the tolerance."""
    return 4.0 * float(jnp.finfo(x.dtype).eps)
