"""Stages of a branch: what they compute, what they state, and rows of them."""

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from helpers import (
    Geometry,
    dense_matrix,
    matrix_with_singular_values,
    operator_norm,
    sample_jacobians,
)

from iresnet_jax import (
    Activation,
    Affine,
    FixedPointIteration,
    Sequential,
    certify_branch,
    fixed_point_inverse,
    layers_by_path,
)
from iresnet_jax.activations import ACTIVATIONS, Elementwise
from iresnet_jax.operators import DenseOperator, conv_operator
from iresnet_jax.stages import as_used, first_without_activation
from iresnet_jax.statements import stated_lipschitz

GEOMETRY = Geometry((3, 4), (3, 3), (2, 2))


def dense(seed, rows, columns, norm, bias=True):
    values = norm * np.linspace(1.0, 0.5, min(rows, columns))
    kernel = matrix_with_singular_values(seed, rows, columns, values)
    offset = np.random.default_rng(seed).normal(size=columns)
    return Affine(DenseOperator(jnp.asarray(kernel)), jnp.asarray(offset) if bias else None)


def convolution(seed, norm):
    kernel = GEOMETRY.kernel(seed, np.float64)
    kernel *= norm / operator_norm(dense_matrix(GEOMETRY, kernel))
    return Affine(conv_operator(jnp.asarray(kernel), GEOMETRY.image), jnp.asarray([0.1, -0.2]))


# Activations


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_slopes_stay_within_the_stated_constant(x64, name):
    activation, x = Activation(name), jnp.linspace(-20.0, 20.0, 400_001)
    slopes = np.diff(activation(x)) / np.diff(x)
    low, high = activation.slopes()
    assert low - 1e-9 <= slopes.min() <= low + 0.01
    assert high - 0.01 <= slopes.max() <= high + 1e-9
    tangents = jax.jvp(activation, (x,), (jnp.ones_like(x),))[1]
    assert float(jnp.abs(tangents).max()) <= activation.lipschitz_bound() * (1.0 + 1e-9)


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("elu", lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0)))),
        ("relu", lambda x: np.maximum(x, 0)),
        ("softplus", lambda x: np.log1p(np.exp(x))),
        ("tanh", np.tanh),
        ("sin", lambda x: np.sin(np.pi * x) / np.pi),
        ("lipswish", lambda x: x / (1 + np.exp(-x)) / 1.1),
    ],
)
def test_activations_are_what_their_names_say(x64, name, formula):
    x = np.linspace(-3.0, 3.0, 50)
    np.testing.assert_allclose(Activation(name)(x), formula(x), rtol=1e-10, atol=1e-12)


def test_an_activation_that_is_left_out_is_the_identity(monkeypatch):
    monkeypatch.setitem(ACTIVATIONS, "half", Elementwise(lambda x: x / 2, (0.5, 0.5)))
    x = jnp.linspace(-3.0, 3.0, 50)
    idle, acting = (Activation("lipswish", jnp.asarray(active)) for active in (0.0, 1.0))
    np.testing.assert_array_equal(idle(x), x)
    np.testing.assert_array_equal(acting(x), Activation("lipswish")(x))
    assert Activation("half", jnp.zeros(())).lipschitz_bound() == 1.0
    assert Activation("half").lipschitz_bound() == 0.5


def test_an_unknown_activation_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'swish'.*elu, relu"):
        Activation("swish")


# Affine maps


@pytest.mark.parametrize("bias", [True, False])
def test_affine_of_a_matrix(x64, bias):
    affine, x = dense(0, 3, 4, 0.8, bias), np.random.default_rng(1).normal(size=(5, 3))
    expected = x @ np.asarray(affine.operator.kernel) + (affine.bias if bias else 0.0)
    np.testing.assert_allclose(affine(x), expected, rtol=1e-12)
    np.testing.assert_allclose(affine.lipschitz_bound(), 0.8, rtol=1e-6)


def test_affine_of_a_convolution_adds_its_bias_to_each_channel(x64):
    affine = convolution(0, 0.7)
    x = np.random.default_rng(1).normal(size=(2, *affine.operator.domain_shape))
    matrix = dense_matrix(GEOMETRY, affine.operator.kernel)
    expected = (x.reshape(2, -1) @ matrix.T).reshape(x.shape) + np.array([0.1, -0.2])
    np.testing.assert_allclose(affine(x), expected, rtol=1e-10, atol=1e-12)
    assert 0.7 * (1 - 1e-9) <= affine.lipschitz_bound() <= 0.7 * (1 + 1e-6)


# Compositions


def branches():
    return {
        "vectors": Sequential((dense(0, 3, 5, 0.9), Activation("elu"), dense(1, 5, 3, 0.8))),
        "images": Sequential((Activation("sin"), convolution(0, 0.9), Activation("tanh"),
                              convolution(1, 0.7))),
    }  # fmt: skip


