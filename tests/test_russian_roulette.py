"""Russian roulette against the Exact log-determinant: mean, gradient, lengths, variance."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import build, quick_jit
from helpers import contraction, matrix_with_eigenvalues, rest_slow, trace_series

from iresnet_jax import Exact, Roulette
from iresnet_jax.russian_roulette import _survives

X64 = pytest.mark.usefixtures("x64")
STRICT = pytest.mark.usefixtures("no_rank_promotion")
KEY = jax.random.key(0)


def draw(seed, shape, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def standard_error(values):
    return values.std(axis=0, ddof=1) / math.sqrt(len(values))


# The value


@STRICT
@pytest.mark.parametrize("probe", rest_slow(["rademacher", "gaussian"], "rademacher"))
def test_the_mean_is_the_log_determinant(probe):
    """Where the terms that are always taken are far from it, and J is not symmetric."""
    matrix, samples = matrix_with_eigenvalues(3, [-0.8, -0.5, 0.3, 0.8]), 40_000
    matrix = matrix @ np.diag([1.0, -1.0, 1.0, 1.0])
    truth = np.linalg.slogdet(np.eye(4) + matrix)[1]
    estimate = quick_jit(Roulette(0.8, lipschitz=0.81, min_terms=1, probe=probe), static_argnums=0)
    transposed = jnp.asarray(matrix.T, jnp.float32)
    out, values = estimate(lambda x: x @ transposed, jnp.ones((samples, 4)), KEY)
    np.testing.assert_allclose(out[0], matrix.sum(1), rtol=1e-5)
    error = standard_error(np.asarray(values, np.float64))
    assert abs(float(np.mean(values)) - truth) < 4.0 * error
    assert abs(float(trace_series(matrix, 1)) - truth) > 10.0 * error  # a bias would be seen


@pytest.mark.parametrize(
    ("name", "shape"),
    [("vector", (3,)), pytest.param("image", (2, 2, 12), marks=pytest.mark.slow)],
)
def test_a_branch_of_a_model_has_the_mean_of_exact(name, shape):
    (_, block), samples = next(build(name).flow.blocks()).links, 4000
    x = draw(0, (1, *shape))
    lipschitz = block.branch.lipschitz_bound()
    estimator = Roulette(lipschitz, lipschitz=lipschitz, min_terms=1)
    many = jnp.repeat(x, samples, axis=0)
    values = np.asarray(quick_jit(estimator)(block.branch, many, KEY)[1], np.float64)
    _, truth = quick_jit(Exact())(block.branch, x)
    error = standard_error(values)
    assert 0.0 < error < 0.05
    assert abs(values.mean() - float(truth[0])) < 4.0 * error


def one_dimensional(slope):
    """Any ±1 probe is Exact on g(x) = slope·x: the value tells the length N."""
    return lambda x: slope * x


def value_of_length(slope, continuation, min_terms, length):
    k = np.arange(1, length + 1)
    weights = continuation ** -np.maximum(k - min_terms, 0.0)
    return np.sum((-1.0) ** (k + 1) / k * slope**k * weights)


@X64
@STRICT
@pytest.mark.parametrize("of_samples", rest_slow([False, True], True))
def test_a_batch_shares_a_length_where_it_is_asked_to(of_samples):
    """Then all of its values are of one length, of the same law, and without bias."""
    slope, batches, q, m = 0.7, 8000, 0.7, 2
    estimator = Roulette(q, lipschitz=slope, min_terms=m, shared_length=True)

    def values(key):
        key = jax.random.split(key, 3) if of_samples else key
        return estimator(one_dimensional(slope), jnp.zeros((3, 1), jnp.float64), key)[1]

    found = np.asarray(jax.jit(jax.vmap(values))(jax.random.split(KEY, batches)))
    np.testing.assert_array_equal(found, found[:, :1].repeat(3, 1))
    lengths = m + np.arange(3)
    by_length = [value_of_length(slope, q, m, n) for n in lengths]
    shares = np.isclose(found[:, :1], by_length, rtol=1e-12).mean(0)
    np.testing.assert_allclose(shares, (1 - q) * q ** np.arange(3), atol=4 * 0.5 / batches**0.5)
    assert abs(found[:, 0].mean() - np.log1p(slope)) < 4 * standard_error(found[:, 0])


@X64
@STRICT
@pytest.mark.parametrize(("continuation", "min_terms"), [(0.5, 1), (0.8, 3)])
def test_lengths_are_geometric_and_terms_weighted_by_their_probability(continuation, min_terms):
    slope, samples = 0.7, 20_000
    estimator = Roulette(continuation, lipschitz=slope, min_terms=min_terms)
    x = jnp.zeros((samples, 1), jnp.float64)
    values = np.asarray(quick_jit(estimator, static_argnums=0)(one_dimensional(slope), x, KEY)[1])
    lengths = min_terms + np.arange(200)
    by_length = [value_of_length(slope, continuation, min_terms, n) for n in lengths]
    nearest = np.abs(values[:, None] - np.asarray(by_length)).argmin(1)
    np.testing.assert_allclose(values, np.asarray(by_length)[nearest], rtol=1e-9)
    for j in range(6):
        expected = (1.0 - continuation) * continuation**j
        deviation = math.sqrt(expected * (1.0 - expected) / samples)
        assert abs(np.mean(nearest == j) - expected) < 4.0 * deviation


@X64
def test_the_variance_is_finite_above_the_square_of_the_lipschitz_constant():
    """It is the sum over lengths, which settles for q > L² and grows without end for q < L²."""

    def second_moment(slope, q, longest):
        lengths = np.arange(1, longest + 1)
        values = np.array([value_of_length(-slope, q, 1, n) for n in lengths])
        return np.sum((1 - q) * q ** (lengths - 1.0) * values**2)

    slope, samples = 0.8, 40_000
    assert second_moment(slope, 0.5, 200) > 10.0 * second_moment(slope, 0.5, 100)
    expected = second_moment(slope, 0.8, 400)
    np.testing.assert_allclose(second_moment(slope, 0.8, 200), expected, rtol=1e-9)
    estimator = Roulette(0.8, lipschitz=slope, min_terms=1)
    x = jnp.zeros((samples, 1), jnp.float64)
    squares = quick_jit(estimator, static_argnums=0)(one_dimensional(-slope), x, KEY)[1] ** 2
    assert abs(float(squares.mean()) - expected) < 4.0 * standard_error(np.asarray(squares))


@STRICT
@pytest.mark.slow
def test_more_probes_average():
    branch, x = contraction(0, 4, 0.8), jnp.zeros((8000, 4))
    one, four = (
        float(quick_jit(Roulette(0.8, lipschitz=0.8, num_probes=n))(branch, x, KEY)[1].var())
        for n in (1, 4)
    )
    np.testing.assert_allclose(one / four, 4.0, rtol=0.15)


# The gradient


@X64
@STRICT
def test_the_mean_gradient_is_that_of_the_log_determinant():
    """By component within four standard errors, of parameters and of the input."""
    branch, x = contraction(0, 3, 0.8, np.float64), draw(1, (1, 3), np.float64)
    estimator = Roulette(0.75, lipschitz=0.8, min_terms=1)
    chunks, size = 200, 100

    def loss(branch, x, keys):
        return jnp.mean(estimator(branch, jnp.repeat(x, size, axis=0), keys)[1])

    @quick_jit
    def gradients(branch, x):
        keys = jax.random.split(KEY, (chunks, size))
        ours = jax.lax.map(lambda k: jax.grad(loss, (0, 1))(branch, x, k), keys)
        return ours, jax.grad(lambda b, x: Exact()(b, x)[1][0], (0, 1))(branch, x)

    ours, theirs = gradients(branch, x)
    for estimate, truth in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        error = standard_error(np.asarray(estimate))
        assert (np.abs(estimate.mean(0) - truth) < 4.0 * error).all()
        assert (error < 0.05 * np.abs(truth).max()).all()


@pytest.mark.slow
@X64
def test_the_gradient_passes_through_a_scan_over_blocks_and_a_checkpoint():
    """One dimension: each sample's length is known, and so is its gradient."""
    estimator = Roulette(0.6, lipschitz=0.7, min_terms=2)
    slopes, x = jnp.asarray([0.5, -0.7]), jnp.full((4, 1), 0.3)

    def block(total, slope):
        return total + jnp.sum(estimator(lambda x: slope * x, x, KEY)[1]), None

    def loss(slopes, step):
        return jax.lax.scan(step, 0.0, slopes)[0]

    def unrolled(slopes):
        return sum(block(0.0, slope)[0] for slope in slopes)

    expected = jax.value_and_grad(unrolled)(slopes)
    for step in (block, jax.checkpoint(block)):
        ours = quick_jit(jax.value_and_grad(lambda s, step=step: loss(s, step)))(slopes)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), ours, expected)


