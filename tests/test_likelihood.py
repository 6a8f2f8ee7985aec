"""Likelihoods: number of terms, stopping rule, estimators that agree, importance weights."""

import dataclasses
import itertools
import math

import jax
import numpy as np
import pytest
from cases import build, quick_jit, residual_of
from helpers import rest_slow

import iresnet_jax as ir
from iresnet_jax import BoundedSeries, Exact, Roulette, truncation_error_bound
from train.configs import DENSITY
from train.data import Dataset, load_dataset
from train.density import Density, likelihood_rows
from train.estimators import (
    bias_bound,
    description,
    evaluation_estimator,
    terms_taken,
    training_bias_bound,
    training_estimator,
    validation_estimator,
)
from train.likelihood import (
    draw_stderr,
    draws_needed,
    evaluate_likelihood,
    importance_weighted_bits,
)

DIGITS = dataclasses.replace(DENSITY["digits"], dequantization="uniform")


def settings(**changes):
    return dataclasses.replace(DIGITS, **changes)


def proved(flow, *lipschitz):
    """The flow's certificate, with these bounds on its first branches instead of its own."""
    certificate = ir.certify(flow)
    pairs = itertools.zip_longest(certificate.branches, lipschitz)
    branches = [b if bound is None else b._replace(lipschitz=bound) for b, bound in pairs]
    blocks = zip(certificate.blocks, branches, strict=True)
    return dataclasses.replace(
        certificate, blocks=tuple(block._replace(branches=(own,)) for block, own in blocks)
    )


def likelihood(flow, examples, levels, certificate, **changes):
    """That of a task with these examples; ``levels`` None for points."""
    task = Density(settings(**changes), Dataset("own", *[examples] * 3, num_levels=levels))

    def bits(*draw):
        return task.bits({}, *draw)

    noisy = levels is not None
    return evaluate_likelihood(bits, flow, examples, task.config, certificate, noisy=noisy)


# The number of terms


def test_every_block_takes_the_fewest_terms_that_meet_its_share_of_the_bias():
    flow = build("image").flow
    certificate = proved(flow, 0.3, 0.9)
    for target in (1e-2, 1e-4):
        estimator = evaluation_estimator(settings(target_bias=target), certificate, flow.dim)
        terms = terms_taken(certificate, estimator)
        assert 0.999 * target < bias_bound(certificate, estimator, flow.dim) <= target
        share = target * flow.dim * math.log(2.0) / len(certificate.branches)
        for branch, n in zip(certificate.branches, terms, strict=True):
            assert truncation_error_bound(branch.lipschitz, branch.dim, n) <= share
            assert n == 1 or truncation_error_bound(branch.lipschitz, branch.dim, n - 1) > share
        assert 1 < 3 * terms[0] < terms[1] < 1000
        assert description(certificate, estimator) == f"{min(terms)} to {max(terms)} terms a block"


def test_a_branch_of_two_log_determinants_takes_two_shares_of_the_bias():
    flow = build("image").flow
    certificate = proved(flow, 0.3, 0.9)
    first, *others = certificate.blocks
    first = first._replace(branches=(first.branches[0]._replace(log_dets=2),))
    certificate = dataclasses.replace(certificate, blocks=(first, *others))
    estimator = evaluation_estimator(settings(target_bias=1e-3), certificate, flow.dim)
    assert estimator.bias == pytest.approx(1e-3 * flow.dim * math.log(2.0) / 4)
    assert 0.999e-3 < bias_bound(certificate, estimator, flow.dim) <= 1e-3


def test_the_bias_bound_holds_for_the_mean_of_the_series():
    """Against the exact log-determinant of every block, at few terms."""
    flow = build("image").flow
    certificate, images = proved(flow), integers((4, 4, 3), 40)
    exact, short = (
        likelihood(
            *(flow, images, 256, certificate),
            eval_estimator=name,
            target_bias=0.05,
            target_stderr=4e-3,
        )
        for name in ("exact", "series")
    )
    assert 0.04 < short.bias_bound <= 0.05
    noise = math.hypot(exact.stderr, short.stderr)
    assert abs(exact.bits_per_dim - short.bits_per_dim) <= short.bias_bound + 4.0 * noise


