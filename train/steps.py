"""The train state and the pure steps that advance it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from iresnet_jax import bits_per_dim, dequantize, exact, truncated_series
from iresnet_jax.logdet import Estimator
from iresnet_jax.models import FlowModel
from train.configs.base import DensityConfig, TrainingConfig
from train.data import Dataset

Metrics = dict[str, jax.Array]
Step = Callable[["TrainState", Any], tuple["TrainState", Metrics]]


class TrainState(NamedTuple):
    """All that training changes.

    Attributes:
      step: steps completed.
      params: trainable parameters.
      model_state: the other collections: singular vectors ("spectral"), BatchNorm's statistics.
      opt_state: the optimiser's.
      averages: moving averages of the parameters and of BatchNorm's statistics.
    """

    step: jax.Array
    params: Any
    model_state: Any
    opt_state: Any
    averages: Any

    @property
    def variables(self) -> dict[str, Any]:
        """The model's variables in training."""
        return {"params": self.params, **self.model_state}

    @property
    def averaged_variables(self) -> dict[str, Any]:
        """The model's variables with the averages in place: what is evaluated."""
        return {**self.model_state, **self.averages}


def make_optimizer(config: TrainingConfig) -> optax.GradientTransformation:
    """AdamW with a linear warm-up and a cosine decay to 1% of the peak."""
    warmup = min(config.warmup_steps, config.steps)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0,
        config.learning_rate,
        warmup,
        max(config.steps, warmup + 1),
        0.01 * config.learning_rate,
    )
    return optax.adamw(schedule, b2=0.99, weight_decay=config.weight_decay)


def init_state(variables: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    model_state = {name: tree for name, tree in variables.items() if name != "params"}
    params = variables["params"]
    averages = jax.tree.map(jnp.copy, _averaged(params, model_state))
    return TrainState(
        jnp.zeros((), jnp.int32), params, model_state, optimizer.init(params), averages
    )


def example_keys(seed: int, step: jax.Array, batch_size: int) -> jax.Array:
    """One key for each example of a step's batch, by (seed, step, index)."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch_size))


def to_unit_interval(examples: jax.Array, num_levels: int | None, keys: jax.Array) -> jax.Array:
    """Images dequantised by ``keys``; points as they are."""
    return examples if num_levels is None else dequantize(keys, examples, num_levels)


def density_bits(
    flow: Any, examples: jax.Array, num_levels: int | None, estimator: Estimator, keys: jax.Array
) -> jax.Array:
    """Bits per dimension of each example, [batch], for one draw of all noise."""
    noise, probes = jax.vmap(lambda k: tuple(jax.random.split(k)))(keys)
    x = to_unit_interval(examples, num_levels, noise)
    log_prob = flow.log_prob(x, estimator, probes)
    return bits_per_dim(log_prob, flow.dim, num_levels or 1)


def density_step(
    model: FlowModel,
    optimizer: optax.GradientTransformation,
    config: DensityConfig,
    dataset: Dataset,
) -> Step:
    """One step of maximum likelihood on a batch."""
    series = truncated_series(config.num_terms)
    estimator = series if config.train_estimator == "series" else exact()

    def loss_fn(params, model_state, examples, keys):
        flow, updates = model.apply(
            {"params": params, **model_state}, method="network", mutable=["spectral"]
        )
        bits = density_bits(flow, examples, dataset.num_levels, estimator, keys)
        return jnp.mean(bits), ({**model_state, **updates}, {})

    return _step(loss_fn, optimizer, config)


def classification_step(
    model: Any, optimizer: optax.GradientTransformation, config: TrainingConfig
) -> Step:
    """One step of cross-entropy on a batch of images in [0, 1] and labels."""

    def loss_fn(params, model_state, batch, keys):
        del keys
        images, labels = batch
        logits, updates = model.apply(
            {"params": params, **model_state},
            images,
            train=True,
            mutable=["spectral", "batch_stats"],
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        accuracy = jnp.mean(jnp.argmax(logits, -1) == labels)
        return jnp.mean(losses), ({**model_state, **updates}, {"accuracy": accuracy})

    return _step(loss_fn, optimizer, config)


def _step(loss_fn, optimizer, config) -> Step:
    def step(state: TrainState, batch):
        batch_size = jax.tree.leaves(batch)[0].shape[0]
        keys = example_keys(config.seed, state.step, batch_size)
        (loss, (model_state, metrics)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params, state.model_state, batch, keys
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        latest = _averaged(params, model_state)
        averages = _average(state.averages, latest, state.step, config.ema_decay)
        new = TrainState(state.step + 1, params, model_state, opt_state, averages)
        return new, {"loss": loss, "gradient": optax.tree.norm(grads), **metrics}

    return step


def _averaged(params, model_state):
    """The collections that are averaged; singular vectors are converged anew instead."""
    return {"params": params} | {k: v for k, v in model_state.items() if k == "batch_stats"}


def _average(averages, latest, step, decay):
    """Moving average whose memory grows with the run, up to ``decay``."""
    decay = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda old, new: decay * old + (1.0 - decay) * new, averages, latest)
