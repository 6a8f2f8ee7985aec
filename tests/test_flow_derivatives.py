"""Derivatives through the inverse of whole flows."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import build, quick_jit
from helpers import rest_slow

from iresnet_jax import FixedPointIteration, nn
from iresnet_jax.nn import VectorFlow

KEY = jax.random.key(7)


# Compiled once for every kind of flow, and shared by the tests.
forward = quick_jit(lambda flow, x: flow.forward(x))
invert = quick_jit(lambda flow, latents: flow.inverse(latents))
sample = quick_jit(lambda flow, key, temperature: flow.sample(key, 5, temperature=temperature))


# Derivatives through the inverse


@pytest.fixture(scope="module")
def tiny():
    """A vector flow's model, its variables in float64, latents to invert, and the flow itself."""
    model = VectorFlow(dim=2, depth=2, features=(3,), activation="tanh")
    x = cases.data(model, 16, seed=4)
    variables = quick_jit(model.init)(jax.random.key(5), x)
    variables = {**variables, "params": cases.shaken(variables["params"])}
    with jax.enable_x64(True):
        variables = cases.in_double(variables)
        z = jnp.asarray(np.random.default_rng(6).normal(size=(2, 2)))
        flow = quick_jit(model.flow)(variables)
    return model, variables, z, flow


SOLVER = FixedPointIteration(rtol=1e-13, atol=1e-13, max_steps=300)


def inverse_loss(model, variables, z):
    x, _ = model.flow(variables).inverse((z,), SOLVER)
    return jnp.sum(jnp.sin(x) * jnp.arange(1.0, 1.0 + x.size).reshape(x.shape))


def sample_loss(model, variables, z):
    del z
    x, _ = model.flow(variables).sample(KEY, 3, solver=SOLVER)
    return jnp.sum(jnp.sin(x))


def directions(seed, params):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params)


def moved(params, direction, step):
    return jax.tree.map(lambda p, d: p + step * d, params, direction)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("loss", rest_slow([inverse_loss, sample_loss], inverse_loss))
def test_gradients_through_the_inverse_agree_with_differences(tiny, loss):
    """With respect to all parameters and the latents; singular vectors are constants."""
    model, variables, z, _ = tiny

    def value(args):
        params, z = args
        return loss(model, {**variables, "params": params}, z)

    args = (variables["params"], z)
    with nn.frozen_vectors():
        gradient = quick_jit(jax.grad(value))(args)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    value = quick_jit(value)
    for seed in range(3):
        direction, step = directions(seed, args), 1e-5
        up, down = (float(value(moved(args, direction, s))) for s in (step, -step))
        along = sum(
            float(jnp.vdot(g, d))
            for g, d in zip(*map(jax.tree.leaves, (gradient, direction)), strict=True)
        )
        assert along == pytest.approx((up - down) / (2 * step), rel=1e-6, abs=1e-8)


@pytest.mark.usefixtures("x64")
def test_forward_mode_through_the_inverse_is_the_inverse_jacobian(tiny):
    _, _, z, flow = tiny

    def invert(z):
        return flow.inverse((z[None],), SOLVER)[0][0]

    backward = quick_jit(jax.jacfwd(invert))(z[0])
    forward = quick_jit(jax.jacrev(lambda x: flow.forward(x[None])[0][0]))(quick_jit(invert)(z[0]))
    np.testing.assert_allclose(backward @ forward, np.eye(2), atol=1e-9)


@pytest.mark.usefixtures("x64")
def test_second_derivatives_through_the_inverse_agree_with_differences(tiny):
    _, _, z, flow = tiny

    def value(z):
        return jnp.sum(jnp.sin(flow.inverse((z[None],), SOLVER)[0]))

    gradient, step = quick_jit(jax.grad(value)), 1e-5
    hessian = quick_jit(jax.hessian(value))(z[0])
    for i, e in enumerate(np.eye(2)):
        differences = (gradient(z[0] + step * e) - gradient(z[0] - step * e)) / (2 * step)
        np.testing.assert_allclose(hessian[i], differences, rtol=1e-5, atol=1e-7)


def test_unconverged_inverses_have_no_derivative():
    _, _, flow, x = build("vector")
    solver = FixedPointIteration(max_steps=2)
    gradient = quick_jit(jax.grad(lambda z: jnp.sum(flow.inverse(z, solver)[0])))
    (gradient,) = gradient(forward(flow, x))
    assert jnp.isnan(gradient).all()