# Keys


@STRICT
def test_a_samples_probe_and_length_depend_on_its_key_alone():
    branch, x = contraction(0, 4, 0.9), draw(1, (6, 4))
    keys = jax.random.split(KEY, 6)
    estimate = quick_jit(Roulette(0.9, lipschitz=0.9, num_probes=2))
    _, together = estimate(branch, x, keys)
    assert len(set(np.asarray(together).round(4).tolist())) == 6
    for i in range(6):
        _, alone = estimate(branch, x[i : i + 1], keys[i : i + 1])
        np.testing.assert_allclose(alone[0], together[i], rtol=1e-5)
    _, reordered = estimate(branch, x[::-1], keys[::-1])
    np.testing.assert_allclose(reordered[::-1], together, rtol=1e-5)


def test_a_sample_that_has_stopped_is_not_touched_by_what_overflows_later():
    """Of an expansive branch, whose power leaves float32 at the seventh term."""
    x, steep, q = jnp.ones((200, 1)), 1e6, 0.9

    @quick_jit
    def values_and_slopes(slopes):
        estimator = Roulette(q, lipschitz=None, min_terms=1)
        total, vjp = jax.vjp(lambda s: estimator(lambda x: s * x, x, KEY)[1], slopes)
        return total, vjp(jnp.ones_like(total))[0][:, 0]

    told = np.asarray(values_and_slopes(0.5 * x)[0])  # the value tells the length
    values, slopes = map(np.asarray, values_and_slopes(steep * x))
    for length in range(1, 6):
        own = np.isclose(told, value_of_length(0.5, q, 1, length), rtol=1e-6)
        assert own.any()
        np.testing.assert_allclose(values[own], value_of_length(steep, q, 1, length), rtol=1e-5)
        expected = sum((-steep / q) ** k for k in range(length))
        np.testing.assert_allclose(slopes[own], expected, rtol=1e-5)
    assert not np.isfinite(values).all()  # the longest do overflow


