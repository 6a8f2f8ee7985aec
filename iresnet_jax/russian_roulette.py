"""log|det(I + J)| without bias: the trace series cut at a random length (Chen et al. 2019)."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from iresnet_jax.checks import check_at_least_one
from iresnet_jax.iterations import expand
from iresnet_jax.logdet import Estimated, Estimator, SampleKeys
from iresnet_jax.neumann_gradients import constant_once, forward_alone, with_gradient_of
from iresnet_jax.probes import (
    KeyPerSample,
    Probe,
    check_probes,
    draw_probes,
    per_sample_keys,
    sample_dot,
)
from iresnet_jax.series import NEUMANN_VECTOR
from iresnet_jax.types import Branch, PerSample, Samples, Scalar

_MAX_CONTINUATION = 0.9999  # ten thousand terms on average


@dataclasses.dataclass(frozen=True)
class Roulette(Estimator):
    """The trace series, each term weighted by the inverse of the probability that it is reached.

    log|det(I + J)| = E[ Σ_{k=1}^{N} (−1)^{k+1}/k · vᵀJᵏv / P(N ≥ k) ] with E[v vᵀ] = I and
    N = m + G, P(G ≥ j) = qʲ (Chen et al. 2019, Theorem 1; arXiv 1906.02735). Every sample draws a
    probe of its own. It draws a length of its own too, m + q/(1−q) on average, and a batch runs to
    the longest; or the batch shares one length, as in the authors' code, and takes m + q/(1−q)
    terms on average. Values that share a length are unbiased each, but not independent: their
    spread tells no standard error of their mean. Shared lengths are for training.

    With ‖Jᵏ‖ ≤ Lᵏ, the second moments of value and gradient are dominated by Σ (L²/q)ᵏ: finite for
    q > L², which is checked. With q ≥ L no weighted term of a Rademacher probe exceeds d/k, and all
    moments are finite: q = L is a good choice. A flow hands one estimator to all of its blocks; q
    must exceed the square of the largest L.

    The gradient is that of vᵀJw with w = Σ_{k=0}^{N−1} (−1)ᵏ Jᵏv / P(N ≥ k+1) held constant (their
    Theorem 2). Its mean is the gradient of log|det(I + J)|; its memory does not grow with N.
    A second derivative is that of the Neumann gradient, w no longer constant, and its mean that of
    log|det|; it is refused in reverse mode over reverse mode, as N is not known before it runs.

    Attributes:
      continuation: q, in (0, 0.9999].
      lipschitz: a rigorous bound L on Lip(g), of all branches that it will see; None leaves q
        unchecked, and the variance possibly infinite.
      min_terms: m ≥ 1, terms that are always taken.
      num_probes: probes, each with a length of its own, that are averaged; ≥ 1.
      probe: distribution of v, "rademacher" or "gaussian".
      shared_length: whether the samples of a batch share a length, the first one's.

    Raises:
      TypeError, ValueError: for settings out of range, or a q that does not exceed L².
    """

    continuation: float
    lipschitz: float | None = dataclasses.field(kw_only=True)
    min_terms: int = dataclasses.field(default=2, kw_only=True)
    num_probes: int = dataclasses.field(default=1, kw_only=True)
    probe: Probe = dataclasses.field(default="rademacher", kw_only=True)
    shared_length: bool = dataclasses.field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        check_at_least_one("min_terms", self.min_terms)
        check_probes(self.num_probes, self.probe)
        _check_continuation(self.continuation, self.lipschitz)

    def __call__(
        self,
        branch: Branch,
        x: Samples,
        key: SampleKeys | None = None,
        lipschitz: Scalar | None = None,
    ) -> Estimated:
        keys = per_sample_keys(self._checked_key(key), x.shape[0])
        log_det = jnp.zeros(x.shape[0], x.dtype)
        out, jvp = jax.linearize(branch, x)
        constant = constant_once(jvp)
        probe_keys, length_keys = jax.vmap(lambda k: tuple(jax.random.split(k)))(keys)
        length_keys = length_keys[:1] if self.shared_length else length_keys
        for i, draw in enumerate(draw_probes(self.probe, probe_keys, x, self.num_probes)):
            v = draw()
            own = jax.vmap(jax.random.fold_in, (0, None))(length_keys, i)
            value, w = _weighted_series(constant, v, own, self.continuation, self.min_terms)
            term = with_gradient_of(sample_dot(v, jvp(w)), value)
            log_det = log_det + term / self.num_probes
        return out, log_det

    def describe(self) -> str:
        further = self.continuation / (1.0 - self.continuation)
        return f"roulette of {self.min_terms} + {further:.1f} terms on average"


class _State(NamedTuple):
    k: Int[Array, ""]  # the term to come
    reached: Bool[Array, " batch"]  # N ≥ k
    value: PerSample
    w: Samples
    power: Samples  # (−J)ᵏ⁻¹v


def _weighted_series(
    jvp: Branch, v: Samples, length_keys: KeyPerSample, continuation: float, min_terms: int
) -> tuple[PerSample, Samples]:
    """Σ (−1)^{k+1}/k · vᵀJᵏv / P(N ≥ k) for k = 1…N, and w, from the same products.

    ``length_keys`` are one a sample, or a single one for all.
    """
    growth = -math.log(continuation)

    def add_term(state: _State) -> _State:
        k, reached, value, w, power = state
        extra = jnp.maximum(k - min_terms, 0).astype(v.dtype)
        weight = jnp.where(reached, jnp.exp(extra * growth), 0.0)
        # A sample that has stopped goes on with zeros: its power could overflow, and 0·∞ is NaN.
        power = jnp.where(expand(reached, v), power, 0.0)
        w = w + expand(weight, v) * power
        power = -jvp(power)
        value = value - weight / k.astype(v.dtype) * sample_dot(v, power)
        goes_on = (k < min_terms) | _survives(length_keys, k, continuation, v)
        return _State(k + 1, reached & goes_on, value, w, power)

    zeros = jnp.zeros(v.shape[0], v.dtype)
    start = _State(jnp.int32(1), jnp.ones(v.shape[0], bool), zeros, jnp.zeros_like(v), v)
    last = lax.while_loop(lambda state: jnp.any(state.reached), add_term, start)
    value, w = forward_alone((last.value, last.w), "Roulette")
    named: Array = checkpoint_name(w, NEUMANN_VECTOR)
    return value, named


def _survives(
    keys: KeyPerSample, k: Int[Array, ""], continuation: float, like: Samples
) -> Bool[Array, " batch"]:
    """For each key, true with probability q, drawn anew for each k.

    Half precision has too few numbers below 1 to tell q by.
    """
    dtype = jnp.promote_types(like.dtype, jnp.float32)

    def survives(key: PRNGKeyArray) -> Bool[Array, ""]:
        uniform = jax.random.uniform(jax.random.fold_in(key, k), (), dtype)
        return uniform < continuation

    return jax.vmap(survives)(keys)


def _check_continuation(continuation: float, lipschitz: float | None) -> None:
    if not 0.0 < continuation <= _MAX_CONTINUATION:
        raise ValueError(f"continuation must lie in (0, {_MAX_CONTINUATION}]; got {continuation}.")
    if lipschitz is not None and not continuation > lipschitz**2:
        raise ValueError(
            f"continuation must exceed the square of the Lipschitz bound, {lipschitz:.6g}² = "
            f"{lipschitz**2:.6g}; got {continuation}: the variance could be infinite."
        )
