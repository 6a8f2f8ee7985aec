"""How to add an activation: its function, its constant, its rounding; in this file alone."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import iresnet_jax as ir


def squareplus(x):
    """(x + √(x² + 4))/2: a smooth ReLU with slopes in (0, 1) (Barron 2021, arXiv 2112.11687)."""
    return 0.5 * (x + jnp.hypot(x, 2.0))


#: For large negative x, x + √(x² + 4) cancels: the error is of the order of |x|, not of φ(x), so
#: none of its form is known for all x. Half of it plus the other half of x does not cancel.
def softsign(x):
    """x/(1 + |x|): slopes in (0, 1], one rounding each for sum and quotient."""
    return x / (1.0 + jnp.abs(x))


@pytest.fixture(scope="module", autouse=True)
def registered():
    """Known here alone: other tests go through all activations that there are."""
    ir.register_activation("squareplus", squareplus, 1.0)
    ir.register_activation("softsign", softsign, 1.0, ulps=(4.0, 0.0))
    yield
    for name in ("squareplus", "softsign"):
        del ir.ACTIVATIONS[name]


@functools.cache
def flow_with(activation):
    model = ir.nn.VectorFlow(dim=3, depth=2, features=(6,), activation=activation)
    x = jax.random.normal(jax.random.key(0), (32, 3))
    variables = jax.jit(model.init)(jax.random.key(1), x)
    return jax.jit(model.flow)(variables), x


@pytest.mark.parametrize("name", ["squareplus", "softsign"])
def test_networks_with_it_are_certified(name):
    flow, x = flow_with(name)
    assert ir.certify(flow).certified
    back, info = jax.jit(lambda x: flow.inverse(flow.forward(x), ir.Anderson()))(x)
    np.testing.assert_allclose(back, x, atol=1e-4)
    assert bool(info.converged.all())


def test_with_its_rounding_the_inverse_states_an_error():
    flow, x = flow_with("softsign")
    flow, solver = flow.with_bounds(), ir.Anderson(error_tolerance=1e-4)
    _, info = jax.jit(lambda x: flow.inverse(flow.forward(x), solver))(x)
    assert float(info.error_bound.max()) <= 1e-4


def test_without_it_the_inverse_states_none():
    flow, x = flow_with("squareplus")
    flow = flow.with_bounds()
    _, info = flow.inverse(flow.forward(x))
    assert math.isinf(float(info.error_bound.min()))
    with pytest.raises(ValueError, match="that of squareplus is not known"):
        flow.inverse(flow.forward(x), ir.Anderson(error_tolerance=1e-4))


def test_the_stated_rounding_holds():
    rng = np.random.default_rng(0)
    magnitudes = 10.0 ** rng.uniform(-30.0, 30.0, 100_000)
    x = np.float32(magnitudes * rng.choice([-1.0, 1.0], len(magnitudes)))
    exact = x.astype(np.float64) / (1.0 + np.abs(x.astype(np.float64)))
    error = np.abs(np.asarray(softsign(x), np.float64) - exact)
    assert np.all(error <= 2.0**-24 * 4.0 * np.abs(exact))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("elu", jnp.tanh, 1.0), "'elu' is known already"),
        (("steep", lambda x: 2.0 * x, 1.0), "'steep' has slopes of 2, above lipschitz = 1.0"),
        (("nothing", jnp.tanh, 0.0), r"lipschitz must lie in \(0, inf\); got 0.0"),
        (("nan", jnp.tanh, math.nan), r"lipschitz must lie in \(0, inf\); got nan"),
        (("total", jnp.sum, 1.0), "'total' must be elementwise"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ir.register_activation(*arguments)