def test_half_precision_stops_as_often_as_it_weighs():
    """With probability 1 − q at each term, which bfloat16 cannot tell from 0 at q = 0.999."""
    keys = jax.random.split(KEY, 20_000)
    like = jnp.zeros((), jnp.bfloat16)
    goes_on = _survives(keys, jnp.int32(1), 0.999, like)
    stops = len(keys) - int(goes_on.sum())
    assert abs(stops - 20) < 4 * math.sqrt(20)


def test_values_that_are_not_finite_do_not_keep_the_loop_running():
    estimator = Roulette(0.5, lipschitz=0.5)
    _, values = estimator(lambda x: 0.5 * x, jnp.asarray([[jnp.nan], [1.0]]), KEY)
    assert np.isfinite(values[1])


# Refusals


@pytest.mark.parametrize(
    ("continuation", "settings", "message"),
    [
        (0.81, {"lipschitz": 0.9}, r"exceed.*0\.9² = 0\.81; got 0\.81"),
        (0.5, {"lipschitz": 0.75}, r"0\.75² = 0\.5625; got 0\.5: the variance could be infinite"),
        (0.99, {"lipschitz": 1.0}, r"1² = 1; got 0\.99"),
        (0.5, {"lipschitz": math.nan}, r"nan² = nan; got 0\.5"),
        (0.0, {"lipschitz": None}, r"continuation must lie in \(0, 0\.9999\]; got 0\.0"),
        (1.0, {"lipschitz": 0.5}, r"continuation must lie in \(0, 0\.9999\]; got 1\.0"),
        (math.nan, {"lipschitz": None}, r"continuation must lie in \(0, 0\.9999\]; got nan"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(continuation, settings, message):
    with pytest.raises(ValueError, match=message):
        Roulette(continuation, **settings)
