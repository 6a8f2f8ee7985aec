import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    contraction,
    directional_difference,
    matrix_with_eigenvalues,
    orthogonal,
    random_like,
    sample_jacobians,
    trace_series,
    tree_dot,
)

from iresnet_jax import (
    Exact,
    TruncatedSeries,
    series_along_probe,
    truncation_error_bound,
)

X64 = pytest.mark.usefixtures("x64")
STRICT = pytest.mark.usefixtures("no_rank_promotion")
KEY = jax.random.key(0)


def draw(seed, shape, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def linear(matrix, dtype=np.float32):
    """g(x) = A x, whose Jacobian is ``matrix`` everywhere."""
    transposed = jnp.asarray(matrix.T, dtype)
    return lambda x: x @ transposed


def oracle_log_det(branch, x):
    jacobians = sample_jacobians(branch, x)
    return np.linalg.slogdet(np.eye(jacobians.shape[-1]) + jacobians)[1]


# Exact


@X64
@pytest.mark.parametrize("lipschitz", [0.3, 0.9, 4.0])
@pytest.mark.parametrize("dim", [1, 2, 4])
def test_exact_equals_the_determinant_of_the_full_jacobian(dim, lipschitz):
    branch, x = contraction(0, dim, lipschitz, np.float64), draw(1, (5, dim), np.float64)
    out, log_det = jax.jit(Exact())(branch, x)
    np.testing.assert_allclose(out, branch(x), rtol=1e-12)
    np.testing.assert_allclose(log_det, oracle_log_det(branch, x), rtol=1e-10)


@X64
@pytest.mark.parametrize("values", [[-3.0], [-3.0, 0.5], [-3.0, -4.0]])
def test_exact_takes_determinants_of_either_sign_by_their_formula(values):
    branch = linear(matrix_with_eigenvalues(0, np.array(values)), np.float64)
    _, log_det = Exact()(branch, jnp.ones((1, len(values))))
    np.testing.assert_allclose(log_det, [np.log(np.abs(1.0 + np.array(values))).sum()], rtol=1e-10)


@X64
def test_exact_takes_images():
    flat, x = contraction(0, 12, 0.8, np.float64), draw(1, (2, 3, 2, 2), np.float64)

    def branch(x):
        return flat(x.reshape(-1, 12)).reshape(x.shape)

    out, log_det = Exact()(branch, x, None)
    assert out.shape == x.shape and log_det.shape == (2,)
    np.testing.assert_allclose(log_det, oracle_log_det(branch, x), rtol=1e-10)


@X64
def test_exact_takes_the_absolute_value_of_a_negative_determinant():
    values = [-3.0, 0.5, 0.2]
    _, log_det = Exact()(linear(matrix_with_eigenvalues(0, values), np.float64), jnp.ones((1, 3)))
    np.testing.assert_allclose(log_det, [math.log(2.0 * 1.5 * 1.2)], rtol=1e-12)


@X64
def test_exact_differentiates_to_second_order():
    arguments = contraction(0, 3, 0.8, np.float64), draw(1, (2, 3), np.float64)
    direction = random_like(2, arguments)
    loss = jax.jit(lambda a: jnp.sum(Exact()(*a)[1] ** 2))
    slope = jax.jit(lambda a: jax.jvp(loss, (a,), (direction,))[1])
    gradient = jax.jit(jax.grad(loss))(arguments)
    expected = directional_difference(
        lambda a: np.sum(oracle_log_det(*a) ** 2), arguments, direction
    )
    np.testing.assert_allclose(tree_dot(gradient, direction), expected, rtol=1e-7)
    curvature = tree_dot(jax.jit(jax.grad(slope))(arguments), direction)
    np.testing.assert_allclose(
        curvature, directional_difference(slope, arguments, direction), rtol=1e-6
    )


# The series' value


def all_signs(dim, dtype=np.float64):
    return jnp.asarray(list(itertools.product((-1.0, 1.0), repeat=dim)), dtype)


def series_by_hand(jacobian, v, num_terms):
    power, total = np.asarray(v), 0.0
    for k in range(1, num_terms + 1):
        power = jacobian @ power
        total += (-1.0) ** (k + 1) / k * np.vdot(v, power)
    return total


@X64
@STRICT
@pytest.mark.parametrize("num_terms", [1, 2, 5, 12])
def test_all_sign_vectors_give_the_trace_series_exactly(num_terms):
    matrix = matrix_with_eigenvalues(0, [-0.9, 0.5, 0.7]) @ orthogonal(np.random.default_rng(1), 3)
    probes = all_signs(3)
    x = jnp.zeros_like(probes)
    _, terms = series_along_probe(linear(matrix, np.float64), x, probes, num_terms)
    np.testing.assert_allclose(terms.mean(), trace_series(matrix, num_terms), rtol=1e-12)
    assert float(terms.std()) > 1e-3


@X64
@STRICT
@pytest.mark.parametrize("num_terms", [1, 4])
def test_the_value_is_the_series_along_the_probe_and_no_surrogate(num_terms):
    branch, x = contraction(0, 4, 0.9, np.float64), draw(1, (3, 4), np.float64)
    v = draw(2, (3, 4), np.float64)
    jacobians = sample_jacobians(branch, x)
    expected = [series_by_hand(j, p, num_terms) for j, p in zip(jacobians, v, strict=True)]

    def value(branch):
        out, terms = series_along_probe(branch, x, v, num_terms)
        return jnp.sum(terms), (out, terms)

    differentiated = jax.jit(jax.value_and_grad(value, has_aux=True))
    for out, terms in (value(branch)[1], differentiated(branch)[0][1]):
        np.testing.assert_allclose(terms, expected, rtol=1e-12)
        np.testing.assert_allclose(out, branch(x), rtol=1e-12)


@STRICT
@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
@pytest.mark.parametrize("num_terms", [1, 6])
def test_the_mean_over_probes_is_the_trace_series(probe, num_terms):
    matrix, samples = matrix_with_eigenvalues(3, [-0.8, -0.5, 0.3, 0.9]), 4000
    estimate = jax.jit(TruncatedSeries(num_terms, probe=probe), static_argnums=0)
    _, values = estimate(linear(matrix), jnp.zeros((samples, 4)), KEY)
    truth = float(trace_series(matrix, num_terms))
    standard_error = float(values.std()) / math.sqrt(samples)
    assert abs(float(values.mean()) - truth) < 4.0 * standard_error < 0.2


@STRICT
def test_the_series_approaches_the_log_determinant():
    matrix, samples = matrix_with_eigenvalues(3, [-0.4, 0.3, 0.5]), 8000
    estimate = jax.jit(TruncatedSeries(30), static_argnums=0)
    _, values = estimate(linear(matrix), jnp.zeros((samples, 3)), KEY)
    truth = math.log(0.6 * 1.3 * 1.5)
    standard_error = float(values.std()) / math.sqrt(samples)
    assert abs(float(values.mean()) - truth) < 4.0 * standard_error < 0.05


@STRICT
def test_more_probes_average():
    matrix = matrix_with_eigenvalues(3, [-0.8, -0.5, 0.3, 0.9])
    variances = []
    for num_probes in (1, 4):
        estimate = jax.jit(TruncatedSeries(3, num_probes), static_argnums=0)
        variances.append(float(estimate(linear(matrix), jnp.zeros((4000, 4)), KEY)[1].var()))
    np.testing.assert_allclose(variances[0] / variances[1], 4.0, rtol=0.15)


@STRICT
def test_rademacher_probes_are_exact_on_diagonal_jacobians():
    scale = jnp.asarray([0.3, -0.5, 0.7])
    branch = linear(np.diag(scale))
    expected = float(trace_series(np.diag(scale), 5))
    for key in (KEY, jax.random.key(1)):
        _, log_det = TruncatedSeries(5)(branch, jnp.zeros((4, 3)), key)
        np.testing.assert_allclose(log_det, expected, rtol=1e-5)
    _, gaussian = TruncatedSeries(5, probe="gaussian")(branch, jnp.zeros((4, 3)), KEY)
    assert float(gaussian.std()) > 1e-2


# What a branch may be


class MutableBranch:
    """A callable whose weights are replaced between calls, as in a notebook."""

    scale = 0.5

    def __call__(self, x):
        return self.scale * x


ESTIMATORS = [pytest.param(TruncatedSeries(1), id="series"), pytest.param(Exact(), id="exact")]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_branch_whose_weights_were_replaced_is_not_remembered(estimator):
    branch, x = MutableBranch(), jnp.ones((1, 2))
    first = estimator(branch, x, KEY)
    branch.scale = 0.25
    second = estimator(branch, x, KEY)
    fresh = estimator(lambda x: 0.25 * x, x, KEY)
    jax.tree.map(np.testing.assert_array_equal, second, fresh)
    assert float(jnp.abs(first[1] - second[1]).min()) > 0.1


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_branch_need_not_be_hashable(estimator):
    """Such as a NamedTuple or a ``flax.struct`` dataclass of arrays."""

    class Scaling(NamedTuple):
        scale: jax.Array

        def __call__(self, x):
            return self.scale * x

    _, log_det = estimator(Scaling(jnp.float32(0.5)), jnp.ones((1, 2)), KEY)
    np.testing.assert_allclose(log_det, estimator(lambda x: 0.5 * x, jnp.ones((1, 2)), KEY)[1])


@X64
def test_scan_vmap_and_checkpoint_give_the_same_gradient():
    stack = jax.tree.map(
        lambda *leaves: jnp.stack(leaves), *(contraction(s, 3, 0.8, np.float64) for s in (0, 1))
    )
    x, v = draw(2, (4, 3), np.float64), draw(3, (4, 3), np.float64)

    def value(branch):
        return jnp.sum(series_along_probe(branch, x, v, 4)[1])

    def scanned(stack):
        return jax.lax.scan(lambda total, b: (total + value(b), None), 0.0, stack)[0]

    def mapped(stack):
        return jnp.sum(jax.vmap(value)(stack))

    def checkpointed(stack):
        return jnp.sum(jax.vmap(jax.checkpoint(value))(stack))

    def unrolled(stack):
        return sum(value(jax.tree.map(lambda leaf, i=i: leaf[i], stack)) for i in range(2))

    @jax.jit
    def gradients(stack):
        functions = (unrolled, scanned, mapped, checkpointed)
        return [jax.value_and_grad(f)(stack) for f in functions]

    expected, *others = gradients(stack)
    for other in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), other, expected)


