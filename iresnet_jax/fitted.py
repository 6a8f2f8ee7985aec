"""What a fit returns: a flow with its certificate, and how training went."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, PRNGKeyArray

from iresnet_jax.bijections import Bijection, Chain
from iresnet_jax.certificates import Certificate
from iresnet_jax.convergence import FixedPointInfo
from iresnet_jax.flows import Flow, PerDatum
from iresnet_jax.logdet import Estimator, Exact, SampleKeys
from iresnet_jax.nn.models import FlowModel
from iresnet_jax.nn.variables import Variables
from iresnet_jax.solvers import FixedPointIteration, Solver
from iresnet_jax.types import AnyArray, Samples


class History(NamedTuple):
    """How training went. Losses are −log p in nats, in the units of the data.

    Attributes:
      epoch: at the end of which the losses were taken, [validations].
      train: mean loss over the steps since the one before, of parameters as they moved.
      validation: mean loss of the averaged parameters on the data held out.
      best_epoch: that of the least validation loss, whose parameters were kept.
      stopped_early: whether training ended before ``max_epochs``.
      final: validation loss of the network as it is shipped, within its bounds. The data held out
        have chosen the epoch, so it is a little optimistic.
      final_stderr: its standard error, noise of estimated log-determinants included; NaN where a
        single example was held out.
      seconds: that the fit took.
    """

    epoch: Float[np.ndarray, " validations"]
    train: Float[np.ndarray, " validations"]
    validation: Float[np.ndarray, " validations"]
    best_epoch: int
    stopped_early: bool
    final: float
    final_stderr: float
    seconds: float


@dataclasses.dataclass(frozen=True, eq=False)
class Fitted:
    """A model with the variables it was given, and what data pass before it.

    Attributes:
      model: the Flax model.
      variables: of the model, within their bounds.
      entrance: bijections from the data to what the model sees, first to last.
      num_levels: of images that are to be dequantised, see :func:`~iresnet_jax.dequantize`; None
        for all else.
      about: what else is to be told of it, such as data, licence and results, as JSON holds it.
    """

    model: FlowModel
    variables: Variables
    entrance: tuple[Bijection, ...] = ()
    num_levels: int | None = None
    about: Mapping[str, object] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def flow(self) -> Flow:
        """The network from the data to the latents, with its bounds attached: a pure pytree."""
        return self._bare.with_bounds(self.certificate)

    @functools.cached_property
    def certificate(self) -> Certificate:
        """What is proved of the network; see :func:`~iresnet_jax.certify`."""
        return self._bare.certify()

    @functools.cached_property
    def _bare(self) -> Flow:
        return with_entrance(jax.jit(self.model.flow)(self.variables), self.entrance)

    def log_prob(
        self, x: AnyArray, estimator: Estimator = Exact(), *, key: SampleKeys | None = None
    ) -> PerDatum:
        """Return log p(x) in nats, in the units of the data.

        Args, raises: as of :meth:`~iresnet_jax.flows.Flow.log_prob`.
        """
        return self.flow.log_prob(x, estimator, key=key)

    def sample(
        self,
        key: PRNGKeyArray,
        num_samples: int,
        *,
        temperature: float = 1.0,
        solver: Solver = FixedPointIteration(),
    ) -> tuple[Samples, FixedPointInfo]:
        """Draw data, with how the inverses went; see :meth:`~iresnet_jax.flows.Flow.sample`."""
        return self.flow.sample(key, num_samples, temperature=temperature, solver=solver)


def with_entrance(flow: Flow, entrance: tuple[Bijection, ...]) -> Flow:
    """Return the flow of data that pass these bijections first, which keep their shape."""
    if not entrance:
        return flow
    first, *others = flow.levels
    return dataclasses.replace(flow, levels=(Chain((*entrance, first)), *others))
