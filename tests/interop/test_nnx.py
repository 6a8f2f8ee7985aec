"""Our Linen modules inside Flax NNX: trained by its optimiser, with vectors that advance."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import iresnet_jax as ir
from iresnet_jax.interop import nnx as interop

pytestmark = pytest.mark.slow


class Net(nnx.Module):
    """A stack of blocks between two layers of NNX's own."""

    def __init__(self, rngs):
        self.enter = nnx.Linear(2, 4, rngs=rngs)
        blocks = ir.nn.Stack(ir.nn.dense_branch(4, (8,)), depth=2)
        self.stack = nnx.bridge.ToNNX(blocks, rngs=rngs)
        self.leave = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x, train=False):
        h = self.stack(self.enter(x), mutable=["spectral"] if train else False)
        return self.leave(h)


@pytest.fixture
def bridge(model, x):
    return nnx.bridge.ToNNX(model, rngs=nnx.Rngs(0)).lazy_init(x)


def vectors(bridge):
    return jax.tree.leaves(interop.linen_variables(bridge)["spectral"])


def test_a_flow_trains_and_its_vectors_advance_as_in_linen(model, bridge, x):
    """Step by step the numbers of a step by :func:`ir.nn.value_and_grad`."""
    optimizer = nnx.Optimizer(bridge, optax.sgd(1e-2), wrt=nnx.Param)
    variables = interop.linen_variables(bridge)

    @nnx.jit
    def step(bridge, optimizer, x):
        loss = lambda m: -m(method="pure", mutable=["spectral"]).log_prob(x).mean()  # noqa: E731
        value, grads = nnx.value_and_grad(loss)(bridge)
        optimizer.update(bridge, grads)
        return value

    @jax.jit
    def expected_step(variables):
        loss = lambda flow: -flow.log_prob(x).mean()  # noqa: E731
        value, grads, state = ir.nn.value_and_grad(model, loss, variables)
        params = jax.tree.map(lambda p, g: p - 1e-2 * g, variables["params"], grads)
        return value, {**state, "params": params}

    start = vectors(bridge)
    for _ in range(3):
        value, (expected, variables) = step(bridge, optimizer, x), expected_step(variables)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
    pairs = zip(*map(jax.tree.leaves, (interop.linen_variables(bridge), variables)), strict=True)
    assert all(np.allclose(a, b, atol=1e-5) for a, b in pairs)
    assert not any(np.array_equal(a, b) for a, b in zip(vectors(bridge), start, strict=True))


def test_a_step_that_forgets_the_vectors_is_refused(bridge, x):
    with pytest.raises(ValueError, match="power iteration stands still"):
        nnx.value_and_grad(lambda m: m(method="pure").log_prob(x).mean())(bridge)


def test_a_trained_bridge_is_certified(model, bridge, x):
    variables = ir.nn.shrink(model, ir.nn.converge(model, interop.linen_variables(bridge)))
    interop.update(bridge, variables)
    flow = bridge(method="pure")
    assert ir.certify(flow).certified
    np.testing.assert_array_equal(flow.log_prob(x), model.flow(variables).log_prob(x))
    assert ir.certify(model, interop.linen_variables(bridge)).certified


def test_a_stack_inside_an_nnx_model(x):
    net = Net(nnx.Rngs(0))
    nnx.bridge.lazy_init(net, x)
    optimizer = nnx.Optimizer(net, optax.adam(1e-2), wrt=nnx.Param)
    y = x.sum(axis=1, keepdims=True)

    @nnx.jit
    def step(net, optimizer, x, y):
        loss = lambda net: jnp.mean((net(x, train=True) - y) ** 2)  # noqa: E731
        value, grads = nnx.value_and_grad(loss)(net)
        optimizer.update(net, grads)
        return value

    start = vectors(net.stack)
    losses = [float(step(net, optimizer, x, y)) for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]
    assert not any(np.array_equal(a, b) for a, b in zip(vectors(net.stack), start, strict=True))
    stack, h = net.stack.to_nnx__module, net.enter(x)
    variables = ir.nn.converge(stack, interop.linen_variables(net.stack), h)
    interop.update(net.stack, ir.nn.shrink(stack, variables, h))
    assert ir.certify(stack, interop.linen_variables(net.stack), h).certified
    back, info = net.stack.inverse(net.stack(h))
    np.testing.assert_allclose(back, h, atol=1e-4)
    assert bool(info.converged.all())


def test_the_variables_are_linens(model, bridge, x):
    expected = jax.eval_shape(model.init, jax.random.key(0), x)
    shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)  # noqa: E731
    assert shapes(interop.linen_variables(bridge)) == shapes(expected)


def test_what_is_refused(model, bridge, x):
    variables = interop.linen_variables(bridge)
    with pytest.raises(TypeError, match=r"ToNNX is needed; got Linear"):
        interop.linen_variables(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="lazy_init"):
        interop.linen_variables(nnx.bridge.ToNNX(model, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"differ in .*spectral/scale0_blocks"):
        interop.update(bridge, {"params": variables["params"]})
    deeper = jax.jit(model.clone(depth=3).init)(jax.random.key(0), x)
    before = interop.linen_variables(bridge)
    with pytest.raises(ValueError, match=r"scale0_blocks.* holds"):
        interop.update(bridge, deeper)
    after = interop.linen_variables(bridge)
    assert all(map(np.array_equal, *map(jax.tree.leaves, (before, after))))
