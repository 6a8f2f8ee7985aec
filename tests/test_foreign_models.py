"""Layers and stacks inside of somebody else's Flax network: converged, shrunk and certified."""

import contextlib
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import quick_jit
from flax.traverse_util import flatten_dict, unflatten_dict
from foreign_cases import Repeated, X, blocks, initial, moved
from helpers import rest_slow

import iresnet_jax as ir

STACK_LAYERS = ("stages_1", "stages_3")


class Inner(nn.Module):
    """A layer of this library, one level down."""

    @nn.compact
    def __call__(self, x):
        return ir.nn.SpectralDense(3, coeff=0.5, name="mix")(nn.tanh(x))


class Network(nn.Module):
    """Everything between, before and behind the stacks is its author's."""

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.Dense(3, name="embed")(x)
        x = blocks("body")(x)
        x = Inner(name="inner")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        x = blocks("tail", actnorm=False, label="the tail")(x)
        return ir.nn.SpectralDense(2, normalize="bound", name="head")(x)


class SetUp(nn.Module):
    """The same in Flax's other style, a stack with a branch made in place."""

    def setup(self):
        self.body = ir.nn.Stack(ir.nn.Sequential(("elu", ir.nn.SpectralDense(3))), 2)
        self.inner = Inner()

    def __call__(self, x):
        return self.inner(self.body(x))


class Wrapped(nn.Module):
    """Lifted transforms that pass every collection on."""

    @nn.compact
    def __call__(self, x):
        x = nn.remat(Inner)(name="again")(x)
        return nn.jit(Inner)(name="compiled")(x)


MODELS = {
    "network": Network(),
    "set up": SetUp(),
    "wrapped": Wrapped(),
    "scan": Repeated("scan"),
    "vmap": Repeated("vmap"),
}
every_model = pytest.mark.parametrize("name", rest_slow(MODELS, "network", "wrapped", "scan"))


def layers_of(tree, at=()):
    """Path -> what is stored for every layer that has singular vectors."""
    if "vectors" in tree:
        return {at: tree["vectors"]}
    return {path: v for name in tree for path, v in layers_of(tree[name], (*at, name)).items()}


def stored(tree, path):
    for name in path:
        tree = tree[name]
    return tree


def norms_of(variables):
    """Path -> the norms of a layer's raw kernels, stacked ones too, by SVD."""
    kernels = {
        path: np.asarray(stored(variables["params"], path)["kernel"], np.float64)
        for path in layers_of(variables["spectral"])
    }
    return {path: np.linalg.norm(kernel, 2, axis=(-2, -1)) for path, kernel in kernels.items()}


def coeff_of(path):
    return 0.5 if path[-1] == "mix" and path[0] != "cells" else 0.9


def unchanged(before, after, collection):
    """All collections but one are as they were; so is every structure and shape."""
    assert jax.tree.map(jnp.shape, before) == jax.tree.map(jnp.shape, after)
    for name in set(before) - {collection}:
        jax.tree.map(np.testing.assert_array_equal, before[name], after[name])


@pytest.mark.parametrize("name", rest_slow(MODELS, "network"))
def test_every_power_iteration_converges_wherever_it_is(name):
    model = MODELS[name]
    variables = moved(model)
    converged = ir.nn.converge(model, variables, X)
    unchanged(variables, converged, "spectral")
    norms = norms_of(variables)
    assert norms
    for path, vectors in layers_of(converged["spectral"]).items():
        kernel = stored(variables["params"], path)["kernel"]
        sigma = np.einsum("...i,...ij,...j->...", vectors.v, kernel, vectors.u)
        np.testing.assert_allclose(np.abs(sigma), norms[path], rtol=5e-3)
    jitted = quick_jit(lambda variables: ir.nn.converge(model, variables, X))(variables)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), jitted, converged)


@pytest.mark.parametrize("name", rest_slow(MODELS, "network", "wrapped"))
def test_every_kernel_is_shrunk_wherever_it_is(name):
    model = MODELS[name]
    variables = moved(model)
    shrunk = ir.nn.shrink(model, variables, X)
    unchanged(variables, shrunk, "params")
    before, after = norms_of(variables), norms_of(shrunk)
    assert max(norm.max() for norm in before.values()) > 1.0
    for path, norm in after.items():
        coeff = coeff_of(path)
        assert (norm <= coeff).all()
        np.testing.assert_allclose(norm, np.minimum(before[path], coeff), rtol=1e-4)
    others = (
        (path, a, b)
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(variables["params"]),
            jax.tree.leaves(shrunk["params"]),
            strict=True,
        )
        if tuple(entry.key for entry in path[:-1]) not in after or path[-1].key != "kernel"
    )
    for _, a, b in others:
        np.testing.assert_array_equal(a, b)


