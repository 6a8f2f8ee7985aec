"""Branches with modules that are not this library's: used, trained, and certified by their word."""

import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import quick_jit, residual_of
from helpers import rest_slow, sample_jacobians

import iresnet_jax as ir
from iresnet_jax.layer_walk import largest_norm

SHAPES = {"vector": (3,), "image": (4, 4, 2), "classifier": (4, 4, 2)}


class Swish(nn.Module):
    """x·sigmoid(βx)/1.1 with a learned β > 0: its slope is below 1 for every β."""

    bound: float = 1.0

    @nn.compact
    def __call__(self, x):
        beta = jax.nn.softplus(self.param("beta", nn.initializers.normal(1.0), ()))
        return x * jax.nn.sigmoid(beta * x) / 1.1

    def lipschitz_bound(self, variables):
        del variables
        return self.bound


class Scaled(nn.Module):
    """s·tanh(x), whose constant |s| depends on its variables."""

    @nn.compact
    def __call__(self, x):
        return self.param("s", nn.initializers.normal(0.3), ()) * jnp.tanh(x)

    def lipschitz_bound(self, variables):
        return abs(float(variables["params"]["s"]))


class Hidden(nn.Module):
    """A whole branch that keeps a power iteration inside, and states nothing."""

    @nn.compact
    def __call__(self, x):
        return ir.nn.SpectralDense(x.shape[-1])(jnp.tanh(x))


class Listed(nn.Module):
    """An attribute that cannot be hashed."""

    table: np.ndarray

    def __call__(self, x):
        return x * self.table


def mixed(channels, features, *, coeff, **_):
    """The library's layers around a module with parameters; parents are left to Flax."""
    del features
    return ir.nn.Sequential(
        (ir.nn.SpectralDense(5, coeff), Swish(), "elu", ir.nn.SpectralDense(channels))
    )


def alone(module):
    return lambda channels, features, **_: module


def make(name, make_branch, depth=2):
    common = {"make_branch": make_branch, "features": 4}
    if name == "vector":
        model = ir.nn.VectorFlow(dim=3, depth=depth, **{**common, "features": (4,)})
    else:
        kind = {"image": ir.nn.ImageFlow, "classifier": ir.nn.InvertibleClassifier}[name]
        extra = {} if name == "image" else {"num_classes": 3}
        model = kind(image_shape=(4, 4, 2), depths=(1,), **common, **extra)
    x = jax.random.uniform(jax.random.key(0), (3, *SHAPES[name]))
    return model, quick_jit(model.init)(jax.random.key(1), x), x


