"""Layers and stacks inside of somebody else's Flax network: converged, shrunk and certified."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import quick_jit

import iresnet_jax as ir

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (6, 3))
STACK_LAYERS = ("stages_1", "stages_3")


def blocks(name, **options):
    return ir.nn.Stack(ir.nn.dense_branch(3, (4,)), 2, name=name, **options)


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


class Cell(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return ir.nn.SpectralDense(3, name="mix")(blocks("stack")(x)), None


class Repeated(nn.Module):
    """Three cells in a row, or side by side, by a lifted transform of these collections."""

    lift: str
    collections: tuple[str, ...] = ("params", "spectral", "intermediates")
    axes: tuple[int | None, ...] = (0, 0, 0)

    @nn.compact
    def __call__(self, x):
        options = {
            "variable_axes": dict(zip(self.collections, self.axes, strict=False)),
            "split_rngs": {"params": self.axes[0] is not None},
        }
        if self.lift == "scan":
            return nn.scan(Cell, length=3, **options)(name="cells")(x, None)[0]
        cells = nn.vmap(Cell, in_axes=(None, None), axis_size=3, **options)(name="cells")
        return cells(x, None)[0].mean(0)


MODELS = {
    "network": Network(),
    "set up": SetUp(),
    "wrapped": Wrapped(),
    "scan": Repeated("scan"),
    "vmap": Repeated("vmap"),
}
every_model = pytest.mark.parametrize("name", MODELS)


def moved(model):
    """Variables as after training that let no power iteration advance."""
    variables = quick_jit(model.init)(KEY, X)
    rng = np.random.default_rng(3)

    def move(path, leaf):
        kernel = "kernel" in jax.tree_util.keystr(path)
        return leaf + jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype) if kernel else leaf

    return {**variables, "params": jax.tree_util.tree_map_with_path(move, variables["params"])}


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


@every_model
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


@every_model
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
    variables = quick_jit(model.init)(KEY, X)
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
        assert product * (1 - 1e-6) <= block.lipschitz <= product * (1 + 1e-4)


def test_a_stack_that_is_no_contraction_is_named():
    model = MODELS["network"]
    variables = quick_jit(model.init)(KEY, X)
    branch = variables["params"]["tail"]["branch"]
    branch["stages_1"]["bias"] = branch["stages_1"]["bias"].at[1].set(jnp.nan)
    certificate = ir.certify(model, variables, X)
    (failure,) = certificate.failures
    assert failure.name == "the tail, block 1"
    assert failure.problem == "not finite: the bias of layer 0"


@pytest.mark.parametrize("lift", ["scan", "vmap"])
def test_the_copies_of_a_repeated_stack_are_all_certified(lift):
    model = MODELS[lift]
    variables = ir.nn.shrink(model, moved(model), X)
    certificate = ir.certify(model, variables, X)
    assert certificate.certified and len(certificate.blocks) == 6
    norms = norms_of(variables)
    factors = [norms["cells", "stack", "branch", layer] for layer in STACK_LAYERS]
    product = (factors[0] * factors[1]).ravel()
    np.testing.assert_allclose(np.sort(certificate.lipschitz), np.sort(product), rtol=1e-4)
    assert len({block.name for block in certificate.blocks}) == 6


# What cannot be seen


DO = {"converge": ir.nn.converge, "shrink": ir.nn.shrink, "certify": ir.certify}


@pytest.mark.parametrize("do", DO.values(), ids=DO)
@pytest.mark.parametrize("lift", ["scan", "vmap"])
def test_layers_below_a_transform_that_hides_them_are_named(lift, do):
    model = Repeated(lift, ("params", "spectral"))
    variables = quick_jit(model.init)(KEY, X)
    found = r"not found: cells/mix, cells/stack, cells/stack/branch/stages_1"
    message = found + r", .*must list \"intermediates\""
    with pytest.raises(ValueError, match=message):
        do(model, variables, X)


@pytest.mark.parametrize("do", DO.values(), ids=DO)
@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("collection", [0, 1, 2])
@pytest.mark.parametrize("lift", ["scan", "vmap"])
def test_copies_are_read_and_written_on_the_first_axis_alone(lift, collection, axis, do):
    """Their number is that of the features, so that no shape gives another axis away."""
    axes = tuple(axis if i == collection else 0 for i in range(3))
    model = Repeated(lift, axes=axes)
    variables = moved(model)
    if do is ir.certify and collection < 2:  # it reads what the model hands out
        assert len(do(model, variables, X).blocks) == 6
        return
    name = model.collections[collection]
    message = f'"{name}" of cells/mix on axis {axis}; it must be the first'
    for run in (do, jax.jit(do, static_argnums=0)) if do is ir.nn.converge else (do,):
        with pytest.raises(ValueError, match=message):
            run(model, variables, X)


@pytest.mark.parametrize("do", [ir.nn.converge, ir.nn.shrink])
def test_copies_that_share_their_variables_are_refused(do):
    model = Repeated("vmap", axes=(None, None, 0))
    message = r"cells/mix/\w+ are used in shapes .*3, 3.*, and stored in .*: copies that share them"
    with pytest.raises(ValueError, match=message):
        do(model, moved(model), X)


class Mapped(nn.Module):
    """A layer whose kernel is transposed on the way in."""

    @nn.compact
    def __call__(self, x):
        transposed = functools.partial(jax.tree.map, jnp.transpose)
        options = {"trans_in_fn": transposed, "trans_out_fn": transposed}
        layer = nn.map_variables(
            ir.nn.SpectralDense, "params", init=self.is_initializing(), **options
        )
        return layer(3, name="layer")(x)


def test_a_kernel_that_is_used_otherwise_than_stored_is_not_shrunk():
    model = Mapped()
    with pytest.raises(ValueError, match="layer/kernel is not used as it is stored"):
        ir.nn.shrink(model, moved(model), X)


class Stated(nn.Module):
    """A branch without a layer of this library, whose bound is its parameter."""

    size: float

    @nn.compact
    def __call__(self, x):
        return self.param("s", nn.initializers.constant(self.size), ()) * jnp.tanh(x)

    def lipschitz_bound(self, variables):
        return abs(float(variables["params"]["s"]))


class HiddenCell(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return ir.nn.Stack(Stated(1.5, parent=None), 2, actnorm=False, name="steep")(x), None


class WithHiddenStack(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = blocks("seen")(x)
        options = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 2}
        return nn.scan(HiddenCell, **options)(name="cells")(x, None)[0]


def test_a_stack_that_is_not_seen_is_not_passed_over():
    """It has no singular vectors that would give it away."""
    model = WithHiddenStack()
    variables = quick_jit(model.init)(KEY, X)
    with pytest.raises(ValueError, match=r"not found: cells/steep"):
        ir.certify(model, variables, X)


class Optional(nn.Module):
    """A layer that only some inputs reach."""

    @nn.compact
    def __call__(self, x, *, both=True):
        x = ir.nn.SpectralDense(3, name="always")(x)
        return ir.nn.SpectralDense(3, name="sometimes")(x) if both else x


def test_inputs_that_do_not_reach_every_layer_are_refused():
    model = Optional()
    variables = quick_jit(model.init)(KEY, X)
    for do in (ir.nn.converge, ir.nn.shrink):
        assert do(model, variables, X)
        with pytest.raises(ValueError, match=r"not found: sometimes\. The inputs must reach them"):
            do(model, variables, X, both=False)


def test_a_network_without_a_stack_has_nothing_to_certify():
    model = Optional()
    variables = quick_jit(model.init)(KEY, X)
    with pytest.raises(ValueError, match=r"No iresnet_jax\.nn\.Stack was found in Optional"):
        ir.certify(model, variables, X)


def test_a_network_without_a_layer_of_this_library_stays_as_it_is():
    model = nn.Dense(3)
    variables = quick_jit(model.init)(KEY, X)
    for do in (ir.nn.converge, ir.nn.shrink):
        jax.tree.map(np.testing.assert_array_equal, do(model, variables, X), variables)


def test_options_reach_the_network():
    model = MODELS["network"]
    variables = quick_jit(model.init)(KEY, X)
    converged = ir.nn.converge(model, variables, X, train=False)
    assert set(converged) == set(variables) == {"params", "spectral", "batch_stats"}
    assert ir.certify(model, variables, X, train=False).blocks
