"""``fit``: from arrays to a certified flow in one call."""

import dataclasses
import math
import time
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PRNGKeyArray

from iresnet_jax.bijections import Chain
from iresnet_jax.checks import check_domain, typed_key
from iresnet_jax.fitted import Fitted, History
from iresnet_jax.fitting_data import FittingData, check_count, fitting_data, model_inputs
from iresnet_jax.fitting_steps import Evaluate, FittingState, Step, make_evaluate, make_step
from iresnet_jax.logdet import Estimator, Exact
from iresnet_jax.nn.conditional import ConditionalVectorFlow
from iresnet_jax.nn.models import FlowModel, ImageFlow, VectorFlow
from iresnet_jax.nn.variables import Variables, converge, shrink
from iresnet_jax.progress_bar import Report, progress_bar
from iresnet_jax.russian_roulette import Roulette
from iresnet_jax.tables import mean_and_stderr
from iresnet_jax.types import AnyArray, Shape

_STEPS, _VALIDATIONS = 2000, 40
_WARMUP = 50
_EXACT_IN_TRAINING, _EXACT_IN_VALIDATION = 16, 64
_TRAINING = Roulette(0.7, lipschitz=None, min_terms=4, shared_length=True)
_VALIDATION = Roulette(0.9, lipschitz=None, min_terms=10)
_LEAST_CONTINUATION, _MOST_CONTINUATION = 0.7, 0.999
_ROWS_AT_FIRST = 1024  # that ActNorm is initialised from