@pytest.mark.parametrize(
    ("largest", "bound", "told"),
    [
        (0.9999, 0.1, "a bias ≤ 0.001 needs more than 1000 terms"),
        (1.0, math.inf, "no bound on the bias is known"),
    ],
)
def test_terms_are_not_capped_silently(largest, bound, told):
    """The report keeps the bound of the terms that were taken, and the table names the target."""
    flow = build("vector").flow
    certificate = proved(flow, largest)
    estimator = evaluation_estimator(settings(target_bias=1e-4), certificate, flow.dim)
    assert max(terms_taken(certificate, estimator)) == 1000
    bias = bias_bound(certificate, estimator, flow.dim)
    assert bias >= bound
    missed = dict(likelihood_rows(report(bits_per_dim_bias_bound=bias)))
    assert missed["TARGET MISSED"].startswith(told)


def report(**changes):
    return {
        "bits_per_dim": 2.0,
        "bits_per_dim_stderr": 0.0015,
        "bits_per_dim_target_stderr": 0.002,
        "bits_per_dim_bias_bound": 0.000941,
        "bits_per_dim_target_bias": 0.001,
        "bits_per_dim_sampling_stderr": 0.01,
        "log_det_description": "77 terms",
        "likelihood_draws": 12,
    } | changes


def test_the_table_quotes_value_error_and_bias():
    rows = likelihood_rows(report())
    assert rows[0] == ("test bits/dim", "2.0000 ± 0.0015 (bias ≤ 0.00095)")
    assert rows[1] == ("estimated by", "12 draws, 77 terms")
    assert "TARGET MISSED" not in dict(rows)
    missed = dict(likelihood_rows(report(bits_per_dim_stderr=0.003)))
    assert missed["TARGET MISSED"].startswith("a standard error of 0.002 needs more than 12 draws")


# The standard error, and when drawing stops


def test_the_standard_error_is_that_of_the_mean_over_draws():
    rng = np.random.default_rng(0)
    scales = np.linspace(0.1, 1.0, 20)
    errors = [draw_stderr(scales * rng.normal(size=(5, 20))) for _ in range(400)]
    truth = math.sqrt((scales**2).sum() / 5) / 20
    assert np.mean(np.square(errors)) == pytest.approx(truth**2, rel=0.05)
    assert draw_stderr(np.ones((1, 20))) == math.inf
    assert draw_stderr(np.ones((3, 20))) == 0.0


@pytest.mark.parametrize(("examples", "least"), [(1, 101), (30, 5), (100, 2), (5000, 2)])
def test_few_examples_take_more_draws_before_their_standard_error_is_believed(examples, least):
    assert draws_needed(np.zeros((0, examples)), 1.0) == least
    assert draws_needed(np.zeros((least, examples)), 1.0) == least


def test_the_draws_needed_follow_the_variance():
    rng = np.random.default_rng(0)
    bits = rng.normal(size=(4, 10_000))  # a standard error of 1/200
    assert draws_needed(bits, 1 / 100) == 2
    assert draws_needed(bits, 1 / 400) == pytest.approx(16, abs=1)
    assert draws_needed(np.full((2, 300), np.nan), 0.1) == 2


