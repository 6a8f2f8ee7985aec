"""The flow is a pytree and the parameters are one: what Equinox and optax do with them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import iresnet_jax as ir

pytestmark = pytest.mark.slow


@pytest.fixture
def loss_and_grads(bounded_model, variables):
    """Of parameters and data, without a state."""
    state = {name: value for name, value in variables.items() if name != "params"}

    def loss(params, x):
        return -bounded_model.flow({**state, "params": params}).log_prob(x).mean()

    return jax.jit(jax.value_and_grad(loss))


def test_filter_jit_and_filter_grad(flow, x):
    eqx = pytest.importorskip("equinox")
    value = eqx.filter_jit(lambda flow, x: flow.log_prob(x).mean())
    np.testing.assert_allclose(value(flow, x), flow.log_prob(x).mean(), rtol=1e-5)
    grads = eqx.filter_grad(lambda flow: flow.log_prob(x).mean())(flow)
    expected = jax.grad(lambda flow: flow.log_prob(x).mean())(flow)
    pairs = zip(*map(jax.tree.leaves, (grads, expected)), strict=True)
    assert all(np.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in pairs)
    arrays, rest = eqx.partition(flow, eqx.is_array)
    np.testing.assert_array_equal(eqx.combine(arrays, rest).log_prob(x), flow.log_prob(x))


def test_one_leaf_is_replaced_by_tree_at(flow, x):
    eqx = pytest.importorskip("equinox")
    shift = jnp.array([0.5, -1.0])
    moved = eqx.tree_at(lambda flow: flow.priors[0].mean, flow, flow.priors[0].mean + shift)
    latents, log_det = flow.forward_and_log_det(x)
    expected = log_det + moved.priors[0].log_prob(latents[0])
    np.testing.assert_allclose(moved.log_prob(x), expected, rtol=1e-5)
    assert not np.allclose(moved.log_prob(x), flow.log_prob(x))


def test_accumulated_gradients_are_those_of_the_whole_batch(loss_and_grads, variables, x):
    params = variables["params"]
    every = optax.MultiSteps(optax.sgd(0.1), every_k_schedule=4)
    accumulated, state = params, every.init(params)
    for part in x.reshape(4, 16, 2):
        updates, state = every.update(loss_and_grads(accumulated, part)[1], state, accumulated)
        accumulated = optax.apply_updates(accumulated, updates)
    whole = jax.tree.map(lambda p, g: p - 0.1 * g, params, loss_and_grads(params, x)[1])
    pairs = zip(*map(jax.tree.leaves, (accumulated, whole)), strict=True)
    assert all(np.allclose(a, b, atol=1e-5) for a, b in pairs)


def test_frozen_parts_stand_still(loss_and_grads, variables, x):
    params = variables["params"]
    labels = jax.tree_util.tree_map_with_path(
        lambda path, _: "frozen" if "prior" in str(path) else "trained", params
    )
    optimizer = optax.multi_transform(
        {"trained": optax.adam(1e-2), "frozen": optax.set_to_zero()}, labels
    )
    updates, _ = optimizer.update(loss_and_grads(params, x)[1], optimizer.init(params), params)
    new = optax.apply_updates(params, updates)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), params, new)
    frozen = jax.tree.map(lambda label: label == "frozen", labels)
    assert same == frozen and any(jax.tree.leaves(frozen))


def test_a_schedule_free_optimiser(loss_and_grads, bounded_model, variables, x):
    optimizer = optax.contrib.schedule_free_adamw(1e-2, weight_decay=0.0)
    params = variables["params"]
    state, first = optimizer.init(params), loss_and_grads(params, x)[0]
    update = jax.jit(optimizer.update)
    for _ in range(30):
        updates, state = update(loss_and_grads(params, x)[1], state, params)
        params = optax.apply_updates(params, updates)
    params = optax.contrib.schedule_free_eval_params(state, params)
    assert loss_and_grads(params, x)[0] < first - 0.1
    assert ir.certify(bounded_model, {**variables, "params": params}).certified


def test_a_line_search_needs_a_gradient_that_is_its_values(loss_and_grads, variables, x):
    """L-BFGS asks for value and gradient of one function, without noise."""
    params, optimizer = variables["params"], optax.lbfgs()
    value_of = lambda params: loss_and_grads(params, x)[0]  # noqa: E731

    @jax.jit
    def step(params, state):
        value, grads = loss_and_grads(params, x)
        updates, state = optimizer.update(
            grads, state, params, value=value, grad=grads, value_fn=value_of
        )
        return optax.apply_updates(params, updates), state

    state, first = optimizer.init(params), value_of(params)
    for _ in range(5):
        params, state = step(params, state)
    assert value_of(params) < first - 0.1
