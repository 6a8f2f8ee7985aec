"""Somebody else's Flax networks in which a layer or a stack is not seen, or cannot be replaced."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from foreign_cases import Repeated, X, blocks, initial, moved
from helpers import rest_slow

import iresnet_jax as ir

DO = {"converge": ir.nn.converge, "shrink": ir.nn.shrink, "certify": ir.certify}


@pytest.mark.parametrize("do", DO.values(), ids=DO)
@pytest.mark.parametrize("lift", rest_slow(["scan", "vmap"], "scan"))
def test_layers_below_a_transform_that_hides_them_are_named(lift, do):
    model = Repeated(lift, ("params", "spectral"))
    variables = initial(model)
    found = r"not found: cells/mix, cells/stack, cells/stack/branch/stages_1"
    message = found + r", .*must list \"intermediates\""
    with pytest.raises(ValueError, match=message):
        do(model, variables, X)


@pytest.mark.parametrize("do", DO.values(), ids=DO)
@pytest.mark.parametrize("axis", [pytest.param(1, marks=pytest.mark.slow), -1])
@pytest.mark.parametrize("collection", rest_slow([0, 1, 2], 0, 2))
@pytest.mark.parametrize("lift", rest_slow(["scan", "vmap"], "scan"))
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


@pytest.mark.parametrize("do", rest_slow([ir.nn.converge, ir.nn.shrink], ir.nn.shrink))
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
    variables = initial(model)
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
    variables = initial(model)
    for do in (ir.nn.converge, ir.nn.shrink):
        assert do(model, variables, X)
        with pytest.raises(ValueError, match=r"not found: sometimes\. The inputs must reach them"):
            do(model, variables, X, both=False)


def test_a_network_without_a_stack_has_nothing_to_certify():
    model = Optional()
    variables = initial(model)
    with pytest.raises(ValueError, match=r"No iresnet_jax\.nn\.Stack was found in Optional"):
        ir.certify(model, variables, X)


def test_a_network_without_a_layer_of_this_library_stays_as_it_is():
    model = nn.Dense(3)
    variables = initial(model)
    for do in (ir.nn.converge, ir.nn.shrink):
        jax.tree.map(np.testing.assert_array_equal, do(model, variables, X), variables)
