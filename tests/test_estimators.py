"""What estimators say of themselves, what they refuse; an estimator of one's own."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import build

from iresnet_jax import (
    BoundedSeries,
    Estimator,
    Exact,
    Roulette,
    TruncatedSeries,
    certify_branch,
    log_det_bounds,
    truncation_error_bound,
)
from iresnet_jax.certificates import BlockCertificate, BranchCertificate, Certificate

KEY = jax.random.key(0)
ESTIMATORS = [Exact(), TruncatedSeries(3), Roulette(0.6, lipschitz=0.5)]
named = pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: type(e).__name__)


def sine(x):
    return 0.5 * jnp.sin(x)


def test_estimators_describe_themselves_in_a_few_words():
    words = [estimator.describe() for estimator in ESTIMATORS]
    assert words == [
        "exact log-determinants",
        "3 terms",
        "roulette of 2 + 1.5 terms on average",
    ]


# Keys


@named
def test_an_estimator_needs_a_key_where_it_says_so(estimator):
    x = jnp.ones((2, 3))
    assert estimator.needs_key == (not isinstance(estimator, Exact))
    if estimator.needs_key:
        with pytest.raises(ValueError, match=f"{type(estimator).__name__} draws: pass a key"):
            estimator(sine, x)
    else:
        np.testing.assert_array_equal(estimator(sine, x)[1], estimator(sine, x, KEY)[1])


# Bias


@pytest.mark.parametrize("lipschitz", [0.0, 0.5, 0.9, 1.0, 2.0])
def test_the_bias_of_a_series_is_that_of_its_bound(lipschitz):
    bound = TruncatedSeries(4, 3).bias_bound(lipschitz, 6)
    assert isinstance(bound, float) and bound == float(truncation_error_bound(lipschitz, 6, 4))
    assert Exact().bias_bound(lipschitz, 6) == Roulette(0.6, lipschitz=0.5).bias_bound(0.5, 6) == 0


def test_a_network_sums_the_bias_of_all_branches():
    """Of a block with two branches, both; within the bounds on either log-determinant."""
    branches = [BranchCertificate(lipschitz, 6, ()) for lipschitz in (0.2, 0.5, 0.9)]
    pair = BlockCertificate("pair", tuple(branches[:2]), 1.0, 1.0)
    certificate = Certificate((pair, BlockCertificate("one", (branches[2],), 1.0, 1.0)))
    expected = sum(float(truncation_error_bound(b.lipschitz, 6, 4)) for b in branches)
    bound = certificate.bias_bound(TruncatedSeries(4))
    assert expected <= bound <= expected * (1 + 1e-9)
    assert certificate.bias_bound(Exact()) == 0.0
    assert certificate.bias_bound(TruncatedSeries(200)) < -float(log_det_bounds(0.9, 6)[0])


def test_a_branch_without_a_bound_leaves_the_bias_unbounded():
    branch = certify_branch(jnp.tanh, "it", (3,))
    certificate = Certificate((BlockCertificate("it", (branch,), 1.0, math.inf, branch.problem),))
    assert certificate.bias_bound(TruncatedSeries(4)) == math.inf


# Refusals


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda value: TruncatedSeries(value), "num_terms"),
        (lambda value: TruncatedSeries(2, value), "num_probes"),
        (lambda value: Roulette(0.5, lipschitz=0.5, min_terms=value), "min_terms"),
        (lambda value: Roulette(0.5, lipschitz=0.5, num_probes=value), "num_probes"),
    ],
    ids=["terms", "probes", "fewest terms", "probes of a roulette"],
)
def test_counts_out_of_range_are_refused(make, name):
    for value in (0, -2):
        with pytest.raises(ValueError, match=f"{name} must be ≥ 1; got {value}"):
            make(value)
    for value in (2.5, "3", None):
        with pytest.raises(TypeError, match=f"{name} must be an integer ≥ 1; got {value!r}"):
            make(value)
    make(np.int64(3))


@pytest.mark.parametrize(
    "settings", [{"num_terms": 2}, {"continuation": 0.5, "lipschitz": 0.5}], ids=str
)
@pytest.mark.parametrize("probe", ["uniform", None, 1])
def test_unknown_probes_are_refused_with_those_there_are(settings, probe):
    estimator = TruncatedSeries if "num_terms" in settings else Roulette
    with pytest.raises(ValueError, match=f'"rademacher" or "gaussian"; got {probe!r}'):
        estimator(**settings, probe=probe)


def test_a_roulette_is_told_a_lipschitz_constant_or_that_there_is_none():
    with pytest.raises(TypeError, match="lipschitz"):
        Roulette(0.5)


# As many terms as each block's bound needs


@pytest.mark.parametrize("lipschitz", [0.0, 0.3, 0.7, 0.9, 0.97])
@pytest.mark.parametrize("bias", [1e-4, 1e-2])
def test_a_bounded_series_takes_the_fewest_terms_that_meet_its_bias(lipschitz, bias):
    series = BoundedSeries(bias)
    n = int(jax.jit(series.num_terms, static_argnums=1)(lipschitz, 10))
    bounds = [float(truncation_error_bound(lipschitz, 10, k)) for k in range(1, n + 1)]
    assert bounds[-1] <= bias and all(bound > bias for bound in bounds[:-1])
    assert series.bias_bound(lipschitz, 10) == bias


@pytest.mark.parametrize(("lipschitz", "terms"), [(0.9, 7), (1.0, 7), (np.nan, 7), (0.1, 3)])
def test_a_bounded_series_stops_at_its_most_terms_and_states_their_bias(lipschitz, terms):
    series = BoundedSeries(1e-3, max_terms=7)
    assert int(series.num_terms(lipschitz, 10)) == terms
    bound = float(truncation_error_bound(lipschitz, 10, terms))
    np.testing.assert_equal(series.bias_bound(lipschitz, 10), np.maximum(bound, 1e-3))


def test_a_bounded_series_is_the_truncated_one_of_so_many_terms():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)), jnp.float32)
    series, lip = BoundedSeries(1e-3, num_probes=2), jnp.float32(0.5)
    same = TruncatedSeries(int(series.num_terms(lip, 3)), num_probes=2)

    def total(slope, estimator, lipschitz=None):
        out, log_det = estimator(lambda x: slope * jnp.sin(x), x, KEY, lipschitz)
        return jnp.sum(log_det) + jnp.sum(out**2)

    found = jax.jit(jax.value_and_grad(partial(total, estimator=series)))(0.5, lipschitz=lip)
    expected = jax.jit(jax.value_and_grad(partial(total, estimator=same)))(0.5)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_bounded_series_reads_the_bounds_of_the_flows_blocks():
    x = jnp.ones((2, 3))
    with pytest.raises(ValueError, match=r"attach .* flow\.with_bounds\(\)"):
        BoundedSeries(1e-3)(sine, x, KEY)
    built = build("vector")
    with pytest.raises(ValueError, match=r"attach .* flow\.with_bounds\(\)"):
        built.flow.log_prob(built.x, BoundedSeries(1e-3), key=KEY)
    flow = built.flow.with_bounds()
    found = flow.log_prob(jnp.repeat(built.x[:1], 500, axis=0), BoundedSeries(1e-6), key=KEY)
    noise = float(jnp.std(found)) / math.sqrt(500)
    assert 0.0 < noise < 0.1
    assert float(jnp.mean(found)) == pytest.approx(float(flow.log_prob(built.x)[0]), abs=4 * noise)


@pytest.mark.parametrize("bias", [0.0, -1.0, np.nan, np.inf])
def test_a_bias_that_is_none_is_refused(bias):
    with pytest.raises(ValueError, match=r"bias must lie in \(0, inf\), in nats; got"):
        BoundedSeries(bias)


# An estimator of one's own


def test_an_estimator_of_ones_own_is_a_dataclass():
    """One that takes log|det(I + J)| ≈ tr J by the diagonal alone."""

    @dataclasses.dataclass(frozen=True)
    class FirstOrder(Estimator):
        scale: float = 1.0
        needs_key = False

        def __call__(self, branch, x, key=None, lipschitz=None):
            out, slope = jax.jvp(branch, (x,), (jnp.ones_like(x),))  # of elementwise branches
            return out, self.scale * jnp.sum(slope, axis=1)

        def describe(self):
            return "the first term"

    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3)), jnp.float32)
    _, found = jax.jit(lambda x, estimator: estimator(sine, x))(x, FirstOrder())
    np.testing.assert_allclose(found, TruncatedSeries(1)(sine, x, KEY)[1], rtol=1e-6)
    assert FirstOrder().bias_bound(0.5, 3) == 0.0


def test_an_estimator_says_how_and_what_it_computes():
    with pytest.raises(TypeError, match="abstract"):
        Estimator()
