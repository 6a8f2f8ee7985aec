"""Fits of p(y | x): what they promise, against densities that are known."""

import jax
import numpy as np
import pytest

import iresnet_jax as ir
from iresnet_jax.fitting_data import fitting_data

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
#: y = a + s·x + noise in odd units, x of two columns, one of which does not matter.
X = RNG.normal(size=(500, 2)) * [40.0, 2e-3] + [1800.0, -5.0]
NOISE = 3e-3
Y = 7.0 + 2.5e-4 * (X[:, :1] - 1800.0) + NOISE * RNG.normal(size=(500, 1))
SMALL = ir.nn.ConditionalVectorFlow(
    dim=1, depth=2, features=(8,), condition_dim=2, context_features=(8,)
)
LABELS = RNG.integers(0, 3, size=400)
CENTRES = np.array([-30.0, 0.0, 50.0])
OF_CLASSES = CENTRES[LABELS, None] + 2.0 * RNG.normal(size=(400, 1))
CLASSES = ir.nn.ConditionalVectorFlow(dim=1, depth=2, features=(8,), num_classes=3)
QUICK = {"max_epochs": 3, "batch_size": 128, "progress": False}


@pytest.fixture(scope="module")
def regression():
    return ir.fit(KEY, SMALL, Y, condition=X, max_epochs=80, batch_size=128, progress=False)


@pytest.fixture(scope="module")
def classes():
    longer = {"max_epochs": 150, "learning_rate": 2e-2, "batch_size": 128, "progress": False}
    return ir.fit(KEY, CLASSES, OF_CLASSES, condition=LABELS, **longer)


def test_the_density_at_a_condition_is_that_of_the_users_units(regression):
    """Held against the true one, on fresh data: the Kullback–Leibler divergence is small."""
    fitted, _ = regression
    rng = np.random.default_rng(1)
    x = rng.normal(size=(1000, 2)) * [40.0, 2e-3] + [1800.0, -5.0]
    noise = rng.normal(size=(1000, 1))
    y = 7.0 + 2.5e-4 * (x[:, :1] - 1800.0) + NOISE * noise
    true = -0.5 * noise[:, 0] ** 2 - 0.5 * np.log(2 * np.pi) - np.log(NOISE)
    divergence = np.mean(true - np.asarray(jax.jit(fitted.flow.log_prob)(y, x)))
    assert -0.02 < divergence < 0.15


def test_bits_are_nats_over_log_2_and_dimensions(regression):
    fitted, _ = regression
    nats = np.asarray(fitted.log_prob(Y[:5], X[:5]))
    bits = fitted.bits_per_dim(Y[:5], X[:5])
    np.testing.assert_allclose(bits, -nats / np.log(2) / Y.shape[1], rtol=1e-6)


def test_one_certificate_holds_at_every_condition(regression):
    fitted, _ = regression
    assert isinstance(fitted, ir.FittedConditional) and fitted.certificate.certified
    for x in (X[0], X[0] + 1e4):
        np.testing.assert_allclose(
            fitted.given(x).certify().lipschitz, fitted.certificate.lipschitz, rtol=1e-9
        )


def test_samples_follow_their_condition(regression):
    """Their means are those of the line, within the error of the fit and of 500 draws."""
    fitted, _ = regression
    samples, info = fitted.sample(jax.random.key(1), 500, X[:3])
    assert samples.shape == (500, 3, 1) and bool(info.converged.all())
    expected = 7.0 + 2.5e-4 * (X[:3, 0] - 1800.0)
    np.testing.assert_allclose(samples.mean(axis=(0, 2)), expected, atol=0.5 * NOISE)
    alone, _ = fitted.sample(jax.random.key(2), 500, X[0])
    np.testing.assert_allclose(alone.std(), NOISE, rtol=0.25)


