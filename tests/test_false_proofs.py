"""Networks that look provable and are not: none is certified, and no bound is attached to it."""

import dataclasses
import math

import flax.linen as fnn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import iresnet_jax as ir

EYE = np.eye(2)


def dense(kernel, bias=None):
    return ir.Affine(ir.DenseOperator(jnp.asarray(kernel, jnp.float32)), bias)


def flow_of(*stages):
    return ir.Flow((ir.Residual(ir.Sequential(stages)),), (2,))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Shifted:
    """x ↦ a·x + b, of Python floats."""

    scale: float
    shift: float

    def __call__(self, x):
        return self.scale * x + self.shift

    def lipschitz_bound(self):
        return abs(float(self.scale))

    def rounding(self, x, error, arithmetic):
        return jnp.full_like(error, jnp.inf)


# Branches that broadcast: x + g(x) would be another map than the one that is bounded


def test_a_branch_that_broadcasts_is_neither_certified_nor_run():
    """g maps the plane to one number: x + g(x) has a singular Jacobian at L = 0.71."""
    flow = flow_of(dense([[-0.5], [-0.5]]))
    certificate = ir.certify(flow)
    assert not certificate.certified
    assert certificate.blocks[0].problem == "the branch maps the shape (2,) to (1,)"
    with pytest.raises(ValueError, match=r"must keep the shape of its input; .* to \(3, 1\)"):
        flow.forward(jnp.ones((3, 2)))


def test_a_bias_that_broadcasts_is_refused():
    flow = flow_of(dense([[-0.5], [-0.5]], jnp.zeros(2)))
    with pytest.raises(ValueError, match=r"bias of a layer with 1 output channels .* got \(2,\)"):
        ir.certify(flow)


def test_a_module_that_changes_the_shape_is_no_branch():
    stack = ir.nn.Stack(ir.nn.SpectralDense(1), depth=1)
    with pytest.raises(ValueError, match=r"maps \(2,\) to \(1,\)"):
        stack.init(jax.random.key(0), jnp.ones((3, 2)))


# Certificates of other networks


@pytest.mark.parametrize(
    ("certified", "other"),
    [
        ((dense(0.5 * EYE),), (dense(0.5 * EYE), dense(1.9 * EYE))),
        ((dense(0.5 * EYE), ir.Activation("elu")), (dense(0.5 * EYE), ir.Activation("sin"))),
        ((Shifted(0.1, 0.0),), (Shifted(0.9, 0.0),)),
        ((dense(0.5 * EYE, jnp.zeros(2)),), (dense(0.5 * EYE, jnp.ones(2)),)),
        ((dense(0.5 * EYE),), (dense(0.6 * EYE),)),
    ],
    ids=["another layer", "another activation", "a stage's own weights", "a bias", "a kernel"],
)
def test_bounds_of_another_branch_are_not_attached(certified, other):
    certificate = ir.certify(flow_of(*certified))
    with pytest.raises(ValueError, match="of other weights"):
        flow_of(*other).with_bounds(certificate)
    assert flow_of(*certified).with_bounds(certificate).contracts


# Stacks in somebody else's model


class Hidden(fnn.Module):
    """A good stack; then, beside it, what is no contraction."""

    bad: str

    @fnn.compact
    def __call__(self, x):
        x = ir.nn.Stack(ir.nn.dense_branch(2, (4,)), depth=1)(x)
        steep = ir.nn.dense_branch(2, (4,), coeff=None)
        if self.bad == "model":
            return ir.nn.VectorFlow(dim=2, depth=1, features=(4,), coeff=None)(x)[0]
        return ir.nn.Stack(steep, depth=1, name="steep").pure((2,)).forward(x)


@pytest.mark.parametrize("bad", ["model", "pure"])
def test_no_stack_is_passed_over(bad):
    net, x = Hidden(bad), jax.random.normal(jax.random.key(0), (4, 2))
    variables = jax.jit(net.init)(jax.random.key(1), x)
    params = jax.tree.map(lambda leaf: 3.0 * leaf, variables["params"])
    certificate = ir.certify(net, {**variables, "params": params}, x)
    assert len(certificate.blocks) == 2 and not certificate.certified


class Reused(fnn.Module):
    @fnn.compact
    def __call__(self, x):
        stack = ir.nn.Stack(ir.nn.dense_branch(2, (4,)), depth=1, actnorm=False, name="stack")
        return stack(stack(x)[:, 0])


def test_every_use_of_a_stack_counts():
    net, x = Reused(), jax.random.normal(jax.random.key(0), (4, 3, 2))
    variables = jax.jit(net.init)(jax.random.key(1), x)
    certificate = ir.certify(net, variables, x)
    assert [block.name for block in certificate.blocks] == [
        "stack, block 0",
        "stack, use 2, block 0",
    ]
    assert [branch.dim for branch in certificate.branches] == [6, 2]


# Weights and operators that no bound sees


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_python_number_that_is_not_finite_is_found(value):
    certificate = ir.certify(flow_of(Shifted(0.5, value)))
    assert not certificate.certified and "not finite" in certificate.blocks[0].problem


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Twice(ir.DenseOperator):
    def __call__(self, x):
        return 2.0 * super().__call__(x)


def test_a_subclass_of_an_operator_inherits_no_proof():
    layer = ir.Affine(Twice(jnp.eye(2)))
    for refuse in (ir.layer_upper_bound, ir.gram_upper_bound):
        with pytest.raises(TypeError, match="type Twice"):
            refuse(layer.operator)
    with pytest.raises(TypeError, match="Twice"):
        layer.rounding(jnp.ones((1, 2)), jnp.zeros(1), ir.Arithmetic(2.0**-24))


def test_a_negative_lipschitz_bound_proves_nothing():
    g, y = (lambda x: -9.0 * jnp.tanh(x)), jnp.ones((1, 2))
    with pytest.raises(ValueError, match=r"lipschitz must be ≥ 0; got -9\.0"):
        ir.fixed_point_inverse(g, y, lipschitz=-9.0)
    exactly = lambda x: jnp.zeros(x.shape[0])  # noqa: E731
    invert = jax.jit(lambda L: ir.fixed_point_inverse(g, y, lipschitz=L, rounding=exactly)[1])
    assert math.isinf(float(invert(-9.0).error_bound[0]))


def test_a_stack_of_another_depth_than_its_weights_is_not_certified():
    two = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), ir.Residual(dense(0.5 * EYE)))
    with pytest.raises(ValueError, match=r"A stack of depth 1 needs weights .* got \[\(2,\)\]"):
        ir.certify(ir.Flow((ir.Stack(two, 1),), (2,)))


# Where a network has a place that does not fit


def test_priors_of_another_shape_are_refused():
    prior = ir.DiagonalGaussian(jnp.zeros(()), jnp.zeros(()))
    flow = dataclasses.replace(flow_of(dense(0.5 * EYE)), priors=(prior,))
    with pytest.raises(ValueError, match=r"priors are over shapes .* the latents have"):
        flow.log_prob(jnp.ones((2, 2)))


def test_actnorm_of_other_channels_is_refused():
    norm = ir.ActNorm(jnp.zeros(1), jnp.zeros(1))
    with pytest.raises(ValueError, match="ActNorm of"):
        norm.forward(jnp.ones((3, 2)))
