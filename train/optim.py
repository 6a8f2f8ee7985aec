"""Optimisers and learning-rate schedules, from a config."""

from typing import Any

import jax
import optax

from train.configs.base import TrainingConfig

#: Beginnings of the names of constrained kernels, [block, ..., in, out].
_MATRICES = ("kernel", "input_", "hidden_")


def make_schedule(config: TrainingConfig) -> optax.Schedule:
    """Return the schedule of the learning rate: a linear warm-up, then ``config.schedule``."""
    peak, warmup = config.learning_rate, min(config.warmup_steps, config.steps)
    rest = max(config.steps - warmup, 1)
    drops: dict[int, float] = {}
    for at in config.milestones:  # in a short run several may fall on one step
        step = round(at * config.steps) - warmup
        drops[step] = drops.get(step, 1.0) * config.milestone_factor
    after = {
        "cosine": optax.cosine_decay_schedule(peak, rest, alpha=0.01),
        "constant": optax.constant_schedule(peak),
        "steps": optax.piecewise_constant_schedule(peak, drops),
    }[config.schedule]
    if warmup == 0:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def describe_schedule(config: TrainingConfig) -> str:
    """Say in a few words what :func:`make_schedule` does."""
    warmup = min(config.warmup_steps, config.steps)
    peak = f"{config.learning_rate:g}"
    start = f"a linear warm-up to {peak} at step {warmup:,}" if warmup else f"{peak} at first"
    drops = " and ".join(f"{round(at * config.steps):,}" for at in config.milestones)
    after = {
        "cosine": f"a cosine down to {0.01 * config.learning_rate:g} at step {config.steps:,}",
        "constant": "a constant",
        "steps": f"{config.milestone_factor:g} times as much from steps {drops} on",
    }[config.schedule]
    return f"{start}, then {after}"


def make_optimizer(config: TrainingConfig) -> optax.GradientTransformation:
    """Return the optimiser of a run, with gradients clipped if the config says so."""
    schedule, decay, name = make_schedule(config), config.weight_decay, config.optimizer
    parts = []
    if config.clip_gradient is not None:
        parts.append(optax.clip_by_global_norm(config.clip_gradient))
    if decay and name not in ("adamw", "muon"):  # these decouple it
        parts.append(optax.add_decayed_weights(decay))
    makers = {
        "adamw": lambda: optax.adamw(schedule, b2=0.99, weight_decay=decay),
        "muon": lambda: _muon(schedule, config),
        "adamax": lambda: optax.adamax(schedule),
        "sgd": lambda: optax.sgd(schedule, momentum=0.9),
        "nesterov": lambda: optax.sgd(schedule, momentum=0.9, nesterov=True),
    }
    chain = optax.chain(*parts, makers[name]())
    # As one array, where it does not matter which parameter is which: it compiles faster.
    return chain if config.optimizer == "muon" else optax.flatten(chain)


def kernel_matrices(params: Any) -> Any:
    """Tell Muon which parameters are matrices: the constrained kernels.

    A kernel [block, ..., in, out] is one matrix per block, of all inputs by the outputs, as its
    layer multiplies by it. Every other parameter has None, and goes to Adam.
    """

    def matrix(path, leaf):
        names = [str(getattr(key, "key", key)) for key in path]
        if not names[0].startswith("scale") or not names[-1].startswith(_MATRICES):
            return None
        return optax.contrib.MuonDimensionNumbers(tuple(range(1, leaf.ndim - 1)), leaf.ndim - 1)

    return jax.tree_util.tree_map_with_path(matrix, params)


def _muon(schedule: optax.Schedule, config: TrainingConfig) -> optax.GradientTransformation:
    ratio = config.adam_learning_rate / config.learning_rate
    return optax.contrib.muon(
        schedule,
        weight_decay=config.weight_decay,
        adam_b2=0.99,
        adam_weight_decay=config.weight_decay,
        adam_learning_rate=lambda step: ratio * schedule(step),
        muon_weight_dimension_numbers=kernel_matrices,
    )
