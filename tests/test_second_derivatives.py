"""Second derivatives of the series: those of the trace series on the mean, or refused."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import quick_jit
from helpers import contraction, trace_series
from jax.flatten_util import ravel_pytree

from iresnet_jax import (
    Residual,
    Roulette,
    Stack,
    TruncatedSeries,
    series_along_probe,
)

X64 = pytest.mark.usefixtures("x64")
KEY = jax.random.key(0)
TERMS, DIM = 4, 2

WAYS = {
    "forward over reverse": lambda f: jax.jacfwd(jax.grad(f)),
    "reverse over reverse": lambda f: jax.jacrev(jax.grad(f)),
    "forward over forward": lambda f: jax.jacfwd(jax.jacfwd(f)),
    "reverse over forward": lambda f: jax.jacrev(jax.jacfwd(f)),
}


def along_basis(branch, x, num_terms):
    """The mean over √d·eᵢ, which is the trace series itself."""
    probes = math.sqrt(DIM) * jnp.eye(DIM, dtype=x.dtype)[:, None]
    log_det = jax.vmap(lambda v: series_along_probe(branch, x, v, num_terms)[1])(probes).mean(0)
    return jnp.sin(3.0 * log_det).sum()


def by_traces(branch, x, num_terms):
    jacobian = jax.jacfwd(lambda s: branch(s[None])[0])(x[0])
    return jnp.sin(3.0 * trace_series(jacobian, num_terms))


def arguments():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, DIM)))
    branch = contraction(0, DIM, 0.8, np.float64)
    return ravel_pytree((branch, x))


@pytest.fixture(scope="module")
def expected():
    with jax.enable_x64(True):
        flat, unravel = arguments()
        return np.asarray(quick_jit(jax.hessian(lambda f: by_traces(*unravel(f), TERMS)))(flat))


@X64
@pytest.mark.parametrize("way", WAYS)
def test_second_derivatives_have_the_mean_of_the_trace_series(way, expected):
    """By the weights too, and mixed; through a function that is not linear in the estimate."""
    flat, unravel = arguments()
    found = quick_jit(WAYS[way](jax.checkpoint(lambda flat: along_basis(*unravel(flat), TERMS))))
    np.testing.assert_allclose(found(flat), expected, atol=1e-10)


@X64
@pytest.mark.parametrize("way", WAYS)
def test_a_traced_number_of_terms_is_as_right_or_refused(way, expected):
    flat, unravel = arguments()

    def second():
        return quick_jit(WAYS[way](lambda f: along_basis(*unravel(f), jnp.int32(TERMS))))(flat)

    if way.startswith("reverse"):
        with pytest.raises(ValueError, match=r"BoundedSeries is taken in reverse mode, .*jacfwd"):
            second()
    else:
        np.testing.assert_allclose(second(), expected, atol=1e-10)


_ROULETTE = pytest.param(
    Roulette(0.5, lipschitz=None),
    marks=pytest.mark.skipif(
        jax.__version_info__ < (0, 9), reason="lax.scan of jax 0.8.0 raises a TypeError of its own"
    ),
)


@X64
@pytest.mark.parametrize("estimator", [TruncatedSeries(3), _ROULETTE], ids=str)
def test_a_second_derivative_is_the_difference_of_first_ones(estimator):
    """Of one draw, along samples and weights, through a stack of blocks."""
    branches = [contraction(seed, DIM, 0.7, np.float64) for seed in range(2)]
    flow = Stack(Residual(jax.tree.map(lambda *leaves: jnp.stack(leaves), *branches)), 2)
    keys = jax.random.split(KEY, (2, 1))
    flat, unravel = ravel_pytree((flow, jnp.ones((1, DIM))))

    def value(flat):
        flow, x = unravel(flat)
        return flow.forward_and_log_det(x, estimator, keys)[1].sum()

    along, step, gradient = jnp.cos(jnp.arange(flat.size)), 1e-5, jax.grad(value)
    _, found = quick_jit(lambda flat: jax.jvp(gradient, (flat,), (along,)))(flat)
    gradient = quick_jit(gradient)
    differences = (gradient(flat + step * along) - gradient(flat - step * along)) / (2 * step)
    np.testing.assert_allclose(found, differences, rtol=1e-5, atol=1e-8)


def test_where_the_length_is_drawn_only_reverse_over_reverse_of_the_log_det_is_refused():
    branch, x, roulette = (
        contraction(0, DIM, 0.8),
        jnp.ones((1, DIM)),
        Roulette(0.7, lipschitz=None),
    )

    def log_det(x):
        return roulette(branch, x, KEY)[1].sum()

    def penalty(x):
        return (jax.grad(lambda x: roulette(branch, x, KEY)[0].sum())(x) ** 2).sum()

    with pytest.raises(ValueError, match=r"Roulette is taken in reverse mode, .*Exact\(\)"):
        jax.grad(lambda x: (jax.grad(log_det)(x) ** 2).sum())(x)
    both = quick_jit(jax.grad(lambda x: log_det(x) + penalty(x)))(x)
    assert jnp.isfinite(both).all()
