"""A fit that is interrupted, or diverges, loses nothing."""

import jax
import numpy as np
import pytest

import iresnet_jax as ir
from iresnet_jax import fitting
from iresnet_jax.fitting_steps import make_evaluate, make_step

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(size=(600, 2)) * [30.0, 1e-3] + [1500.0, 0.0]
MODEL = ir.nn.VectorFlow(dim=2, depth=1, features=(8,))
QUICK = {"max_epochs": 6, "batch_size": 128, "progress": False}
STEPS = 4  # an epoch: 540 rows


def interrupted_at(monkeypatch, step, *, again=False):
    """Press Ctrl-C instead of the step of this number, counted from 0; and at the validation."""
    pressed = []

    def make(*arguments):
        run, count = make_step(*arguments), iter(range(10**6))

        def wrapped(*inputs):
            if next(count) == step:
                pressed.append(step)
                raise KeyboardInterrupt
            return run(*inputs)

        return wrapped

    def evaluated(*arguments):
        run = make_evaluate(*arguments)

        def wrapped(variables):
            if pressed and again:
                raise KeyboardInterrupt
            return run(variables)

        return wrapped

    monkeypatch.setattr(fitting, "make_step", make)
    monkeypatch.setattr(fitting, "make_evaluate", evaluated)


@pytest.mark.parametrize(
    ("step", "epoch"), [pytest.param(2 * STEPS + 1, 3, marks=pytest.mark.slow), (2, 1)]
)
def test_an_interrupted_fit_returns_the_best_until_then(monkeypatch, step, epoch):
    """Even within the first epoch; certified, and validated, as any other."""
    interrupted_at(monkeypatch, step)
    with pytest.warns(UserWarning, match=f"Training was interrupted in epoch {epoch}"):
        fitted, history = ir.fit(KEY, MODEL, X, **QUICK)
    assert history.ended_by == "interrupt" and history.stopped_early
    assert list(history.epoch) == list(range(1, epoch + 1))
    assert np.isfinite(history.train).all() and np.isfinite(history.final)
    assert history.best_epoch == history.epoch[np.argmin(history.validation)]
    assert fitted.certificate.certified


@pytest.mark.slow
def test_what_is_kept_is_what_was_trained_until_then(monkeypatch):
    """Interrupted as epoch 3 begins, it is the fit that would have ended there."""
    constant = {"optimizer": ir.fitting.default_optimizer(1e-3, 1000)}
    whole, _ = ir.fit(KEY, MODEL, X, **(QUICK | {"max_epochs": 2}), **constant)
    interrupted_at(monkeypatch, 2 * STEPS)
    with pytest.warns(UserWarning, match="interrupted in epoch 3"):
        fitted, _ = ir.fit(KEY, MODEL, X, **QUICK, **constant)
    pairs = zip(*map(jax.tree.leaves, (whole.variables, fitted.variables)), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)


@pytest.mark.slow
def test_an_interruption_just_after_a_validation_adds_none(monkeypatch):
    """Ctrl-C where the bar is told: what was validated is not validated again."""

    class Bar:
        def __init__(self, *_):
            pass

        def __enter__(self):
            def report(*_):
                raise KeyboardInterrupt

            return report

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(fitting, "progress_bar", Bar)
    with pytest.warns(UserWarning, match="interrupted in epoch 1"):
        fitted, history = ir.fit(KEY, MODEL, X, **QUICK)
    assert list(history.epoch) == [1] and np.isfinite(history.train).all()
    assert fitted.certificate.certified


def test_before_the_first_step_an_interruption_is_raised(monkeypatch):
    interrupted_at(monkeypatch, 0)
    with pytest.raises(KeyboardInterrupt):
        ir.fit(KEY, MODEL, X, **QUICK)


@pytest.mark.slow
def test_a_second_interruption_ends_the_call(monkeypatch):
    interrupted_at(monkeypatch, STEPS + 1, again=True)
    with pytest.raises(KeyboardInterrupt):
        ir.fit(KEY, MODEL, X, **QUICK)


def test_a_fit_that_diverges_returns_the_best_before(monkeypatch):
    """The loss becomes NaN in epoch 3: parameters and losses are those of the epochs before."""

    def make(*arguments):
        run, count = make_step(*arguments), iter(range(10**6))

        def wrapped(*inputs):
            state, loss = run(*inputs)
            if next(count) >= 2 * STEPS:
                state = state._replace(average=jax.tree.map(lambda p: p * np.nan, state.average))
            return state, loss

        return wrapped

    monkeypatch.setattr(fitting, "make_step", make)
    with pytest.warns(UserWarning, match="diverged by epoch 3: lower the learning rate"):
        fitted, history = ir.fit(KEY, MODEL, X, **QUICK)
    assert history.ended_by == "divergence" and list(history.epoch) == [1, 2]
    assert np.isfinite(history.final) and fitted.certificate.certified
