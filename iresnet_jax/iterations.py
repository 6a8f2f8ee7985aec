"""Fixed-point iterations x ← f(x) on batches, each sample for itself: plain, and accelerated.

Both stop a sample by a rule on its iterate and residual, and freeze it from then on, so that its
answer does not depend on the others in its batch. Both evaluate f once a step, on the whole batch.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Update = Callable[[jax.Array], jax.Array]

#: (x, ‖f(x) − x‖ [batch]) -> which samples have what was asked for, and which can not get it.
Rule = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


class Solution(NamedTuple):
    """Where the iteration ended; all but x of shape [batch], in the type of x.

    Counts and flags are floats: ``lax.custom_root`` differentiates around what its solver returns.

    Attributes:
      x: the last iterate whose residual is known.
      num_steps: evaluations of f until the sample stopped.
      residual: ‖f(x) − x‖₂.
      converged: 1 where the rule was met.
    """

    x: jax.Array
    num_steps: jax.Array
    residual: jax.Array
    converged: jax.Array


class _Plain(NamedTuple):
    solution: Solution
    step: jax.Array
    active: jax.Array


def plain(update: Update, start: jax.Array, rule: Rule, max_steps: int) -> Solution:
    """x ← f(x) for each sample until the rule is met or given up, or the steps run out."""

    def unfinished(state):
        return (state.step < max_steps) & jnp.any(state.active)

    def advance(state):
        solution, step, active = state
        proposal = update(solution.x)
        residual = sample_norm(proposal - solution.x)
        met, hopeless = rule(solution.x, residual)
        keep_on = active & ~met & ~hopeless
        moves = keep_on & (step + 1 < max_steps)  # the residual stays that of x
        solution = Solution(
            jnp.where(expand(moves, start), proposal, solution.x),
            solution.num_steps + active.astype(start.dtype),
            jnp.where(active, residual, solution.residual),
            jnp.where(active, met.astype(start.dtype), solution.converged),
        )
        return _Plain(solution, step + 1, keep_on)

    zeros = jnp.zeros(start.shape[0], start.dtype)
    first = _Plain(
        Solution(start, zeros, zeros + jnp.inf, zeros), jnp.zeros((), jnp.int32), zeros == 0
    )
    return lax.while_loop(unfinished, advance, first).solution


class _Accelerated(NamedTuple):
    solution: Solution
    image: jax.Array  # f(x)
    query: jax.Array  # where f is evaluated next
    on_trial: jax.Array  # whether the query is an extrapolation, not f(x)
    trusted: jax.Array  # whether none has been rejected
    residuals: tuple[jax.Array, ...]  # differences of f(x) − x between steps, newest first
    images: tuple[jax.Array, ...]  # of f(x), likewise
    step: jax.Array
    active: jax.Array


def anderson(
    update: Update,
    start: jax.Array,
    rule: Rule,
    max_steps: int,
    *,
    window: int = 3,
    lipschitz: float | jax.Array = 1.0,
) -> Solution:
    """:func:`plain`, accelerated by extrapolation (Anderson 1965; Walker, Ni 2011) and safeguarded.

    From the last ``window`` differences ΔR of residuals r = f(x) − x and ΔF of images f(x), each
    sample proposes f(x) − ΔF γ, where γ minimises ‖r − ΔR γ‖₂. The proposal is accepted where its
    residual is at most L times the last one, as a plain step's is, or meets the rule. Otherwise the
    plain step f(x) is taken instead and the sample goes on without extrapolation.

    For a contraction by L, the residual of the n-th evaluation is thus at most Lⁿ⁻¹ times the first
    one, or Lⁿ⁻² after a rejection: Banach's rate, with at most one evaluation lost.

    Args:
      update: f.
      start: [batch, ...].
      rule: when a sample stops.
      max_steps: evaluations of f, at most.
      window: differences that are kept, ≥ 1.
      lipschitz: L; 1 where it is not known.
    """

    def unfinished(state):
        return (state.step < max_steps) & jnp.any(state.active)

    def advance(state):
        old = state.solution
        image = update(state.query)
        change = image - state.query
        residual = sample_norm(change)
        met, hopeless = rule(state.query, residual)
        accepted = ~state.on_trial | met | (residual <= bound * old.residual)
        moved = state.active & accepted
        solution = Solution(
            jnp.where(expand(moved, start), state.query, old.x),
            old.num_steps + state.active.astype(start.dtype),
            jnp.where(moved, residual, old.residual),
            jnp.where(moved, met.astype(start.dtype), old.converged),
        )
        has_history = jnp.isfinite(old.residual)
        learns = expand(moved & has_history, start)
        residuals = _remember(state.residuals, change - (state.image - old.x), learns)
        images = _remember(state.images, image - state.image, learns)
        image = jnp.where(expand(moved, start), image, state.image)
        trusted = state.trusted & (accepted | ~state.active)
        on_trial = trusted & has_history
        extrapolated = _extrapolate(image, image - solution.x, images, residuals)
        return _Accelerated(
            solution,
            image,
            jnp.where(expand(on_trial, start), extrapolated, image),
            on_trial,
            trusted,
            residuals,
            images,
            state.step + 1,
            state.active & ~(accepted & (met | hopeless)),
        )

    zeros, no = jnp.zeros(start.shape[0], start.dtype), jnp.zeros(start.shape[0], bool)
    bound = jnp.minimum(jnp.asarray(lipschitz, start.dtype), 1.0)
    history = (jnp.zeros_like(start),) * window
    solution = Solution(start, zeros, zeros + jnp.inf, zeros)
    step = jnp.zeros((), jnp.int32)
    first = _Accelerated(solution, start, start, no, ~no, history, history, step, ~no)
    return lax.while_loop(unfinished, advance, first).solution


def _remember(history, newest, where):
    """The history with the newest difference in front, for the samples that moved."""
    shifted = (newest, *history[:-1])
    return tuple(jnp.where(where, new, old) for new, old in zip(shifted, history, strict=True))


def _extrapolate(image, residual, images, residuals):
    """image − ΔF γ with γ = argmin ‖residual − ΔR γ‖₂, by Gram-Schmidt on the columns of ΔR.

    Every operation on a column of ΔR is repeated on that of ΔF. Columns that depend on newer ones
    to half of the working precision are left out.
    """
    basis: list[tuple[jax.Array, jax.Array]] = []
    for column, partner in zip(residuals, images, strict=True):
        threshold = jnp.sqrt(jnp.finfo(image.dtype).eps) * sample_norm(column)
        for direction, companion in basis:
            overlap = expand(_dot(direction, column), image)
            column, partner = column - overlap * direction, partner - overlap * companion
        length = sample_norm(column)
        used = length > threshold
        scale = expand(jnp.where(used, 1.0 / jnp.where(used, length, 1.0), 0.0), image)
        direction, companion = column * scale, partner * scale
        basis.append((direction, companion))
        coefficient = expand(_dot(direction, residual), image)
        residual, image = residual - coefficient * direction, image - coefficient * companion
    return image


def sample_norm(x: jax.Array) -> jax.Array:
    """‖x‖₂ of each sample, [batch]."""
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=tuple(range(1, x.ndim))))


def expand(per_sample: jax.Array, x: jax.Array) -> jax.Array:
    """[batch] with as many axes as ``x``."""
    return per_sample.reshape(per_sample.shape + (1,) * (x.ndim - 1))


def _dot(x, y):
    return jnp.sum(x * y, axis=tuple(range(1, x.ndim)))