@pytest.mark.parametrize("name", rest_slow(SHAPES, "vector"))
def test_every_model_takes_a_branch_of_ones_own(name):
    model, variables, x = make(name, mixed)
    certificate = ir.certify(model, variables)
    assert certificate.certified
    assert all(len(block.layers) == 2 for block in certificate.blocks)
    flow = quick_jit(model.flow)(variables)
    recovered, info = quick_jit(lambda x: flow.inverse(flow.forward(x)))(x)
    assert info.converged.all()
    np.testing.assert_allclose(recovered, x, atol=2e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_variables_of_a_module_that_are_not_finite_are_not_certified(value):
    """Swish states its bound whatever its variables are."""
    model, variables, _ = make("vector", mixed)
    spoil = lambda path, leaf: (  # noqa: E731
        leaf.at[0].set(value) if "beta" in jax.tree_util.keystr(path) else leaf
    )
    params = jax.tree_util.tree_map_with_path(spoil, variables["params"])
    certificate = ir.certify(model, {**variables, "params": params})
    assert not certificate.certified and certificate.lipschitz[0] < 1.0
    assert certificate.failures[0].problem == "not finite: the variables of Swish"


def test_bounds_hold_for_the_jacobians_of_the_blocks():
    model, variables, x = make("vector", mixed)
    bounds = ir.certify(model, variables).lipschitz
    for block, bound in zip(quick_jit(model.flow)(variables).blocks(), bounds, strict=True):
        for jacobian in sample_jacobians(residual_of(block).branch, x):
            assert np.linalg.norm(jacobian, 2) <= bound * (1 + 1e-6)


def test_the_gradient_reaches_the_modules_parameters():
    """Over all 2³ sign vectors the series has the exact traces; it is cut at 0.81⁶⁰."""
    model, variables, x = make("vector", mixed, depth=1)
    (block,) = quick_jit(model.flow)(variables).blocks()
    branch = residual_of(block).branch
    signs = jnp.array(list(itertools.product((-1.0, 1.0), repeat=3)))
    repeated = jnp.broadcast_to(x[0], signs.shape)

    def slope(log_det):
        gradient = quick_jit(jax.grad(lambda branch: log_det(branch).mean()))(branch)
        return float(gradient.stages[1].variables["params"]["beta"])

    series = slope(lambda branch: ir.series_along_probe(branch, repeated, signs, 60)[1])
    exact = slope(lambda branch: ir.Exact()(branch, x[:1])[1])
    assert abs(exact) > 1e-3
    assert series == pytest.approx(exact, rel=1e-3)


def test_a_bound_is_asked_of_each_block_with_its_own_variables():
    model, variables, _ = make("vector", alone(Scaled()), depth=3)
    slopes = np.abs(variables["params"]["scale0_blocks"]["branch"]["stages_0"]["s"])
    assert len(set(slopes)) == 3
    bounded = quick_jit(model.flow)(variables).with_bounds().blocks()
    told = [residual_of(block).lipschitz for block in bounded]
    np.testing.assert_allclose(told, slopes, rtol=1e-6)
    np.testing.assert_allclose(ir.certify(model, variables).lipschitz, slopes, rtol=1e-6)


def with_dense(channels, *_, **__):
    return ir.nn.Sequential((ir.nn.SpectralDense(4), "elu", nn.Dense(channels)))


@pytest.mark.parametrize(("branch", "name"), [(alone(Hidden()), "Hidden"), (with_dense, "Dense")])
def test_a_module_that_states_nothing_is_named(branch, name):
    model, variables, _ = make("vector", branch)
    certificate = ir.certify(model, variables)
    assert not certificate.certified and math.isinf(certificate.inverse)
    assert [block.problem for block in certificate.failures] == [
        f"{name} states no lipschitz_bound()"
    ] * 2


def test_errors_that_are_not_known_are_not_bounded():
    """How a module rounds is its own affair: the library's error bounds become infinite."""
    model, variables, x = make("vector", mixed)
    for block in quick_jit(model.flow)(variables).blocks():
        assert jnp.isinf(residual_of(block).branch.rounding_bound(x)).all()


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_an_error_tolerance_names_the_modules_whose_rounding_is_not_known(wrap):
    model, variables, x = make("vector", mixed)
    flow = quick_jit(model.flow)(variables).with_bounds()
    solver = ir.FixedPointIteration(error_tolerance=1e-3)
    invert = wrap(lambda z: flow.inverse(z, solver))
    with pytest.raises(ValueError, match=r"that of Swish is not known.*rounding_bound\(x\)"):
        invert(flow.forward(x))
    block = residual_of(next(flow.blocks()))
    known = {"lipschitz": block.lipschitz, "rounding": lambda x: 1e-6 * jnp.ones(len(x))}
    _, info = ir.fixed_point_inverse(block.branch, x, solver, **known)
    assert info.converged.all() and (info.error_bound <= 1e-3 * (1 + 1e-5)).all()


def test_a_network_of_modules_alone_has_no_norm_to_show_in_training():
    for make_branch, has_norms in ((alone(Scaled()), False), (mixed, True)):
        model, variables, _ = make("vector", make_branch)
        flow = quick_jit(model.flow)(variables)
        assert (largest_norm(flow, flow, model.coeff) is not None) == has_norms


@pytest.mark.parametrize("bound", [1.5, math.nan])
def test_a_stated_bound_that_proves_nothing_does_not_certify(bound):
    model, variables, _ = make("vector", alone(Swish(bound)))
    assert not ir.certify(model, variables).certified


def test_a_negative_bound_is_refused():
    model, variables, _ = make("vector", alone(Swish(-1.0)))
    with pytest.raises(ValueError, match=r"Swish.lipschitz_bound must be ≥ 0; got -1.0"):
        ir.certify(model, variables)


def test_power_iterations_inside_a_module_advance_in_training_alone():
    model, variables, _ = make("vector", alone(Hidden()))
    kernels = jax.tree.map(lambda leaf: leaf + 0.3, variables["params"])
    moved = {**variables, "params": kernels}
    _, state = model.advance(moved)
    before, after = (jax.tree.leaves(tree) for tree in (variables["spectral"], state["spectral"]))
    assert all(np.abs(a - b).max() > 1e-4 for a, b in zip(before, after, strict=True))
    assert isinstance(model.flow(moved), ir.Flow)


def test_a_layer_inside_a_module_is_trained_converged_and_shrunk():
    model, variables, x = make("vector", alone(Hidden()))
    kernels = jax.tree.map(lambda leaf: leaf + 0.3, variables["params"])
    moved = {**variables, "params": kernels}

    @quick_jit
    @jax.grad
    def gradient(params):
        return model.advance({**moved, "params": params})[0].log_prob(x).mean()

    def stored(collection):
        return collection["scale0_blocks"]["branch"]["stages_0"]["SpectralDense_0"]

    def norms(variables):
        kernels = np.asarray(stored(variables["params"])["kernel"], np.float64)
        return np.linalg.norm(kernels, 2, axis=(1, 2))

    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient(moved["params"])))
    vectors = stored(ir.nn.converge(model, moved)["spectral"])["vectors"]
    kernels = map(ir.DenseOperator, stored(moved["params"])["kernel"])
    pairs = zip(kernels, map(ir.SingularVectors, vectors.u, vectors.v), strict=True)
    sigmas = [ir.sigma_estimate(operator, own) for operator, own in pairs]
    np.testing.assert_allclose(sigmas, norms(moved), rtol=5e-3)
    assert norms(moved).max() > 0.95 and norms(ir.nn.shrink(model, moved)).max() <= 0.9


