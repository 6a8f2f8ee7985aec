"""Tables as they come: errors that name columns, scales, and the tails' transform."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import sample_jacobians

from iresnet_jax import Asinh, Chain, Error, Exact
from iresnet_jax.fitting_data import fitting_data
from iresnet_jax.tables import (
    Table,
    as_table,
    as_weights,
    check_table,
    location_and_scale,
    mean_and_stderr,
    standardizer,
)

RNG = np.random.default_rng(0)
GOOD = RNG.normal(size=(200, 3)) * [1.0, 1e4, 1e-4] + [0.0, 1e5, 0.0]


class Frame:
    """What a data frame shows of itself."""

    def __init__(self, values, columns):
        self.values, self.columns = values, columns

    def __array__(self, dtype=None, copy=None):
        return np.array(self.values, dtype)


def broken(column, value, row=7):
    out = GOOD.copy()
    out[row, column] = value
    return out


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (broken(1, np.nan), "columns 1 hold NaN or infinity, first nan in row 7, 1 rows"),
        (Frame(broken(2, np.inf), ["a", "b", "c"]), "columns 'c' hold NaN"),
        (np.zeros((0, 2)), r"must be \[rows, columns\]; got an array of \(0, 2\)"),
        (GOOD[:, 0], r"data\[:, None\]"),
        (GOOD[:9], "at least 10 rows of weight above 0; got 9"),
        (np.c_[GOOD, np.full(200, 3.3)], "columns 3 are constant"),
        (np.c_[GOOD, GOOD[:, 1]], "columns 1, 3 repeat one another"),
        (np.c_[GOOD, 5e-4 - 2.0 * GOOD[:, 2]], "columns 2, 3 repeat one another"),
        (np.c_[GOOD, GOOD[:, 0] + GOOD[:, 1] / 1e4], "columns 0, 1, 3 are linearly dependent"),
        (np.c_[GOOD, 1e12 + RNG.normal(size=200)], "columns 3 vary too little for float32, 3 by"),
        (np.c_[GOOD, 1e-35 * RNG.normal(size=200)], "columns 3 vary by .*e-3[56], which must lie"),
    ],
)
def test_what_has_no_density_is_named(data, told):
    with pytest.raises(ValueError, match=told):
        check_table(as_table(data))


def test_a_common_outlier_makes_no_duplicate():
    """Correlated up to rounding by one row, and independent otherwise."""
    x = RNG.normal(size=(200, 2))
    x[3] = 1e12
    assert np.corrcoef(x.T)[0, 1] > 1.0 - 1e-12
    check_table(as_table(x))


def test_what_is_no_number_is_refused():
    with pytest.raises(TypeError, match="data must be numbers; got an array of <U1"):
        as_table(np.array([["a"]]))


def test_few_values_warn():
    with pytest.warns(UserWarning, match="columns 3 repeat few values"):
        check_table(as_table(np.c_[GOOD, RNG.integers(0, 4, 200)]))


def test_a_value_of_many_rows_warns():
    """Zero-inflated: an atom, although there are many distinct values."""
    column = np.where(RNG.uniform(size=200) < 0.4, 0.0, RNG.normal(size=200))
    with pytest.warns(UserWarning, match="columns 3 repeat few values"):
        check_table(as_table(np.c_[GOOD, column]))


def test_frames_of_other_columns_do_not_validate():
    data, other = (Frame(GOOD, names) for names in (["a", "b", "c"], ["b", "a", "c"]))
    with pytest.raises(ValueError, match="in their order, 'a', 'b', 'c'; got 'b', 'a', 'c'"):
        fitting_data(jax.random.key(0), data, None, other, 256, True)


def test_the_standard_error_is_that_of_means_drawn_anew():
    """Over many draws of values and weights, its square is the variance of the mean."""
    weights = RNG.uniform(0.5, 1.5, 5)
    drawn = [mean_and_stderr(x, weights) for x in RNG.normal(size=(20_000, 5))]
    means, errors = np.asarray(drawn).T
    np.testing.assert_allclose(np.mean(errors**2), means.var(), rtol=0.05)
    _, error = mean_and_stderr(GOOD[:, 0], np.ones(200))
    np.testing.assert_allclose(error, GOOD[:, 0].std(ddof=1) / np.sqrt(200), rtol=1e-12)
    assert np.isnan(mean_and_stderr(GOOD[:1, 0], np.ones(1))[1])


@pytest.mark.parametrize("weights", [np.ones(3), -np.ones(4), np.zeros(4), np.full(4, np.nan)])
def test_weights_that_are_none_are_refused(weights):
    with pytest.raises(ValueError, match="sample_weight must be"):
        as_weights(weights, 4)


def test_integer_weights_are_repetitions():
    """Of mean, deviation, median and quartiles: as if rows were repeated."""
    weights = RNG.integers(0, 4, 200)
    repeated = np.repeat(GOOD, weights, axis=0)
    own = location_and_scale(GOOD, weights.astype(float))
    for a, b in zip(own, location_and_scale(repeated, np.ones(len(repeated))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
    names = tuple("abc")
    (norm,), (other,) = (
        standardizer(Table(x, names), w)
        for x, w in ((GOOD, weights.astype(float)), (repeated, np.ones(len(repeated))))
    )
    np.testing.assert_allclose(norm.log_scale, other.log_scale, rtol=1e-5)


def test_columns_are_brought_to_one_scale():
    (norm,) = standardizer(Table(GOOD, tuple("abc")), np.ones(200))
    y = np.asarray(norm.forward(jnp.asarray(GOOD, jnp.float32)))
    np.testing.assert_allclose(y.mean(axis=0), 0.0, atol=2e-5)
    np.testing.assert_allclose(y.std(axis=0), 1.0, rtol=1e-4)


def test_heavy_columns_alone_are_compressed():
    x = np.c_[GOOD, RNG.standard_cauchy(200)]
    norm, tails = standardizer(Table(x, tuple("abcd")), np.ones(200))
    assert tails.columns == (False, False, False, True)
    y = np.asarray(Chain((norm, tails)).forward(jnp.asarray(x, jnp.float32)))
    assert np.abs(y).max() < 20.0


def test_asinh_agrees_with_its_jacobian_and_its_inverse(x64):
    tails = Asinh((True, False, True))
    x = jnp.asarray(RNG.normal(size=(6, 3)) * 10.0 ** RNG.integers(-3, 6, (6, 3)))
    y, log_det = tails.forward_and_log_det(x, Exact())
    np.testing.assert_allclose(y[:, [0, 2]], np.arcsinh(np.asarray(x)[:, [0, 2]]), rtol=1e-13)
    jacobians = sample_jacobians(tails.forward, x)
    np.testing.assert_allclose(log_det, np.linalg.slogdet(jacobians)[1], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(tails.inverse(y)[0], x, rtol=1e-11)


def test_asinh_of_the_largest_numbers_is_finite():
    x = jnp.asarray([[3e38], [-3e38], [0.0]], jnp.float32)
    y, log_det = Asinh((True,)).forward_and_log_det(x, Exact())
    np.testing.assert_allclose(y[:, 0], np.arcsinh(np.asarray(x[:, 0], np.float64)), rtol=1e-6)
    np.testing.assert_allclose(log_det, -np.log(np.hypot(1.0, np.float64(x[:, 0]))), rtol=1e-6)
    slope = jax.grad(lambda x: Asinh((True,)).forward_and_log_det(x, Exact())[1].sum())(x)
    assert np.isfinite(slope).all()


def test_the_bound_on_the_error_of_asinh_holds_in_float32():
    """Against float64, from outputs that are off by as much as they say, in their worst entry."""
    y = RNG.normal(size=(200, 2)) * 10.0 ** RNG.uniform(-3, 1.2, (200, 1))
    off = RNG.normal(size=(200, 2)) * 10.0 ** RNG.uniform(-6, -1, (200, 1))
    computed = (y + off).astype(np.float32)
    size = np.linalg.norm(computed - y, axis=1)
    error = Error(*(jnp.asarray(1.000001 * v, jnp.float32) for v in (size, norms(computed))))
    tails = Asinh((True, False))
    bound = tails.inverse_error(error, None, (2,))
    exact = np.c_[np.sinh(y[:, 0]), y[:, 1]]
    back = np.asarray(tails.backward(jnp.asarray(computed)), np.float64)
    assert (np.linalg.norm(back - exact, axis=1) <= bound.bound).all()
    assert (norms(back) <= bound.norm).all()


def norms(x):
    return np.linalg.norm(np.asarray(x, np.float64), axis=1)


def test_the_certificate_of_asinh_is_its_steepest_slope():
    tails = Asinh((True, False)).certify("it", (2,))
    assert tails.certified and tails.forward == 1.0 and tails.inverse == np.inf
    assert Asinh((False,)).certify("it", (1,)).inverse == 1.0