@dataclasses.dataclass(frozen=True)
class _Schedule:
    """How long to train, in epochs; validations come every so many of them.

    Attributes:
      steps: of one epoch.
    """

    epochs: int
    steps: int
    batch_size: int
    patience: int

    @property
    def every(self) -> int:
        return max(1, self.epochs // _VALIDATIONS)

    @property
    def total(self) -> int:
        return self.epochs * self.steps


def fit(
    key: PRNGKeyArray,
    model: FlowModel | None,
    data: object,
    *,
    sample_weight: AnyArray | None = None,
    validation: float | object = 0.1,
    optimizer: optax.GradientTransformation | None = None,
    learning_rate: float = 5e-3,
    batch_size: int = 256,
    max_epochs: int | None = None,
    patience: int = 10,
    estimator: Estimator | None = None,
    ema_decay: float = 0.99,
    num_levels: int = 256,
    standardize: bool = True,
    progress: bool = True,
) -> tuple[Fitted, History]:
    """Fit a density to data by maximum likelihood; return it, certified, and how training went.

    Minimises −Σ wᵢ log p(xᵢ) in batches of a random order of the data, anew each epoch. What is
    kept are the averaged parameters of the epoch with the least validation loss, with their power
    iterations converged and every kernel scaled to within its rigorous bound. The result depends on
    the key alone, on the same machine.

    Args:
      key: of the split, the initial weights, the order of the data and all noise.
      model: a model of this library over the shape of one example; None picks a
        :class:`~iresnet_jax.nn.VectorFlow` for a table, an :class:`~iresnet_jax.nn.ImageFlow` for
        images.
      data: a table [rows, columns], array or data frame, in any units; or images [examples, height,
        width, channels], floats in [0, 1], or integer grey levels, which get new noise each step.
      sample_weight: w ≥ 0, [examples]; an example of weight 0 is left out.
      validation: fraction of the data to hold out, in (0, 1), or data to validate on.
      optimizer: of optax; by default Adam with gradients clipped to norm 1, a warm-up of 50 steps
        and a cosine to 0 over all epochs.
      learning_rate: peak of the default optimiser's.
      batch_size: examples a step; at most all. What an epoch leaves over waits for the next.
      max_epochs: passes over the data; by default as many as make about 2,000 steps.
      patience: validations without improvement after which training ends. There are about 40, at
        most one an epoch.
      estimator: of log-determinants in training; by default exact up to 16 dimensions, and above
        without bias by a short :class:`~iresnet_jax.Roulette`, whose variance is known to be finite
        for L² < 0.7. Of a model without ``coeff``, whose series may diverge, it is exact always.
      ema_decay: decay of the parameters' moving average, in [0, 1).
      num_levels: grey levels of integer images.
      standardize: whether columns of a table are brought to one scale by bijections that become
        part of the flow; see :func:`~iresnet_jax.tables.standardizer`.
      progress: whether to show a bar on a terminal, where rich or tqdm is installed.

    Returns:
      The fitted model, whose ``flow`` is an :class:`~iresnet_jax.Flow` from the data as given, and
      whose ``certificate`` says what is proved; and the :class:`History`.

    Raises:
      ValueError, TypeError: for settings out of range, a model of another shape, data that are not
        finite; naming columns that are constant, or that others determine.
      FloatingPointError: if the validation loss is no longer finite.
    """
    start = time.monotonic()
    if (key := typed_key(key)).ndim:
        raise ValueError(f"fit takes one key; got {key.shape}.")
    split_key, init_key, train_key = jax.random.split(key, 3)
    source = fitting_data(split_key, data, sample_weight, validation, num_levels, standardize)
    model = default_model(source.event_shape) if model is None else _checked(model)
    schedule = _schedule(len(source.train.x), batch_size, max_epochs, patience)
    if not 0.0 <= ema_decay < 1.0:
        raise ValueError(f"ema_decay must lie in [0, 1); got {ema_decay}.")
    optimizer = default_optimizer(learning_rate, schedule.total) if optimizer is None else optimizer
    _check_optimizer(optimizer)
    variables = _initial(init_key, model, source)
    dim = math.prod(source.event_shape)
    bounded = model.coeff is not None
    if estimator is None:
        estimator = _TRAINING if bounded and dim > _EXACT_IN_TRAINING else Exact()
    validating = _VALIDATION if bounded and dim > _EXACT_IN_VALIDATION else Exact()
    step = make_step(model, optimizer, estimator, source, ema_decay)
    evaluate = make_evaluate(model, validating, source)
    state = FittingState.start(variables, optimizer)
    with progress_bar(schedule.total, progress) as report:
        kept, history = _train(train_key, state, step, evaluate, source, schedule, report)
    shipped = shrink(model, jax.jit(partial(converge, model))(kept))
    fitted = Fitted(model, shipped, source.entrance, source.num_levels)
    bounds = fitted.certificate.lipschitz  # proved now, and remembered
    if validating is _VALIDATION:
        evaluate = make_evaluate(model, final_estimator(max(bounds, default=0.0)), source)
    final, stderr = mean_and_stderr(evaluate(shipped), source.validation.weights)
    seconds = time.monotonic() - start
    return fitted, history._replace(final=final, final_stderr=stderr, seconds=seconds)


def final_estimator(lipschitz: float) -> Estimator:
    """Return an estimator without bias, and of a variance that is proved to be finite.

    Args:
      lipschitz: the largest bound L of the network's branches.
    """
    if not lipschitz <= _MOST_CONTINUATION:
        return Exact()
    return Roulette(max(_LEAST_CONTINUATION, lipschitz), lipschitz=lipschitz, min_terms=10)


def default_model(shape: Shape) -> FlowModel:
    """Return the model that :func:`fit` picks for examples of this shape.

    Images get a scale for each squeeze that their sides allow, three at most.
    """
    if len(shape) == 1:
        return VectorFlow(dim=shape[0], depth=8, features=(32, 32), coeff=0.97, activation="sin")
    height, width, _ = shape
    squeezes = min(3, *(_twos(side) for side in (height, width)))
    return ImageFlow(
        image_shape=(height, width, shape[2]),
        depths=(4,) * max(squeezes, 1),
        features=32,
        squeeze_first=squeezes > 0,
    )


def default_optimizer(learning_rate: float, steps: int) -> optax.GradientTransformation:
    """Return Adam, its rate rising for 50 steps and falling to 0 by a cosine, gradients clipped.

    Raises:
      ValueError: for a rate that is not above 0 and finite.
    """
    if not 0.0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate must lie in (0, inf); got {learning_rate}.")
    warmup = min(_WARMUP, max(1, steps // 10))
    rate = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, max(steps, warmup + 1))
    return optax.flatten(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate)))