@pytest.mark.slow
def test_what_is_validated_is_what_is_shipped(regression):
    """`history.final` is the loss of the returned network, in the units of the data."""
    fitted, history = ir.fit(KEY, SMALL, Y[:400], condition=X[:400], **QUICK, validation=(Y, X))
    losses = -np.asarray(fitted.log_prob(Y, X))
    np.testing.assert_allclose(history.final, losses.mean(), rtol=1e-4)
    assert history.ended_by == "max_epochs" and not history.stopped_early


@pytest.mark.slow
def test_units_of_the_condition_do_not_matter():
    """They are brought to one scale, by powers of two without rounding: the same fit."""
    first, second = (
        ir.fit(KEY, SMALL, Y, condition=scale * X, **QUICK)[1].final for scale in (1.0, 2.0**20)
    )
    np.testing.assert_allclose(first, second, rtol=1e-4)


def test_a_class_is_a_condition(classes):
    fitted, _ = classes
    samples, _ = fitted.sample(KEY, 300, np.arange(3))
    np.testing.assert_allclose(np.median(samples[..., 0], axis=0), CENTRES, atol=1.5)
    assert fitted.certificate.certified and not fitted.condition_entrance


def test_every_class_has_a_density(classes):
    grid = np.linspace(-150.0, 150.0, 6_001, dtype=np.float32)
    for label in range(3):
        p = np.exp(np.asarray(classes[0].log_prob(grid[:, None], label), np.float64))
        np.testing.assert_allclose(np.trapezoid(p, grid), 1.0, atol=2e-3)


@pytest.mark.slow
def test_weights_count_rows_and_their_conditions():
    """Rows of weight 0 are as if they were not there, at whatever condition."""
    y, x = np.concatenate([Y, Y + 1.0]), np.concatenate([X, X])
    weights = np.repeat([1.0, 0.0], len(Y))
    weighted = ir.fit(KEY, SMALL, y, condition=x, sample_weight=weights, **QUICK)[1]
    plain = ir.fit(KEY, SMALL, Y, condition=X, **QUICK)[1]
    assert weighted.final == plain.final


def test_conditions_stay_beside_their_rows():
    """Through weights, split and order: each row's condition is a function of the row."""
    y = np.arange(50.0)[:, None] ** 1.5
    weights = np.r_[np.zeros(5), np.ones(45)]
    data = fitting_data(KEY, y, weights, 0.2, 256, True, condition=2.0 * y + 1.0)
    for part, count in ((data.train, 36), (data.validation, 9)):
        assert len(part.x) == count
        np.testing.assert_allclose(part.condition, 2.0 * part.x + 1.0, rtol=1e-6)
    (norm,) = data.condition_entrance
    standard = np.asarray(norm.forward(np.asarray(data.train.condition)))
    np.testing.assert_allclose([standard.mean(), standard.std()], [0.0, 1.0], atol=1e-5)


@pytest.mark.slow
def test_more_dimensions_train_by_a_roulette():
    """And are validated exactly; log-determinants see the shifts of each row."""
    x = np.random.default_rng(5).normal(size=(60, 1))
    y = x + np.random.default_rng(6).normal(size=(60, 17))
    model = ir.nn.ConditionalVectorFlow(dim=17, depth=1, features=(4,), condition_dim=1)
    fitted, history = ir.fit(KEY, model, y, condition=x, validation=(y, x), **QUICK)
    losses = -np.asarray(fitted.log_prob(y, x, ir.Exact()))
    np.testing.assert_allclose(history.final, losses.mean(), rtol=1e-4)


@pytest.fixture
def untrained(monkeypatch):
    """The models of fits, each of which ends by an InterruptedError before it initialises one."""
    chosen = []

    def stop(key, model, source):
        chosen.append(model)
        raise InterruptedError

    monkeypatch.setattr(ir.fitting, "_initial", stop)
    return chosen


@pytest.mark.parametrize(
    ("condition", "settings"),
    [(X, {"condition_dim": 2}), (RNG.permutation(np.arange(500) % 4), {"num_classes": 4})],
    ids=["vectors", "classes"],
)
def test_the_default_model_fits_the_condition(condition, settings, untrained):
    with pytest.raises(InterruptedError):
        ir.fit(KEY, None, Y, condition=condition, progress=False)
    (model,) = untrained
    assert isinstance(model, ir.nn.ConditionalVectorFlow) and model.dim == 1
    assert all(getattr(model, name) == value for name, value in settings.items())


