"""The one walk over a branch: layers by path, their bounds, what is broken, the largest norm."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import matrix_with_singular_values

from iresnet_jax import (
    Activation,
    Affine,
    DenseOperator,
    ModuleStage,
    Sequential,
    conv_operator,
    layers_by_path,
    with_layer_bounds,
)
from iresnet_jax.layer_walk import (
    float32_above,
    largest_norm,
    modules_by_path,
    not_finite,
    unreadable,
)

RELU = Activation("relu")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Scaled:
    """s·f(x): a stage with a weight of its own and another stage inside."""

    scale: jax.Array
    inner: Any

    def __call__(self, x):
        return self.scale * self.inner(x)


class Doubling(nn.Module):
    def __call__(self, x):
        return 2.0 * x


def dense(seed, norm, size=3):
    kernel = matrix_with_singular_values(seed, size, size, norm * np.linspace(1.0, 0.5, size))
    return Affine(DenseOperator(jnp.asarray(kernel, jnp.float32)), jnp.zeros(size))


def convolution():
    return Affine(conv_operator(jnp.ones((3, 3, 2, 2)), (4, 4)))


def module(value=0.5):
    return ModuleStage(Doubling(), {"params": {"w": jnp.full(2, value)}})


def nested():
    """Layers at every depth: in a row, in a composite stage, in a row within that."""
    row = Sequential((dense(2, 0.3), RELU, module(), dense(3, 0.4)))
    return Sequential((dense(0, 0.1), Scaled(jnp.float32(2.0), row), RELU, convolution()))


PATHS = [
    ".stages[0]",
    ".stages[1].inner.stages[0]",
    ".stages[1].inner.stages[3]",
    ".stages[3]",
]


# Layers


def test_layers_are_found_in_order_and_by_their_path():
    branch = nested()
    found = layers_by_path(branch)
    assert list(found) == PATHS
    row = branch.stages[1].inner.stages
    expected = (branch.stages[0], row[0], row[3], branch.stages[3])
    assert all(a is b for a, b in zip(found.values(), expected, strict=True))


def test_layers_are_found_in_any_pytree():
    found = layers_by_path({"a": dense(0, 1.0), "b": [RELU, convolution()], "c": None})
    assert list(found) == ["['a']", "['b'][1]"]
    assert layers_by_path(RELU) == layers_by_path(jnp.ones(3)) == {}
    assert list(layers_by_path(dense(0, 1.0))) == [""]


def test_paths_of_a_stack_are_those_of_its_branches():
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), nested(), nested())
    assert list(layers_by_path(stack)) == PATHS
    assert layers_by_path(stack)[PATHS[0]].operator.kernel.shape == (2, 3, 3)


def test_foreign_modules_are_found_by_their_path():
    branch = nested()
    found = modules_by_path(branch)
    assert list(found) == [".stages[1].inner.stages[2]"]
    assert found.popitem()[1] is branch.stages[1].inner.stages[2]
    assert modules_by_path(dense(0, 1.0)) == {}


# Bounds


def test_bounds_are_attached_by_path_and_other_layers_stay():
    branch = nested()
    bounded = with_layer_bounds(branch, {PATHS[0]: 0.1, PATHS[2]: 0.4, "elsewhere": 9.0})
    told = [layer.norm_bound for layer in layers_by_path(bounded).values()]
    assert told[1] is None and told[3] is None
    assert float(told[0]) >= 0.1 and float(told[2]) >= 0.4
    np.testing.assert_allclose([told[0], told[2]], [0.1, 0.4], rtol=1e-6)
    assert bounded.stages[1].scale == branch.stages[1].scale
    assert bounded.precision == branch.precision


def test_bounds_of_a_stack_are_attached_as_a_column():
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), dense(0, 0.1), dense(1, 0.2))
    told = with_layer_bounds(stack, {"": np.array([0.1, 0.2])}).norm_bound
    np.testing.assert_allclose(told, [0.1, 0.2], rtol=1e-6)


def test_a_bound_in_single_precision_is_never_smaller():
    rng = np.random.default_rng(0)
    bounds = np.concatenate([rng.uniform(0, 2, 1000), 10.0 ** rng.uniform(-30, 30, 1000), [0.0]])
    rounded = np.asarray(float32_above(bounds), np.float64)
    assert float32_above(bounds).dtype == jnp.float32 and (rounded >= bounds).all()
    np.testing.assert_allclose(rounded, bounds, rtol=2.5e-7, atol=1e-37)
    assert np.isnan(float32_above(np.nan)) and np.isinf(float32_above(np.inf))


# What is broken


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_named_where_it_is(value):
    """Kernels aside: their bound is not finite then."""
    branch = nested()
    assert not_finite(branch) == []

    def with_bias(path):
        bias = jnp.zeros(3).at[1].set(value)
        replaced = dataclasses.replace(layers_by_path(branch)[path], bias=bias)
        is_layer = lambda node: isinstance(node, Affine)  # noqa: E731
        return jax.tree_util.tree_map_with_path(
            lambda at, node: replaced if jax.tree_util.keystr(at) == path else node,
            branch,
            is_leaf=is_layer,
        )

    for i, path in enumerate(PATHS[:3]):
        assert not_finite(with_bias(path)) == [f"the bias of layer {i}"]
    scaled = Scaled(jnp.float32(value), dense(0, 1.0))
    assert not_finite(Sequential((RELU, scaled))) == ["the weights at .stages[1].scale"]
    assert not_finite((RELU, module(value))) == ["the variables of Doubling"]


def test_several_broken_weights_are_all_named():
    broken = dataclasses.replace(dense(0, 1.0), bias=jnp.full(3, jnp.nan))
    branch = Sequential((broken, Scaled(jnp.float32(jnp.inf), broken), module(jnp.nan)))
    assert set(not_finite(branch)) == {
        "the bias of layer 0",
        "the bias of layer 1",
        "the weights at .stages[1].scale",
        "the variables of Doubling",
    }


def test_integers_are_finite():
    assert not_finite(Scaled(jnp.arange(3), dense(0, 1.0))) == []


class Opaque:
    """A callable that no one registered as a pytree."""

    def __call__(self, x):
        return x


def test_what_cannot_be_looked_into_is_named():
    assert unreadable(nested()) == unreadable(Scaled(2.0, RELU)) == []
    assert unreadable(Sequential((Opaque(), RELU, Scaled(jnp.ones(()), Opaque())))) == ["Opaque"]
    assert unreadable((jnp.tanh, Opaque(), "word")) == ["Opaque", "PjitFunction", "str"]


# Norms as constrained


def constrained(sigmas):
    """Layers of true norms 2 and 0.5 as constrained by these estimates."""
    layers = ((dense(0, 2.0), sigmas[0]), (dense(1, 0.5), sigmas[1]))
    return Sequential(tuple(Affine(layer.operator, None, jnp.asarray(s)) for layer, s in layers))


@pytest.mark.parametrize(
    ("used", "expected"),
    [((2.0, 0.5), 0.9), ((1.0, 0.5), 1.8), ((0.6, 0.1), 2.0), ((4.0, 0.5), 0.5)],
)
def test_the_largest_norm_shows_vectors_that_lag_behind(used, expected):
    """A layer of norm 2 scaled by min(1, 0.9/σ); the other, of norm 0.5, is never scaled."""
    norm = largest_norm(constrained(used), constrained((2.0, 0.5)), 0.9)
    np.testing.assert_allclose(norm, expected, rtol=1e-6)


def test_the_largest_norm_of_unconstrained_layers_is_the_raw_one():
    norm = largest_norm(constrained((1.0, 0.5)), constrained((2.0, 0.5)), None)
    np.testing.assert_allclose(norm, 2.0)


def test_layers_that_keep_no_estimate_have_no_largest_norm():
    silent = Sequential((dense(2, 0.9), Activation("elu")))
    assert largest_norm(silent, silent, 0.9) is None
    mixed = [(*constrained(sigmas).stages, *silent.stages) for sigmas in ((1.0, 0.5), (2.0, 0.5))]
    assert largest_norm(mixed[0], mixed[1], None) == 2.0
