"""Under each of JAX's strictness flags, whatever a user may have turned on, the public calls work.

A context manager turns a flag on for one test.
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import quick_jit
from helpers import rest_slow

import iresnet_jax as ir
from iresnet_jax import nn

SLOW = pytest.mark.slow
FLAGS = {
    "rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "dtype promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "NaN": lambda: jax.debug_nans(True),
    "tracer leaks": lambda: jax.check_tracer_leaks(True),
    "checks": lambda: jax.enable_checks(True),
    "legacy keys": lambda: jax.legacy_prng_key("error"),
    "custom keys": lambda: jax.enable_custom_prng(True),
    "bfloat16 products": lambda: jax.default_matmul_precision("bfloat16"),
    "no jit": lambda: jax.disable_jit(),
}

VECTORS = nn.VectorFlow(dim=2, depth=1, features=(3,), coeff=0.8)
IMAGES = nn.ImageFlow(image_shape=(2, 2, 1), depths=(1,), features=(2,), coeff=0.8)
CLASSIFIER = nn.InvertibleClassifier(
    image_shape=(2, 2, 1), depths=(1,), features=(2,), coeff=0.8, num_classes=3
)
ESTIMATORS = [ir.Exact(), ir.TruncatedSeries(2), ir.Roulette(0.8, lipschitz=0.8)]


def use(model, x):
    """Call what a user calls, eagerly and traced, and return the numbers."""
    key = jax.random.key(0)
    variables = quick_jit(model.init)(key, x)
    flow = model.flow(nn.converge(model, variables))
    certificate = ir.certify(flow)
    bounded = flow.with_bounds(certificate)
    z = flow.forward(x)
    back, info = bounded.inverse(z, ir.Anderson(1e-5, 1e-5))
    exact = flow.log_prob(x)
    error = ir.inverse_error_bound(bounded, info, z)
    nn.shrink(model, variables)

    @quick_jit
    def traced(flow, bounded, variables, x):
        densities = [flow.log_prob(x, e, key=key if e.needs_key else None) for e in ESTIMATORS]
        densities.append(bounded.log_prob(x, ir.BoundedSeries(1e-1), key=key))
        loss = lambda flow: -jnp.mean(flow.log_prob(x, ir.TruncatedSeries(2), key=key))  # noqa: E731
        value, gradients, _ = nn.value_and_grad(model, loss, variables)
        return densities, value, gradients, flow.sample(key, 2)[0]

    densities, loss, gradients, samples = traced(flow, bounded, variables, x)
    densities.append(exact)
    return certificate, z, back, densities, error, loss, gradients, samples


#: That depend on the shapes and types of a network's arrays.
OF_ARRAYS = ("rank promotion", "dtype promotion")
CASES = [
    pytest.param("vectors", "rank promotion", id="vectors-rank promotion"),
    *(pytest.param("images", flag, id=f"images-{flag}", marks=SLOW) for flag in OF_ARRAYS),
    *(
        pytest.param("vectors", flag, id=f"vectors-{flag}", marks=SLOW)
        for flag in FLAGS
        if flag != "rank promotion"
    ),
]


@pytest.mark.parametrize(("kind", "flag"), CASES)
def test_all_that_is_public_works_under_a_flag(kind, flag):
    model, shape = {"vectors": (VECTORS, (3, 2)), "images": (IMAGES, (3, 2, 2, 1))}[kind]
    x = np.random.default_rng(0).uniform(0.1, 0.9, shape).astype(np.float32)
    with FLAGS[flag]():
        certificate, z, back, densities, error, loss, gradients, samples = use(model, x)
    assert certificate.certified
    np.testing.assert_allclose(back, x, atol=1e-3)
    distance = np.linalg.norm((np.asarray(back, np.float64) - x).reshape(3, -1), axis=1)
    assert np.isfinite(np.asarray(error)).all() and distance.shape == error.shape
    for value in (z, densities, loss, gradients, samples):
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(value))


@pytest.mark.parametrize("flag", rest_slow(OF_ARRAYS))
def test_a_classifier_works_under_a_flag(flag):
    x = np.random.default_rng(0).uniform(size=(3, 2, 2, 1)).astype(np.float32)
    with FLAGS[flag]():
        variables = quick_jit(CLASSIFIER.init)(jax.random.key(0), x)
        train = quick_jit(
            lambda v, x: CLASSIFIER.apply(v, x, train=True, mutable=["spectral", "batch_stats"])
        )
        logits, _ = train(variables, x)
        moments = nn.feature_moments(CLASSIFIER, variables, x)
        again = CLASSIFIER.apply(nn.recalibrated(variables, [moments, moments]), x, train=False)
    assert np.isfinite(logits).all() and np.isfinite(again).all()


def test_nothing_is_transferred_inside_of_traced_functions():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2)).astype(np.float32))
    key = jax.random.key(0)
    flow = VECTORS.flow(quick_jit(VECTORS.init)(key, x)).with_bounds()
    functions = [
        lambda flow, x, key: flow.inverse(flow.forward(x), ir.Anderson(1e-5, 1e-5))[0],
        lambda flow, x, key: flow.log_prob(x, ir.TruncatedSeries(2), key=key),
        lambda flow, x, key: flow.sample(key, 2)[0],
    ]
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.transfer_guard("disallow"))
        for function in functions:
            assert jax.jit(function)(flow, x, key).shape[0] in (2, 3)
