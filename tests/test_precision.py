"""Reduced precision inside branches, and recomputation in the backward pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import data, image_flow, quick_jit
from helpers import inner_jaxprs

from iresnet_jax import Affine, Exact, Roulette, Sequential, TruncatedSeries, nn
from iresnet_jax.operators import DenseOperator

KEY = jax.random.key(0)
MODEL = image_flow((8, 8, 1), depths=(2,), features=4)


@pytest.fixture(scope="module")
def variables():
    return quick_jit(MODEL.init)(KEY, data(MODEL, 32, seed=0))


@pytest.fixture(scope="module")
def value_and_gradient(variables):
    """Of the mean of −log p under settings of the model; each is computed once."""
    x = data(MODEL, 8, seed=1)

    @functools.cache
    def compute(**settings):
        def loss(params):
            flow = MODEL.clone(**settings).flow({**variables, "params": params})
            return -flow.log_prob(x, TruncatedSeries(4), key=KEY).mean()

        with nn.frozen_vectors():
            return quick_jit(jax.value_and_grad(loss))(variables["params"])

    return compute


def primitive_outputs(function, *args):
    """Types of all intermediate values, those inside loops and calls included."""
    types = set()

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            types.update((equation.primitive.name, v.aval.dtype) for v in equation.outvars)
            for inner in inner_jaxprs(equation):
                visit(inner)

    visit(jax.make_jaxpr(function)(*args).jaxpr)
    return types


def test_bfloat16_computes_the_branch_in_bfloat16_and_all_else_in_float32(variables):
    x, estimator = data(MODEL, 2, seed=1), TruncatedSeries(3)
    flow = jax.eval_shape(MODEL.clone(precision="bfloat16").flow, variables)
    latents, log_det = jax.eval_shape(
        lambda flow, x: flow.forward_and_log_det(x, estimator, key=KEY), flow, x
    )
    assert {z.dtype for z in (*latents, log_det)} == {jnp.dtype("float32")}
    types = primitive_outputs(lambda flow, x: flow.log_prob(x, estimator, key=KEY), flow, x)
    products = {dtype for name, dtype in types if name == "dot_general"}
    assert products == {jnp.dtype("bfloat16")}


@pytest.mark.slow
def test_bfloat16_is_close_to_float32(variables):
    x = data(MODEL, 8, seed=1)
    exactly, nearly = (
        quick_jit(lambda v, x, model=model: model.flow(v).log_prob(x, Exact()))(variables, x)
        for model in (MODEL, MODEL.clone(precision="bfloat16"))
    )
    assert 0.0 < np.abs(exactly - nearly).max() < 0.02 * np.abs(exactly).max()


def test_the_state_of_training_does_not_depend_on_the_precision(variables):
    states = [
        MODEL.clone(precision=precision).advance(variables)[1]
        for precision in ("float32", "bfloat16")
    ]
    for a, b in zip(*map(jax.tree.leaves, states), strict=True):
        assert a.dtype == b.dtype == jnp.float32
        np.testing.assert_array_equal(a, b)


def test_gradients_in_bfloat16_are_float32_and_point_the_same_way(value_and_gradient):
    (_, exactly), (_, nearly) = value_and_gradient(), value_and_gradient(precision="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(nearly)} == {jnp.dtype("float32")}
    a, b = (jnp.concatenate([v.ravel() for v in jax.tree.leaves(g)]) for g in (exactly, nearly))
    assert a @ b > 0.99 * jnp.linalg.norm(a) * jnp.linalg.norm(b)


def test_bounds_are_of_the_weights_as_used():
    """1 + 2⁻⁸ + 2⁻⁹ is 1 + 2⁻⁷ in bfloat16."""
    weights = Affine(DenseOperator(jnp.full((1, 1), 1.0 + 2.0**-8 + 2.0**-9)))
    bound = Sequential((weights,), precision="bfloat16").lipschitz_bound()
    assert 1.0 + 2.0**-7 <= bound < 1.0 + 2.0**-7 + 1e-9
    assert Sequential((weights,)).lipschitz_bound() < 1.0 + 2.0**-7


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match=r"precision must be one of float32.*got 'float16'"):
        Sequential((), precision="float16")


@pytest.mark.slow
def test_recomputation_changes_no_value_and_no_gradient(value_and_gradient):
    plain, again = value_and_gradient(), value_and_gradient(remat=True)
    for a, b in zip(*map(jax.tree.leaves, (plain, again)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


SERIES, ROULETTE = TruncatedSeries(2, 2), Roulette(0.9, lipschitz=0.9)


@pytest.mark.parametrize(
    ("remat", "estimator"),
    [
        (True, SERIES),
        (False, ROULETTE),
        pytest.param(False, SERIES, marks=pytest.mark.slow),
        pytest.param(True, ROULETTE, marks=pytest.mark.slow),
    ],
)
def test_the_backward_pass_draws_no_signs_again(remat, estimator):
    model = image_flow((4, 4, 1), depths=(3, 2), features=4, remat=remat)
    x = data(model, 2, seed=1)
    stored = jax.eval_shape(model.init, KEY, x)

    def loss(variables):
        return model.flow(variables).log_prob(x, estimator, key=KEY).mean()

    def draws(function):
        return str(jax.make_jaxpr(function)(stored)).count("random_bits[")

    with nn.frozen_vectors():
        assert draws(jax.grad(loss, allow_int=True)) == draws(loss) > 0


@pytest.mark.slow
def test_recomputation_keeps_less_between_forward_and_backward():
    def temporaries(depth, remat):
        model = image_flow((8, 8, 1), depths=(depth,), features=16, remat=remat)
        x = data(model, 16, seed=1)
        stored = jax.eval_shape(model.init, KEY, x)

        def loss(variables):
            return model.flow(variables).log_prob(x, TruncatedSeries(3), key=KEY).mean()

        with nn.frozen_vectors():
            lowered = jax.jit(jax.grad(loss, allow_int=True)).lower(stored)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    def for_each_block(remat):
        return (temporaries(24, remat) - temporaries(12, remat)) / 12

    assert for_each_block(True) < 0.5 * for_each_block(False)
