"""``fit``: from arrays to a certified flow in one call."""

import math
import time
from functools import partial

import jax
import optax
from jaxtyping import PRNGKeyArray

from iresnet_jax.bijections import Chain
from iresnet_jax.checks import check_domain, typed_key
from iresnet_jax.conditional import ConditionalFlow
from iresnet_jax.fitted import Fitted, FittedConditional, History
from iresnet_jax.fitting_data import FittingData, fitting_data, model_inputs
from iresnet_jax.fitting_loop import Schedule, train
from iresnet_jax.fitting_models import model_for
from iresnet_jax.fitting_steps import FittingState, make_evaluate, make_step
from iresnet_jax.logdet import Estimator, Exact
from iresnet_jax.nn.conditional import ConditionalVectorFlow
from iresnet_jax.nn.models import FlowModel
from iresnet_jax.nn.variables import Variables, converge, shrink
from iresnet_jax.progress_bar import progress_bar
from iresnet_jax.russian_roulette import Roulette
from iresnet_jax.tables import mean_and_stderr
from iresnet_jax.types import AnyArray

_WARMUP = 50
_EXACT_IN_TRAINING, _EXACT_IN_VALIDATION = 16, 64
_TRAINING = Roulette(0.7, lipschitz=None, min_terms=4, shared_length=True)
_VALIDATION = Roulette(0.9, lipschitz=None, min_terms=10)
_LEAST_CONTINUATION, _MOST_CONTINUATION = 0.7, 0.999
_ROWS_AT_FIRST = 1024  # that ActNorm is initialised from


def fit(
    key: PRNGKeyArray,
    model: FlowModel | None,
    data: object,
    *,
    condition: object = None,
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

    Minimises −Σ wᵢ log p(xᵢ), or with conditions −Σ wᵢ log p(yᵢ | xᵢ), in batches of a random order
    of the data, anew each epoch. What is kept are the averaged parameters of the epoch with the
    least validation loss, with their power iterations converged and every kernel scaled to within
    its rigorous bound. The result depends on the key alone, on the same machine.

    Ctrl-C in training, or a loss that is no longer finite, loses nothing: training ends with a
    warning, and the best parameters until then are returned, certified as always. Ctrl-C after
    that, a second one or while the network is certified, ends the call.

    Args:
      key: of the split, the initial weights, the order of the data and all noise.
      model: a model of this library over the shape of one example; None picks a
        :class:`~iresnet_jax.nn.VectorFlow` for a table, an :class:`~iresnet_jax.nn.ImageFlow` for
        images, a :class:`~iresnet_jax.nn.ConditionalVectorFlow` for a table with conditions.
      data: a table [rows, columns], array or data frame, in any units; or images [examples, height,
        width, channels], floats in [0, 1], or integer grey levels, which get new noise each step.
      condition: x of p(y | x), for each row y of a table: vectors, an array [rows, columns] or data
        frame in any units, or classes, integers 0, 1, 2, … [rows].
      sample_weight: w ≥ 0, [examples]; an example of weight 0 is left out.
      validation: fraction of the data to hold out, in (0, 1), or data to validate on; with
        conditions, a pair (data, condition).
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
        part of the flow, and those of the condition likewise; see
        :func:`~iresnet_jax.tables.standardizer`.
      progress: whether to show a bar on a terminal, where rich or tqdm is installed.

    Returns:
      The fitted model, whose ``flow`` is an :class:`~iresnet_jax.Flow` from the data as given, and
      whose ``certificate`` says what is proved; and the :class:`History`. With conditions it is a
      :class:`~iresnet_jax.FittedConditional`, with ``log_prob(y, condition)`` and ``sample(key, n,
      condition)``, and one certificate for every condition.

    Raises:
      ValueError, TypeError: for settings out of range, a model of another shape, data that are not
        finite; naming columns that are constant, or that others determine; for conditions that
        do not fit the data or the model.
      FloatingPointError: if no validation loss was finite.
      KeyboardInterrupt: by Ctrl-C before the first step is done, or when training has ended.
    """
    start = time.monotonic()
    if (key := typed_key(key)).ndim:
        raise ValueError(f"fit takes one key; got {key.shape}.")
    split_key, init_key, train_key = jax.random.split(key, 3)
    source = fitting_data(
        split_key, data, sample_weight, validation, num_levels, standardize, condition
    )
    model = model_for(source, model)
    schedule = Schedule.of(len(source.train.x), batch_size, max_epochs, patience)
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
        kept, history = train(
            train_key,
            state,
            step,
            evaluate,
            len(source.train.x),
            source.validation.weights,
            schedule,
            report,
        )
    shipped = shrink(model, jax.jit(partial(converge, model))(kept))
    fitted = _fitted(model, shipped, source)
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


def _initial(key: PRNGKeyArray, model: FlowModel, source: FittingData) -> Variables:
    """Initialise the model, ActNorm from training data."""
    init_key, noise_key = jax.random.split(key)
    x = source.train.x[:_ROWS_AT_FIRST]
    x = model_inputs(x, jax.random.split(noise_key, len(x)), source.num_levels)
    x = Chain(source.entrance).forward(x)
    flow = jax.eval_shape(model.flow, jax.eval_shape(model.init, init_key, x))
    flow = flow.flow if isinstance(flow, ConditionalFlow) else flow
    flow._check_priors()
    for part in (source.train.x, source.validation.x) if source.num_levels is None else ():
        if not source.entrance:
            check_domain(part, unit_interval=flow.levels[0].takes_unit_interval)
    variables: Variables = jax.jit(model.init)(init_key, x)
    return variables


def _fitted(model: FlowModel, variables: Variables, source: FittingData) -> Fitted:
    if isinstance(model, ConditionalVectorFlow):
        return FittedConditional(
            model, variables, source.entrance, condition_entrance=source.condition_entrance
        )
    return Fitted(model, variables, source.entrance, source.num_levels)


def _check_optimizer(optimizer: object) -> None:
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(
            f"optimizer must be of optax, such as optax.adam(1e-3); got {optimizer!r}. A rate for "
            "the default one is learning_rate."
        )
