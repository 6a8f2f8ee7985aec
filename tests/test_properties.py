"""The marks of the i-ResNet's row in Table 1 of the paper, each as a test.

``python -m train reproduce table-1`` names these tests beside the marks and runs them.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import build, in_double
from helpers import inner_jaxprs, matrix_with_eigenvalues, sample_jacobians

from iresnet_jax import (
    Exact,
    FixedPointIteration,
    TruncatedSeries,
    series_along_probe,
    truncation_error_bound,
)

X64 = pytest.mark.usefixtures("x64")


def primitives(jaxpr) -> set[str]:
    """The names of all primitives in a jaxpr, inner ones included."""
    names = set()
    for equation in jaxpr.eqns:
        names.add(equation.primitive.name)
        for inner in inner_jaxprs(equation):
            names |= primitives(inner)
    return names


@X64
def test_the_jacobian_is_free_form():
    """No entry vanishes: in no order of the dimensions is it triangular, as a coupling's is."""
    flow, x = in_double(build("vector").flow), in_double(build("vector").x)
    jacobians = sample_jacobians(lambda x: flow.forward(x)[0], x)
    rounding = 1e-12 * np.abs(jacobians).max()
    assert np.abs(jacobians).min() > rounding


@X64
def test_the_forward_map_is_analytic():
    """h + W₂ elu(W₁ h + b₁) + b₂ in NumPy, and no loop whose length depends on data."""
    flow, x = in_double(build("vector-depth-1").flow), in_double(build("vector-depth-1").x)
    ((actnorm, block),) = (chain.links for chain in flow.blocks())
    left_out, first, _, second = block.branch.stages
    assert not left_out.active
    h = np.asarray(x) * np.exp(actnorm.log_scale) + actnorm.shift
    hidden = h @ np.asarray(first.operator.kernel) + first.bias
    hidden = np.where(hidden > 0, hidden, np.expm1(hidden))
    expected = h + hidden @ np.asarray(second.operator.kernel) + second.bias
    np.testing.assert_allclose(flow.forward(x)[0], expected, rtol=1e-12, atol=1e-13)
    assert "while" not in primitives(jax.make_jaxpr(flow.forward)(x).jaxpr)


@X64
def test_the_inverse_is_iterative_not_analytic():
    """It loops until a tolerance is met, and a smaller tolerance takes more steps."""
    flow, x = in_double(build("vector").flow), in_double(build("vector").x)
    latents = flow.forward(x)
    steps = [
        int(flow.inverse(latents, FixedPointIteration(tolerance, tolerance))[1].num_steps.min())
        for tolerance in (1e-2, 1e-6, 1e-10)
    ]
    assert steps == sorted(set(steps))
    assert "while" in primitives(jax.make_jaxpr(lambda z: flow.inverse(z))(latents).jaxpr)


@X64
@pytest.mark.parametrize("slope", [-0.5, 0.5])
def test_volume_is_not_preserved(slope):
    """x + a·tanh(x) scales volume by (1 + a)^d at 0, and by about 1 far away."""
    x = jnp.stack([jnp.zeros(3), jnp.full(3, 20.0)])
    _, log_det = Exact()(lambda x: slope * jnp.tanh(x), x, None)
    np.testing.assert_allclose(log_det, [3 * math.log1p(slope), 0.0], atol=1e-12)


@X64
def test_the_series_gives_no_exact_likelihood():
    """Its log-likelihood is a random estimate; that of the full Jacobian is one number."""
    flow, x = in_double(build("vector").flow), in_double(build("vector").x)
    keys = jax.random.split(jax.random.key(0), 2)
    one, other = (flow.log_prob(x, TruncatedSeries(5), key=key) for key in keys)
    assert np.abs(one - other).max() > 1e-6
    np.testing.assert_array_equal(*(flow.log_prob(x, Exact(), key=key) for key in keys))


@X64
def test_the_truncated_series_is_biased():
    """Its mean over all probes misses log|det| by the tail of the series, within the bound."""
    values, terms = np.array([0.8, -0.5, 0.3]), 4
    matrix = jnp.asarray(matrix_with_eigenvalues(0, values))
    probes = jnp.asarray(list(itertools.product((-1.0, 1.0), repeat=3)))
    _, estimates = series_along_probe(lambda x: x @ matrix, jnp.zeros_like(probes), probes, terms)
    ks = np.arange(1, terms + 1)
    series = np.sum((-1.0) ** (ks + 1) / ks * values[:, None] ** ks)
    bias = np.mean(estimates) - np.log1p(values).sum()
    np.testing.assert_allclose(np.mean(estimates), series, rtol=1e-12)
    assert 1e-2 < abs(bias) <= truncation_error_bound(0.8, 3, terms)
