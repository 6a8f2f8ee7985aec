"""The log density of a flow as one deterministic function, for samplers and optimisers.

A sampler such as NUTS, or a line search, asks one function for its value and its gradient, and
takes it for granted that they belong together. :func:`log_density` is such a function.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from iresnet_jax.checks import typed_key
from iresnet_jax.flows import Flow
from iresnet_jax.logdet import Estimated, Estimator, Exact, SampleKeys
from iresnet_jax.probes import draw_probes, per_sample_keys, sample_dot
from iresnet_jax.series import TruncatedSeries
from iresnet_jax.types import AnyArray, Branch, PerSample, Samples, Scalar

#: Estimators whose gradient is that of their value; subclasses are taken at their word.
CONSISTENT = (Exact,)


@dataclasses.dataclass(frozen=True)
class TermwiseSeries(TruncatedSeries):
    """The first n terms of the trace series, differentiated term by term.

    The value is that of :class:`~iresnet_jax.series.TruncatedSeries` of the same settings and key.
    For one probe v the derivatives, of any order, are those of that value,
    ∂ Σ_{k=1}^{n} (−1)^{k+1}/k · vᵀJᵏv, whereas the Neumann gradient of ``TruncatedSeries`` agrees
    with its value in the mean over probes alone. The price is memory that grows with n.

    Attributes, raises: as of :class:`~iresnet_jax.series.TruncatedSeries`.
    """

    def __call__(
        self,
        branch: Branch,
        x: Samples,
        key: SampleKeys | None = None,
        lipschitz: Scalar | None = None,
    ) -> Estimated:
        keys = per_sample_keys(self._checked_key(key), x.shape[0])
        out, jvp = jax.linearize(branch, x)
        draws = draw_probes(self.probe, keys, x, self.num_probes)
        terms = (_series(jvp, lax.stop_gradient(draw()), self.num_terms) for draw in draws)
        return out, sum(terms, start=jnp.zeros(x.shape[0], x.dtype)) / self.num_probes


def log_density(
    flow: Flow, estimator: Estimator = Exact(), *, key: PRNGKeyArray | None = None
) -> jax.tree_util.Partial:
    """Return x ↦ log p(x) in nats, one deterministic function whose derivatives are its own.

    It takes one example [...event_shape], which gives a scalar, or any batch
    [...batch, ...event_shape], which gives [...batch]. It jits, maps and differentiates to any
    order, and is itself a pytree, which may be an argument of ``jit``. The probes of a
    :class:`TermwiseSeries` are drawn once, by ``key``: a block has the same for every x. What is
    returned is then one estimate of log p, noise and all, held fixed: its exponential does not
    integrate to 1, and a sampler draws from it, not from p. More probes bring them together.
    :class:`~iresnet_jax.logdet.Exact` is exact, up to rounding.

    Values are not looked at, as under ``jit``: for data that are not finite the result is NaN, and
    outside of [0, 1] a flow over images has the density that its formula says.

    Args:
      flow: with priors.
      estimator: ``Exact()`` or :class:`TermwiseSeries`.
      key: one key, for a series.

    Raises:
      ValueError: for an estimator whose gradient is not that of its value, such as
        :class:`~iresnet_jax.series.TruncatedSeries`; for a series without a key; for several keys.
      TypeError: for what is no flow, no estimator, or no key.
    """
    check_density(flow)
    check_consistent(estimator)
    return jax.tree_util.Partial(log_prob, flow, estimator, checked_key(estimator, key))


def check_density(flow: Flow) -> None:
    """Refuse what is no flow, by a TypeError, and a flow without priors, by a ValueError."""
    if not isinstance(flow, Flow):
        raise TypeError(f"A flow is needed, such as model.flow(variables); got {type(flow)}.")
    if not flow.priors:
        raise ValueError("This flow has no prior: it maps, but has no density to evaluate.")


def check_consistent(estimator: Estimator) -> None:
    """Refuse an estimator whose gradient is not that of its value, by a TypeError or ValueError."""
    if not isinstance(estimator, Estimator):
        raise TypeError(f"estimator must be Exact() or TermwiseSeries(n); got {estimator!r}.")
    if not isinstance(estimator, (*CONSISTENT, TermwiseSeries)):
        raise ValueError(
            f"The gradient of {type(estimator).__name__} is not that of its value: a sampler would "
            "follow another density than it accepts by. Use Exact(), or "
            f"interop.densities.TermwiseSeries(n) with a key; got {estimator!r}."
        )


def checked_key(estimator: Estimator, key: PRNGKeyArray | None) -> PRNGKeyArray | None:
    """Return one typed key, or None for an estimator that draws none.

    Raises:
      ValueError: for a series without a key, or several keys.
      TypeError: for what is no key.
    """
    if not estimator.needs_key:
        return None
    if key is None:
        raise ValueError(f"{type(estimator).__name__} draws its probes once: pass key=.")
    if (key := typed_key(key)).ndim:
        raise ValueError(f"The probes are drawn by one key; got {key.shape}.")
    return key


@jax.jit
def log_prob(
    flow: Flow, estimator: Estimator, key: PRNGKeyArray | None, x: AnyArray
) -> Float[Array, "*batch"]:
    """Return log p(x) in nats, [...batch], of x [...batch, ...event_shape]; see
    :func:`log_density`."""
    x = jnp.asarray(x)
    batch = x.shape[: x.ndim - len(flow.event_shape)]
    if x.shape != (*batch, *flow.event_shape):
        raise ValueError(f"Data must have shape [..., {flow.event_shape}]; got {x.shape}.")
    count = math.prod(batch)
    keys = None if key is None else jnp.broadcast_to(key, (count,))
    rows = x.reshape(count, *flow.event_shape)
    return flow.log_prob(rows, estimator, key=keys).reshape(batch)


def _series(jvp: Branch, v: Samples, num_terms: int) -> PerSample:
    """Σ_{k=1}^{n} (−1)^{k+1}/k · vᵀJᵏv."""

    def add_term(carry: tuple[PerSample, Samples], k: Scalar) -> tuple[tuple, None]:
        total, power = carry
        power = -jvp(power)
        return (total - sample_dot(v, power) / k, power), None

    start = jnp.zeros(v.shape[0], v.dtype), v
    ks = jnp.arange(1, num_terms + 1, dtype=v.dtype)
    return lax.scan(add_term, start, ks)[0][0]