def test_the_stacks_of_a_network_are_certified_by_their_paths():
    model = MODELS["network"]
    variables = initial(model)
    variables = ir.nn.shrink(model, variables, X)
    certificate = ir.certify(model, variables, X)
    assert certificate.certified
    places = [("body", 0), ("body", 1), ("the tail", 0), ("the tail", 1)]
    assert [b.name for b in certificate.blocks] == [f"{at}, block {i}" for at, i in places]
    assert math.isinf(certificate.forward) and math.isinf(certificate.inverse)
    norms = norms_of(variables)
    for block, (stack, i) in zip(certificate.blocks, places, strict=True):
        path = ("body",) if stack == "body" else ("tail",)
        product = math.prod(norms[(*path, "branch", layer)][i] for layer in STACK_LAYERS)
        assert product * (1 - 1e-6) <= block.product <= product * (1 + 1e-4)


def test_a_stack_that_is_no_contraction_is_named():
    model = MODELS["network"]
    variables = initial(model)
    branch = variables["params"]["tail"]["branch"]
    branch["stages_1"]["bias"] = branch["stages_1"]["bias"].at[1].set(jnp.nan)
    certificate = ir.certify(model, variables, X)
    (failure,) = certificate.failures
    assert failure.name == "the tail, block 1"
    assert failure.problem == "not finite: the bias of layer 0"


class LogitFirst(nn.Module):
    """A block of ones own: a logit, whose slopes are known on [0, 1], and a residual."""

    @nn.compact
    def pure(self, shape):
        layer = ir.nn.SpectralDense(3, name="layer").pure(shape)
        return ir.Chain((ir.Logit(), ir.Residual(ir.Sequential((layer,)))))


class WithLogit(nn.Module):
    @nn.compact
    def __call__(self, x):
        return ir.nn.Stack(LogitFirst(), 1, actnorm=False, name="stack")(nn.Dense(3)(x))


def test_a_stack_for_data_in_the_unit_interval_is_not_certified_behind_what_is_not_known():
    model = WithLogit()
    certificate = ir.certify(model, initial(model), X)
    assert not certificate.certified
    (problem,) = certificate.problems
    assert problem == "stack takes data in [0, 1], and it is not known what it sees"


@pytest.mark.parametrize("lift", rest_slow(["scan", "vmap"], "scan"))
def test_the_copies_of_a_repeated_stack_are_all_certified(lift):
    model = MODELS[lift]
    variables = ir.nn.shrink(model, moved(model), X)
    certificate = ir.certify(model, variables, X)
    assert certificate.certified and len(certificate.blocks) == 6
    norms = norms_of(variables)
    factors = [norms["cells", "stack", "branch", layer] for layer in STACK_LAYERS]
    product = (factors[0] * factors[1]).ravel()
    products = [block.product for block in certificate.blocks]
    np.testing.assert_allclose(np.sort(products), np.sort(product), rtol=1e-4)
    assert len({block.name for block in certificate.blocks}) == 6


def test_options_reach_the_network():
    model = MODELS["network"]
    variables = initial(model)
    converged = ir.nn.converge(model, variables, X, train=False)
    assert set(converged) == set(variables) == {"params", "spectral", "batch_stats"}
    assert ir.certify(model, variables, X, train=False).blocks


class Within(nn.Module):
    """A branch of one's own that contains a layer of this library, and states its constant."""

    @nn.compact
    def __call__(self, x):
        return ir.nn.SpectralDense(3, coeff=0.5, name="layer")(x)

    def lipschitz_bound(self, variables):
        return 0.5


@pytest.mark.parametrize("as_they_are", [False, True])
def test_stale_vectors_do_not_loosen_a_layer_in_a_branch_of_ones_own(as_they_are):
    """Vectors that miss the norm, such as averaged ones, count only where that is asked for."""
    stack = ir.nn.Stack(ir.nn.Sequential((Within(),)), depth=1, actnorm=False)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
    variables = stack.init(jax.random.key(0), x)
    layer = ("branch", "stages_0", "layer")
    flat = flatten_dict(variables)
    flat["params", *layer, "kernel"] = jnp.diag(jnp.array([4.0, 0.01, 0.01]))[None]
    for vectors in (path for path in flat if path[0] == "spectral"):
        vector = jnp.array([[0.01, 1.0, 0.0]])  # near a small singular value's
        flat[vectors] = jax.tree.map(lambda _, v=vector: v, flat[vectors])
    with ir.nn.frozen_vectors() if as_they_are else contextlib.nullcontext():
        y = stack.apply(unflatten_dict(flat), jnp.eye(3))
    norm = np.linalg.norm(np.asarray(y - jnp.eye(3), np.float64), 2)
    assert norm > 1.0 if as_they_are else norm <= 0.5 + 1e-5
