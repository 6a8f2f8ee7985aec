"""Stages that state their slopes are seen through; whatever could mislead is not."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import in_double
from helpers import matrix_with_singular_values, sample_jacobians

import iresnet_jax as ir
from iresnet_jax.affine_rows import split
from iresnet_jax.lipsdp import whole_bound


def two_layers(stage, seed=0):
    rng = np.random.default_rng(seed)
    first, last = (matrix_with_singular_values(rng, *s, [0.9, 0.8, 0.7]) for s in ((3, 8), (8, 3)))
    affine = [ir.Affine(ir.DenseOperator(jnp.asarray(k, jnp.float32))) for k in (first, last)]
    return ir.Sequential((affine[0], stage, affine[1]))


@jax.tree_util.register_static
class Half:
    """A foreign elementwise stage."""

    def __call__(self, x):
        return 0.25 * x + 0.25 * jnp.sin(x)

    def lipschitz_bound(self):
        return 0.5

    def slopes(self):
        return 0.0, 0.5


@jax.tree_util.register_static
class Steep(Half):
    """Maps otherwise than what states the slopes."""

    def __call__(self, x):
        return 2.0 * super().__call__(x)

    def lipschitz_bound(self):
        return 1.0


@jax.tree_util.register_static
class Boundless(Half):
    def lipschitz_bound(self):
        return math.inf


@jax.tree_util.register_static
class Flat(Half):
    """States slopes as a number, which is no method."""

    slopes = (0.0, 0.1)


@jax.tree_util.register_static
class Mixed(Half):
    """States slopes, and is not elementwise: its shape tells."""

    def __call__(self, x):
        return jnp.concatenate([x, x], axis=-1) * 0.5

    def lipschitz_bound(self):
        return math.sqrt(0.5)

    def slopes(self):
        return 0.0, 0.5


@jax.tree_util.register_static
class Unknown(Half):
    def slopes(self):
        return math.nan, 0.5


@jax.tree_util.register_static
class Reversed(Half):
    def slopes(self):
        return 0.5, 0.0


def test_elementwise_stages_that_state_slopes_are_seen_through():
    for stage in (ir.LipSwish(jnp.asarray(2.0)), Half(), ir.Activation("elu")):
        branch = two_layers(stage)
        rows, rest = split(branch, (3,))
        assert len(rows) == 1 and rest == 1.0
        assert rows[0].slopes == (ir.stated_slopes(stage),)
        assert whole_bound(branch, (3,)) < 0.95 * branch.lipschitz_bound()
    assert ir.stated_slopes(Half()) == (0.0, 0.5)


def test_slopes_that_could_mislead_are_not_used():
    for stage in (Steep(), Boundless(), Flat(), Unknown()):
        assert ir.stated_slopes(stage) is None
    rows, rest = split(two_layers(Steep()), (3,))
    assert not rows and rest <= 0.81 * (1 + 1e-6)
    layer = two_layers(Half()).stages[0]
    wide = ir.Sequential((layer, Mixed()))
    rows, rest = split(wide, (3,))
    assert not rows and rest == pytest.approx(0.9 * math.sqrt(0.5))
    with pytest.raises(ValueError, match=r"Reversed.slopes\(\) must be \(α, β\), α ≤ β"):
        ir.stated_slopes(Reversed())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Doubled(ir.Sequential):
    """A row of stages that maps otherwise than the stages in a row."""

    def __call__(self, x):
        return 2.0 * super().__call__(x)

    def lipschitz_bound(self):
        return 2.0 * super().lipschitz_bound()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class DoubledLayer(ir.Affine):
    """A layer that maps otherwise than its operator."""

    def __call__(self, x):
        return 2.0 * super().__call__(x)

    def lipschitz_bound(self):
        return 2.0 * super().lipschitz_bound()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_subclasses_are_bounded_by_what_they_state(x64, precision):
    plain = two_layers(ir.Activation("tanh")).stages
    layer = DoubledLayer(plain[0].operator, plain[0].bias)
    for branch in (
        Doubled(plain, precision),
        ir.Sequential((Doubled(plain),), precision),
        ir.Sequential((layer, *plain[1:]), precision),
    ):
        x = 1e-4 * jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)))
        exact = in_double(dataclasses.replace(branch, precision="float32"))
        slopes = np.linalg.norm(sample_jacobians(exact, x), 2, axis=(1, 2))
        found = ir.certify_branch(branch, "it", (3,)).lipschitz
        assert slopes.max() <= found * (1.0 + (precision == "bfloat16") * 1e-2)


def test_lipswish_by_lipsdp_is_that_of_the_named_activation_and_never_exceeded(x64):
    learned, named = (two_layers(s) for s in (ir.LipSwish(jnp.ones(())), ir.Activation("lipswish")))
    bounds = [whole_bound(branch, (3,)) for branch in (learned, named)]
    assert bounds[0] <= bounds[1] * (1 + 1e-6)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(200, 3)) * 6)
    slopes = np.linalg.norm(sample_jacobians(in_double(learned), x), 2, axis=(1, 2))
    assert slopes.max() <= bounds[0]