def inputs(name, samples, scale=1.0):
    shape = (3,) if name == "vectors" else (*GEOMETRY.image, 2)
    return jnp.asarray(scale * np.random.default_rng(2).normal(size=(samples, *shape)))


@pytest.mark.parametrize(("name", "product"), [("vectors", 0.72), ("images", 0.63)])
def test_the_bound_is_the_product_and_above_every_jacobian(x64, name, product):
    branch = branches()[name]
    bound = branch.lipschitz_bound()
    assert product * (1 - 1e-9) <= bound <= product * (1 + 1e-6)
    norms = [operator_norm(j) for j in sample_jacobians(branch, inputs(name, 20))]
    assert 0.2 * bound < max(norms) <= bound


@pytest.mark.parametrize("name", ["vectors", "images"])
def test_the_bound_holds_between_distant_points(x64, name):
    branch, x = branches()[name], inputs(name, 12, scale=3.0)
    out = np.asarray(branch(x)).reshape(12, -1)
    points, bound = np.asarray(x).reshape(12, -1), branch.lipschitz_bound()
    for i, j in itertools.combinations(range(12), 2):
        change = np.linalg.norm(out[i] - out[j])
        assert change <= bound * np.linalg.norm(points[i] - points[j])


def test_stages_run_first_to_last(x64):
    x = inputs("vectors", 2)
    first, activation, last = branches()["vectors"].stages
    np.testing.assert_allclose(Sequential((first, activation, last))(x), last(activation(first(x))))
    np.testing.assert_array_equal(Sequential(())(x), x)
    assert Sequential(()).lipschitz_bound() == 1.0


def test_a_kernel_with_nan_has_no_finite_bound():
    broken = Affine(DenseOperator(jnp.full((2, 2), jnp.nan)))
    assert math.isnan(Sequential((Activation("relu"), broken)).lipschitz_bound())


def test_a_branch_is_a_pytree_through_jit_scan_and_grad(x64):
    pair = [Sequential((dense(i, 3, 3, 0.5), Activation("tanh"))) for i in (0, 1)]
    stack, x = jax.tree.map(lambda *leaves: jnp.stack(leaves), *pair), inputs("vectors", 4)
    run = jax.jit(lambda s, x: jax.lax.scan(lambda x, b: (x + b(x), None), x, s)[0])
    h = x + pair[0](x)
    np.testing.assert_allclose(run(stack, x), h + pair[1](h), rtol=1e-12)
    gradient = jax.grad(lambda s: jnp.sum(run(s, x)))(stack)
    assert jax.tree.structure(gradient) == jax.tree.structure(stack)
    assert all(float(jnp.abs(leaf).min()) > 0.0 for leaf in jax.tree.leaves(gradient))


def test_a_convolutional_block_inverts_and_its_inverse_differentiates(x64):
    branch, x = branches()["images"], inputs("images", 2)
    bound = branch.lipschitz_bound()

    @jax.jit
    def invert(branch, y):
        solver = FixedPointIteration(1e-13, 1e-13, 200)
        return fixed_point_inverse(branch, y, solver, lipschitz=bound)

    found, info = invert(branch, x + branch(x))
    assert bool(info.converged.all())
    np.testing.assert_allclose(found, x, atol=1e-11)
    cotangent = np.random.default_rng(3).normal(size=x.shape)
    pulled = jax.vjp(lambda y: invert(branch, y)[0], x + branch(x))[1](cotangent)[0]
    forward = np.eye(x[0].size) + sample_jacobians(branch, x)
    expected = [np.linalg.solve(j.T, c.ravel()) for j, c in zip(forward, cotangent, strict=True)]
    np.testing.assert_allclose(pulled.reshape(2, -1), expected, atol=1e-9)


# What stages state


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Stated:
    """x ↦ f(x), with a bound that is what one says."""

    inner: Any
    bound: float = dataclasses.field(metadata={"static": True})

    def __call__(self, x):
        return self.inner(x)

    def lipschitz_bound(self):
        return self.bound


def test_a_stage_without_a_bound_has_none():
    assert stated_lipschitz(jnp.tanh) == math.inf
    assert Sequential((Activation("elu"), jnp.tanh)).lipschitz_bound() == math.inf
    assert Sequential((jnp.tanh, Stated(jnp.tanh, 0.0))).lipschitz_bound() != 0.0


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: Sequential((s,))], ids=["alone", "in row"])
def test_a_bound_below_zero_is_refused(wrap):
    with pytest.raises(ValueError, match=r"Stated.lipschitz_bound\(\) must be ≥ 0; got -0\.5"):
        stated_lipschitz(wrap(Stated(jnp.tanh, -0.5)))


def test_bounds_of_rows_within_rows_multiply(x64):
    first, activation, last = branches()["vectors"].stages
    flat = Sequential((first, activation, last))
    nested = Sequential((Sequential((first,)), Sequential((activation, Sequential((last,))))))
    x = inputs("vectors", 4)
    np.testing.assert_array_equal(nested(x), flat(x))
    np.testing.assert_allclose(nested.lipschitz_bound(), flat.lipschitz_bound(), rtol=1e-12)
    np.testing.assert_array_equal(nested.rounding_bound(x), flat.rounding_bound(x))


