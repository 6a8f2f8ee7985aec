"""Every bijection by one table: inverse, log-determinant, certificate, error of its inverse."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bijection_cases import BRANCHED, NAMES, bounded, cases
from cases import in_double, norms, quick_jit
from helpers import rest_slow, sample_jacobians

from iresnet_jax import Error, Exact, FixedPointIteration, Roulette, TruncatedSeries, block_keys

KEY = jax.random.key(0)
#: What repeats another case, on images or by one more composition.
REPEATED = ["actnorm of images", "mixing of images", "residual of images", "monotone of images"]
REPEATED += ["chain", "nested chain"]
REPEATED += ["stack of residuals", "stack of chains", "stack that recomputes"]
every_bijection = pytest.mark.parametrize(
    "name", rest_slow(NAMES, *(name for name in NAMES if name not in REPEATED))
)
TIGHT = FixedPointIteration(1e-14, 1e-14, 300)

#: Tolerances of inverses, with how far their outputs are off, and the most telling bijections.
TELLING = {
    (1e-2, 1e-4): [name for name in NAMES if name not in REPEATED],
    (1e-6, 0.0): ["residual", "monotone", "stack with mixing"],
    (1e-6, 1e-4): [],
}
OFF = [
    pytest.param(*off, name, marks=[] if name in telling else pytest.mark.slow)
    for off, telling in TELLING.items()
    for name in NAMES
]

#: What is certified of them is their largest slope, not a bound above it.
SHARP = ["center", "logit", "logit of its own alpha", "squeeze", "actnorm of vectors"]
SHARP += ["mixing of vectors", "mixing of images"]

SERIES = TruncatedSeries(2, probe="gaussian")
ROULETTE = Roulette(0.8, lipschitz=0.8, probe="gaussian")

# Compiled once for every bijection, and shared by the tests.
forward = quick_jit(lambda bijection, x: bijection.forward(x))


@functools.partial(quick_jit, static_argnames=("tolerance", "shape"))
def inverted(bijection, y, distance, *, tolerance, shape):
    """The inverse of ``y``, which is ``distance`` off, and its error."""
    size = jnp.sqrt(jnp.sum(y**2, axis=range(1, y.ndim))) * (1 + 1e-5)
    found, info = bijection.inverse(y, FixedPointIteration(tolerance, tolerance))
    return found, bijection.inverse_error(Error(distance, size), info, shape)


@every_bijection
def test_the_inverse_returns_the_input_and_shapes_are_as_stated(x64, name):
    case = cases()[name]
    bijection, x = in_double(case.bijection), in_double(case.draw(4))

    @quick_jit
    def there_and_back(bijection, x):
        y = bijection.forward(x)
        return y, bijection.inverse(y, TIGHT)

    y, (back, info) = there_and_back(bijection, x)
    assert y.shape == (4, *case.bijection.out_shape(case.shape))
    np.testing.assert_allclose(back, x, atol=1e-12)
    if bijection.num_solves:
        assert {field.shape for field in info} == {(bijection.num_solves, 4)}
        assert bool(info.converged.all())
    else:
        assert info is None


@pytest.mark.parametrize(
    "name", rest_slow(NAMES, "residual", "monotone", "chain of squeeze and stacks")
)
def test_an_empty_batch_stays_one(name):
    case = cases()[name]
    y = case.bijection.forward(jnp.asarray(case.draw(0)))
    x, info = case.bijection.inverse(y)
    assert x.shape == (0, *case.shape)
    assert info is None or info.converged.shape == (case.bijection.num_solves, 0)


@every_bijection
def test_log_det_is_that_of_the_full_jacobian(x64, name):
    case = cases()[name]
    bijection, x = in_double(case.bijection), in_double(case.draw(3))
    y, log_det = quick_jit(lambda b, x: b.forward_and_log_det(x, Exact()))(bijection, x)
    np.testing.assert_allclose(y, forward(bijection, x), rtol=1e-13, atol=1e-13)
    jacobians = sample_jacobians(bijection.forward, x)
    np.testing.assert_allclose(log_det, np.linalg.slogdet(jacobians)[1], rtol=1e-10, atol=1e-12)


#: One of a kind by the roulette, which costs twice the series, and takes its keys as that does.
DRAWN = [
    *(
        pytest.param(
            name, SERIES, id=f"{name}-series", marks=[pytest.mark.slow] * (name in REPEATED)
        )
        for name in BRANCHED
    ),
    *(
        pytest.param(name, ROULETTE, id=f"{name}-roulette", marks=[] if few else pytest.mark.slow)
        for name in BRANCHED
        for few in [name in ("monotone", "stack of stacks")]
    ),
]


@pytest.mark.parametrize(("name", "estimator"), DRAWN)
def test_every_branch_draws_by_its_own_row_of_keys(name, estimator):
    case = cases()[name]
    x, count = jnp.asarray(case.draw(2)), case.bijection.num_branches
    evaluate = quick_jit(lambda keys: case.bijection.forward_and_log_det(x, estimator, keys)[1])
    keys = block_keys(KEY, count, 2)
    log_det = evaluate(keys)
    others = jax.random.split(jax.random.key(1), 2)
    for i in range(count):
        changed = evaluate(keys.at[i].set(others))
        assert bool((changed != log_det).all())
        second_alone = evaluate(keys.at[i, 1].set(others[1]))
        np.testing.assert_array_equal(second_alone, [log_det[0], changed[1]])


@pytest.mark.parametrize(
    "name",
    rest_slow(["chain", "stack of stacks", "chain of squeeze and stacks"], "stack of stacks"),
)
def test_one_key_a_branch_stands_for_a_key_a_sample_by_its_index(name):
    case = cases()[name]
    x, keys = jnp.asarray(case.draw(2)), jax.random.split(KEY, case.bijection.num_branches)
    of_samples = jax.vmap(lambda key: jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(2)))
    evaluate = quick_jit(lambda keys: case.bijection.forward_and_log_det(x, SERIES, keys)[1])
    np.testing.assert_array_equal(evaluate(keys), evaluate(of_samples(keys)))


@every_bijection
def test_no_two_points_prove_the_certificate_wrong(x64, name):
    case = cases()[name]
    certificate = case.bijection.certify("it", case.shape)
    assert certificate.certified and len(certificate.branches) == case.bijection.num_branches
    x = case.draw(24).astype(np.float64)
    if case.unit_interval:
        x[:2], x[2:4] = np.round(x[:2]), 0.5  # where the logit is steepest, and flattest
    x[1::2] = np.clip(x[::2] + 1e-5 * case.draw(12, seed=1), 0.0 if case.unit_interval else -9, 1.0)
    y = np.asarray(forward(in_double(case.bijection), jnp.asarray(x)))
    ratios = []
    for i, j in itertools.combinations(range(24), 2):
        moved = np.linalg.norm(x[i] - x[j])
        ratios.append(np.linalg.norm(y[i] - y[j]) / moved)
    assert max(ratios) <= certificate.forward * (1 + 1e-9)
    assert 1.0 / min(ratios) <= certificate.inverse * (1 + 1e-9)
    jacobians = sample_jacobians(in_double(case.bijection).forward, jnp.asarray(x[::2]))
    slopes = np.linalg.svd(jacobians.reshape(12, x[0].size, -1), compute_uv=False)
    assert slopes.max() <= certificate.forward * (1 + 1e-9)
    assert 1.0 / slopes.min() <= certificate.inverse * (1 + 1e-9)
    if name in SHARP:
        np.testing.assert_allclose(slopes.max(), certificate.forward, rtol=1e-4)
        np.testing.assert_allclose(1.0 / slopes.min(), certificate.inverse, rtol=1e-4)


@pytest.mark.parametrize(("tolerance", "size", "name"), OFF)
def test_the_error_of_an_inverse_is_within_its_bound(name, tolerance, size):
    """Of outputs that are off by about ``size``, and rounded to single precision."""
    case = cases()[name]
    bijection, certificate = bounded(name)
    with jax.enable_x64(True):
        double, x = in_double(bijection), in_double(case.draw(60))
        x = x.at[0].set(0.5 if case.unit_interval else 0.0)
        y = np.asarray(forward(double, x))
    off = size * np.random.default_rng(1).normal(size=y.shape)
    computed = (y + off).astype(np.float32)
    distance = np.nextafter(norms(computed - y).astype(np.float32), np.float32(np.inf))

    found, error = inverted(bijection, computed, distance, tolerance=tolerance, shape=case.shape)
    actual = norms(np.asarray(found, np.float64) - np.asarray(x))
    assert (actual <= error.bound).all()
    assert (norms(found) <= error.norm).all()
    solves = 3 * max(bijection.num_solves, 1) * (tolerance + 1e-5) * (1 + norms(x).max())
    allowed = certificate.inverse * (distance + (solves if bijection.num_solves else 1e-5))
    assert (error.bound <= 2 * allowed).all()


@every_bijection
def test_inverses_contract_once_their_bounds_are_attached(name):
    case = cases()[name]
    bijection, certificate = bounded(name)
    assert case.bijection.contracts == (case.bijection.num_branches == 0)
    assert bijection.contracts
    told = [float(b.lipschitz) for part in bijection.blocks() for b in residuals(part)]
    stated = [branch.lipschitz for branch in certificate.branches]
    assert len(told) == bijection.num_branches == len(bijection.solve_names("it"))
    np.testing.assert_allclose(told, stated, rtol=1e-6)
    assert (np.array(told) >= stated).all()


def residuals(part):
    """The residual blocks of an unstacked part."""
    if hasattr(part, "branch"):
        return [part]
    if hasattr(part, "links"):
        return [r for link in part.links for r in residuals(link)]
    return [r for inner in part.unstacked() for r in residuals(inner)] if part.num_branches else []
