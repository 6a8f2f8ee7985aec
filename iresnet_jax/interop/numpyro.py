"""Flows as NumPyro distributions: priors, likelihoods and guides.

A guide's flow is trained by its Flax model, which :func:`flow_param` registers.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from iresnet_jax.bijections import Bijection, Chain
from iresnet_jax.flows import Flow
from iresnet_jax.interop.densities import (
    check_consistent,
    check_density,
    checked_key,
    log_prob,
)
from iresnet_jax.interop.foreign import nan_unless_converged
from iresnet_jax.interop.optional import missing
from iresnet_jax.logdet import Estimator, Exact
from iresnet_jax.solvers import FixedPointIteration, Solver
from iresnet_jax.transforms import Center, Logit
from iresnet_jax.types import AnyArray, Shape

try:
    import numpyro
    from numpyro import distributions
    from numpyro.distributions import constraints
except ModuleNotFoundError as error:
    raise missing("numpyro", error) from error


#: As NumPyro's own distributions have them.
_REALS = {1: constraints.real_vector, 2: constraints.real_matrix}


class FlowDistribution(distributions.Distribution):
    """The density of a flow, with ``event_shape`` of one datum and no batch shape.

    log_prob(x) = log p(z) + log|det ∂z/∂x|, in nats, is one deterministic function whose gradient
    is its own, as samplers and guides need; see
    :func:`~iresnet_jax.interop.densities.log_density`. Samples are the inverse of draws from the
    priors, differentiable in the flow's weights; one whose inverse missed the solver's tolerance is
    NaN.

    Args:
      flow: with priors.
      estimator: ``Exact()``, or :class:`~iresnet_jax.interop.densities.TermwiseSeries` in many
        dimensions.
      key: draws the probes of a series, once; without one, an error.
      solver: of the inverse that samples.
      validate_args: as of NumPyro's distributions: values outside of the support cause a warning.

    Raises:
      ValueError: for a flow without priors, or one that is defined on [0, 1] in a way of which the
        support is not known; for an estimator whose gradient is not that of its value; for a
        series without a key.
      TypeError: for what is no flow, no estimator or no key.
    """

    pytree_data_fields = ("flow", "key")
    pytree_aux_fields = ("estimator", "solver")

    def __init__(
        self,
        flow: Flow,
        estimator: Estimator = Exact(),
        *,
        key: PRNGKeyArray | None = None,
        solver: Solver = FixedPointIteration(),
        validate_args: bool | None = None,
    ) -> None:
        check_density(flow)
        check_consistent(estimator)
        self.flow, self.estimator, self.solver = flow, estimator, solver
        self.key = checked_key(estimator, key)
        _support_of(flow)
        super().__init__((), tuple(flow.event_shape), validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """Where the density lives: ℝᵈ, or the open cube that a logit stretches to it."""
        return _support_of(self.flow)

    def sample(self, key: PRNGKeyArray, sample_shape: Shape = ()) -> Float[Array, "..."]:
        """Draw samples [*sample_shape, *event_shape] by one key, typed or legacy."""
        if not (count := math.prod(sample_shape)):
            return jnp.zeros((*sample_shape, *self.event_shape))
        x, info = self.flow.sample(key, count, solver=self.solver)
        return nan_unless_converged(x, info).reshape(*sample_shape, *self.event_shape)

    @distributions.util.validate_sample
    def log_prob(
        self, value: AnyArray, intermediates: list[object] | None = None
    ) -> Float[Array, "*batch"]:
        """Return the log density in nats, [*batch], of ``value`` [*batch, *event_shape]."""
        return log_prob(self.flow, self.estimator, self.key, value)


class Model(Protocol):
    """What hands out a flow for its variables, as the models of :mod:`iresnet_jax.nn` do."""

    def flow(self, variables: Mapping[str, Any]) -> Flow:
        """Return the flow that these variables describe."""


def flow_param(name: str, model: Model, variables: Mapping[str, Any]) -> Flow:
    """Register the parameters of a model in a NumPyro model or guide, and return its flow.

    They are the site ``name``, a pytree. Training differentiates them, which needs a model with
    ``normalize="bound"``: its constraint holds by the parameters alone, for any number of
    particles. After training the flow is ``model.flow({**variables, "params": params[name]})``,
    ``params`` being what ``svi.get_params`` returns.

    Args:
      name: of the site.
      model: such as ``ir.nn.VectorFlow(…, normalize="bound")``.
      variables: all that init returned: where training starts.

    Raises:
      ValueError: for variables that do not fit the model; in training, for another ``normalize``.
      TypeError: for anything but a mapping.
    """
    model.flow(variables)
    params = numpyro.param(name, variables["params"])
    return model.flow({**variables, "params": params})


def _support_of(flow: Flow) -> constraints.Constraint:
    """ℝᵈ, or what the logit that comes first maps to it."""
    first = next((link for link in _links(flow.levels[0]) if not link.keeps_values), None)
    if isinstance(first, Logit):
        margin = first.alpha / (1.0 - 2.0 * first.alpha)
        interval = constraints.interval(-margin, 1.0 + margin)
        return constraints.independent(interval, len(flow.event_shape))
    if flow.levels[0].takes_unit_interval and not isinstance(first, Center):
        raise ValueError(
            f"The support of a flow on [0, 1] that begins with {type(first).__name__} is not known."
        )
    return _REALS.get(len(flow.event_shape)) or constraints.independent(
        constraints.real, len(flow.event_shape)
    )


def _links(bijection: Bijection) -> Iterator[Bijection]:
    if isinstance(bijection, Chain):
        yield from itertools.chain.from_iterable(map(_links, bijection.links))
    else:
        yield bijection
