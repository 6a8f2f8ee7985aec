"""What layers are divided by where their singular vectors do not advance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import quick_jit
from flax.serialization import to_state_dict
from layer_cases import initialised

from iresnet_jax import nn
from iresnet_jax.operators import DenseOperator
from iresnet_jax.spectral import (
    SingularVectors,
    power_iteration,
    power_iteration_and_sigma,
    sigma_estimate,
)

RNG = np.random.default_rng(0)
MATRIX = RNG.normal(size=(5, 4)).astype(np.float32)


def norm(matrix):
    return float(np.linalg.norm(np.asarray(matrix, np.float64), 2))


def converged():
    left, _, right = np.linalg.svd(MATRIX)
    return DenseOperator(jnp.asarray(MATRIX)), SingularVectors(
        *map(jnp.asarray, (right[0], left[:, 0]))
    )


def with_vectors(variables, change):
    return {**variables, "spectral": jax.tree.map(change, variables["spectral"])}


CHANGES = {
    "as they are": lambda leaf: leaf,
    "averaged": lambda leaf: 0.3 * leaf,
    "cast": lambda leaf: leaf.astype(jnp.bfloat16),
    "sign": lambda leaf: -leaf,
    "zero": lambda leaf: 0.0 * leaf,
    "of other weights": lambda leaf: leaf * (-1.0) ** jnp.arange(leaf.shape[-1]),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["dense", "conv"])
def test_an_evaluation_keeps_the_norm_whatever_the_vectors(name, change):
    """The network grew fourfold in one direction that its vectors do not see."""
    layer, variables, _, shape = initialised(name)
    kernel = variables["params"]["kernel"]
    grown = kernel + 4.0 * jnp.ones_like(kernel)
    variables = {**variables, "params": {**variables["params"], "kernel": grown}}
    variables = with_vectors(variables, CHANGES[change])
    affine = layer.apply(variables, shape, method="pure")
    assert affine.lipschitz_bound() <= 1.1 * layer.coeff
    assert affine.lipschitz_bound() >= 0.85 * layer.coeff


@pytest.mark.parametrize(("size", "channels"), [(3, 6), pytest.param(7, 3, marks=pytest.mark.slow)])
def test_with_converged_vectors_an_evaluation_is_the_training_steps(size, channels):
    """Also where bounds by symbols are loose: a flat kernel on a small image."""
    layer = nn.SpectralConv(channels, kernel_size=size)
    x = jnp.asarray(RNG.normal(size=(2, 4, 4, channels)), jnp.float32)
    variables = quick_jit(layer.init)(jax.random.key(0), x)
    kernel = jnp.ones((size, size, channels, channels))
    variables = nn.converge(
        layer, {**variables, "params": {"kernel": kernel, "bias": x[0, 0, 0]}}, x
    )
    trained, _ = layer.apply(variables, x, mutable=["spectral"])
    np.testing.assert_allclose(layer.apply(variables, x), trained, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change", ["averaged", "cast", "sign"])
def test_vectors_that_are_no_unit_vectors_give_the_same_sigma(change):
    operator, vectors = converged()
    changed = jax.tree.map(CHANGES[change], vectors)
    rtol = 1e-4 if change == "cast" else 1e-6
    np.testing.assert_allclose(sigma_estimate(operator, changed), norm(MATRIX), rtol=rtol)
    slope, expected = (
        jax.grad(lambda w, v=v: sigma_estimate(DenseOperator(w), v))(operator.kernel)
        for v in (changed, vectors)
    )
    np.testing.assert_allclose(slope, expected, atol=1e-2 if change == "cast" else 1e-6)


def test_opposed_signs_do_not_make_sigma_negative():
    operator, (u, v) = converged()
    assert sigma_estimate(operator, SingularVectors(-u, v)) == pytest.approx(norm(MATRIX), rel=1e-6)


def test_zero_vectors_begin_anew_and_advance_to_the_norm():
    operator, vectors = converged()
    zero = jax.tree.map(jnp.zeros_like, vectors)
    assert sigma_estimate(operator, zero) == 0
    _, sigma = power_iteration_and_sigma(operator, zero, 60)
    assert sigma == pytest.approx(norm(MATRIX), rel=1e-4)


def test_vectors_keep_their_types():
    operator, vectors = converged()
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), vectors)
    for steps in (0, 1, 3):
        advanced = power_iteration(operator, low, steps)
        assert {leaf.dtype for leaf in advanced} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("container", [lambda v: v._asdict(), list, tuple, to_state_dict])
def test_vectors_in_other_containers_are_theirs(container):
    layer, variables, x, _ = initialised("dense")
    other = {**variables, "spectral": {"vectors": container(variables["spectral"]["vectors"])}}
    np.testing.assert_array_equal(layer.apply(other, x), layer.apply(variables, x))
    found = nn.converge(layer, other, x)["spectral"]["vectors"]
    np.testing.assert_allclose(found.v, variables["spectral"]["vectors"].v, atol=1e-3)


def test_vectors_in_no_container_of_two_are_refused():
    layer, variables, x, _ = initialised("dense")
    broken = {**variables, "spectral": {"vectors": {"left": jnp.ones(5)}}}
    with pytest.raises(TypeError, match=r"must be u and v; got keys \['left'\]"):
        layer.apply(broken, x)
