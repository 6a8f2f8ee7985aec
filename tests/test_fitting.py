"""One call from arrays to a certified flow: what it promises, against oracles."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import iresnet_jax as ir
from iresnet_jax.fitting_data import fitting_data
from iresnet_jax.fitting_models import default_model

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
#: A Gaussian in odd units: its density is known.
MEAN, ROOT = np.array([1500.0, -2e-4]), np.array([[30.0, 0.0], [6e-5, 8e-5]])
GAUSSIAN = MEAN + RNG.normal(size=(600, 2)) @ ROOT.T
SMALL = ir.nn.VectorFlow(dim=2, depth=2, features=(8,))
QUICK = {"max_epochs": 4, "batch_size": 128, "progress": False}


@dataclasses.dataclass(frozen=True)
class Counting(ir.Estimator):
    """Exact, and counts how often it is traced."""

    needs_key = False
    traced: ClassVar[list] = []

    def __call__(self, branch, x, key=None, lipschitz=None):
        self.traced.append(x.shape)
        return ir.Exact()(branch, x)

    def describe(self):
        return "exact"


@pytest.fixture(scope="module")
def quick():
    """A fit of a few epochs."""
    return ir.fit(KEY, SMALL, GAUSSIAN, **QUICK)


@pytest.fixture(scope="module")
def gaussian():
    """A fit to a Gaussian, long enough to be good."""
    return ir.fit(KEY, SMALL, GAUSSIAN, max_epochs=60, batch_size=128, progress=False)


def test_the_density_is_that_of_the_users_units(gaussian):
    """Held against the true one, whose log-determinants of units are about 13 nats."""
    fitted, _ = gaussian
    fresh = MEAN + np.random.default_rng(1).normal(size=(1000, 2)) @ ROOT.T
    log_prob = np.asarray(jax.jit(fitted.flow.log_prob)(jnp.asarray(fresh, jnp.float32)))
    standard = np.linalg.solve(ROOT, (fresh - MEAN).T)
    true = -0.5 * (standard**2).sum(axis=0) - np.log(2 * np.pi) - np.log(np.linalg.det(ROOT))
    divergence = np.mean(true - log_prob)  # Kullback–Leibler, of 1000 draws
    assert -0.02 < divergence < 0.1


def test_it_is_certified_and_samples_the_data(gaussian):
    fitted, _ = gaussian
    assert fitted.certificate.certified and fitted.flow.contracts
    samples, info = fitted.sample(jax.random.key(1), 2000)
    assert bool(info.converged.all())
    error = np.sqrt((ROOT**2).sum(axis=1)) * np.sqrt(1 / 540 + 1 / 2000)  # of both means
    assert (np.abs(samples.mean(axis=0) - MEAN) < 4.0 * error).all()
    np.testing.assert_allclose(samples.std(axis=0), GAUSSIAN.std(axis=0), rtol=0.15)


def test_the_history_states_what_was_shipped(gaussian):
    _, history = gaussian
    assert history.train.shape == history.validation.shape == history.epoch.shape
    assert history.best_epoch == history.epoch[np.argmin(history.validation)]
    assert history.validation[-1] < history.validation[0]
    assert abs(history.final - history.validation.min()) < 3 * history.final_stderr


@pytest.mark.slow
def test_the_same_key_gives_the_same_fit_and_another_another(quick):
    fits = [ir.fit(jax.random.key(seed), SMALL, GAUSSIAN, **QUICK) for seed in (0, 1)]
    first, again, other = (jax.tree.leaves(fitted.flow) for fitted, _ in (quick, *fits))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.slow
def test_a_step_is_compiled_once_however_many_epochs():
    counts = []
    for epochs in (1, 6):
        Counting.traced.clear()
        ir.fit(KEY, SMALL, GAUSSIAN[:301], **(QUICK | {"max_epochs": epochs}), estimator=Counting())
        counts.append(list(Counting.traced))
    assert counts[0] == counts[1] and {shape[0] for shape in counts[0]} == {128}


def test_training_ends_when_validation_no_longer_improves():
    """At a rate of 0 nothing does, where kernels do not depend on power iterations."""
    model = ir.nn.VectorFlow(dim=2, depth=1, features=(8,), coeff=None)
    still = {"optimizer": optax.sgd(0.0), "ema_decay": 0.0, "max_epochs": 100}
    _, history = ir.fit(KEY, model, GAUSSIAN, patience=2, progress=False, **still)
    assert history.stopped_early and history.best_epoch == history.epoch[0]
    assert len(history.epoch) == 3


@pytest.mark.slow
def test_any_optimizer_of_optax_trains():
    optimizer = optax.chain(optax.clip(1.0), optax.lion(1e-2))
    _, history = ir.fit(KEY, SMALL, GAUSSIAN, **QUICK, optimizer=optimizer)
    assert history.validation[-1] < history.validation[0]


@pytest.mark.slow
def test_weights_count_rows():
    """Two clusters, one of weight 0: the fit is to the other one alone."""
    x = np.concatenate([GAUSSIAN, GAUSSIAN + np.array([5e3, 0.0])])
    weights = np.repeat([1.0, 0.0], len(GAUSSIAN))
    fitted, _ = ir.fit(KEY, SMALL, x, sample_weight=weights, **(QUICK | {"max_epochs": 10}))
    samples, _ = fitted.sample(KEY, 300)
    assert abs(np.median(samples[:, 0]) - MEAN[0]) < 30.0


def test_a_row_of_weight_0_is_as_if_it_were_not_there(quick):
    """Even one that no other weight would leave finite; and no scale of the weights matters."""
    x = np.concatenate([GAUSSIAN, [[3e37, -3e37]]])
    weights = np.append(np.full(len(GAUSSIAN), 1e308), 0.0)
    weighted = ir.fit(KEY, SMALL, x, sample_weight=weights, **QUICK)
    assert weighted[1].final == quick[1].final
    pairs = zip(*(jax.tree.leaves(fitted.flow) for fitted, _ in (weighted, quick)), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)


@pytest.mark.slow
def test_one_example_held_out_tells_no_standard_error():
    _, history = ir.fit(KEY, SMALL, GAUSSIAN[:12], **(QUICK | {"max_epochs": 1}))
    assert np.isfinite(history.final) and np.isnan(history.final_stderr)


@pytest.mark.parametrize(
    ("lipschitz", "kind", "continuation"),
    [(0.2, ir.Roulette, 0.7), (0.98, ir.Roulette, 0.98), (1.0, ir.Exact, 0), (np.nan, ir.Exact, 0)],
)
def test_the_final_estimator_has_a_finite_variance(lipschitz, kind, continuation):
    estimator = ir.fitting.final_estimator(lipschitz)
    assert type(estimator) is kind
    assert getattr(estimator, "continuation", 0) == continuation


@pytest.mark.slow
def test_without_bounds_log_determinants_are_exact():
    """A series may diverge there, as in these dimensions it would be used otherwise."""
    x = np.random.default_rng(6).normal(size=(70, 65))
    model = ir.nn.VectorFlow(dim=65, depth=1, features=(4,), coeff=None)
    fitted, history = ir.fit(KEY, model, x[:66], validation=x[66:], **(QUICK | {"max_epochs": 1}))
    losses = -np.asarray(fitted.log_prob(x[66:]))
    np.testing.assert_allclose(history.final, losses.mean(), rtol=1e-5)


def test_images_that_are_quantised_floats_warn():
    levels = np.random.default_rng(4).integers(6, 11, size=(64, 4, 4, 1))
    with pytest.warns(UserWarning, match="Pass their integer grey levels"):
        fitting_data(KEY, levels / 16.0, None, 0.1, 17, True)


@pytest.mark.slow
def test_validation_data_of_ones_own():
    own = MEAN + RNG.normal(size=(77, 2)) @ ROOT.T
    fitted, history = ir.fit(KEY, SMALL, GAUSSIAN, validation=own, **QUICK)
    losses = -np.asarray(fitted.flow.log_prob(own))
    np.testing.assert_allclose(history.final, losses.mean(), rtol=1e-5)
    np.testing.assert_allclose(history.final_stderr, losses.std(ddof=1) / np.sqrt(77), rtol=1e-4)


@pytest.mark.slow
def test_more_dimensions_train_by_a_roulette_and_are_validated_exactly():
    x = np.random.default_rng(5).normal(size=(120, 17)) @ np.diag(np.geomspace(1e-3, 1e3, 17))
    own = x[:50] + 0.01
    model = ir.nn.VectorFlow(dim=17, depth=1, features=(4,))
    fitted, history = ir.fit(KEY, model, x, validation=own, **QUICK)
    losses = -np.asarray(fitted.flow.log_prob(own, ir.Exact()))
    np.testing.assert_allclose(history.final, losses.mean(), rtol=1e-4)
    assert fitted.certificate.certified


@pytest.mark.slow
def test_heavy_tails_survive():
    """Cauchy columns, some values beyond 10⁶ scales: better than any Gaussian, and finite."""
    x = np.random.default_rng(2).standard_cauchy((1500, 2)) * 3.0 + 7.0
    x[0] = [2e7, -1e8]
    fitted, _ = ir.fit(KEY, SMALL, x, max_epochs=30, batch_size=128, progress=False)
    entropy = 2 * np.log(4 * np.pi * 3.0)
    losses = -np.asarray(fitted.flow.log_prob(x))
    assert np.isfinite(losses).all() and losses.mean() < entropy + 0.5
    assert fitted.certificate.certified
    back, _ = fitted.flow.inverse(fitted.flow.forward(x))
    np.testing.assert_allclose(back, x, rtol=1e-2, atol=1e-2)


@pytest.mark.slow
def test_one_dimension_integrates_to_one():
    x = np.random.default_rng(3).gamma(2.0, size=(500, 1)) * 40.0
    fitted, _ = ir.fit(KEY, ir.nn.VectorFlow(dim=1, depth=3, features=(8,)), x, **QUICK)
    grid = np.linspace(-800.0, 1200.0, 20_001, dtype=np.float32)
    density = np.exp(np.asarray(fitted.flow.log_prob(grid[:, None]), np.float64))
    np.testing.assert_allclose(np.trapezoid(density, grid), 1.0, atol=2e-3)


def test_images_of_grey_levels():
    levels = np.random.default_rng(4).integers(6, 11, size=(64, 4, 4, 1))
    model = ir.nn.ImageFlow(image_shape=(4, 4, 1), depths=(1,), features=4)
    more = {"max_epochs": 20, "progress": False}
    fitted, history = ir.fit(KEY, model, levels, num_levels=17, batch_size=32, **more)
    assert fitted.num_levels == 17 and fitted.certificate.certified
    images, _ = fitted.sample(KEY, 3)
    assert images.shape == (3, 4, 4, 1)
    assert history.validation[-1] < history.validation[0]


@pytest.mark.parametrize(
    ("shape", "kind", "scales"),
    [((3,), "VectorFlow", None), ((8, 8, 1), "ImageFlow", 3), ((7, 8, 1), "ImageFlow", 1)],
)
def test_the_default_model_fits_the_shape(shape, kind, scales):
    model = default_model(shape)
    assert type(model).__name__ == kind
    assert scales is None or len(model.depths) == scales
    variables = jax.eval_shape(model.init, KEY, jnp.zeros((2, *shape)))
    assert jax.eval_shape(model.flow, variables).event_shape == shape


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"validation": 1.5}, ValueError, r"\(0, 1\); got 1.5"),
        ({"batch_size": 0}, ValueError, "batch_size must be ≥ 1; got 0"),
        ({"max_epochs": 2.5}, TypeError, "max_epochs must be an integer"),
        ({"patience": 0}, ValueError, "patience must be ≥ 1; got 0"),
        ({"learning_rate": -1.0}, ValueError, "learning_rate must lie in"),
        ({"ema_decay": 1.0}, ValueError, r"ema_decay must lie in \[0, 1\); got 1.0"),
        ({"model": "VectorFlow"}, TypeError, "got str"),
        ({"model": ir.nn.VectorFlow(dim=3)}, ValueError, "built for data of shape"),
        ({"sample_weight": np.ones(3)}, ValueError, r"sample_weight must be \[600\]"),
        ({"validation": np.ones((5, 3))}, ValueError, "the 2 columns of the data; got 3"),
        ({"data": np.ones(5)}, ValueError, r"data\[:, None\]"),
        ({"data": np.ma.masked_less(GAUSSIAN, 0.0)}, ValueError, "data must not be masked"),
        (
            {"model": ir.nn.VectorFlow(dim=2, axis_name="i")},
            ValueError,
            "axis_name must be None; got 'i'",
        ),
        ({"key": 0}, TypeError, "A key must come from"),
        ({"key": jax.random.split(KEY)}, ValueError, r"fit takes one key; got \(2,\)"),
        ({"optimizer": 1e-3}, TypeError, "optimizer must be of optax"),
    ],
)
def test_what_cannot_be_is_refused_early(change, error, told):
    arguments = {"key": KEY, "model": SMALL, "data": GAUSSIAN, **QUICK, **change}
    with pytest.raises(error, match=told):
        ir.fit(**arguments)


def test_divergence_is_told():
    with pytest.raises(FloatingPointError, match="training diverged"):
        ir.fit(KEY, SMALL, GAUSSIAN, **QUICK, optimizer=optax.sgd(1e30))
