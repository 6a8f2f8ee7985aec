"""Branches whose stages hold layers of their own: every layer gets its own bound."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iresnet_jax import (
    Activation,
    Affine,
    DenseOperator,
    Flow,
    ModuleStage,
    Residual,
    Scale,
    Sequential,
    Stack,
    certify,
    layers_by_path,
)


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
    return Flow((Scale((Stack(stacked, depth),)),), (3,))


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("name", BRANCHES)
def test_every_layer_is_told_its_own_bound(name, depth):
    stages, norms, lipschitz = BRANCHES[name]
    flow = flow_of(stages, depth)
    certificate = certify(flow)
    handed = flow.with_bounds(certificate.lipschitz, certificate.layer_bounds)
    for bounded in (flow.with_bounds(), handed):
        for i, (block, stated) in enumerate(zip(bounded.blocks(), certificate.blocks, strict=True)):
            told = [float(layer.norm_bound) for layer in layers_by_path(block.branch)]
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
    certificate = certify(Flow((Scale((Stack(block, 1),)),), (3,)))
    assert certificate.lipschitz == pytest.approx([5.0]) and not certificate.certified