def test_a_stage_without_rounding_leaves_it_unknown():
    x = inputs("vectors", 2)
    branch = Sequential((*branches()["vectors"].stages, Stated(jnp.tanh, 1.0)))
    np.testing.assert_array_equal(branch.rounding_bound(x), jnp.inf)
    silent = Sequential((branch, jnp.tanh, Activation("elu"))).silent_about_rounding()
    assert silent == sorted(["Stated", type(jnp.tanh).__name__])
    assert branches()["images"].silent_about_rounding() == []


def test_an_unknown_precision_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="one of float32, tensorfloat32, bfloat16; got 'float16'"):
        Sequential((), "float16")


# Reduced precision within rows


def grown_by_rounding():
    """An orthogonal matrix times 1 + a little: rounding to bfloat16 adds 2% to its norm, all up."""
    entries = scipy.linalg.hadamard(256) / 16.0 + 1.02 * 2.0**-12
    return Affine(DenseOperator(jnp.asarray(entries, jnp.float32)))


def in_half(*stages):
    return Sequential(stages, "bfloat16")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda layer: in_half(layer),
        lambda layer: Sequential((in_half(layer),)),
        lambda layer: in_half(Sequential((layer,))),
        lambda layer: Sequential((Stated(in_half(layer), 1.1),)),
        lambda layer: Stated(Sequential((in_half(layer),)), 1.1),
    ],
    ids=["alone", "in a row", "of a row", "in a stage", "at depth"],
)
def test_bounds_of_layers_are_of_the_weights_as_used(wrap):
    layer = grown_by_rounding()
    rounded = np.asarray(layer.operator.kernel.astype(jnp.bfloat16), np.float64)
    truth = operator_norm(rounded)
    assert truth > 1.015 * layer.lipschitz_bound()
    branch = wrap(layer)
    (used,) = layers_by_path(as_used(branch)).values()
    np.testing.assert_array_equal(np.asarray(used.operator.kernel, np.float64), rounded)
    certificate = certify_branch(branch, "it", (256,))
    assert certificate.layers[0].upper_bound >= truth
    assert certificate.lipschitz >= truth
    assert list(layers_by_path(branch)) == [certificate.layers[0].path]


def test_weights_of_full_precision_are_used_as_they_are():
    branch = Sequential((dense(0, 3, 3, 0.5), Sequential((dense(1, 3, 3, 0.5),), "tensorfloat32")))
    same = [a is b for a, b in zip(*map(jax.tree.leaves, (branch, as_used(branch))), strict=True)]
    assert all(same) and as_used(branch).stages[1].precision == "tensorfloat32"


def test_what_has_no_precision_stays_as_it_is_in_reduced_precision():
    """Functions, Python's numbers and integers."""
    count = jnp.arange(3)
    stages = as_used(in_half(Stated((jnp.tanh, 0.5, count), 1.0), dense(0, 3, 3, 0.5))).stages
    function, number, integers = stages[0].inner
    assert (function, number, integers.dtype) == (jnp.tanh, 0.5, count.dtype)
    assert stages[1].bias.dtype == jnp.bfloat16
    x = inputs("vectors", 2).astype(jnp.float32)
    np.testing.assert_allclose(in_half(jnp.tanh)(x), np.tanh(x), atol=4e-3)


def test_only_inner_rows_compute_in_their_precision():
    x, layer = inputs("vectors", 3).astype(jnp.float32), dense(0, 3, 3, 0.9)
    branch = Sequential((in_half(layer), Activation("tanh")))
    expected = np.tanh(np.asarray(in_half(layer)(x)))
    assert branch(x).dtype == jnp.float32
    np.testing.assert_allclose(branch(x), expected, rtol=1e-6)
    bounds = branch.rounding_bound(x), Sequential((layer, Activation("tanh"))).rounding_bound(x)
    assert (bounds[0] > 100 * bounds[1]).all()


# Stacks of branches


def test_the_first_of_a_stack_leaves_out_the_activation_that_it_begins_with():
    blocks = [Sequential((Activation("tanh"), dense(i, 3, 3, 0.5))) for i in range(3)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
    marked = first_without_activation(stack, 3)
    x = inputs("vectors", 2)
    for i, block in enumerate(blocks):
        own = jax.tree.map(lambda leaf, i=i: leaf[i], marked)
        expected = block(x) if i else block.stages[1](x)
        np.testing.assert_allclose(own(x), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "branch",
    [Sequential((dense(0, 3, 3, 0.5),)), Sequential(()), dense(0, 3, 3, 0.5)],
    ids=range(3),
)
def test_branches_that_begin_with_something_else_stay(branch):
    assert first_without_activation(branch, 3) is branch
