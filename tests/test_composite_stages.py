"""Branches whose stages hold layers of their own: every layer gets its own bound."""

import dataclasses
import math
from typing import get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import rest_slow

from iresnet_jax import (
    Activation,
    Affine,
    DenseOperator,
    FixedPointIteration,
    Flow,
    ModuleStage,
    Residual,
    Sequential,
    Stack,
    certify,
    layers_by_path,
    with_layer_bounds,
)
from iresnet_jax.stages import Precision


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Halved:
    """x ↦ ½ f(x), of a stage or a row of them."""

    inner: Affine | Sequential

    def __call__(self, x):
        return 0.5 * self.inner(x)

    def lipschitz_bound(self):
        return 0.5 * self.inner.lipschitz_bound()

    def rounding(self, x, error, arithmetic):
        return jnp.full_like(error, jnp.inf)


class Twice(nn.Module):
    """A foreign module that states its bound."""

    def __call__(self, x):
        return 2.0 * x

    def lipschitz_bound(self, variables):
        return 2.0


def affine(norm, bias=0.0):
    return Affine(DenseOperator(norm * jnp.eye(3)), jnp.full(3, bias))


ELU, FOREIGN = Activation("elu"), ModuleStage(Twice(), {})

#: Name -> (stages, the norms of the layers in order, L).
BRANCHES = {
    "composite first": ((Halved(affine(0.1)), ELU, affine(0.9)), (0.1, 0.9), 0.045),
    "composite last": ((affine(0.9), ELU, Halved(affine(0.1))), (0.9, 0.1), 0.045),
    "composite between": ((affine(0.3), Halved(affine(1.5)), affine(0.9)), (0.3, 1.5, 0.9), 0.2025),
    "nested twice": ((Halved(Halved(affine(0.2))), affine(0.9)), (0.2, 0.9), 0.045),
    "a row inside": (
        (Halved(Sequential((affine(0.2), ELU, affine(0.5)))), affine(0.9)),
        (0.2, 0.5, 0.9),
        0.045,
    ),
    "foreign module between": (
        (Halved(affine(0.1)), FOREIGN, affine(0.9)),
        (0.1, 0.9),
        0.09,
    ),
}


def flow_of(stages, depth):
    """A stack of branches of which block i has layers i + 1 times as small as the first's."""

    def block(i):
        shrink = lambda leaf: leaf / (i + 1)  # noqa: E731
        return Residual(Sequential(jax.tree.map(shrink, stages)))

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(block, range(depth)))
    return Flow((Stack(stacked, depth),), (3,))


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("name", BRANCHES)
def test_every_layer_is_told_its_own_bound(name, depth):
    stages, norms, lipschitz = BRANCHES[name]
    flow = flow_of(stages, depth)
    certificate = certify(flow)
    for bounded in (flow.with_bounds(), flow.with_bounds(certificate)):
        for i, (block, stated) in enumerate(zip(bounded.blocks(), certificate.blocks, strict=True)):
            told = [float(layer.norm_bound) for layer in layers_by_path(block.branch).values()]
            expected = np.array(norms) / (i + 1)
            assert np.all(told >= expected)
            np.testing.assert_allclose(told, expected, rtol=1e-5)
            bounds = [layer.upper_bound for layer in stated.layers]
            np.testing.assert_allclose(bounds, expected, rtol=1e-5)
            np.testing.assert_allclose(block.lipschitz, stated.lipschitz, rtol=1e-6)
            expected_lipschitz = lipschitz / (i + 1) ** len(norms)
            np.testing.assert_allclose(stated.lipschitz, expected_lipschitz, rtol=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", BRANCHES)
def test_a_bias_that_is_not_finite_is_found_in_every_layer(name, value):
    stages, norms, _ = BRANCHES[name]
    for i in range(len(norms)):
        places = iter(range(len(norms)))

        def spoil(node, i=i, places=places):
            if not isinstance(node, Affine) or next(places) != i:
                return node
            return dataclasses.replace(node, bias=jnp.full(3, value))

        spoilt = jax.tree.map(spoil, stages, is_leaf=lambda node: isinstance(node, Affine))
        certificate = certify(flow_of(spoilt, 1))
        assert not certificate.certified
        assert certificate.blocks[0].problem == f"not finite: the bias of layer {i}"


def test_a_branch_that_is_a_single_layer_is_bounded():
    block = jax.tree.map(lambda leaf: leaf[None], Residual(affine(5.0)))
    certificate = certify(Flow((Stack(block, 1),), (3,)))
    assert certificate.lipschitz == pytest.approx([5.0]) and not certificate.certified


# Weights of a stage's own


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Gated:
    """x ↦ tanh(gate) · f(x), with a weight that is in no layer."""

    gate: jax.Array
    inner: Affine

    def __call__(self, x):
        return jnp.tanh(self.gate) * self.inner(x)

    def lipschitz_bound(self):
        return self.inner.lipschitz_bound()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 1])
