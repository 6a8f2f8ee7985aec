"""Rounding bounds of branches, and the error bounds of inverses that rest on them: in float64."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from activation_cases import reference
from cases import norms, quick_jit
from helpers import rest_slow

from iresnet_jax import (
    Activation,
    Affine,
    Anderson,
    FixedPointIteration,
    Sequential,
    fixed_point_inverse,
    layers_by_path,
    with_layer_bounds,
)
from iresnet_jax.activations import ACTIVATIONS
from iresnet_jax.bounds import layer_upper_bound
from iresnet_jax.operators import DenseOperator, conv_operator, with_kernel
from iresnet_jax.stages import as_used

UNIT = {np.float32: 2.0**-24, np.float64: 2.0**-53}


def in_double(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), tree)


def dense_operators(rng):
    widths = [6, 40, 24, 6]
    shapes = itertools.pairwise(widths)
    return [DenseOperator(jnp.asarray(rng.normal(size=s), jnp.float32)) for s in shapes]


def conv_operators(rng):
    sizes = [(3, 3, 2, 16), (1, 1, 16, 16), (3, 3, 16, 2)]
    kernels = [jnp.asarray(rng.normal(size=size), jnp.float32) for size in sizes]
    return [conv_operator(kernel, (4, 4)) for kernel in kernels]


DOMAINS = {"dense": (6,), "conv": (4, 4, 2)}
OPERATORS = {"dense": dense_operators, "conv": conv_operators}


def random_branch(seed, kind, activation, lipschitz, attached=True):
    """Layers of equal norm whose product is ``lipschitz``, and the bound on it."""
    rng = np.random.default_rng(seed)
    stages = []
    for operator in OPERATORS[kind](rng):
        scale = lipschitz ** (1 / 3) / layer_upper_bound(operator)
        operator = with_kernel(operator, operator.kernel * np.float32(scale))
        bias = jnp.asarray(0.5 * rng.normal(size=operator.kernel.shape[-1]), jnp.float32)
        stages += [Activation(activation), Affine(operator, bias)]
    branch = Sequential(tuple(stages))
    bound = branch.lipschitz_bound()
    return (attach(branch) if attached else branch), bound


def attach(branch):
    layers = layers_by_path(branch)
    return with_layer_bounds(branch, {at: layer.lipschitz_bound() for at, layer in layers.items()})


def inputs(seed, kind, count=8):
    """Samples of very different sizes, one of them zero."""
    rng = np.random.default_rng(seed)
    scales = 10.0 ** rng.uniform(-3, 2, size=(count, *[1] * len(DOMAINS[kind])))
    scales[0] = 0.0
    return jnp.asarray(scales * rng.normal(size=(count, *DOMAINS[kind])), jnp.float32)


# Activations


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_in_bfloat16_are_computed_to_the_stated_ulps(name):
    """All of its finite numbers."""
    x = np.arange(2**16, dtype=np.uint16).view(jnp.bfloat16)
    x = x[np.isfinite(x.astype(np.float32))]
    computed = np.asarray(jax.jit(ACTIVATIONS[name].function)(jnp.asarray(x)))
    with np.errstate(over="ignore"):  # of exponentials, where the answer is 0
        exact = reference(name, x.astype(np.float64))
    relative, absolute = ACTIVATIONS[name].ulps
    allowed = 2.0**-8 * (relative * np.abs(exact) + absolute) + 1024 * np.finfo(np.float32).tiny
    assert computed.dtype == jnp.bfloat16
    assert (np.abs(computed.astype(np.longdouble) - exact) <= allowed).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_computed_to_the_stated_ulps(name, dtype, x64):
    rng = np.random.default_rng(0)
    magnitudes = rng.choice([-1, 1], 200_000) * 2.0 ** rng.uniform(-30, 7, 200_000)
    x = np.concatenate([magnitudes, rng.uniform(-100, 100, 100_000)]).astype(dtype)
    computed = np.asarray(jax.jit(ACTIVATIONS[name].function)(jnp.asarray(x)))
    exact = reference(name, x)
    relative, absolute = ACTIVATIONS[name].ulps
    allowed = UNIT[dtype] * (relative * np.abs(exact) + absolute) + 1024 * np.finfo(dtype).tiny
    assert computed.dtype == dtype
    assert (np.abs(computed - exact) <= allowed).all()


# Branches


bound_of = quick_jit(lambda branch, x: branch.rounding_bound(x))


@pytest.mark.parametrize("attached", rest_slow([True, False], True))
@pytest.mark.parametrize("activation", rest_slow(ACTIVATIONS, "elu", "sin", "lipswish"))
@pytest.mark.parametrize("kind", OPERATORS)
def test_rounding_of_a_branch_is_within_its_bound(kind, activation, attached):
    @quick_jit
    def evaluate(branch, x):
        return branch(x), branch.rounding_bound(x)

    for seed in range(2):
        branch, _ = random_branch(seed, kind, activation, 0.9, attached)
        x = inputs(seed, kind)
        computed, bound = evaluate(branch, x)
        with jax.enable_x64(True):
            exact = jax.jit(lambda b, x: b(x))(in_double(branch), in_double(x))
        error = norms(np.asarray(computed, np.float64) - np.asarray(exact))
        assert (error <= bound).all()
        assert (np.asarray(bound) < (1e-3 if attached else 1e-2) * (1 + norms(x))).all()


def test_an_activation_that_is_left_out_rounds_nothing():
    branch, _ = random_branch(0, "conv", "sin", 0.9)
    idle = dataclasses.replace(branch.stages[0], active=jnp.zeros(()))
    x, rest = inputs(0, "conv"), branch.stages[1:]
    bounds = [bound_of(Sequential(stages), x) for stages in ((idle, *rest), rest)]
    np.testing.assert_array_equal(*bounds)
    assert (bound_of(branch, x) != bounds[0])[1:].all()


def test_attached_bounds_tighten():
    branch, _ = random_branch(0, "conv", "elu", 0.9)
    loose, _ = random_branch(0, "conv", "elu", 0.9, attached=False)
    x = inputs(0, "conv")
    assert (bound_of(branch, x) < 0.7 * bound_of(loose, x)).all()


@pytest.mark.parametrize("precision", ["tensorfloat32", "bfloat16"])
def test_reduced_precision_has_the_bound_of_its_arithmetic(precision):
    rng = np.random.default_rng(0)
    layers = [Affine(DenseOperator(jnp.asarray(rng.normal(size=(6, 6)), jnp.float32)))] * 2
    branch = Sequential((layers[0], Activation("tanh"), layers[1]), precision)
    x = inputs(0, "dense")
    with jax.enable_x64(True):
        exact = Sequential(in_double(as_used(branch).stages))(in_double(x))
    error = norms(np.asarray(branch(x), np.float64) - np.asarray(exact))
    bound = np.asarray(branch.rounding_bound(x))
    full = np.asarray(Sequential(branch.stages).rounding_bound(x))
    assert (error <= bound).all() and (bound >= full).all() and np.isfinite(bound).all()
    assert (bound[1:] > 50 * full[1:]).all()


def test_too_many_products_for_bfloat16_have_no_bound():
    wide = Affine(DenseOperator(jnp.ones((64, 64)) / 64))
    assert np.isinf(Sequential((wide,), "bfloat16").rounding_bound(jnp.ones((2, 64)))).all()


def test_samples_are_bounded_each_for_itself():
    branch, _ = random_branch(0, "dense", "tanh", 0.9)
    x = inputs(0, "dense").at[3, 1].set(jnp.nan)
    bound = np.asarray(bound_of(branch, x))
    assert np.isinf(bound[3]) and np.isfinite(np.delete(bound, 3)).all()
    alone = bound_of(branch, x[5:6])
    np.testing.assert_allclose(bound[5:6], alone, rtol=1e-5)


def test_an_unknown_operator_has_no_rounding_bound():
    @dataclasses.dataclass(frozen=True)
    class Doubling:
        kernel: jax.Array

        def __call__(self, x):
            return 2.0 * x

    with pytest.raises(TypeError, match="No rounding bound is known for Doubling"):
        Sequential((Affine(Doubling(jnp.ones((2, 2)))),)).rounding_bound(jnp.ones((1, 2)))


# Inverses: error against float64


@pytest.mark.parametrize("kind", rest_slow(OPERATORS, "dense"))
def test_error_of_an_inverse_is_within_its_bound(kind):
    """From a loose tolerance to one that is not met, where rounding alone is left."""

    @quick_jit
    def invert(branch, y, bound):
        solvers = FixedPointIteration(0.1, 0.0), FixedPointIteration(1e-9, 0.0), Anderson(1e-5, 0.0)
        return [fixed_point_inverse(branch, y, solver, lipschitz=bound) for solver in solvers]

    @quick_jit
    def invert_in_double(branch, y):
        return fixed_point_inverse(branch, y, FixedPointIteration(1e-14, 1e-14, 10_000))

    for seed, (lipschitz, activation) in enumerate([(0.3, "tanh"), (0.9, "sin"), (0.99, "elu")]):
        branch, bound = random_branch(seed, kind, activation, lipschitz)
        y = inputs(seed, kind)
        with jax.enable_x64(True):
            exact, info = invert_in_double(in_double(branch), in_double(y))
            assert bool(info.converged.all())
        for found, info in invert(branch, y, bound):
            error = norms(np.asarray(found, np.float64) - np.asarray(exact))
            assert (error <= info.error_bound).all() and np.isfinite(info.error_bound).all()


# Tolerances as error bounds


@pytest.mark.parametrize("solver", [FixedPointIteration, Anderson])
def test_an_error_tolerance_is_what_the_bound_meets(solver):
    branch, bound = random_branch(0, "conv", "elu", 0.9)
    y = draw(1, (6, 4, 4, 2))
    invert = quick_jit(
        lambda branch, y: fixed_point_inverse(
            branch, y, solver(error_tolerance=1e-2), lipschitz=bound
        )
    )
    found, info = invert(branch, y)
    assert bool(info.converged.all()) and (info.error_bound <= 1e-2 * (1 + 1e-5)).all()
    with jax.enable_x64(True):
        solver = FixedPointIteration(1e-13, 1e-13, 1000)
        exact, _ = fixed_point_inverse(in_double(branch), in_double(y), solver)
    assert (norms(np.asarray(found, np.float64) - np.asarray(exact)) <= 1e-2).all()
    residual, rounding = np.asarray(info.residual), np.asarray(info.rounding)
    before = residual / (1e-2 * (1 - bound) - rounding)
    assert (before > 1e-3).all(), "it is meant to stop as soon as the bound is met"


def test_an_error_tolerance_below_the_rounding_floor_is_refused_or_reported():
    branch, bound = random_branch(0, "conv", "elu", 0.9)
    y = draw(1, (3, 4, 4, 2)).at[1].multiply(50.0)
    solver = FixedPointIteration(error_tolerance=3e-3)
    with pytest.raises(ValueError, match=r"error_tolerance 0.003 is below .* of sample 1 cannot"):
        fixed_point_inverse(branch, y, solver, lipschitz=bound)
    _, info = quick_jit(lambda b, y: fixed_point_inverse(b, y, solver, lipschitz=bound))(branch, y)
    np.testing.assert_array_equal(info.converged, [True, False, True])
    assert float(info.error_bound[1]) > 3e-3
    assert int(info.num_steps[1]) < 50, "it is meant to stop where rounding is all that is left"


def draw(seed, shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)