# Keys


@STRICT
@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
def test_a_samples_noise_depends_on_its_key_alone(probe):
    branch, x = contraction(0, 4, 0.9), draw(1, (3, 4))
    keys = jax.random.split(KEY, 3)
    estimate = jax.jit(TruncatedSeries(4, 2, probe))
    _, together = estimate(branch, x, keys)
    for i in range(3):
        _, alone = estimate(branch, x[i : i + 1], keys[i : i + 1])
        np.testing.assert_allclose(alone[0], together[i], rtol=1e-5)
    _, reordered = estimate(branch, x[::-1], keys[::-1])
    np.testing.assert_allclose(reordered[::-1], together, rtol=1e-5)


@STRICT
def test_one_key_gives_each_sample_its_own_noise():
    x, branch = jnp.zeros((50, 4)), linear(matrix_with_eigenvalues(0, [-0.8, -0.5, 0.3, 0.9]))
    estimate = jax.jit(TruncatedSeries(3), static_argnums=0)
    (_, first), (_, second) = (estimate(branch, x, jax.random.key(i)) for i in (0, 1))
    assert len(set(np.asarray(first).round(5).tolist())) > 4
    assert float(jnp.abs(first - second).max()) > 1e-2
    np.testing.assert_array_equal(estimate(branch, x, KEY)[1], first)
    per_sample = jax.vmap(jax.random.fold_in, (None, 0))(KEY, jnp.arange(50))
    np.testing.assert_array_equal(estimate(branch, x, per_sample)[1], first)


# Refusals


def test_a_bound_needs_a_term():
    with pytest.raises(ValueError, match="num_terms must be ≥ 1; got 0"):
        truncation_error_bound(0.5, 4, 0)


def test_keys_of_another_number_are_refused():
    with pytest.raises(ValueError, match=r"one for each of 3 samples; got \(2,\)"):
        TruncatedSeries(2)(jnp.tanh, jnp.ones((3, 3)), jax.random.split(KEY, 2))
