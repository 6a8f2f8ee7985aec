"""Kernels are not differentiated while their singular vectors stand still, unless that is meant."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CLASSIFIER, IMAGE, VECTOR, data, quick_jit, residual_of, small_variables
from helpers import rest_slow
from layer_cases import LAYERS, initialised

from iresnet_jax import TruncatedSeries, nn

KEY = jax.random.key(0)
REFUSED = r"The kernel of \S+ is differentiated while its power iteration stands still"

MODELS = {"vector": VECTOR, "image": IMAGE}


def loss_of(model, variables, network):
    """The mean log density as a function of the parameters, by ``network(model, variables)``."""
    x = data(model, 4, seed=5)

    def loss(params):
        flow = network(model, {**variables, "params": params})
        return flow.log_prob(x, TruncatedSeries(3), key=KEY).mean()

    return loss


def as_it_is(model, variables):
    return model.flow(variables)


def advanced(model, variables):
    return model.advance(variables)[0]


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("derivative", [jax.grad, jax.jacfwd, jax.hessian, jax.value_and_grad])
def test_a_step_that_forgets_to_advance_is_refused(derivative, wrap):
    """At trace time, with the layer and the cure."""
    variables = small_variables()["vector"]
    loss = loss_of(VECTOR, variables, as_it_is)
    with pytest.raises(ValueError, match=REFUSED) as refusal:
        wrap(derivative(loss))(variables["params"])
    message = str(refusal.value)
    assert "scale0_blocks/branch/stages_" in message
    for cure in ("model.advance(variables)", 'normalize="bound"', "frozen_vectors()"):
        assert cure in message


@pytest.mark.parametrize("name", rest_slow(MODELS, "vector"))
def test_within_frozen_vectors_the_gradient_is_that_of_the_step_with_the_same_vectors(name):
    """With no steps of power iteration, an advanced network is the network as it is."""
    variables, model = small_variables()[name], MODELS[name].clone(num_steps=0)
    step = quick_jit(jax.grad(loss_of(model, variables, advanced)))(variables["params"])
    with nn.frozen_vectors():
        still = quick_jit(jax.grad(loss_of(model, variables, as_it_is)))(variables["params"])
    assert any(jnp.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(step))
    for a, b in zip(jax.tree.leaves(step), jax.tree.leaves(still), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_frozen_vectors_ends_with_its_block_and_with_an_error_in_it():
    variables = small_variables()["vector"]
    gradient = jax.grad(loss_of(VECTOR, variables, as_it_is))

    def trace():
        jax.eval_shape(lambda params: gradient(params), variables["params"])  # never cached

    with nn.frozen_vectors():
        with nn.frozen_vectors():
            pass
        trace()
    with pytest.raises(ValueError, match=REFUSED):
        trace()
    with pytest.raises(KeyError), nn.frozen_vectors():
        raise KeyError
    with pytest.raises(ValueError, match=REFUSED):
        trace()


def without_kernels(params, kernels):
    """The parameters with other kernels."""
    is_kernel = lambda path: "kernel" in jax.tree_util.keystr(path)  # noqa: E731
    choose = lambda path, leaf, kernel: kernel if is_kernel(path) else leaf  # noqa: E731
    return jax.tree_util.tree_map_with_path(choose, params, kernels)


def test_everything_but_kernels_may_be_differentiated():
    """Data, biases, ActNorm, priors, a pure flow's own weights: norms do not change with them."""
    variables, x = small_variables()["vector"], data(VECTOR, 3, seed=5)
    kernels = variables["params"]

    def loss(params):
        params = without_kernels(params, kernels)
        return VECTOR.flow({**variables, "params": params}).log_prob(x).mean()

    slopes = quick_jit(jax.grad(loss))(variables["params"])
    assert jnp.abs(slopes["scale0_blocks"]["branch"]["stages_1"]["bias"]).max() > 0
    stopped = lambda params: loss_of(VECTOR, variables, as_it_is)(  # noqa: E731
        without_kernels(params, jax.lax.stop_gradient(params))
    )
    assert jnp.isfinite(quick_jit(jax.grad(stopped))(variables["params"])["prior_mean_0"]).all()
    flow = quick_jit(VECTOR.flow)(variables)
    assert jnp.isfinite(quick_jit(jax.grad(lambda x: flow.log_prob(x).sum()))(x)).all()
    own = quick_jit(jax.grad(lambda flow: flow.log_prob(x).sum()))(flow)
    assert jnp.abs(residual_of(next(own.blocks())).branch.stages[1].operator.kernel).max() > 0


@pytest.mark.parametrize(
    "setting", rest_slow([{"normalize": "bound"}, {"coeff": None}], {"coeff": None}), ids=str
)
def test_what_does_not_rest_on_singular_vectors_may_be_differentiated(setting):
    variables = small_variables()["vector"]
    model = dataclasses.replace(VECTOR, **setting)
    slopes = quick_jit(jax.grad(loss_of(model, variables, as_it_is)))(variables["params"])
    assert jnp.abs(slopes["scale0_blocks"]["branch"]["stages_1"]["kernel"]).max() > 0


@pytest.mark.parametrize("name", rest_slow(LAYERS, "dense", "conv", "conv-strided"))
def test_a_layer_by_itself_is_refused_too(name):
    layer, variables, x, _ = initialised(name)

    def loss(params, mutable):
        out = layer.apply({**variables, "params": params}, x, mutable=mutable)
        return jnp.sum(out[0] if mutable else out)

    with pytest.raises(ValueError, match=REFUSED):
        jax.grad(loss)(variables["params"], False)
    with pytest.raises(ValueError, match=REFUSED):
        jax.grad(loss)(variables["params"], ["batch_stats"])
    step = quick_jit(jax.grad(lambda params: loss(params, ["spectral"])))
    slope = step(variables["params"])["kernel"]
    assert jnp.abs(slope).max() > 0


def test_a_classifiers_step_advances_or_is_refused():
    variables, x = small_variables()["classifier"], data(CLASSIFIER, 4, seed=6)

    def loss(params, mutable):
        logits, _ = CLASSIFIER.apply(
            {**variables, "params": params}, x, train=True, mutable=mutable
        )
        return jnp.sum(logits**2)

    with pytest.raises(ValueError, match=REFUSED):
        jax.grad(loss)(variables["params"], ["batch_stats"])
    gradient = quick_jit(jax.grad(lambda p: loss(p, ["batch_stats", "spectral"])))
    slopes = gradient(variables["params"])
    assert jnp.abs(slopes["scale0_blocks"]["branch"]["stages_1"]["kernel"]).max() > 0
