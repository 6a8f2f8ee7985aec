"""The train state and the pure steps that advance it, written for one device of many.

A step sees its device's part of the batch and averages over the axis ``parallel.AXIS``. Random
numbers are drawn by the example's place in the global batch: any number of devices draws the same.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from iresnet_jax.models import FlowModel
from jax import lax
from jax.flatten_util import ravel_pytree

from iresnet_jax import bits_per_dim, dequantize
from iresnet_jax.logdet import Estimator
from train.configs.base import ClassificationConfig, DensityConfig, TrainingConfig
from train.data import Dataset
from train.estimators import training_estimator
from train.optim import make_optimizer, make_schedule
from train.parallel import AXIS, global_indices

Metrics = dict[str, jax.Array]
Step = Callable[["TrainState", Any], tuple["TrainState", Metrics]]

_CROP_MARGIN = 4


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


def init_state(variables: Any, config: TrainingConfig) -> TrainState:
    """The state before the first step."""
    model_state = {name: tree for name, tree in variables.items() if name != "params"}
    params = variables["params"]
    averages = jax.tree.map(jnp.copy, _averaged(params, model_state))
    opt_state = make_optimizer(config).init(params)
    return TrainState(jnp.zeros((), jnp.int32), params, model_state, opt_state, averages)


def training_model(model: FlowModel, config: TrainingConfig) -> FlowModel:
    """The model as a mapped step applies it."""
    return model.clone(axis_name=AXIS, precision=config.precision, remat=config.remat)


def example_keys(seed: int, step: jax.Array, indices: jax.Array) -> jax.Array:
    """One key for each example of a step's global batch, by (seed, step, index)."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, indices)


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


def density_step(model: FlowModel, config: DensityConfig, dataset: Dataset) -> Step:
    """One step of maximum likelihood on a batch of integer images or points."""
    estimator = training_estimator(config, dataset)
    model = training_model(model, config)

    def loss_fn(params, model_state, examples, keys):
        if config.augment:
            # 0 and 1 are what jax.random.split folds in, for the noise and the probes
            examples = crop_and_flip(examples, jax.vmap(jax.random.fold_in, (0, None))(keys, 2))
        flow, updates = model.apply(
            {"params": params, **model_state}, method="network", mutable=["spectral"]
        )
        bits = density_bits(flow, examples, dataset.num_levels, estimator, keys)
        return jnp.mean(bits), ({**model_state, **updates}, {})

    return _step(loss_fn, config)


def normalize(images: jax.Array, num_levels: int, config: ClassificationConfig) -> jax.Array:
    """Integer grey levels as a classifier sees them: in [0, 1], then (x − mean) / std."""
    scaled = images.astype(jnp.float32) / (num_levels - 1)
    return (scaled - jnp.asarray(config.mean)) / jnp.asarray(config.std)


def denormalize(x: jax.Array | np.ndarray, config: ClassificationConfig) -> jax.Array:
    """What :func:`normalize` saw, in [0, 1]."""
    return jnp.asarray(x) * jnp.asarray(config.std) + jnp.asarray(config.mean)


def crop_and_flip(images: jax.Array, keys: jax.Array) -> jax.Array:
    """Each image cropped at random out of a mirrored margin, and flipped half of the time.

    Args:
      images: [batch, height, width, channels].
      keys: one an image.
    """
    margin = ((_CROP_MARGIN, _CROP_MARGIN), (_CROP_MARGIN, _CROP_MARGIN), (0, 0))

    def one(image, key):
        place, side = jax.random.split(key)
        top, left = jax.random.randint(place, (2,), 0, 2 * _CROP_MARGIN + 1)
        cropped = lax.dynamic_slice(
            jnp.pad(image, margin, mode="symmetric"), (top, left, 0), image.shape
        )
        return jnp.where(jax.random.bernoulli(side), cropped[:, ::-1], cropped)

    return jax.vmap(one)(images, keys)


def classification_step(model: Any, config: ClassificationConfig, num_levels: int) -> Step:
    """One step of cross-entropy on a batch of integer images and labels."""
    model = training_model(model, config)

    def loss_fn(params, model_state, batch, keys):
        images, labels = batch
        images = crop_and_flip(images, keys) if config.augment else images
        logits, updates = model.apply(
            {"params": params, **model_state},
            normalize(images, num_levels, config),
            train=True,
            mutable=["spectral", "batch_stats"],
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        accuracy = jnp.mean(jnp.argmax(logits, -1) == labels)
        return jnp.mean(losses), ({**model_state, **updates}, {"accuracy": accuracy})

    return _step(loss_fn, config)


def _step(loss_fn, config) -> Step:
    optimizer, schedule = make_optimizer(config), make_schedule(config)

    def step(state: TrainState, batch):
        indices = global_indices(jax.tree.leaves(batch)[0].shape[0])
        keys = example_keys(config.seed, state.step, indices)
        (loss, (model_state, metrics)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params, state.model_state, batch, keys
        )
        gradient, as_tree = ravel_pytree(grads)
        loss, metrics, gradient = lax.pmean((loss, metrics, gradient), AXIS)
        updates, opt_state = optimizer.update(as_tree(gradient), state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        latest = _averaged(params, model_state)
        averages = _average(state.averages, latest, state.step, config.ema_decay)
        new = TrainState(state.step + 1, params, model_state, opt_state, averages)
        norms = {"gradient": jnp.linalg.norm(gradient), "update": _norm(updates)}
        return new, {"loss": loss, **metrics, **norms, "learning_rate": schedule(state.step)}

    return step


def _norm(tree):
    """As one reduction, where optax.tree.norm makes several small programs of every array."""
    return jnp.linalg.norm(ravel_pytree(tree)[0])


def _averaged(params, model_state):
    """The collections that are averaged; singular vectors are converged anew instead."""
    return {"params": params} | {k: v for k, v in model_state.items() if k == "batch_stats"}


def _average(averages, latest, step, decay):
    """Moving average whose memory grows with the run, up to ``decay``."""
    decay = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda old, new: decay * old + (1.0 - decay) * new, averages, latest)