def test_a_weight_of_a_stages_own_that_is_not_finite_is_named(place, value):
    """The stage states a bound that does not look at it."""
    sound, broken = (Gated(jnp.full(1, gate), affine(0.5)) for gate in (0.3, value))
    stages = (broken, sound) if place == 0 else (sound, broken)
    certificate = certify(flow_of(stages, 1))
    assert certificate.lipschitz[0] < 1.0 and not certificate.certified
    assert certificate.blocks[0].problem == f"not finite: the weights at .stages[{place}].gate"
    assert certify(flow_of((sound, sound), 1)).certified


class Unregistered:
    """A stage that JAX takes for a leaf."""

    def __init__(self, weight):
        self.weight = weight

    def __call__(self, x):
        return self.weight * x

    def lipschitz_bound(self):
        return 0.5


def test_a_stage_whose_weights_cannot_be_looked_at_is_not_certified():
    block = Residual(Sequential((Unregistered(math.nan), affine(0.5))))
    certificate = certify(Flow((block,), (3,)))
    assert not certificate.certified
    assert "Unregistered is no registered pytree" in certificate.blocks[0].problem


# Precisions

BETWEEN = 1.0 + 2.0**-8 + 2.0**-9  # becomes 1 + 2⁻⁷ in bfloat16
ROUNDED = 1.0 + 2.0**-7

IN_BFLOAT16 = {
    "as it is": Sequential((affine(BETWEEN),), "bfloat16"),
    "in a composite stage": Sequential((Halved(affine(BETWEEN)),), "bfloat16"),
    "in a row inside": Sequential((Sequential((affine(BETWEEN),)), ELU), "bfloat16"),
    "inside of a row": Sequential((ELU, Sequential((affine(BETWEEN),), "bfloat16"))),
    "inside of a composite stage": Sequential(
        (Halved(Sequential((affine(BETWEEN),), "bfloat16")), ELU)
    ),
}


@pytest.mark.parametrize("name", IN_BFLOAT16)
def test_bounds_are_of_the_weights_as_used_wherever_they_are(name):
    branch = IN_BFLOAT16[name]
    factor = 0.5 if "composite" in name else 1.0
    flow = Flow((Residual(branch),), (3,))
    certificate = certify(flow)
    (block,) = certificate.blocks
    (layer,) = block.layers
    assert ROUNDED <= layer.upper_bound <= ROUNDED * (1 + 1e-5)
    assert factor * ROUNDED <= block.lipschitz <= factor * ROUNDED * (1 + 1e-5)
    (told,) = layers_by_path(flow.with_bounds(certificate)).values()
    assert ROUNDED <= told.norm_bound <= ROUNDED * (1 + 1e-5)
    assert certify(flow.with_bounds(certificate)).lipschitz == certificate.lipschitz


def random_affine(rng, width, height, norm):
    kernel = rng.normal(size=(width, height))
    kernel = jnp.asarray(norm * kernel / np.linalg.norm(kernel, 2), jnp.float32)
    return Affine(DenseOperator(kernel), jnp.asarray(0.3 * rng.normal(size=height), jnp.float32))


