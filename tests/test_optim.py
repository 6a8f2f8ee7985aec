"""Schedules at their corners; optimisers against one step done by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from train.configs import CLASSIFICATION, DENSITY
from train.optim import make_optimizer, make_schedule

BASE = dataclasses.replace(
    DENSITY["digits"], learning_rate=0.5, warmup_steps=10, steps=110, weight_decay=0.0
)


def rates(steps, **changes):
    schedule = make_schedule(dataclasses.replace(BASE, **changes))
    return np.array([float(schedule(step)) for step in steps])


def test_every_schedule_warms_up_linearly():
    for name in ("cosine", "constant", "steps"):
        np.testing.assert_allclose(rates([0, 5, 10], schedule=name), [0.0, 0.25, 0.5], rtol=1e-6)


def test_the_cosine_ends_at_a_hundredth_and_is_half_way_in_the_middle():
    np.testing.assert_allclose(rates([60, 110]), [0.5 * 0.505, 0.005], rtol=1e-5)


def test_the_constant_stays():
    np.testing.assert_allclose(rates([11, 80, 110], schedule="constant"), 0.5)


def test_steps_drop_at_their_fraction_of_training():
    options = {"schedule": "steps", "milestones": (0.5, 0.9), "milestone_factor": 0.2}
    np.testing.assert_allclose(
        rates([54, 56, 98, 100], **options), [0.5, 0.1, 0.1, 0.02], rtol=1e-5
    )


def test_milestones_on_one_step_all_count():
    options = {"schedule": "steps", "milestones": (0.5, 0.501), "milestone_factor": 0.2}
    np.testing.assert_allclose(rates([54, 56], **options), [0.5, 0.02], rtol=1e-5)


def test_the_authors_schedule_warms_up_and_drops_at_epochs_60_120_and_160():
    config = CLASSIFICATION["cifar10"]
    epoch = config.steps // 200
    schedule = make_schedule(config)
    rate = [float(schedule(e * epoch + d)) for e in (60, 120, 160) for d in (-1, 1)]
    np.testing.assert_allclose(rate, [0.1, 0.02, 0.02, 0.004, 0.004, 0.0008], rtol=1e-5)
    np.testing.assert_allclose(float(schedule(5 * epoch)), 0.05, rtol=1e-5)


def update(config, gradient, params):
    optimizer = make_optimizer(config)
    state = optimizer.init(params)
    updates, _ = optimizer.update(gradient, state, params)
    return np.asarray(optax.apply_updates(params, updates))


@pytest.mark.parametrize(("optimizer", "length"), [("sgd", 1.0), ("nesterov", 1.9)])
def test_sgd_adds_the_weight_decay_to_the_gradient(optimizer, length):
    """Nesterov's first step is (1 + 0.9) times the gradient."""
    config = dataclasses.replace(
        BASE, optimizer=optimizer, schedule="constant", warmup_steps=0, weight_decay=0.1
    )
    w, g = jnp.array([1.0, -2.0]), jnp.array([0.5, 0.25])
    np.testing.assert_allclose(update(config, g, w), w - 0.5 * length * (g + 0.1 * w), rtol=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "adamax"])
def test_adaptive_optimisers_first_step_is_the_sign(optimizer):
    config = dataclasses.replace(BASE, optimizer=optimizer, schedule="constant", warmup_steps=0)
    w, g = jnp.array([1.0, -2.0]), jnp.array([0.5, -0.25])
    np.testing.assert_allclose(update(config, g, w), w - 0.5 * jnp.sign(g), rtol=1e-5)


def test_long_gradients_are_clipped():
    config = dataclasses.replace(
        BASE, optimizer="sgd", schedule="constant", warmup_steps=0, clip_gradient=1.0
    )
    w, g = jnp.zeros(2), jnp.array([30.0, 40.0])
    np.testing.assert_allclose(update(config, g, w), -0.5 * g / 50.0, rtol=1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adamw", "adamax"])
def test_optimisers_do_to_many_arrays_what_they_do_to_one(optimizer):
    """Clipped by the norm of all of them, decayed, over three steps."""
    settings = {"weight_decay": 0.1, "clip_gradient": 1.0, "warmup_steps": 0}
    optimizer = make_optimizer(dataclasses.replace(BASE, optimizer=optimizer, **settings))

    def split(w):
        return {"b": w[:2].reshape(2, 1), "a": [w[2], w[3:].reshape(1, 3)]}

    results = []
    for form in (lambda w: w, split):
        params = form(jnp.linspace(-1.0, 1.0, 6))
        state = optimizer.init(params)
        for step in range(3):
            gradient = form(jnp.array([3.0, -4.0, 0.5, 1.0, 0.0, -2.0]) * (1.0 + step))
            updates, state = optimizer.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
        results.append(params)
    one, many = split(results[0]), results[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), one, many)


def test_muon_moves_every_kernel_by_an_orthogonal_matrix_and_the_rest_by_adam():
    """A kernel's first update is −lr·√max(1, out/in) times a matrix of singular values about 1."""
    config = dataclasses.replace(
        BASE, optimizer="muon", adam_learning_rate=0.25, schedule="constant", warmup_steps=0
    )
    rng = np.random.default_rng(0)
    gradient = {
        "scale0_blocks": {
            "dense": {"kernel": rng.normal(size=(3, 4, 8)), "bias": rng.normal(size=(3, 8))},
            "conv": {"kernel": rng.normal(size=(2, 3, 3, 4, 8))},
        },
        "head": {"linear": {"kernel": rng.normal(size=(4, 8))}},
    }
    gradient = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), gradient)
    params = jax.tree.map(jnp.zeros_like, gradient)
    optimizer = make_optimizer(config)
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    for name, factor in (("dense", np.sqrt(2.0)), ("conv", 1.0)):
        kernel = updates["scale0_blocks"][name]["kernel"]
        matrices = np.asarray(kernel).reshape(len(kernel), -1, 8)
        sigma = np.linalg.svd(matrices, compute_uv=False) / (0.5 * factor)
        assert sigma.min() > 0.6 and sigma.max() < 1.3  # what five Newton–Schulz steps reach
        slopes = np.sum(np.asarray(gradient["scale0_blocks"][name]["kernel"]) * kernel)
        assert slopes < 0.0
    for kept, given in (
        (updates["scale0_blocks"]["dense"]["bias"], gradient["scale0_blocks"]["dense"]["bias"]),
        (updates["head"]["linear"]["kernel"], gradient["head"]["linear"]["kernel"]),
    ):
        step = -np.asarray(kept) / np.sign(given)  # NAdam's first: one length, against the sign
        np.testing.assert_allclose(step, step.flat[0], rtol=1e-4)
        assert 0.25 <= step.flat[0] <= 0.5