def _train(
    key: PRNGKeyArray,
    state: FittingState,
    step: Step,
    evaluate: Evaluate,
    source: FittingData,
    schedule: _Schedule,
    report: Report,
) -> tuple[Variables, History]:
    """Train until the epochs end, or validations no longer improve; return the best averages."""
    epochs: list[int] = []
    train: list[float] = []
    validation: list[float] = []
    best, losses = state.averaged, []
    for epoch, batches in enumerate(_batches(key, len(source.train.x), schedule), start=1):
        for indices, own_key in batches:
            state, loss = step(state, indices, own_key)
            losses.append(loss)
        if epoch % schedule.every and epoch != schedule.epochs:
            continue
        mean, _ = mean_and_stderr(evaluate(state.averaged), source.validation.weights)
        if not math.isfinite(mean):
            raise FloatingPointError(
                f"The validation loss is {mean} after epoch {epoch}: training diverged. Lower the "
                "learning rate."
            )
        epochs.append(epoch)
        train.append(float(jnp.mean(jnp.stack(losses))))
        validation.append(mean)
        losses = []
        if mean <= min(validation):
            best = state.averaged
        report(epoch * schedule.steps, f"validation {mean:.4g} nats")
        if len(validation) - 1 - int(np.argmin(validation)) >= schedule.patience:
            break
    at = int(np.argmin(validation))
    curves = np.asarray(epochs), np.asarray(train), np.asarray(validation)
    early = epochs[-1] < schedule.epochs
    return best, History(*curves, epochs[at], early, math.nan, math.nan, 0.0)


def _batches(
    key: PRNGKeyArray, count: int, schedule: _Schedule
) -> Iterator[Iterator[tuple[np.ndarray, PRNGKeyArray]]]:
    """For each epoch, its batches: indices of one shape, and a key."""
    for epoch in range(schedule.epochs):
        order_key, noise_key = jax.random.split(jax.random.fold_in(key, epoch))
        order = np.asarray(jax.random.permutation(order_key, count))
        rows = order[: schedule.steps * schedule.batch_size].reshape(schedule.steps, -1)
        yield zip(rows, jax.random.split(noise_key, schedule.steps), strict=True)


def _schedule(count: int, batch_size: int, max_epochs: int | None, patience: int) -> _Schedule:
    size = min(check_count("batch_size", batch_size, 1), count)
    steps = count // size
    epochs = max(1, round(_STEPS / steps)) if max_epochs is None else max_epochs
    return _Schedule(
        check_count("max_epochs", epochs, 1), steps, size, check_count("patience", patience, 1)
    )


def _initial(key: PRNGKeyArray, model: FlowModel, source: FittingData) -> Variables:
    """Initialise the model, ActNorm from training data."""
    init_key, noise_key = jax.random.split(key)
    x = source.train.x[:_ROWS_AT_FIRST]
    x = model_inputs(x, jax.random.split(noise_key, len(x)), source.num_levels)
    x = Chain(source.entrance).forward(x)
    flow = jax.eval_shape(model.flow, jax.eval_shape(model.init, init_key, x))
    flow._check_priors()
    for part in (source.train.x, source.validation.x) if source.num_levels is None else ():
        if not source.entrance:
            check_domain(part, unit_interval=flow.levels[0].takes_unit_interval)
    variables: Variables = jax.jit(model.init)(init_key, x)
    return variables


def _checked(model: object) -> FlowModel:
    if not isinstance(model, FlowModel):
        kind = getattr(model, "__name__", type(model).__name__)
        raise TypeError(
            f"fit takes a model of iresnet_jax.nn, such as VectorFlow(dim=2), or None; got {kind}."
        )
    if isinstance(model, ConditionalVectorFlow):
        raise TypeError(
            "fit is for densities without a condition; got a ConditionalVectorFlow, which is "
            "trained by ir.nn.value_and_grad."
        )
    if model.axis_name is not None:
        raise ValueError(
            f"fit runs on one device: axis_name must be None; got {model.axis_name!r}."
        )
    return model


def _check_optimizer(optimizer: object) -> None:
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(
            f"optimizer must be of optax, such as optax.adam(1e-3); got {optimizer!r}. A rate for "
            "the default one is learning_rate."
        )


def _twos(side: int) -> int:
    """How often a side can be halved."""
    return (side & -side).bit_length() - 1
