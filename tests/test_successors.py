"""Stages of i-ResNets' successors: LipSwish, CLipSwish, GroupSort, dense concatenation."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import in_double, norms, quick_jit
from helpers import matrix_with_singular_values, rest_slow, sample_jacobians

import iresnet_jax as ir

BETAS = [0.0, 1e-30, 1e-3, 0.5, 1.0, 7.0, 1e4, 1e30, -2.0]


def slope(s):
    """f(s) = σ(s) + s·σ′(s), in extended precision."""
    s = np.asarray(s, np.longdouble)
    sigma = 1.0 / (1.0 + np.exp(-s))
    return sigma + s * sigma * (1.0 - sigma)


# Constants


def test_the_slope_of_swish_is_below_its_bound_everywhere():
    """On a grid of step h, plus h²/8·sup|f″|; far out, f is within (1 + |s|)e^−|s| of 0 or 1.

    f″ = 3σ″ + s·σ‴ is below 1: |σ″| < 0.1, |σ‴| ≤ 1/8, and |s·σ‴| < 0.7 since |σ‴| < e^−|s|.
    """
    step = 1e-3
    grid = slope(np.arange(-30.0, 30.0 + step, step))
    highest = float(grid.max()) + step**2 / 8 + 1e-15
    assert 1.0 + 31 * math.exp(-30) < highest < 1.09984
    np.testing.assert_allclose(grid + grid[::-1], 1.0, atol=1e-15)  # f(−s) = 1 − f(s)
    low, high = ir.LipSwish(jnp.ones(())).slopes()
    assert low <= (1.0 - 1.09984) / 1.1 and 1.09984 / 1.1 <= high <= 1.0
    both = math.hypot(1.09984, 0.09984) / 1.1
    bound = ir.CLipSwish(jnp.ones(())).lipschitz_bound()
    assert both / 1.004 * (1 + 1e-12) <= bound <= 1.0
    found = float(np.hypot(grid, 1.0 - grid).max()) / 1.1
    assert bound - 1e-4 <= found / 1.004 <= bound and found > 1.0039  # nearly attained


@jax.jit
def slopes_of(stage, x):
    return jax.vmap(jax.jacobian(lambda v: stage(v[None])[0]))(x)


@pytest.mark.parametrize("beta", BETAS)
def test_slopes_are_as_stated_for_every_beta(x64, beta):
    s = np.concatenate([np.linspace(-30, 30, 2001), [2.39935728, -2.39935728, 1e4, -1e4]])
    x = jnp.asarray(s / beta if beta else s)[:, None]
    for stage in (ir.LipSwish(jnp.asarray(beta)), ir.CLipSwish(jnp.asarray(beta))):
        jacobians = np.asarray(slopes_of(stage, x))
        assert np.linalg.norm(jacobians, axis=(1, 2)).max() <= stage.lipschitz_bound()
        if isinstance(stage, ir.LipSwish):
            low, high = stage.slopes()
            assert low <= jacobians.min() and jacobians.max() <= high


# Rounding


def hostile(dtype, beta):
    """Magnitudes of the whole range of a type, and around where swish bends."""
    rng, info = np.random.default_rng(0), jnp.finfo(dtype)
    top = min(float(np.log10(float(info.max))) - 1, 37)
    sizes = 10.0 ** rng.uniform(-top, top, 20_000)
    bend = rng.normal(size=20_000) * 20.0
    bent = bend / beta if beta and 1e-10 < abs(beta) < 1e10 else bend
    x = np.concatenate([sizes * rng.choice([-1.0, 1.0], len(sizes)), bent, [0.0]])
    return x.astype(np.float32).astype(dtype) if dtype == jnp.bfloat16 else x.astype(dtype)


def exact_swish(x, beta, divisor):
    x, beta = np.asarray(x, np.longdouble), np.longdouble(beta)
    with np.errstate(over="ignore", under="ignore"):
        return x / (1.0 + np.exp(-beta * x)) / np.longdouble(divisor)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(
    "dtype", rest_slow([jnp.float32, jnp.float64, jnp.bfloat16], jnp.float32, jnp.bfloat16)
)
def test_rounding_is_within_its_bound(x64, dtype, beta):
    x = hostile(dtype, beta)
    stored = jnp.asarray(beta, dtype)
    used = float(stored)
    unit = float(jnp.finfo(dtype).eps) / 2
    wide = np.asarray(x, np.float64)
    kind = np.float64 if dtype == jnp.float64 else np.float32
    no_error = jnp.zeros(len(x), kind)
    one, two = np.longdouble(1.1), np.longdouble("1.1") * np.longdouble("1.004")
    for stage, exact in [
        (ir.LipSwish(stored), exact_swish(wide, used, one)[:, None]),
        (
            ir.CLipSwish(stored),
            np.stack([exact_swish(v, used, two) for v in (wide, -wide)], axis=1),
        ),
    ]:
        out = stage(jnp.asarray(x)[:, None])
        assert out.dtype == dtype
        off = np.linalg.norm(np.asarray(out, np.float64) - exact, axis=1)
        bound = stage.rounding(jnp.asarray(x)[:, None], no_error, ir.Arithmetic(unit))
        bound = np.asarray(bound, np.float64)
        assert (off <= bound).all()
        plain = np.isfinite(bound) & (np.abs(wide) < 1e15) & (np.abs(wide) > 1e-8)
        assert (bound[plain] <= 40 * unit * np.abs(wide[plain])).all()


def test_of_a_beta_that_is_not_finite_nothing_is_stated():
    x, no_error = jnp.ones((3, 2)), jnp.zeros(3)
    for kind in (ir.LipSwish, ir.CLipSwish):
        for beta in (math.nan, math.inf):
            bound = rounding_of(kind(jnp.asarray(beta)), x, no_error)
            assert bool(jnp.isinf(bound).all())


@jax.jit
def rounding_of(stage, x, error):
    return stage.rounding(x, error, ir.Arithmetic(2.0**-24))


def test_an_error_of_the_input_is_passed_on():
    rng = np.random.default_rng(1)
    x = np.float32(rng.normal(size=(50, 6)) * 10.0 ** rng.uniform(-3, 3, (50, 1)))
    moved = np.float32(x + rng.normal(size=x.shape) * 1e-3)
    error = jnp.asarray(np.nextafter(norms(moved.astype(float) - x), np.inf), jnp.float32) * 1.001
    weights = ir.bounded_weights(jnp.asarray([0.3, -1.0]))
    for stage in (
        ir.LipSwish(jnp.asarray(3.0)),
        ir.CLipSwish(jnp.asarray([0.1, 1.0, 3.0, 9.0, -1.0, 2.0])),
        ir.GroupSort(3),
        ir.DenseConcatenation(ir.Sequential((ir.LipSwish(jnp.asarray(2.0)),)), weights),
    ):
        bound = np.asarray(rounding_of(stage, x, error))
        with jax.enable_x64(True):
            double = in_double(stage)
            exact = np.asarray(jax.jit(double)(moved.astype(np.float64)))
        assert (norms(np.asarray(stage(jnp.asarray(x)), np.float64) - exact) <= bound).all()


# GroupSort


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_groups_are_sorted_and_norms_are_kept(size):
    x = np.random.default_rng(0).normal(size=(4, 2, 3, 6)).astype(np.float32)
    y = ir.GroupSort(size)(jnp.asarray(x))
    groups = x.reshape(4, 2, 3, -1, size)
    np.testing.assert_array_equal(y, np.sort(groups, axis=-1)[..., ::-1].reshape(x.shape))
    jacobians = sample_jacobians(ir.GroupSort(size), jnp.asarray(x)).reshape(4, 36, 36)
    squares = jacobians @ jacobians.swapaxes(1, 2)
    np.testing.assert_array_equal(squares, np.broadcast_to(np.eye(36), squares.shape))
    error = jnp.asarray([0.0, 1e-30, 1.0, jnp.inf])
    bound = ir.GroupSort(size).rounding(jnp.asarray(x), error, ir.Arithmetic(2.0**-24))
    np.testing.assert_allclose(bound, error, atol=1e-35)


def test_equal_and_close_entries_are_moved_no_further_apart(x64):
    rng = np.random.default_rng(1)
    x = np.round(rng.normal(size=(300, 6)))  # many ties
    y = x + np.where(rng.uniform(size=x.shape) < 0.5, 0.0, rng.normal(size=x.shape) * 1e-3)
    for size in (2, 3, 6):
        stage = ir.GroupSort(size)
        moved = norms(np.asarray(stage(jnp.asarray(x))) - np.asarray(stage(jnp.asarray(y))))
        assert (moved <= norms(x - y) * (1 + 1e-14)).all()
        jacobians = sample_jacobians(stage, jnp.asarray(x))
        assert np.linalg.norm(jacobians, 2, axis=(1, 2)).max() <= 1 + 1e-12


@pytest.mark.parametrize("size", [0, -2])
def test_groups_of_nothing_are_refused(size):
    with pytest.raises(ValueError, match=f"group_size must be ≥ 1; got {size}"):
        ir.GroupSort(size)


def test_wrong_sizes_are_refused_by_name():
    with pytest.raises(ValueError, match=r"groups of 2 needs .* got an array of shape \(4, 3\)"):
        ir.GroupSort()(jnp.ones((4, 3)))
    odd = ir.nn.VectorFlow(dim=2, depth=1, features=(3,), activation="maxmin")
    with pytest.raises(ValueError, match=r"groups of 2 needs .* shape \(1, 3\)"):
        jax.eval_shape(odd.init, jax.random.key(0), jnp.ones((4, 2)))
    with pytest.raises(ValueError, match=r"LipSwish with β of shape \(2,\) cannot act"):
        ir.LipSwish(jnp.ones(2))(jnp.ones((4, 3)))
    with pytest.raises(ValueError, match=r"CLipSwish with β of shape \(\) cannot act"):
        ir.CLipSwish(jnp.ones(()))(jnp.ones(4))
    inner = ir.Sequential((ir.Activation("elu"),))
    with pytest.raises(ValueError, match=r"two weights, \[2\]; got shape \(3,\)"):
        ir.DenseConcatenation(inner, jnp.ones(3))(jnp.ones((4, 3)))
    pixels = ir.Sequential((lambda x: x[:, :1],))
    with pytest.raises(ValueError, match="differs in its last axis alone"):
        ir.DenseConcatenation(pixels, jnp.ones(2))(jnp.ones((4, 3, 3, 1)))


# Dense concatenation


@pytest.mark.parametrize("raw", [(0.0, 0.0), (1.0, -30.0), (-80.0, 20.0), (1e30, 1e30), (-50, -60)])
def test_weights_are_bounded_after_rounding(raw):
    for dtype in (jnp.float32, jnp.bfloat16):
        weights = np.asarray(ir.bounded_weights(jnp.asarray(raw, dtype)), np.float64)
        lowest = 0.99 if dtype == jnp.float32 else 0.9
        assert lowest <= math.hypot(*weights) <= 1.0
    none = ir.bounded_weights(jnp.asarray([-200.0, -200.0]))
    assert not bool(jnp.isfinite(none).any())


def concatenation(seed, weights, *, norm=1.0, tail=None):
    rng = np.random.default_rng(seed)
    kernel = matrix_with_singular_values(rng, 4, 5, [norm, norm, 0.3 * norm, 0.1])
    layer = ir.Affine(ir.DenseOperator(jnp.asarray(kernel, jnp.float32)), jnp.ones(5))
    stages = (layer,) if tail is None else (layer, tail)
    return ir.DenseConcatenation(ir.Sequential(stages), jnp.asarray(weights, jnp.float32))


@pytest.mark.parametrize("weights", [(0.6, 0.8), (1.0, 0.0), (-0.6, -0.8), (0.1, 3.0)])
def test_its_constant_is_that_of_the_steepest_direction(x64, weights):
    linear = in_double(concatenation(0, weights, norm=0.9))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)))
    steepest = np.linalg.norm(sample_jacobians(linear, x), 2, axis=(1, 2)).max()
    np.testing.assert_allclose(linear.lipschitz_bound(), steepest, rtol=1e-7)
    assert steepest <= linear.lipschitz_bound() * (1 + 1e-14)
    bent = in_double(concatenation(0, weights, norm=0.9, tail=ir.LipSwish(jnp.asarray(4.0))))
    slopes = np.linalg.norm(sample_jacobians(bent, 9.0 * x), 2, axis=(1, 2))
    assert slopes.max() <= bent.lipschitz_bound()


@pytest.mark.parametrize("precision", rest_slow(["float32", "bfloat16"], "bfloat16"))
def test_rounding_of_a_whole_branch_is_within_its_bound(precision):
    rng = np.random.default_rng(0)
    kernel = matrix_with_singular_values(rng, 18, 4, [0.9] * 4)
    last = ir.Affine(ir.DenseOperator(jnp.asarray(kernel, jnp.float32)))
    weights = ir.bounded_weights(jnp.asarray([1.0, 0.5]))
    stages = (
        concatenation(1, weights, tail=ir.LipSwish(jnp.asarray(2.0))),
        ir.CLipSwish(jnp.asarray(0.7)),
        ir.GroupSort(),
        last,
    )
    branch = ir.Sequential(stages, precision)
    x = np.float32(rng.normal(size=(40, 4)) * 10.0 ** rng.uniform(-3, 3, (40, 1)))
    bound = np.asarray(jax.jit(branch.rounding_bound)(x))
    with jax.enable_x64(True):
        reference = ir.Sequential(in_double(ir.stages.as_used(branch)).stages)
        exact = np.asarray(quick_jit(lambda x: reference(x))(jnp.asarray(x, jnp.float64)))
    off = norms(np.asarray(branch(jnp.asarray(x)), np.float64) - exact)
    assert (off <= bound).all() and (bound < 1e4 * off.max()).all()
    assert branch.silent_about_rounding() == []
