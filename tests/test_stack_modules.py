"""A stack as a module of one's own network: mapped, measured, inverted, trained."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import quick_jit
from helpers import rest_slow, sample_jacobians

import iresnet_jax as ir

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (6, 3))


def blocks():
    return ir.nn.Stack(ir.nn.dense_branch(3, (4,)), 2)


class Halving(nn.Module):
    """A branch without a layer of this library."""

    @nn.compact
    def __call__(self, x):
        return self.param("s", nn.initializers.constant(0.5), ()) * jnp.tanh(x)

    def lipschitz_bound(self, variables):
        return abs(float(variables["params"]["s"]))


@pytest.mark.parametrize(
    "branch",
    [
        lambda: ir.nn.SpectralDense(3),
        pytest.param(
            lambda: ir.nn.Sequential(("elu", ir.nn.SpectralDense(3))), marks=pytest.mark.slow
        ),
        lambda: Halving(),
        pytest.param(lambda: ir.nn.dense_branch(3, (4,)), marks=pytest.mark.slow),
    ],
    ids=["layer", "row", "foreign", "factory"],
)
@pytest.mark.parametrize("actnorm", rest_slow([False, True], True))
def test_a_branch_may_be_made_in_place(branch, actnorm):
    """In a compact method, where Flax takes it for a child of the enclosing module."""

    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x):
            return ir.nn.Stack(branch(), 2, actnorm, name="stack")(x)

    model = Plain()
    variables = quick_jit(model.init)(KEY, X)
    assert model.apply(variables, X).shape == X.shape
    changed = ir.nn.shrink(model, ir.nn.converge(model, variables, X), X)
    assert jax.tree.map(jnp.shape, changed) == jax.tree.map(jnp.shape, variables)
    certificate = ir.certify(model, variables, X)
    assert [block.name for block in certificate.blocks] == ["stack, block 0", "stack, block 1"]
    size = certificate.lipschitz[0]
    assert 0.3 < size < 1.0


class Density(nn.Module):
    """A density of one's own: two stacks, mapped, measured and inverted."""

    def setup(self):
        self.first, self.second = blocks(), blocks()

    def __call__(self, x, estimator, key=None):
        x, one = self.first.forward_and_log_det(x, estimator, key=key)
        x, other = self.second.forward_and_log_det(x, estimator, key=key)
        return x, one + other

    def invert(self, y, solver):
        y, second = self.second.inverse(y, solver)
        y, first = self.first.inverse(y, solver)
        return y, first, second


def test_a_stack_maps_measures_and_inverts_by_its_methods():
    model, solver = Density(), ir.Anderson(rtol=1e-6)
    variables = quick_jit(model.init, static_argnums=2)(KEY, X, ir.Exact())
    apply = quick_jit(lambda v, x: model.apply(v, x, ir.Exact()))
    y, log_det = apply(variables, X)
    jacobian = sample_jacobians(lambda x: model.apply(variables, x, ir.Exact())[0], X)
    np.testing.assert_allclose(log_det, np.linalg.slogdet(jacobian)[1], atol=1e-5)
    invert = quick_jit(lambda v, y: model.apply(v, y, solver, method="invert"))
    back, first, second = invert(variables, y)
    np.testing.assert_allclose(back, X, atol=1e-5)
    assert first.converged.shape == second.converged.shape == (2, len(X))
    series = ir.TruncatedSeries(2)
    estimate = quick_jit(lambda v, x: model.apply(v, x, series, KEY)[1])(variables, X)
    assert estimate.shape == (len(X),) and jnp.abs(estimate - log_det).max() > 1e-4
    certificate = ir.certify(model, variables, X, ir.Exact())
    assert [b.name for b in certificate.blocks][1:3] == ["first, block 1", "second, block 0"]


@pytest.mark.slow
def test_a_stack_of_ones_own_is_trained():
    """The step advances the singular vectors; one that does not is refused."""
    model, estimator = Density(), ir.Exact()
    variables = quick_jit(model.init, static_argnums=2)(KEY, X, estimator)

    def loss(params, mutable):
        out = model.apply({**variables, "params": params}, X, estimator, mutable=mutable)
        (y, log_det), state = out if mutable else (out, {})
        return jnp.mean(jnp.sum(y**2, axis=1) / 2 - log_det), state

    step = quick_jit(jax.grad(lambda p: loss(p, ["spectral"]), has_aux=True))
    gradient, state = step(variables["params"])
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))
    assert jax.tree.structure(state["spectral"]) == jax.tree.structure(variables["spectral"])
    with pytest.raises(ValueError, match="The kernel of first/branch/stages_"):
        jax.grad(lambda p: loss(p, False), has_aux=True)(variables["params"])


@pytest.mark.slow
def test_the_stacks_of_ones_own_network_take_their_bounds():
    """From a certificate of their own, or from their part of the network's."""
    model = Density()
    variables = quick_jit(model.init, static_argnums=2)(KEY, X, ir.Exact())
    variables = ir.nn.shrink(model, variables, X, ir.Exact())
    first, second = model.apply(
        variables, method=lambda m: (m.first.pure((3,)), m.second.pure((3,)))
    )
    blocks = ir.certify(model, variables, X, ir.Exact()).blocks
    for stack, own in ((first, blocks[:2]), (second, blocks[2:])):
        assert not stack.contracts
        for certificate in (ir.Certificate(own), stack.certify("it", (3,))):
            bounded = stack.bounded_by(certificate)
            _, info = bounded.inverse(X)
            assert bounded.contracts and bool(jnp.isfinite(info.error_bound).all())
    with pytest.raises(ValueError, match="of other weights"):
        first.bounded_by(ir.Certificate(blocks[2:]))
    with pytest.raises(ValueError, match="is of 4 branches; this network has 2"):
        first.bounded_by(ir.Certificate(blocks))


def test_a_stack_initialised_from_one_dummy_row_is_usable():
    variables = jax.jit(blocks().init)(KEY, jnp.ones((1, 3)))
    np.testing.assert_array_equal(variables["params"]["log_scale"], 0.0)


def test_a_stack_is_not_initialised_from_what_is_not_finite():
    with pytest.raises(ValueError, match="finite; the first offending value is nan"):
        blocks().init(KEY, X.at[2, 1].set(jnp.nan))


@pytest.mark.parametrize("monotone", rest_slow([False, True], False))
def test_branches_made_one_after_another_are_those_made_at_once(monotone, monkeypatch):
    """As on a TPU: the same weights at first, and the same map after power iterations."""
    x = np.random.default_rng(0).uniform(size=(4, 4, 4, 2)).astype(np.float32)
    options = {"depths": (3,), "features": 4, "monotone": monotone}
    model = ir.nn.ImageFlow(image_shape=(4, 4, 2), **options)

    @functools.partial(jax.jit, static_argnums=0)
    def advanced(backend, x):
        variables = model.init(jax.random.key(1), x)
        z, state = model.apply(variables, x, mutable=["spectral"])
        return variables["params"], z, state

    found = []
    for backend in ("cpu", "tpu"):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        found.append(advanced(backend, x))
    (weights, *rest), (others, *others_rest) = found
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), weights, others)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), rest, others_rest)
