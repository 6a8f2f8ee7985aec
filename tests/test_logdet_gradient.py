"""The Neumann gradient against the gradient of the Exact trace series; its memory."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    contraction,
    trace_series,
)

from iresnet_jax import Exact, TruncatedSeries, series_along_probe

X64 = pytest.mark.usefixtures("x64")
STRICT = pytest.mark.usefixtures("no_rank_promotion")
KEY = jax.random.key(0)


def draw(seed, shape, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


# The series' gradient


def basis_probes(x):
    """For each sample all probes √d·eᵢ: their mean of v vᵀ is the identity. [d, batch, d]."""
    dim = x.shape[-1]
    basis = math.sqrt(dim) * jnp.eye(dim, dtype=x.dtype)
    return jnp.broadcast_to(basis[:, None], (dim, *x.shape))


def mean_series(branch, x, num_terms):
    values = jax.vmap(lambda v: series_along_probe(branch, x, v, num_terms)[1])(basis_probes(x))
    return jnp.sum(jnp.sin(values.mean(0)))


def mean_trace_series(branch, x, num_terms):
    def one(sample):
        jacobian = jax.jacfwd(lambda s: branch(s[None])[0])(sample)
        return trace_series(jacobian, num_terms)

    return jnp.sum(jnp.sin(jax.vmap(one)(x)))


@X64
@STRICT
@pytest.mark.parametrize("num_terms", [1, 2, 7])
def test_the_mean_gradient_is_that_of_the_trace_series(num_terms):
    arguments = contraction(0, 3, 0.8, np.float64), draw(1, (2, 3), np.float64)

    @jax.jit
    def both(branch, x):
        gradient = [jax.grad(f, (0, 1)) for f in (mean_series, mean_trace_series)]
        return [g(branch, x, num_terms) for g in gradient]

    ours, theirs = both(*arguments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), ours, theirs)
    assert min(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(ours)) > 1e-4


@X64
@STRICT
def test_the_gradient_of_the_estimator_reaches_parameters_and_input():
    """One dimension: any ±1 probe is Exact, and so is the estimator with its gradient."""
    arguments = jnp.asarray(0.7), draw(1, (3, 1), np.float64)

    def series(scale, x):
        slope = scale * jnp.cos(x)
        return jnp.sum(sum((-1.0) ** (k + 1) / k * slope**k for k in range(1, 6)))

    def estimate(scale, x):
        return jnp.sum(TruncatedSeries(5, 2)(lambda x: scale * jnp.sin(x), x, KEY)[1])

    ours, theirs = (jax.jit(jax.value_and_grad(f, (0, 1)))(*arguments) for f in (estimate, series))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), ours, theirs)


@X64
@pytest.mark.parametrize("estimator", [TruncatedSeries(3), Exact()], ids=["series", "exact"])
def test_the_gradient_of_the_output_is_the_branches(estimator):
    branch, x = contraction(0, 3, 0.8, np.float64), draw(1, (2, 3), np.float64)
    ours = jax.grad(lambda b, x: jnp.sum(estimator(b, x, KEY)[0] ** 2), (0, 1))(branch, x)
    theirs = jax.grad(lambda b, x: jnp.sum(b(x) ** 2), (0, 1))(branch, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), ours, theirs)


def compiled_bytes(loss, weights):
    return jax.jit(jax.grad(loss)).lower(weights).compile().memory_analysis().temp_size_in_bytes


@STRICT
def test_the_memory_of_the_gradient_does_not_grow_with_the_terms():
    x, v = draw(0, (64, 32)), draw(1, (64, 32))

    def branch(weights, x):
        for w in weights:
            x = jnp.tanh(x @ w)
        return x

    def neumann(num_terms):
        return lambda weights: jnp.sum(
            series_along_probe(lambda x: branch(weights, x), x, v, num_terms)[1]
        )

    def stacked(num_terms):
        def block(total, w):
            _, terms = series_along_probe(lambda x: jnp.tanh(x @ w), x, v, num_terms)
            return total + jnp.sum(terms), None

        return lambda weights: jax.lax.scan(block, 0.0, jnp.stack(weights))[0]

    def taped(num_terms):
        def loss(weights):
            _, jvp = jax.linearize(lambda x: branch(weights, x), x)
            return jnp.sum(
                jax.lax.scan(lambda p, _: (-jvp(p), jnp.vdot(v, p)), v, None, num_terms)[1]
            )

        return loss

    weights = [draw(i, (32, 32)) / 12.0 for i in range(2)]
    # From 3 terms on: fewer leave the series' loop a single round or none, which XLA unrolls.
    ours, scan, tape = (
        [compiled_bytes(f(n), weights) for n in (3, 20)] for f in (neumann, stacked, taped)
    )
    assert ours[1] <= 1.03 * ours[0] and scan[1] <= 1.03 * scan[0]
    assert tape[1] > 1.5 * tape[0]  # the measure sees a tape where there is one
