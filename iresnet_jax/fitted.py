"""What a fit returns: a flow with its certificate, conditional or not, and how training went."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PRNGKeyArray

from iresnet_jax.bijections import Bijection, Chain
from iresnet_jax.certificates import Certificate
from iresnet_jax.checks import check_shape
from iresnet_jax.conditional import ConditionalFlow
from iresnet_jax.convergence import FixedPointInfo
from iresnet_jax.dequantization import dequantize
from iresnet_jax.flows import Flow, PerDatum
from iresnet_jax.logdet import Estimator, Exact, SampleKeys
from iresnet_jax.model_cards import model_card
from iresnet_jax.nn.conditional import ConditionalVectorFlow
from iresnet_jax.nn.dequantizer import VariationalDequantization
from iresnet_jax.nn.models import FlowModel
from iresnet_jax.nn.variables import Variables
from iresnet_jax.priors import bits_per_dim
from iresnet_jax.probes import KeyPerSample, per_sample_keys
from iresnet_jax.solvers import FixedPointIteration, Solver
from iresnet_jax.types import AnyArray, PerSample, Samples

#: What ended a fit: all epochs were done, validations no longer improved, the user interrupted it,
#: or the loss was no longer finite.
EndedBy = Literal["max_epochs", "patience", "interrupt", "divergence"]


class History(NamedTuple):
    """How training went. Losses are −log p in nats, in the units of the data.

    Attributes:
      epoch: at the end of which the losses were taken, [validations]; the last one of a fit that
        was interrupted is of the epoch under way.
      train: mean loss over the steps since the one before, of parameters as they moved.
      validation: mean loss of the averaged parameters on the data held out.
      best_epoch: that of the least validation loss, whose parameters were kept.
      stopped_early: whether training ended before ``max_epochs``.
      final: validation loss of the network as it is shipped, within its bounds. The data held out
        have chosen the epoch, so it is a little optimistic.
      final_stderr: its standard error, noise of estimated log-determinants included; NaN where a
        single example was held out.
      seconds: that the fit took.
      ended_by: what ended training: "max_epochs", "patience" (validations no longer improved),
        "interrupt" (Ctrl-C) or "divergence".
    """

    epoch: Float[np.ndarray, " validations"]
    train: Float[np.ndarray, " validations"]
    validation: Float[np.ndarray, " validations"]
    best_epoch: int
    stopped_early: bool
    final: float
    final_stderr: float
    seconds: float
    ended_by: EndedBy


@contextlib.contextmanager
def evaluated_at_once() -> Iterator[None]:
    """Keep what is computed from known values out of a trace under way, such as of ``jit``.

    Without one, nothing changes: within the context of JAX, every operation on known values of a
    function that is compiled inside would be compiled for itself.
    """
    traced = isinstance(jnp.zeros(()), jax.core.Tracer)
    with jax.ensure_compile_time_eval() if traced else contextlib.nullcontext():
        yield


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Dequantizer:
    """A learned dequantisation with its weights: the noise u ~ q(u | k) in the grey levels k.

    Attributes:
      module: the Flax module.
      variables: of the module.
    """

    module: VariationalDequantization
    variables: Variables

    def __call__(self, levels: AnyArray, key: SampleKeys) -> tuple[Samples, PerSample]:
        """Draw (k + u)/n and log q(u | k) in nats.

        Args, raises: as of :class:`~iresnet_jax.nn.VariationalDequantization`.
        """
        drawn: tuple[Samples, PerSample] = self.module.apply(self.variables, levels, key)  # type: ignore[assignment]
        return drawn

    def __repr__(self) -> str:
        return _summary(self, self.module, self.variables)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Fitted:
    """A model with the variables it was given, and what data pass before it.

    Attributes:
      model: the Flax model.
      variables: of the model, within their bounds.
      entrance: bijections from the data to what the model sees, first to last.
      num_levels: of images that are to be dequantised, see :func:`~iresnet_jax.dequantize`; None
        for all else.
      about: what else is to be told of it, such as data, licence and results, as JSON holds it.
      dequantizer: the learned dequantisation of the images; None for uniform noise, and for all
        else. It needs ``num_levels``.
    """

    model: FlowModel
    variables: Variables
    entrance: tuple[Bijection, ...] = ()
    num_levels: int | None = None
    about: Mapping[str, object] = dataclasses.field(default_factory=dict)
    dequantizer: Dequantizer | None = None

    def __post_init__(self) -> None:
        if isinstance(self.model, ConditionalVectorFlow):
            raise TypeError(
                "Fitted is of a density without a condition; a ConditionalVectorFlow is "
                "FittedConditional(model, variables)."
            )
        own = self.dequantizer
        if own is not None and own.module.num_levels != self.num_levels:
            raise ValueError(
                f"A dequantizer of {own.module.num_levels} grey levels needs as many in "
                f"num_levels; got {self.num_levels}."
            )

    def __repr__(self) -> str:
        return _summary(self, self.model, self.variables)

    @property
    def card(self) -> str:
        """The model card, in Markdown: what ``about`` tells, and what is proved of the weights."""
        return model_card(self.about, certified=self.certificate.certified)

    @functools.cached_property
    def flow(self) -> Flow:
        """The network from the data to the latents, with its bounds attached: a pure pytree."""
        with evaluated_at_once():
            return self._bare.with_bounds(self.certificate)

    @functools.cached_property
    def certificate(self) -> Certificate:
        """What is proved of the network; see :func:`~iresnet_jax.certify`."""
        with evaluated_at_once():
            return self._bare.certify()

    @functools.cached_property
    def _bare(self) -> Flow:
        with evaluated_at_once():
            return with_entrance(jax.jit(self.model.flow)(self.variables), self.entrance)

    def log_prob(
        self, x: AnyArray, estimator: Estimator = Exact(), *, key: SampleKeys | None = None
    ) -> PerDatum:
        """Return log p(x) in nats, in the units of the data.

        Args, raises: as of :meth:`~iresnet_jax.flows.Flow.log_prob`.
        """
        return self.flow.log_prob(x, estimator, key=key)

    def bits_per_dim(
        self, x: AnyArray, estimator: Estimator = Exact(), *, key: SampleKeys | None = None
    ) -> PerDatum:
        """Return the bits that each datum takes, per dimension, [batch].

        Of images of integer grey levels k (where ``num_levels`` n is given), it is
        −(log p((k + u)/n) − log q(u | k))/(D ln 2) + log₂ n for one draw of the noise u within the
        levels, uniform (log q = 0) or learned: in expectation over u, at least −log₂ P(k)/D. Of
        other data it is −log₂ p(x)/D, in the units of the data.

        Args:
          x: images of grey levels [batch, height, width, channels], or data as of
            :meth:`log_prob`; or one of them.
          estimator: of the log-determinants.
          key: one key, or one for each datum; images need it.

        Raises:
          ValueError: for images without a key; for levels out of range; as :meth:`log_prob`.
          TypeError: for images that are not integers; as :meth:`log_prob`.
        """
        if self.num_levels is None:
            return bits_per_dim(self.log_prob(x, estimator, key=key), self.flow.dim)
        if key is None:
            raise ValueError(
                "bits_per_dim of images draws noise within their grey levels: pass a key=."
            )
        single = jnp.shape(x) == self.flow.event_shape
        batch = x[None] if single else x
        check_shape(batch, self.flow.event_shape)
        keys = jax.vmap(jax.random.split)(per_sample_keys(key, len(batch)))
        data, log_noise = self._dequantized(batch, keys[:, 0])
        log_prob = self.log_prob(data, estimator, key=keys[:, 1]) - log_noise
        bits = bits_per_dim(log_prob, self.flow.dim, self.num_levels)
        return bits[0] if single else bits

    def _dequantized(
        self, levels: AnyArray, keys: KeyPerSample
    ) -> tuple[Samples, PerSample | float]:
        """Images with noise within their levels, and the log density of the noise."""
        if self.dequantizer is not None:
            return self.dequantizer(levels, keys)
        return dequantize(keys, levels, self.num_levels or 0), 0.0

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


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class FittedConditional(Fitted):
    """A model of p(y | x) with the variables it was given, and what y and x pass before it.

    Its one certificate holds at every condition.

    Attributes:
      model: an :class:`~iresnet_jax.nn.ConditionalVectorFlow`.
      variables: of the model, within their bounds.
      entrance: bijections from y to what the model sees, first to last.
      num_levels: None.
      about: what else is to be told of it, as JSON holds it.
      condition_entrance: bijections from the condition, a vector, to what the model sees.
    """

    model: ConditionalVectorFlow
    condition_entrance: tuple[Bijection, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.model, ConditionalVectorFlow):
            raise TypeError(
                f"FittedConditional is of a ConditionalVectorFlow; got a "
                f"{type(self.model).__name__}, which is Fitted(model, variables)."
            )
        if self.num_levels is not None:
            raise ValueError(f"num_levels is of images; a table has None, got {self.num_levels}.")
        if self.condition_entrance and self.model.condition_dim is None:
            raise ValueError("Classes pass no condition_entrance: it is of vectors.")
        if self.dequantizer is not None:
            raise ValueError("dequantizer is of images; a table has none.")

    @functools.cached_property
    def flow(self) -> ConditionalFlow:  # type: ignore[override]
        """The network from y to the latents at x, with its bounds attached: a pure pytree."""
        with evaluated_at_once():
            return self._bare.with_bounds(self.certificate)

    @functools.cached_property
    def _bare(self) -> ConditionalFlow:  # type: ignore[override]
        with evaluated_at_once():
            flow = jax.jit(self.model.flow)(self.variables)
            return with_entrances(flow, self.entrance, self.condition_entrance)

    def log_prob(  # type: ignore[override]
        self,
        y: AnyArray,
        condition: AnyArray,
        estimator: Estimator = Exact(),
        *,
        key: SampleKeys | None = None,
    ) -> PerDatum:
        """Return log p(y | x) in nats, in the units of y.

        Args, raises: as of :meth:`~iresnet_jax.conditional.ConditionalFlow.log_prob`: one condition
          for each y, or one for all.
        """
        return self.flow.log_prob(y, condition, estimator, key=key)

    def bits_per_dim(  # type: ignore[override]
        self,
        y: AnyArray,
        condition: AnyArray,
        estimator: Estimator = Exact(),
        *,
        key: SampleKeys | None = None,
    ) -> PerDatum:
        """Return −log₂ p(y | x)/D, in the units of y.

        Args, raises: as of :meth:`log_prob`.
        """
        return bits_per_dim(self.log_prob(y, condition, estimator, key=key), self.model.dim)

    def sample(  # type: ignore[override]
        self,
        key: PRNGKeyArray,
        num_samples: int,
        condition: AnyArray,
        *,
        temperature: float = 1.0,
        solver: Solver = FixedPointIteration(),
    ) -> tuple[Samples, FixedPointInfo]:
        """Draw y at one condition, [num_samples, dim], or at each of a batch, [num_samples, batch,
        dim], with how the inverses went.

        Args, raises: as of :meth:`~iresnet_jax.conditional.ConditionalFlow.sample`.
        """
        return self.flow.sample(key, num_samples, condition, temperature=temperature, solver=solver)

    def given(self, condition: AnyArray) -> Flow:
        """Return p(y | x) at one condition, as any other flow."""
        return self.flow.given(condition)


def _summary(fitted: object, module: object, variables: Variables) -> str:
    """What a prompt shows, in one line: thousands of weights are no help there."""
    size = sum(leaf.size for leaf in jax.tree.leaves(variables.get("params", {})))
    return f"<{type(fitted).__name__}: {type(module).__name__}, {size:,} parameters>"


def with_entrance(flow: Flow, entrance: tuple[Bijection, ...]) -> Flow:
    """Return the flow of data that pass these bijections first, which keep their shape."""
    if not entrance:
        return flow
    first, *others = flow.levels
    return dataclasses.replace(flow, levels=(Chain((*entrance, first)), *others))


def with_entrances(
    flow: ConditionalFlow, entrance: tuple[Bijection, ...], of_condition: tuple[Bijection, ...]
) -> ConditionalFlow:
    """Return the flow of data, at conditions, that each pass bijections first."""
    network = dataclasses.replace(flow.network, entrance=of_condition)
    return dataclasses.replace(flow, flow=with_entrance(flow.flow, entrance), network=network)