@pytest.mark.parametrize("attached", rest_slow([False, True], True))
@pytest.mark.parametrize("inner", get_args(Precision))
@pytest.mark.parametrize("outer", get_args(Precision))
def test_rounding_of_a_row_within_a_row_is_bounded(outer, inner, attached):
    """Against the real map of the weights as used, in float64."""
    rng = np.random.default_rng(4)
    layers = [random_affine(rng, *sizes, 0.9) for sizes in ((3, 7), (7, 5), (5, 3))]
    first, middle, last = layers
    branch = Sequential((first, Sequential((ELU, middle), inner), ELU, last), outer)
    if attached:
        bounds = {path: layer.norm_bound for path, layer in layers_by_path(bounded(branch)).items()}
        branch = with_layer_bounds(branch, bounds)
        assert all(layer.norm_bound is not None for layer in layers_by_path(branch).values())

    def exact(x):
        for i, layer in enumerate(layers):
            x = np.where(x > 0, x, np.expm1(np.minimum(x, 0.0))) if i else x
            narrow = outer == "bfloat16" or (i == 1 and inner == "bfloat16")
            dtype = jnp.bfloat16 if narrow else jnp.float32
            kernel, bias = (
                np.asarray(weights).astype(dtype).astype(np.float64)
                for weights in (layer.operator.kernel, layer.bias)
            )
            x = x @ kernel + bias
        return x

    x = jnp.asarray(rng.normal(size=(200, 3)) * 10.0 ** rng.uniform(-3, 2, (200, 1)), jnp.float32)
    computed = np.asarray(jax.jit(lambda branch, x: branch(x))(branch, x), np.float64)
    error = np.linalg.norm(computed - exact(np.asarray(x, np.float64)), axis=1)
    bound = jax.jit(lambda branch, x: branch.rounding_bound(x))(branch, x)
    assert (error <= bound).all() and np.isfinite(bound).all()
    size = np.linalg.norm(computed, axis=1) + np.linalg.norm(x, axis=1) + 1.0
    units = {"bfloat16": 2.0**-8, "tensorfloat32": 2.0**-11, "float32": 2.0**-24}
    unit = max(units[outer], units[inner])
    assert (bound <= 500.0 * unit * size).all()  # the bound is of the precision's order
    assert (error.max() > 1e-3) == ("bfloat16" in (outer, inner))


def bounded(branch):
    (residual,) = Flow((Residual(branch),), (3,)).with_bounds().levels
    return residual.branch


@pytest.mark.parametrize("precision", rest_slow(["float32", "bfloat16"], "bfloat16"))
def test_an_inverse_through_a_row_of_another_precision_is_within_its_bound(precision):
    rng = np.random.default_rng(5)
    first, last = (random_affine(rng, 3, 3, 0.6) for _ in range(2))
    branch = Sequential((first, Sequential((ELU, last), precision)))
    flow = Flow((Residual(branch),), (3,)).with_bounds()
    x = jnp.asarray(rng.normal(size=(50, 3)), jnp.float32)
    (latents,) = flow.forward(x)
    solver = FixedPointIteration(rtol=0.0, atol=1e-2)
    back, info = flow.inverse((latents,), solver)

    def exact(x):
        kernels = [np.asarray(first.operator.kernel, np.float64), None]
        dtype = jnp.bfloat16 if precision == "bfloat16" else jnp.float32
        kernels[1] = np.asarray(last.operator.kernel).astype(dtype).astype(np.float64)
        bias = np.asarray(last.bias).astype(dtype).astype(np.float64)
        h = x @ kernels[0] + np.asarray(first.bias, np.float64)
        return np.where(h > 0, h, np.expm1(np.minimum(h, 0.0))) @ kernels[1] + bias

    preimage = np.asarray(back, np.float64)
    for _ in range(200):
        preimage = np.asarray(latents, np.float64) - exact(preimage)
    error = np.linalg.norm(np.asarray(back, np.float64) - preimage, axis=1)
    assert np.isfinite(info.error_bound).all() and (error <= info.error_bound[0]).all()
