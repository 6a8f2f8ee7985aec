"""Whole branches: what of them is bounded as a row, and what must not be taken for it."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from row_cases import LIPSWISH, MONOTONE, ROWS, conv_row, dense, norms_of, product_of

from iresnet_jax import (
    ACTIVATIONS,
    Activation,
    ActNorm,
    Affine,
    Chain,
    DenseOperator,
    ModuleStage,
    Sequential,
)
from iresnet_jax.affine_rows import AffineRow, split
from iresnet_jax.certificates import certify_branch
from iresnet_jax.lipsdp import row_bound, whole_bound


def layer(op):
    return Affine(op)


def branch_of(row, names):
    stages = [layer(row.operators[0])]
    for name, op in zip(names, row.operators[1:], strict=True):
        stages += [Activation(name), layer(op)]
    return Sequential(tuple(stages))


def test_a_branch_is_split_into_rows_and_the_rest():
    row = ROWS["two"]
    inner = branch_of(row, ("elu", "lipswish"))
    branch = Sequential(
        (
            Activation("sin"),
            inner,
            Activation("tanh"),
            Halved(),
            Activation("elu"),
            layer(dense(np.eye(4) * 0.3)),
        )
    )
    (found,), rest = split(branch, (4,))
    assert found.slopes == (MONOTONE, LIPSWISH) and len(found.operators) == 3
    assert rest == pytest.approx(0.15, rel=1e-6)
    assert whole_bound(branch, (4,)) == pytest.approx(0.15 * row_bound(found), rel=1e-6)
    assert whole_bound(branch, (4,)) < 0.9 * branch.lipschitz_bound()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Halved:
    def __call__(self, x):
        return 0.5 * x

    def lipschitz_bound(self):
        return 0.5


def test_activations_in_a_row_have_the_slopes_of_their_composition():
    row = ROWS["one hidden layer"]
    first, second = map(layer, row.operators)
    branch = Sequential((first, Activation("sin"), Activation("lipswish"), second))
    (found,), _ = split(branch, (5,))
    assert found.slopes == ((-1.0, 1.0),)
    branch = Sequential((first, second))
    (found,), _ = split(branch, (5,))
    assert found.slopes == (MONOTONE,)  # the identity's, and 0


def test_the_certificate_has_both_bounds_and_stands_by_the_better_one():
    row = ROWS["two"]
    scaled = [
        dense(np.asarray(op.kernel) * 0.95 / n)
        for op, n in zip(row.operators, norms_of(row), strict=True)
    ]
    branch = branch_of(AffineRow(tuple(scaled), row.slopes, row.shape), ("elu", "tanh"))
    found = certify_branch(branch, "it", (4,))
    assert found.product == pytest.approx(0.95**3, rel=1e-5) and found.lipschitz < 0.8
    x = jnp.asarray(np.random.default_rng(1).normal(size=(64, 4)), jnp.float32)
    slopes = jax.vmap(jax.jacobian(lambda x: branch(x[None])[0]))(x)
    assert np.linalg.norm(np.asarray(slopes, np.float64), 2, axis=(1, 2)).max() < found.lipschitz


def test_a_branch_whose_product_is_above_one_can_be_certified():
    row = ROWS["two"]
    whole = row_bound(row)
    assert whole < 0.9 * product_of(row)
    first = dense(np.asarray(row.operators[0].kernel) * 0.95 / whole)
    branch = branch_of(
        AffineRow((first, *row.operators[1:]), row.slopes, row.shape), ("elu", "elu")
    )
    found = certify_branch(branch, "it", (4,))
    assert found.product > 1.05 and not found.problem and found.lipschitz < 0.96


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_of_weights_that_are_not_finite_nothing_is_certified(bad):
    row = ROWS["two"]
    kernel = np.array(row.operators[1].kernel)
    kernel[2, 3] = bad
    operators = (row.operators[0], dense(kernel), row.operators[2])
    found = certify_branch(
        branch_of(AffineRow(operators, row.slopes, row.shape), ("elu", "elu")), "it", (4,)
    )
    assert "not finite" in found.problem and not found.lipschitz < 1.0


# What must not be mistaken for something else


class Doubled(Sequential):
    def __call__(self, x):
        return 2.0 * super().__call__(x)

    def lipschitz_bound(self):
        return 2.0 * super().lipschitz_bound()


class DoubledLayer(Affine):
    def __call__(self, x):
        return 2.0 * super().__call__(x)

    def lipschitz_bound(self):
        return 2.0 * super().lipschitz_bound()


class DoubledActivation(Activation):
    def __call__(self, x):
        return 2.0 * super().__call__(x)

    def lipschitz_bound(self):
        return 2.0 * super().lipschitz_bound()


for kind, data, meta in (
    (Doubled, ["stages"], ["precision"]),
    (DoubledLayer, ["operator", "bias", "sigma", "norm_bound"], []),
    (DoubledActivation, ["active"], ["name"]),
):
    jax.tree_util.register_dataclass(kind, data, meta)


def test_branches_of_another_precision_and_events_of_more_axes_are_bounded():
    row = conv_row(31, (3, 3), (2, 4, 4, 2), (3, 1, 3), (MONOTONE, MONOTONE))
    branch = branch_of(row, ("elu", "elu"))
    low = dataclasses.replace(branch, precision="bfloat16")
    assert whole_bound(low, (3, 3, 2)) == pytest.approx(whole_bound(branch, (3, 3, 2)), rel=0.02)
    more = Sequential((layer(dense(np.eye(2))), Activation("elu"), *branch.stages))
    assert whole_bound(more, (5, 3, 3, 2)) < 0.9 * more.lipschitz_bound()
    assert whole_bound(more, (5, 3, 3, 2)) == pytest.approx(whole_bound(more, (3, 3, 2)), rel=1e-9)


@pytest.mark.parametrize("where", ["branch", "row within", "layer", "activation"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_subclass_is_bounded_by_what_it_states(where, precision):
    first, elu, second, tanh, third = contracting("elu", "tanh").stages
    stages = {
        "branch": (first, elu, second, tanh, third),
        "row within": (Doubled((first, elu, second)), tanh, third),
        "layer": (first, elu, DoubledLayer(second.operator), tanh, third),
        "activation": (first, elu, second, DoubledActivation("tanh"), third),
    }[where]
    kind = Doubled if where == "branch" else Sequential
    found = certify_branch(kind(stages, precision), "it", (4,))
    plain = certify_branch(Sequential((first, elu, second, tanh, third), precision), "it", (4,))
    assert found.product == pytest.approx(2 * 0.6**3, rel=0.02)
    assert found.lipschitz >= min(1.99 * plain.lipschitz, found.product * (1 - 1e-9))


def contracting(*names):
    row = ROWS["two"]
    pairs = zip(row.operators, norms_of(row), strict=True)
    small = tuple(dense(np.asarray(op.kernel) * 0.6 / norm) for op, norm in pairs)
    return branch_of(AffineRow(small, row.slopes, row.shape), names)


@dataclasses.dataclass(frozen=True)
class Scaled:
    """Prints as every other."""

    factor: float

    def __repr__(self):
        return "Scaled()"

    def apply(self, variables, x):
        return self.factor * x

    def lipschitz_bound(self, variables):
        return self.factor


def test_modules_that_print_alike_are_not_taken_for_each_other():
    square = layer(dense(0.7 * np.eye(4)))
    for factor in (0.1, 3.0, 0.2):
        branch = Sequential((square, ModuleStage(Scaled(factor), {}), square))
        found = certify_branch(branch, "it", (4,))
        assert found.lipschitz == pytest.approx(0.49 * factor, rel=1e-6)


def test_an_activation_that_has_changed_under_its_name_is_bounded_anew(monkeypatch):
    branch = contracting("tanh", "tanh")
    before = whole_bound(branch, (4,))
    wide = ACTIVATIONS["tanh"]._replace(slopes=(-1.0, 1.0))
    monkeypatch.setitem(ACTIVATIONS, "tanh", wide)
    assert whole_bound(branch, (4,)) > 1.1 * before


@pytest.mark.parametrize("x", [4.838e-162, 1e-155, 1e-100, 1e-30, 1e30, 1e155])
def test_of_layers_of_opposite_sizes_nothing_false_is_proved(x, x64, monkeypatch):
    """ReLU turned down: slopes in [−1, 0]."""
    down = ACTIVATIONS["relu"]._replace(function=lambda x: -jax.nn.relu(x), slopes=(-1.0, 0.0))
    monkeypatch.setitem(ACTIVATIONS, "down", down)
    first, middle, last = (
        Affine(DenseOperator(jnp.asarray(k, jnp.float64)))
        for k in ([[0.0], [x]], [[1.0]], [[0.0, 1.05 / x]])
    )
    branch = Sequential((first, Activation("down"), middle, Halved(), last))
    assert whole_bound(branch, (2,)) >= 0.525


def test_of_layers_whose_product_is_tiny_nothing_false_is_proved(x64):
    weights = (1e290, 1.2e15, 1.46, 2e-323)
    operators = tuple(DenseOperator(jnp.asarray([[w]], jnp.float64)) for w in weights)
    row = AffineRow(operators, (MONOTONE,) * 3, (1,))
    held = [np.longdouble(float(op.kernel[0, 0])) for op in operators]
    assert row_bound(row) >= math.prod(held) * (1 - 1e-9)


# Products and subclasses


def test_constants_whose_product_underflows_on_the_way_do_not_vanish():
    """Of 9 layers of 1e-36 and 9 of 2e36 the slope is 512; of 10 ActNorms and their inverses, 1."""
    small, large = (layer(dense(x * np.eye(2))) for x in (1e-36, 2e36))
    branch = Sequential((small,) * 9 + (large,) * 9)
    assert branch.lipschitz_bound() >= 512.0
    assert certify_branch(branch, "it", (2,)).problem
    shift = np.zeros(2, np.float32)
    norms = [ActNorm(np.full(2, x, np.float32), shift) for x in (-80.0, 80.0)]
    for first, second in (norms, norms[::-1]):
        certificate = Chain((first,) * 10 + (second,) * 10).certify("it", (2,))
        assert certificate.forward >= 1.0 and certificate.inverse >= 1.0


class Steeper(Activation):
    def __call__(self, x):
        return 3.0 * super().__call__(x)


jax.tree_util.register_dataclass(Steeper, ["active"], ["name"])


def test_a_subclass_with_a_map_of_its_own_does_not_inherit_what_is_stated():
    first, *_ = contracting("elu", "tanh").stages
    last = layer(dense(np.full((10, 4), 0.01)))
    found = certify_branch(Sequential((first, Steeper("elu"), last)), "it", (4,))
    assert found.lipschitz == math.inf and "Steeper states no lipschitz_bound()" in found.problem
    bound = Sequential((Steeper("elu"),)).rounding_bound(jnp.ones((2, 10)))
    np.testing.assert_array_equal(bound, math.inf)
