"""The train state and the step that advances it, written for one device of many.

A step sees its device's part of the batch and averages over the axis ``parallel.AXIS``. Random
numbers depend on an example's index in the global batch, not on the number of devices.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.flatten_util import ravel_pytree

from train.configs.base import TrainingConfig
from train.optim import make_optimizer, make_schedule
from train.parallel import AXIS, global_indices

Metrics = dict[str, jax.Array]

#: (variables, batch, one key per example) -> the mean loss, the changed collections, and further
#: metrics.
Loss = Callable[[Any, Any, jax.Array], tuple[jax.Array, dict[str, Any], Metrics]]
Step = Callable[["TrainState", Any], tuple["TrainState", Metrics]]


class TrainState(NamedTuple):
    """Everything that training changes.

    Attributes:
      step: number of completed steps.
      params: trainable parameters.
      model_state: the other collections: singular vectors ("spectral"), BatchNorm's statistics.
      opt_state: the optimiser's state.
      averages: moving averages of the parameters and of BatchNorm's statistics.
    """

    step: jax.Array
    params: Any
    model_state: Any
    opt_state: Any
    averages: Any

    @property
    def variables(self) -> dict[str, Any]:
        """The model's variables, as trained."""
        return {"params": self.params, **self.model_state}

    @property
    def averaged_variables(self) -> dict[str, Any]:
        """The model's variables with the averages in place, for evaluation."""
        return {**self.model_state, **self.averages}


class FirstState:
    """The state before the first step, traced once for both its shapes and its values.

    ``init(key, batch)`` makes the variables. For the shapes alone, the shape of a batch will do.
    """

    def __init__(self, init: Callable[[jax.Array, Any], Any], config: TrainingConfig, batch: Any):
        # It runs once, so optimising it would cost more time than it saves.
        options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
        self._fresh = jax.jit(
            lambda key, batch: first_state(init(key, batch), config), compiler_options=options
        )
        self._arguments = jax.random.key(config.seed), batch

    def template(self) -> TrainState:
        """Return shapes and types; raise what the model raises at initialisation."""
        return self._fresh.eval_shape(*self._arguments)

    def values(self) -> TrainState:
        """Return the state, with ActNorm initialised from the batch."""
        return self._fresh(*self._arguments)


def training_step(loss: Loss, config: TrainingConfig) -> Step:
    """Return one step of the config's optimiser on the loss."""
    optimizer, schedule = make_optimizer(config), make_schedule(config)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        indices = global_indices(jax.tree.leaves(batch)[0].shape[0])
        keys = example_keys(config.seed, state.step, indices)

        def loss_of(params):
            value, updates, metrics = loss({"params": params, **state.model_state}, batch, keys)
            return value, ({**state.model_state, **updates}, metrics)

        (value, (model_state, metrics)), grads = jax.value_and_grad(loss_of, has_aux=True)(
            state.params
        )
        gradient, as_tree = ravel_pytree(grads)
        value, metrics, gradient = lax.pmean((value, metrics, gradient), AXIS)
        updates, opt_state = optimizer.update(as_tree(gradient), state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        latest = _averaged(params, model_state)
        averages = _average(state.averages, latest, state.step, config.ema_decay)
        new = TrainState(state.step + 1, params, model_state, opt_state, averages)
        norms = {"gradient": jnp.linalg.norm(gradient), "update": _norm(updates)}
        return new, {"loss": value, **metrics, **norms, "learning_rate": schedule(state.step)}

    return step


def example_keys(seed: int, step: Any, indices: Any) -> jax.Array:
    """Derive one key per example of a step's global batch from (seed, step, index)."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, indices)


def first_state(variables: Any, config: TrainingConfig) -> TrainState:
    """Return the state before the first step, with these variables and a fresh optimiser."""
    model_state = {name: tree for name, tree in variables.items() if name != "params"}
    params = variables["params"]
    averages = jax.tree.map(jnp.copy, _averaged(params, model_state))
    opt_state = make_optimizer(config).init(params)
    return TrainState(jnp.zeros((), jnp.int32), params, model_state, opt_state, averages)


def _norm(tree):
    """Take the norm in one reduction; optax.tree.norm compiles several kernels per array."""
    return jnp.linalg.norm(ravel_pytree(tree)[0])


def _averaged(params, model_state):
    """Return the collections that are averaged; singular vectors are converged instead."""
    return {"params": params} | {k: v for k, v in model_state.items() if k == "batch_stats"}


def _average(averages, latest, step, decay):
    """Update a moving average whose decay grows with the run, up to ``decay``."""
    decay = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda old, new: decay * old + (1.0 - decay) * new, averages, latest)
