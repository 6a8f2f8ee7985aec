"""Data as JAX takes them: NumPy's double precision, with and without x64."""

import jax.numpy as jnp
import numpy as np
import pytest

from iresnet_jax import checks


def test_a_double_precision_table_becomes_single_without_a_warning():
    """Warnings are errors in this suite."""
    assert checks.at_least_default_precision(np.arange(3.0)).dtype == jnp.float32
    assert checks.at_least_default_precision(np.arange(3)).dtype == jnp.float32


def test_under_x64_it_stays_double(x64):
    assert checks.at_least_default_precision(np.arange(3.0)).dtype == jnp.float64


def test_what_single_precision_cannot_hold_is_not_finite():
    table = np.array([[1.0, 1e39], [2.0, 3.0]])
    with pytest.raises(ValueError, match=r"must be finite; .* is inf at index \(0, 1\)"):
        checks.check_domain(table, unit_interval=False)


def test_under_x64_it_is_finite(x64):
    checks.check_domain(np.array([[1e39]]), unit_interval=False)


@pytest.mark.parametrize("count", [2**31, 2**70])
def test_a_count_beyond_32_bits_is_refused(count):
    checks.check_at_least_one("max_steps", 2**31 - 1)
    with pytest.raises(ValueError, match=f"max_steps must be ≤ 2147483647; got {count}"):
        checks.check_at_least_one("max_steps", count)