@pytest.mark.slow
@pytest.mark.parametrize("examples", [1, 10, 300])
def test_stopping_at_the_target_leaves_the_standard_error_honest(examples):
    """(value − truth)/stderr at the stop has variance 1; too eager a rule has far more."""
    rng = np.random.default_rng(examples)
    runs, limit = 2000, 400 // examples + 20
    target = 1.0 / math.sqrt(1.3 * examples * max(2, 1 + math.ceil(100 / examples)))
    noise = rng.exponential(size=(runs, limit, examples)) - 1.0  # skewed

    def scores(rule):
        return np.array([score(bits, rule) for bits in noise])

    def score(bits, rule):
        m = rule(bits[:0])
        while m < min(rule(bits[:m]), limit):
            m += 1
        return bits[:m].mean() / draw_stderr(bits[:m])

    def eager(bits):
        enough = len(bits) >= 2 and draw_stderr(bits) <= target
        return len(bits) if enough else max(2, len(bits) + 1)

    ours = scores(lambda bits: draws_needed(bits, target))
    assert np.mean(ours**2) == pytest.approx(1.0, abs=0.2)
    assert abs(ours.mean()) < 0.2
    if examples == 1:
        assert np.mean(scores(eager) ** 2) > 2.0


# Estimators


def integers(shape, count, levels=256, seed=0):
    return np.random.default_rng(seed).integers(0, levels, (count, *shape)).astype(np.uint8)


@pytest.mark.slow
def test_series_roulette_and_exact_agree_within_their_errors():
    flow = build("image-logit").flow
    images, certificate = integers((2, 4, 2), 100), proved(flow)
    results = {
        name: likelihood(
            *(flow, images, 256, certificate),
            eval_estimator=name,
            target_bias=1e-5,
            target_stderr=0.01,
        )
        for name in ("series", "roulette", "exact")
    }
    for name, result in results.items():
        kinds = {"series": BoundedSeries, "roulette": Roulette, "exact": Exact}
        assert isinstance(result.estimator, kinds[name])
        assert 0.0 < result.stderr <= 0.01
        noise = math.hypot(result.stderr, results["exact"].stderr)
        bias = result.bias_bound
        assert abs(result.bits_per_dim - results["exact"].bits_per_dim) <= bias + 4.0 * noise
    assert results["series"].bias_bound > 0.0
    assert results["roulette"].bias_bound == results["exact"].bias_bound == 0.0


def test_the_roulette_goes_on_with_the_largest_bound_and_refuses_what_is_not_certified():
    flow = build("vector").flow
    config = settings(eval_estimator="roulette")

    def estimator(*lipschitz):
        return evaluation_estimator(config, proved(flow, *lipschitz), flow.dim)

    assert estimator(0.3, 0.9, 0.7).continuation == 0.9
    assert estimator(0.0, 0.1, 0.2).continuation == 0.5
    with pytest.raises(ValueError, match=r"exceed the square of the Lipschitz bound, 1\.01²"):
        estimator(0.3, 1.01, 0.7)
    for bounds in ((math.nan, 0.3, 0.7), (0.3, math.nan, 0.7)):
        with pytest.raises(ValueError, match="got nan"):
            estimator(*bounds)


def test_a_draw_does_not_depend_on_the_batches_it_is_made_in():
    """A test set beyond one batch, and the same examples alone."""
    flow = build("vector").flow
    x = np.random.default_rng(0).normal(size=(1203, 3)).astype(np.float32)
    certificate = proved(flow)
    whole, part, again = (
        likelihood(flow, points, None, certificate, target_stderr=10.0, depths=(1,))
        for points in (x, x[:500], np.concatenate([x[:500], x[:703]]))
    )
    assert whole.num_draws == part.num_draws == 2
    assert part.bits_per_dim != whole.bits_per_dim != again.bits_per_dim
    exact = {"eval_estimator": "exact", "depths": (1,)}
    results = [likelihood(flow, x[s], None, certificate, **exact) for s in SLICES]
    sizes = [len(x[s]) for s in SLICES]
    parts = sum(r.bits_per_dim * n for r, n in zip(results[1:], sizes[1:], strict=True))
    assert results[0].bits_per_dim == pytest.approx(parts / sizes[0], rel=1e-6)
    assert results[0].stderr == 0.0 and results[0].num_draws == 1


SLICES = (slice(None), slice(0, 7), slice(7, None))


