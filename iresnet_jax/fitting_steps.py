"""The training step and the validation of a fit, each compiled once."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from iresnet_jax.conditional import ConditionalFlow
from iresnet_jax.fitted import with_entrance, with_entrances
from iresnet_jax.fitting_data import Examples, FittingData, model_inputs
from iresnet_jax.flows import Flow
from iresnet_jax.logdet import Estimator
from iresnet_jax.nn.gradients import value_and_grad
from iresnet_jax.nn.models import FlowModel
from iresnet_jax.nn.variables import Variables
from iresnet_jax.types import AnyArray, Scalar

_AT_ONCE = 1024


class FittingState(NamedTuple):
    """Everything that a step changes.

    Attributes:
      step: number of completed steps.
      variables: of the model.
      opt_state: the optimiser's.
      average: moving average of the parameters.
    """

    step: Int[Array, ""]
    variables: Variables
    opt_state: optax.OptState
    average: Variables

    @classmethod
    def start(cls, variables: Variables, optimizer: optax.GradientTransformation) -> Self:
        """Return the state before the first step."""
        params = variables["params"]
        return cls(jnp.zeros((), jnp.int32), variables, optimizer.init(params), params)

    @property
    def averaged(self) -> Variables:
        """The variables with the average in place."""
        return {**self.variables, "params": self.average}


Step = Callable[[FittingState, np.ndarray, PRNGKeyArray], tuple[FittingState, Scalar]]
Evaluate = Callable[[Variables], Float[np.ndarray, " examples"]]


def make_step(
    model: FlowModel,
    optimizer: optax.GradientTransformation,
    estimator: Estimator,
    data: FittingData,
    ema_decay: float,
) -> Step:
    """Return (state, indices of a batch, key) -> the next state, and the loss in nats."""

    def step(
        examples: Examples, state: FittingState, indices: Array, key: PRNGKeyArray
    ) -> tuple[FittingState, Scalar]:
        batch: Examples = jax.tree.map(lambda values: values[indices], examples)

        def loss(flow: Flow | ConditionalFlow) -> Scalar:
            return jnp.mean(batch.weights * _losses(flow, estimator, data, batch, key))

        value, grads, rest = value_and_grad(model, loss, state.variables)
        params = state.variables["params"]
        updates, opt_state = optimizer.update(grads, state.opt_state, params)
        params = optax.apply_updates(params, updates)
        decay = jnp.minimum(ema_decay, (1.0 + state.step) / (10.0 + state.step))
        average = optax.incremental_update(params, state.average, 1.0 - decay)
        new = FittingState(state.step + 1, {**rest, "params": params}, opt_state, average)
        return new, value

    return partial(jax.jit(step), jax.tree.map(jnp.asarray, data.train))


def make_evaluate(model: FlowModel, estimator: Estimator, data: FittingData) -> Evaluate:
    """Return variables -> −log p of each validation example in nats, with the same noise always."""
    count = len(data.validation.x)
    size = min(count, _AT_ONCE)

    @jax.jit
    def losses(variables: Variables, batch: Examples, key: PRNGKeyArray) -> Array:
        return _losses(model.flow(variables), estimator, data, batch, key)

    def evaluate(variables: Variables) -> Float[np.ndarray, " examples"]:
        parts = []
        for start in range(0, count, size):
            rows = np.minimum(np.arange(start, start + size), count - 1)
            batch = jax.tree.map(lambda values: values[rows], data.validation)  # noqa: B023
            parts.append(np.asarray(losses(variables, batch, jax.random.key(start)), np.float64))
        return np.concatenate(parts)[:count]

    return evaluate


def _losses(
    flow: Flow | ConditionalFlow,
    estimator: Estimator,
    data: FittingData,
    batch: Examples,
    key: PRNGKeyArray,
) -> Array:
    """−log p of each example in nats, in the units of the data."""
    noise_keys, probe_keys = _keys(key, len(batch.x))
    x = model_inputs(batch.x, noise_keys, data.num_levels)
    if isinstance(flow, ConditionalFlow):
        at = with_entrances(flow, data.entrance, data.condition_entrance)
        condition: AnyArray = batch.condition  # type: ignore[assignment]  # there with such a model
        return -at.log_prob(x, condition, estimator, key=probe_keys)
    return -with_entrance(flow, data.entrance).log_prob(x, estimator, key=probe_keys)


def _keys(key: PRNGKeyArray, count: int) -> tuple[PRNGKeyArray, PRNGKeyArray]:
    """Keys for the noise of each example, and one for the probes of each."""
    noise, probes = jax.random.split(key)
    return jax.random.split(noise, count), jax.random.split(probes, count)
