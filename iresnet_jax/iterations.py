"""Batched fixed-point iterations x ← f(x), plain and accelerated.

A rule on its own iterate and residual stops each sample. The sample is frozen from then on, so its
answer does not depend on the rest of the batch. Each step evaluates f once, on the whole batch.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Shaped

from iresnet_jax.types import AnyArray, PerSample, Samples

Update = Callable[[Array], Array]
Flags = Bool[Array, " batch"]

#: (x, ‖f(x) − x‖ [batch]) -> the samples that are done, and those that never will be.
Rule = Callable[[Samples, PerSample], tuple[Flags, Flags]]


class Solution(NamedTuple):
    """The end of an iteration; all fields but x have shape [batch] and the dtype of x.

    Counts and flags are floats, since ``lax.custom_root`` wants a tangent for all its solver
    returns.

    Attributes:
      x: last iterate with a known residual.
      num_steps: evaluations of f until the sample stopped.
      residual: ‖f(x) − x‖₂.
      converged: 1 where the rule was met.
    """

    x: Samples
    num_steps: PerSample
    residual: PerSample
    converged: PerSample


class _Plain(NamedTuple):
    solution: Solution
    step: Int[Array, ""]
    active: Flags


def plain(update: Update, start: Samples, rule: Rule, max_steps: int) -> Solution:
    """Iterate x ← f(x) until each sample meets the rule or gives up, or the steps run out."""

    def unfinished(state: _Plain) -> Bool[Array, ""]:
        return (state.step < max_steps) & jnp.any(state.active)

    def advance(state: _Plain) -> _Plain:
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
    image: Samples  # f(x)
    query: Samples  # where f is evaluated next
    on_trial: Flags  # whether the query is an extrapolation, not f(x)
    trusted: Flags  # whether none has been rejected
    residuals: tuple[Samples, ...]  # differences of f(x) − x between steps, newest first
    images: tuple[Samples, ...]  # of f(x), likewise
    step: Int[Array, ""]
    active: Flags


def anderson(
    update: Update,
    start: Samples,
    rule: Rule,
    max_steps: int,
    *,
    window: int = 3,
    lipschitz: ArrayLike = 1.0,
) -> Solution:
    """Accelerate :func:`plain` by safeguarded extrapolation (Anderson 1965; Walker, Ni 2011).

    Each sample keeps its last ``window`` differences ΔR of residuals r = f(x) − x and ΔF of images
    f(x), and proposes f(x) − ΔF γ, where γ minimises ‖r − ΔR γ‖₂. It accepts a proposal that meets
    the rule or whose residual is at most L times the last one, as a plain step's is. Otherwise it
    takes the plain step f(x) and extrapolates no more.

    For an L-contraction, the residual of the n-th evaluation is thus at most Lⁿ⁻¹ times the first
    one, or Lⁿ⁻² after a rejection: Banach's rate, with at most one evaluation lost.

    Args:
      update: f.
      start: initial iterate, [batch, ...].
      rule: decides when a sample stops.
      max_steps: maximum number of evaluations of f.
      window: number of differences kept, ≥ 1.
      lipschitz: L, or 1 if unknown.
    """

    def unfinished(state: _Accelerated) -> Bool[Array, ""]:
        return (state.step < max_steps) & jnp.any(state.active)

    def advance(state: _Accelerated) -> _Accelerated:
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


def _remember(
    history: tuple[Samples, ...], newest: Samples, where: Bool[Array, "batch *ones"]
) -> tuple[Samples, ...]:
    """The history with the newest difference in front, for the samples that moved."""
    shifted = (newest, *history[:-1])
    return tuple(jnp.where(where, new, old) for new, old in zip(shifted, history, strict=True))


def _extrapolate(
    image: Samples,
    residual: Samples,
    images: tuple[Samples, ...],
    residuals: tuple[Samples, ...],
) -> Samples:
    """image − ΔF γ with γ = argmin ‖residual − ΔR γ‖₂, by Gram-Schmidt on the columns of ΔR.

    Every operation on a column of ΔR is repeated on that of ΔF. Columns that depend on newer ones
    to half of the working precision are left out.
    """
    basis: list[tuple[Samples, Samples]] = []
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


def sample_norm(x: Float[AnyArray, "batch *event"]) -> PerSample:
    """Compute ‖x‖₂ of each sample, [batch]."""
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=tuple(range(1, x.ndim))))


def expand(per_sample: Shaped[Array, " batch"], x: Samples) -> Shaped[Array, "batch *ones"]:
    """Give an array of shape [batch] as many axes as ``x``."""
    return per_sample.reshape(per_sample.shape + (1,) * (x.ndim - 1))


def _dot(x: Samples, y: Samples) -> PerSample:
    return jnp.sum(x * y, axis=tuple(range(1, x.ndim)))