@pytest.mark.parametrize("name", ["series", "roulette", "exact"])
def test_every_training_estimator_trains(name):
    """Made from a config, it gives a gradient that is finite and not zero."""
    dataset = load_dataset("digits", max_examples=2)
    estimator = training_estimator(settings(train_estimator=name), dataset)
    branch = residual_of(next(build("image").flow.blocks())).branch
    x = np.random.default_rng(0).normal(size=(2, *branch_shape())).astype(np.float32)
    gradient = quick_jit(jax.grad(lambda b: estimator(b, x, jax.random.key(0))[1].sum()))(branch)
    leaves = jax.tree.leaves(gradient)
    assert all(np.isfinite(leaf).all() for leaf in leaves)
    assert max(float(np.abs(leaf).max()) for leaf in leaves) > 0.0


def branch_shape():
    flow = build("image").flow
    return flow.levels[0].out_shape(flow.event_shape)


# Importance weights


def test_importance_weights_average_probabilities_not_their_logarithms():
    bits = np.random.default_rng(0).normal(2.0, 0.3, size=(7, 5))
    dim = 4
    weighted = importance_weighted_bits(bits, dim, 3)
    assert weighted.shape == (2, 5)
    for group in range(2):
        p = np.exp2(-dim * bits[3 * group : 3 * group + 3])
        np.testing.assert_allclose(weighted[group], -np.log2(p.mean(0)) / dim, rtol=1e-12)
    np.testing.assert_allclose(importance_weighted_bits(bits, dim, 1), bits, rtol=1e-12)
    assert (weighted < bits[:6].reshape(2, 3, 5).mean(1)).all()


def test_importance_weights_do_not_underflow_in_high_dimension():
    weighted = importance_weighted_bits(np.full((4, 2), 3.45), 3072, 4)
    np.testing.assert_allclose(weighted, 3.45, rtol=1e-12)


def test_more_importance_samples_give_a_tighter_bound():
    flow = build("image-logit").flow
    images, certificate = integers((2, 4, 2), 100, levels=2), proved(flow)
    results = [
        likelihood(flow, images, 2, certificate, eval_estimator="exact", importance_samples=samples)
        for samples in (2, 8)
    ]
    for samples, result in zip((2, 8), results, strict=True):
        assert result.num_draws % samples == 0 and result.num_draws >= 2 * samples
        assert result.importance_weighted < result.bits_per_dim
    few, many = results
    noise = math.hypot(few.importance_weighted_stderr, many.importance_weighted_stderr)
    assert many.importance_weighted < few.importance_weighted - 4.0 * noise


def test_a_target_that_no_number_of_draws_reaches_overflows_nothing():
    bits = np.random.default_rng(0).normal(size=(2, 200))
    assert draws_needed(bits, 1e-300) > 10**15
    assert draws_needed(np.full((2, 200), np.nan), 1e-300) == 2


# Before anything is certified


@pytest.mark.parametrize("branch", rest_slow(["bottleneck", "concatenation"], "concatenation"))
def test_the_bias_in_training_is_bounded_by_what_the_branch_is_certified_for(branch):
    """A concatenation keeps its input: its layers' norms do not multiply."""
    config = settings(branch=branch, depths=(1,), features=(6,), coeff=0.5)
    task = Density(config, load_dataset("digits", max_examples=8))
    variables = quick_jit(task.init)(jax.random.key(0), task.inputs(task.dataset.train))
    _, certificate = task.functions.certified_flow(task.functions.converge(variables))
    estimator = training_estimator(config, task.dataset)
    certified = bias_bound(certificate, estimator, task.dataset.dim)
    assert certified <= training_bias_bound(config, task.dataset, 0.5) * (1 + 1e-3)


def test_validation_continues_often_enough_for_a_finite_variance():
    points = Dataset("points", *[np.zeros((2, 200), np.float32)] * 3)
    for coeff in (0.5, 0.9, 0.99):
        config = settings(coeff=coeff, features=(8,))
        assert validation_estimator(config, points).continuation == max(0.8, coeff**2)