def test_a_module_that_cannot_be_hashed_is_refused():
    with pytest.raises(TypeError, match="Listed must be hashable"):
        make("vector", alone(Listed(np.ones(3))))


@pytest.mark.parametrize("width", [4, 1])  # one channel would be broadcast
def test_a_branch_that_changes_the_shape_is_refused(width):
    with pytest.raises(ValueError, match=rf"maps \(3,\) to \({width},\)"):
        make("vector", alone(nn.Dense(width)))


def test_batch_norm_is_refused():
    with pytest.raises(TypeError, match="BatchNorm cannot be part of a branch"):
        make("vector", alone(nn.BatchNorm(use_running_average=False)))


def test_a_branch_within_a_branch_keeps_every_layers_own_bound():
    def make(dim, features, **options):
        del features, options
        inner = ir.nn.Sequential(
            ("elu", ir.nn.SpectralDense(dim, coeff=0.5, parent=None)), parent=None
        )
        return ir.nn.Sequential(
            (inner, ir.nn.SpectralDense(dim, coeff=0.9, parent=None)), parent=None
        )

    model = ir.nn.VectorFlow(dim=3, depth=2, make_branch=make)
    x = jax.random.normal(jax.random.key(1), (4, 3))
    flow = model.flow(quick_jit(model.init)(jax.random.key(0), 3.0 * x)).with_bounds()
    _, info = flow.inverse(flow.forward(x))
    assert np.isfinite(info.error_bound).all()
    for block in flow.blocks():
        for layer in ir.layers_by_path(block).values():
            norm = np.linalg.norm(np.asarray(layer.operator.kernel, np.float64), 2)
            assert norm <= layer.norm_bound <= norm * (1 + 1e-5)
