"""log|det(I + J)| by the first terms of its trace series (Behrmann et al. 2019, Algorithm 2)."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from iresnet_jax.checks import check_at_least_one
from iresnet_jax.logdet import Estimated, Estimator, SampleKeys, jax_float_above
from iresnet_jax.neumann_gradients import constant_once, forward_alone, with_gradient_of
from iresnet_jax.probes import Probe, check_probes, draw_probes, per_sample_keys, sample_dot
from iresnet_jax.types import Branch, PerSample, Samples, Scalar

#: What the backward pass of a block may keep: w, which spares it the series.
NEUMANN_VECTOR = "neumann_vector"


@dataclasses.dataclass(frozen=True)
class TruncatedSeries(Estimator):
    """The first n terms of the trace series, by Hutchinson's estimator.

    log|det(I + J)| ≈ 1/m Σ_i Σ_{k=1}^{n} (−1)^{k+1}/k · v_iᵀ Jᵏ v_i, with E[v vᵀ] = I. The bias
    is at most :func:`truncation_error_bound`.

    The gradient is the Neumann gradient (Chen et al. 2019, Theorem 2; arXiv 1906.02735): with
    w = Σ_{k=0}^{n−1} (−1)ᵏ Jᵏ v held constant, that of vᵀ J w. Its mean over the probes is the
    gradient of the n-term trace series, and its memory does not grow with n. A second derivative
    is that of the Neumann gradient, w no longer constant: its mean is that of the series, and its
    memory grows with n in reverse mode. A sample of a Hessian is not symmetric.

    Attributes:
      num_terms: n ≥ 1.
      num_probes: m ≥ 1, averaged.
      probe: distribution of v, "rademacher" (smaller variance) or "gaussian" (the paper's code).

    Raises:
      TypeError, ValueError: for a number below 1 or an unknown probe.
    """

    num_terms: int
    num_probes: int = 1
    probe: Probe = "rademacher"

    def __post_init__(self) -> None:
        check_at_least_one("num_terms", self.num_terms)
        check_probes(self.num_probes, self.probe)

    def __call__(
        self,
        branch: Branch,
        x: Samples,
        key: SampleKeys | None = None,
        lipschitz: Scalar | None = None,
    ) -> Estimated:
        return _averaged(self, branch, x, self._checked_key(key), self.num_terms)

    def describe(self) -> str:
        return f"{self.num_terms} terms"

    def bias_bound(self, lipschitz: float, dim: int) -> float:
        return float(truncation_error_bound(lipschitz, dim, self.num_terms))


@dataclasses.dataclass(frozen=True)
class BoundedSeries(Estimator):
    """The trace series, of as many terms as keep the proved bias of each block within a target.

    As :class:`TruncatedSeries`, but a block with the bound L ≥ Lip(g) takes the least n with
    :func:`truncation_error_bound` ≤ ``bias``: blocks that contract more take fewer terms. It reads
    the bounds that ``flow.with_bounds()`` attaches.

    Attributes:
      bias: allowed to each log|det(I + J)|, in nats, > 0: one a block, two a monotone one. That of
        a network of B of them is at most B·bias.
      max_terms: taken where even they do not meet the target; the bias is then that of so many.
      num_probes, probe: as in :class:`TruncatedSeries`.

    Raises:
      TypeError, ValueError: for a bias that is not positive, a number below 1 or an unknown probe;
        when called for a branch without a bound.
    """

    bias: float
    max_terms: int = 1000
    num_probes: int = 1
    probe: Probe = "rademacher"

    def __post_init__(self) -> None:
        if not 0.0 < self.bias < math.inf:
            raise ValueError(f"bias must lie in (0, inf), in nats; got {self.bias}.")
        check_at_least_one("max_terms", self.max_terms)
        check_probes(self.num_probes, self.probe)

    def __call__(
        self,
        branch: Branch,
        x: Samples,
        key: SampleKeys | None = None,
        lipschitz: Scalar | None = None,
    ) -> Estimated:
        if lipschitz is None:
            raise ValueError(
                "BoundedSeries needs a bound on the branch to know how many terms it takes: attach "
                "those of the flow's certificate, flow.with_bounds()."
            )
        num_terms = self.num_terms(lipschitz, math.prod(x.shape[1:]))
        return _averaged(self, branch, x, self._checked_key(key), num_terms)

    def num_terms(self, lipschitz: ArrayLike, dim: int) -> Int[Array, ""]:
        """Return n for a branch with Lip(g) ≤ L on ``dim`` dimensions; ``max_terms`` for L ≥ 1."""
        bounds = _truncation_error_bounds(lipschitz, dim, jnp.arange(1, self.max_terms + 1))
        least = jnp.argmax(bounds <= self.bias) + 1
        return jnp.where(jnp.any(bounds <= self.bias), least, self.max_terms)

    def describe(self) -> str:
        return f"series with a bias ≤ {self.bias:.2g} nats a block"

    def bias_bound(self, lipschitz: float, dim: int) -> float:
        most = float(truncation_error_bound(lipschitz, dim, self.max_terms))
        return self.bias if most <= self.bias else most  # NaN stays NaN


def _averaged(
    estimator: TruncatedSeries | BoundedSeries,
    branch: Branch,
    x: Samples,
    key: SampleKeys,
    num_terms: int | Int[Array, ""],
) -> Estimated:
    """The series along each of an estimator's probes, and their mean."""
    keys = per_sample_keys(key, x.shape[0])
    log_det = jnp.zeros(x.shape[0], x.dtype)
    for draw in draw_probes(estimator.probe, keys, x, estimator.num_probes):
        out, term = series_along_probe(branch, x, draw(), num_terms)
        log_det = log_det + term / estimator.num_probes
    return out, log_det


def series_along_probe(
    branch: Branch, x: Samples, v: Samples, num_terms: int | Int[Array, ""]
) -> Estimated:
    """Return g(x) and Σ_{k=1}^{n} (−1)^{k+1}/k · vᵀJᵏv, [batch], with the Neumann gradient.

    The probes ``v``, of the shape of x, are constants; ``num_terms`` is n ≥ 1, which may be traced.
    """
    v = lax.stop_gradient(v)
    out, jvp = jax.linearize(branch, x)
    value, total, w = _series_and_neumann_vector(constant_once(jvp), v, num_terms)
    count = jnp.asarray(num_terms, v.dtype)
    surrogate = sample_dot(v, jvp(w))  # vᵀJ Σ (−1)ᵏJᵏv: all n terms, not divided by k
    return out, with_gradient_of(surrogate, value + (surrogate - total) / count)


def truncation_error_bound(lipschitz: ArrayLike, dim: int, num_terms: int) -> Float[Array, "..."]:
    """Bound the bias of the n-term series: d · L^{n+1} / ((n+1)(1−L)), in nats; ∞ for L ≥ 1.

    It follows from |tr Jᵏ| ≤ d·Lᵏ. It is within a factor 1/(1−L) of the paper's
    −d(log(1−L) + Σ Lᵏ/k), which cancels in floating point.

    Args:
      lipschitz: an upper bound L on Lip(g).
      dim: d, dimensions of one sample.
      num_terms: n ≥ 1.

    Raises:
      TypeError, ValueError: if ``num_terms`` is not an integer ≥ 1.
    """
    check_at_least_one("num_terms", num_terms)
    return _truncation_error_bounds(lipschitz, dim, num_terms)


def _truncation_error_bounds(
    lipschitz: ArrayLike, dim: int, num_terms: int | Int[Array, "..."]
) -> Float[Array, "..."]:
    lip = jax_float_above(lipschitz)
    gap = jnp.where(lip < 1, 1.0 - lip, 1.0)
    n = jnp.asarray(num_terms + 1, lip.dtype)
    eps, tiny = jnp.finfo(lip.dtype).eps, jnp.finfo(lip.dtype).tiny
    positive = (lip > 0) & (lip < 1)
    exponent = n * jnp.log(jnp.where(positive, lip, 0.5))
    power = jnp.exp(exponent) * (1.0 + 8.0 * eps * (1.0 - exponent))
    power = jnp.where(positive, jnp.maximum(power, tiny), 0.0)  # outward, never below what rounds
    bound = dim * power / (n * gap) * (1.0 + 8.0 * eps)
    bound = jnp.where(positive, jnp.maximum(bound, tiny), bound)
    return jnp.where(lip < 1, bound, jnp.where(jnp.isnan(lip), jnp.nan, jnp.inf))


_Sums = tuple[PerSample, PerSample, Samples, Samples]


def _series_and_neumann_vector(
    jvp: Branch, v: Samples, num_terms: int | Int[Array, ""]
) -> tuple[PerSample, PerSample, Samples]:
    """Σ (−1)^{k+1}/k vᵀJᵏv and Σ (−1)^{k+1} vᵀJᵏv for k < n, and w = Σ (−1)ᵏJᵏv for k < n."""

    def add_term(k: Scalar, carry: _Sums) -> _Sums:
        value, total, w, power = carry
        power = -jvp(power)
        term = -sample_dot(v, power)
        return value + term / k, total + term, w + power, power

    zeros = jnp.zeros(v.shape[0], v.dtype)
    start = zeros, zeros, v, v
    if isinstance(num_terms, int):
        ks = jnp.arange(1, num_terms, dtype=v.dtype)
        value, total, w, _ = lax.scan(lambda sums, k: (add_term(k, sums), None), start, ks)[0]
    else:
        sums = lax.fori_loop(1, num_terms, lambda k, sums: add_term(k.astype(v.dtype), sums), start)
        value, total, w = forward_alone(sums[:3], "BoundedSeries")
    return value, total, checkpoint_name(w, NEUMANN_VECTOR)
