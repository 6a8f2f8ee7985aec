"""Bounds on the log-determinant and on the truncation of its series."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    contraction,
    matrix_with_eigenvalues,
    orthogonal,
    sample_jacobians,
    trace_series,
)

from iresnet_jax import log_det_bounds, truncation_error_bound

X64 = pytest.mark.usefixtures("x64")


def draw(seed, shape, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def oracle_log_det(branch, x):
    jacobians = sample_jacobians(branch, x)
    return np.linalg.slogdet(np.eye(jacobians.shape[-1]) + jacobians)[1]


# Bounds


@X64
@pytest.mark.parametrize("lipschitz", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("num_terms", [1, 4, 15])
def test_truncation_error_is_within_the_bound_and_close_to_it_in_the_worst_case(
    lipschitz, num_terms
):
    dim, bound = 5, float(truncation_error_bound(lipschitz, 5, num_terms))
    worst = dim * sum(lipschitz**k / k for k in range(num_terms + 1, num_terms + 5000))
    assert (1.0 - lipschitz) * bound <= worst * (1 + 1e-9) and worst <= bound * (1 + 1e-9)
    rng = np.random.default_rng(0)
    extreme = matrix_with_eigenvalues(0, [-lipschitz] * dim)
    spectrum = matrix_with_eigenvalues(1, rng.uniform(-lipschitz, lipschitz, dim))
    turned = spectrum @ orthogonal(rng, dim)
    for matrix in (extreme, spectrum, turned, lipschitz * orthogonal(rng, dim)):
        truth = np.linalg.slogdet(np.eye(dim) + matrix)[1]
        error = abs(truth - float(trace_series(matrix, num_terms)))
        assert error <= bound * (1 + 1e-9) + 1e-13


@pytest.mark.parametrize("lipschitz", [0.0, 1e-4, 0.3, 0.9, 0.999, 1 - 1e-6, 1 - 0.9e-7])
@pytest.mark.parametrize("num_terms", [1, 5, 30])
def test_truncation_bound_loses_nothing_to_single_precision(lipschitz, num_terms):
    n, dim = num_terms + 1, 3072
    truth = dim * lipschitz**n / (n * (1.0 - lipschitz))
    bound = float(truncation_error_bound(lipschitz, dim, num_terms))
    representable = truth > 1e-37
    assert bound >= truth * (1.0 - 1e-5) * representable
    exponent = n * abs(math.log(max(lipschitz, 1e-300)))
    outward = 8 * 1.2e-7 * (4 + exponent)  # the bound's own, which covers the rounding of Lⁿ⁺¹
    rounding = 1e-5 + 1.3e-7 / (1.0 - lipschitz) + outward  # of L itself to float32, upwards
    floor = dim * 1.2e-38 if lipschitz > 0 else 0.0  # the least normal float32, where Lⁿ⁺¹ is less
    assert bound == math.inf or bound <= truth / max(1.0 - rounding, 1e-3) + floor


@pytest.mark.parametrize("lipschitz", [1.0, 1.0 - 1e-9, 1.5, 1e10, math.inf])
def test_truncation_bound_is_infinite_without_a_contraction(lipschitz):
    for bound in (truncation_error_bound, jax.jit(truncation_error_bound, static_argnums=(1, 2))):
        assert float(bound(lipschitz, 4, 3)) == math.inf


def test_truncation_bound_of_nan_is_nan():
    assert math.isnan(float(truncation_error_bound(math.nan, 4, 3)))


def test_truncation_bound_takes_arrays():
    lipschitz = [0.2, 0.9, 1.0, 1.7]
    each = [float(truncation_error_bound(value, 4, 3)) for value in lipschitz]
    np.testing.assert_allclose(truncation_error_bound(jnp.asarray(lipschitz), 4, 3), each, 1e-5)


def test_truncation_bound_decreases_with_the_terms():
    bounds = [float(truncation_error_bound(0.9, 4, n)) for n in range(1, 12)]
    assert all(a > b > 0 for a, b in itertools.pairwise(bounds))


@X64
@pytest.mark.parametrize("lipschitz", [0.2, 0.9])
def test_log_det_lies_within_its_bounds(lipschitz):
    lower, upper = (float(b) for b in log_det_bounds(lipschitz, 4))
    for seed in range(5):
        branch, x = contraction(seed, 4, lipschitz, np.float64), draw(seed, (10, 4), np.float64)
        log_det = oracle_log_det(branch, x)
        assert (lower <= log_det).all() and (log_det <= upper).all()
    np.testing.assert_allclose(lower, 4 * math.log(1 - lipschitz), rtol=1e-12)
    np.testing.assert_allclose(upper, 4 * math.log(1 + lipschitz), rtol=1e-12)


@pytest.mark.parametrize("lipschitz", [1.0, 2.0])
def test_log_det_has_no_lower_bound_without_a_contraction(lipschitz):
    lower, upper = log_det_bounds(lipschitz, 4)
    assert float(lower) == -math.inf
    np.testing.assert_allclose(upper, 4 * math.log1p(lipschitz), rtol=1e-6)


@pytest.mark.parametrize("gap", [1e-2, 1e-4, 4e-6, 2.1e-7, 0.9e-7, 1e-8])
def test_log_det_bounds_are_not_tightened_by_the_rounding_of_the_constant(gap):
    lower, upper = log_det_bounds(1.0 - gap, 4)
    assert float(lower) <= 4 * math.log(gap) * (1.0 - 1e-6)
    assert float(upper) >= 4 * math.log(2.0 - gap) * (1.0 - 1e-6)


@pytest.mark.parametrize("num_terms", [130, 300, 1000])
def test_a_bias_bound_below_the_smallest_number_is_not_zero(num_terms):
    assert float(truncation_error_bound(0.5, 1, num_terms)) > 0.0
    assert float(truncation_error_bound(0.0, 1, num_terms)) == 0.0


@pytest.mark.parametrize("lipschitz", [5e-324, 1e-60, 1e-45, 1e-39, np.float64(1e-50)])
def test_bounds_of_a_tiny_constant_are_not_rounded_to_zero(lipschitz):
    """What single precision does not hold, or flushes to zero."""
    lower, upper = (float(bound) for bound in log_det_bounds(lipschitz, 1))
    assert lower <= math.log1p(-lipschitz) and math.log1p(lipschitz) <= upper
    assert float(truncation_error_bound(lipschitz, 1, 1)) >= lipschitz**2
    assert [float(bound) for bound in log_det_bounds(0.0, 1)] == [0.0, 0.0]
