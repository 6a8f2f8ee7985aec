"""Variables of another model, and what are none, are refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from cases import VECTOR, image_flow, init_shapes, small_variables

from iresnet_jax import certify, nn
from iresnet_jax.nn import VectorFlow


@pytest.fixture(scope="module")
def variables():
    return small_variables()


def test_singular_vectors_of_another_image_size():
    small, large = (image_flow((n, n, 1), depths=(1,), features=2) for n in (8, 12))
    variables = jax.tree.map(
        lambda leaf: jnp.ones(leaf.shape, leaf.dtype), init_shapes(small, jnp.zeros((1, 8, 8, 1)))
    )
    variables["params"] = {
        name: leaf for name, leaf in variables["params"].items() if "prior" not in name
    }
    message = r"v \(4, 4, 4\) do not fit.*v \(6, 6, 4\).*another image size"
    for call in (
        lambda: large.flow(variables),
        lambda: large.advance(variables),
        lambda: nn.converge(large, variables),
        lambda: nn.shrink(large, variables),
        lambda: certify(large, variables),
        lambda: jax.jit(large.flow)(variables),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("setting", [{"features": (5,)}, {"dim": 4}, {"depth": 3}], ids=str)
def test_variables_of_another_model(setting, variables):
    other = dataclasses.replace(VECTOR, **setting)
    with pytest.raises(ValueError, match="variables"):
        other.flow(variables["vector"])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"features": ()}, r"hold stages_3 in scale0_\w+/\S+, which this model does not have"),
        ({"features": (4, 4)}, r'do not fit this model: .*"kernel".*stages_5'),
        ({"actnorm": False}, r"hold log_scale, shift in scale0_\w+, which this model does not"),
    ],
    ids=str,
)
def test_variables_of_a_model_with_more_or_fewer_parts(setting, message):
    """Wherever each kernel that is looked for has the right shape: dim and features agree."""
    model = VectorFlow(dim=4, depth=2, features=(4,))
    variables = jax.tree.map(
        lambda leaf: jnp.ones(leaf.shape, leaf.dtype), init_shapes(model, jnp.zeros((2, 4)))
    )
    other = dataclasses.replace(model, **setting)
    calls = [other.flow, other.advance, jax.jit(other.flow)]
    calls += [functools.partial(do, other) for do in (nn.converge, nn.shrink, certify)]
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call(variables)


def test_what_are_no_variables(variables):
    transformed = [functools.partial(do, VECTOR) for do in (nn.converge, nn.shrink)]
    for call in (VECTOR.flow, VECTOR.advance, *transformed):
        with pytest.raises(TypeError, match="mapping of collections that init returned; got None"):
            call(None)
        with pytest.raises(ValueError, match="do not fit this model"):
            call(variables["vector"]["params"])
    with pytest.raises(TypeError, match="needs the model's variables"):
        certify(VECTOR)


@pytest.mark.parametrize(("stored", "depth"), [(3, 2), (1, 2)])
def test_variables_of_another_depth(stored, depth):
    """Without ActNorm, where nothing but the leading axes differ."""
    models = [dataclasses.replace(VECTOR, depth=d, actnorm=False) for d in (stored, depth)]
    variables = jax.tree.map(
        lambda leaf: jnp.ones(leaf.shape, leaf.dtype), init_shapes(models[0], jnp.zeros((2, 3)))
    )
    with pytest.raises(ValueError, match="variables"):
        models[1].flow(variables)


@pytest.mark.parametrize("stored", [(2, 1), (1, 1)], ids=str)
def test_variables_of_a_model_with_more_scales(stored):
    """Fewer scales would leave stored blocks unused."""
    deeper, model = (image_flow((8, 8, 1), depths=d, features=2) for d in (stored, (1,)))
    variables = jax.tree.map(
        lambda leaf: jnp.ones(leaf.shape, leaf.dtype), init_shapes(deeper, jnp.zeros((2, 8, 8, 1)))
    )
    with pytest.raises(ValueError, match=r"variables hold scale.*depths \(1,\)"):
        model.flow(variables)


def test_variables_without_singular_vectors(variables):
    params = {"params": variables["vector"]["params"]}
    calls = [VECTOR.flow, *(functools.partial(do, VECTOR) for do in (certify, nn.converge))]
    for call in calls:
        with pytest.raises(ValueError, match=r'variables lack the collection "spectral"'):
            call(params)