def test_columns_of_a_condition_may_depend_on_one_another():
    """It needs no density."""
    twice = np.c_[X[:, :1], 2.0 * X[:, :1]]
    data = fitting_data(KEY, Y, None, 0.1, 256, True, condition=twice)
    assert data.train.condition.shape[1] == 2


def test_classes_without_a_row_warn(untrained):
    model = ir.nn.ConditionalVectorFlow(dim=1, depth=1, features=(4,), num_classes=5)
    warned = pytest.warns(UserWarning, match="No row that is trained on is of class 3, 4")
    with warned, pytest.raises(InterruptedError):
        ir.fit(KEY, model, OF_CLASSES, condition=LABELS, **(QUICK | {"max_epochs": 1}))


HOLES = np.where(np.arange(1000).reshape(500, 2) == 7, np.nan, X)


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"condition": X[:9]}, ValueError, "a row for each of the data's 500; got 9"),
        ({"condition": HOLES}, ValueError, "condition must be finite; columns 1 hold NaN .* row 3"),
        ({"condition": np.c_[X, np.ones(500)]}, ValueError, "2 of the condition are constant"),
        ({"condition": X + 1e9}, ValueError, "columns 0 of the condition.* vary too little"),
        ({"condition": X[:, 0]}, TypeError, r"is condition\[:, None\]"),
        ({"condition": X[:, 0] > 0}, TypeError, "integers; got an array of bool"),
        ({"condition": np.ma.masked_less(X, 0.0)}, ValueError, "must not be masked"),
        ({"condition": X[:, :1]}, ValueError, "of 1 columns; the model's condition_dim is 2"),
        ({"condition": np.zeros(500, int)}, ValueError, "num_classes is None"),
        ({"condition": None}, TypeError, "fitted with condition=; got none"),
        ({"model": ir.nn.VectorFlow(dim=1)}, TypeError, "of a ConditionalVectorFlow; got a Vec"),
        ({"model": CLASSES, "condition": np.arange(500) % 4}, ValueError, "num_classes is 3"),
        ({"model": None, "condition": np.arange(500) - 1}, ValueError, "condition has -1"),
        ({"model": None, "condition": np.arange(500) * 9}, ValueError, "got 4491 of 450 rows"),
        ({"validation": Y}, ValueError, r"a pair \(data, condition\); got ndarray"),
        ({"validation": (Y, X[:, :1])}, ValueError, r"vectors \[rows, 2\],.*got \(500, 1\)"),
        ({"validation": (Y, X[:3])}, ValueError, "validation's condition must have a row for each"),
        ({"data": np.zeros((9, 4, 4, 1))}, ValueError, "A condition is for tables"),
    ],
)
def test_conditions_that_cannot_be_are_refused_early(change, error, told):
    arguments = {"key": KEY, "model": SMALL, "data": Y, "condition": X, **QUICK, **change}
    with pytest.raises(error, match=told):
        ir.fit(**arguments)


def test_a_conditional_model_is_not_taken_for_a_plain_one():
    variables = jax.jit(CLASSES.init)(KEY, np.ones((2, 1), np.float32))
    with pytest.raises(TypeError, match=r"is FittedConditional\(model, variables\)"):
        ir.Fitted(CLASSES, variables)
    with pytest.raises(TypeError, match="which is Fitted"):
        ir.FittedConditional(ir.nn.VectorFlow(dim=1), variables)
    with pytest.raises(ValueError, match=r"num_levels is of images; .* got 256"):
        ir.FittedConditional(CLASSES, variables, num_levels=256)
    with pytest.raises(ValueError, match="Classes pass no condition_entrance"):
        ir.FittedConditional(CLASSES, variables, condition_entrance=(ir.Asinh((True,)),))
