"""Products at full precision, whatever the accelerator's default: seen in what is traced.

A CPU has no other precision; a GPU's default keeps 10 bits of a factor, a TPU's 8.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from cases import data, image_flow
from helpers import inner_jaxprs, rest_slow
from jax import lax

import iresnet_jax as ir
from iresnet_jax import nn
from iresnet_jax.spectral import power_iteration_and_sigma

KEY = jax.random.key(0)
PRODUCTS = ("dot_general", "conv_general_dilated")
FLOW = image_flow((8, 8, 1), depths=(1, 2), features=4)
CLASSIFIER = nn.InvertibleClassifier(
    image_shape=(8, 8, 1), depths=(1, 2), features=4, padding=1, num_classes=3
)
KERNEL = jnp.ones((3, 3, 2, 4))
CONVOLUTION = ir.conv_operator(KERNEL, (6, 6))
STRIDED = ir.conv_operator(KERNEL, (6, 6), strides=2)
DENSE = ir.DenseOperator(jnp.ones((4, 6)))


def products(function, *args):
    """The precision of every product in what a function traces, inside loops and calls too."""
    found = []

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name in PRODUCTS:
                found.append(equation.params["precision"])
            for inner in inner_jaxprs(equation):
                visit(inner)

    visit(jax.make_jaxpr(function)(*args).jaxpr)
    return found


def highest(precision):
    pair = precision if isinstance(precision, tuple) else (precision,) * 2
    return all(one == lax.Precision.HIGHEST for one in pair)


@functools.cache
def variables(model):
    return jax.eval_shape(model.init, KEY, data(model, 4, seed=0))


def flow_of(model):
    return jax.eval_shape(model.flow, variables(model))


def log_prob(estimator):
    return lambda flow, x: flow.log_prob(x, estimator, key=KEY)


X = jnp.zeros((2, 8, 8, 1))
ON_FLOWS = {
    "forward": lambda flow: flow.forward(X),
    "exact": lambda flow: log_prob(ir.Exact())(flow, X),
    "series": lambda flow: log_prob(ir.TruncatedSeries(3))(flow, X),
    "roulette": lambda flow: log_prob(ir.Roulette(0.5, lipschitz=None))(flow, X),
    "gradient": lambda flow: jax.grad(lambda f: log_prob(ir.TruncatedSeries(3))(f, X).sum())(flow),
    "inverse": lambda flow: flow.inverse(flow.forward(X)),
    "accelerated inverse": lambda flow: flow.inverse(flow.forward(X), ir.Anderson()),
    "samples": lambda flow: flow.sample(KEY, 2),
}


@pytest.mark.parametrize("backend", rest_slow(["cpu", "gpu", "tpu"], "gpu"))
@pytest.mark.parametrize("name", ON_FLOWS)
def test_a_flow_multiplies_at_full_precision(monkeypatch, name, backend):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    found = products(ON_FLOWS[name], flow_of(FLOW))
    assert found and all(map(highest, found))


def test_a_classifier_multiplies_at_full_precision(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    found = products(CLASSIFIER.apply, variables(CLASSIFIER), X)
    assert found and all(map(highest, found))


@pytest.mark.parametrize(
    "operator", [CONVOLUTION, STRIDED, DENSE], ids=["conv", "strided", "dense"]
)
def test_norms_are_computed_at_full_precision(monkeypatch, operator):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    def norms(operator):
        start = ir.init_singular_vectors(operator)
        vectors = ir.power_iteration(operator, start, 2)
        _, sigma = power_iteration_and_sigma(operator, vectors, 1)
        converged, _ = ir.power_iteration_to_tolerance(operator, vectors)
        return sigma, ir.sigma_estimate(operator, converged), ir.gram_upper_bound(operator)

    found = products(norms, operator)
    assert found and all(map(highest, found))


def test_convergence_of_a_model_is_at_full_precision(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    found = products(functools.partial(nn.converge, FLOW), variables(FLOW))
    assert found and all(map(highest, found))


MIXED = nn.ImageFlow(image_shape=(4, 4, 1), depths=(2,), features=(4,), mixing=True)


@pytest.mark.parametrize("name", ["forward", "series", "inverse"])
def test_mixing_is_at_full_precision(name):
    x = jnp.zeros((2, 4, 4, 1))
    ways = {
        "forward": lambda flow: flow.forward(x),
        "series": lambda flow: log_prob(ir.TruncatedSeries(3))(flow, x),
        "inverse": lambda flow: flow.inverse(flow.forward(x)),
    }
    found = products(ways[name], flow_of(MIXED))
    assert found and all(map(highest, found))


def test_orthonormal_matrices_are_made_at_full_precision():
    found = products(ir.orthonormalized, jnp.ones((3, 4)))
    assert found and all(map(highest, found))


def test_a_product_of_lower_precision_is_seen():
    assert not all(map(highest, products(lambda a: a @ a, jnp.ones((2, 2)))))
