"""Björck's iteration against the polar decomposition, and the layer in a model of MaxMin."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import quick_jit
from helpers import matrix_with_singular_values, sample_jacobians

import iresnet_jax as ir

SHAPES = [(1, 1), (5, 5), (3, 8), (8, 3), (64, 64)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_it_finds_the_orthonormal_factor_of_the_polar_decomposition(shape, scale):
    rng, size = np.random.default_rng(0), min(shape)
    values = scale * np.geomspace(1.0, 0.1, size)
    kernel = np.float32(matrix_with_singular_values(rng, *shape, values))
    left, _, right = np.linalg.svd(kernel.astype(np.float64), full_matrices=False)
    found = ir.orthonormalized(jnp.asarray(kernel))
    np.testing.assert_allclose(found, left @ right, atol=2e-5)
    assert ir.layer_upper_bound(ir.DenseOperator(0.9 * (1.0 - 1e-5) * found)) <= 0.9


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_singular_values_never_pass_one_on_the_way(steps):
    rng = np.random.default_rng(1)
    kernel = matrix_with_singular_values(rng, 6, 6, [7.0, 6.9, 3.0, 1.0, 1e-3, 0.0])
    found = ir.orthonormalized(jnp.asarray(kernel, jnp.float32), steps)
    assert np.linalg.norm(np.asarray(found, np.float64), 2) <= 1.0 + 1e-6


def test_what_has_no_orthonormal_factor():
    np.testing.assert_array_equal(ir.orthonormalized(jnp.zeros((3, 2))), 0.0)
    assert bool(jnp.isnan(ir.orthonormalized(jnp.full((3, 2), jnp.nan))).all())
    with pytest.raises(ValueError, match="num_steps of Björck's iteration must be ≥ 0; got -1"):
        ir.orthonormalized(jnp.ones((2, 2)), -1)


def orthonormal_branch(dim, features, *, coeff, activation, **options):
    """As a model's ``make_branch``."""
    del options
    layers = [ir.nn.OrthonormalDense(w, coeff, parent=None) for w in (*features, dim)]
    stages = [stage for layer in layers for stage in (layer, activation)][:-1]
    return ir.nn.Sequential(tuple(stages), parent=None)


def test_a_model_of_it_and_maxmin_is_trained_and_certified():
    model = ir.nn.VectorFlow(
        dim=2,
        depth=1,
        features=(6,),
        coeff=0.9,
        activation="maxmin",
        make_branch=orthonormal_branch,
    )
    x = jax.random.normal(jax.random.key(0), (16, 2)) * jnp.asarray([1.0, 3.0])
    variables = jax.jit(model.init)(jax.random.key(1), x)
    loss = lambda flow: -flow.log_prob(x).mean()  # noqa: E731
    evaluate = quick_jit(lambda variables: ir.nn.value_and_grad(model, loss, variables))
    value, grads, state = evaluate(variables)
    optimizer = optax.sgd(1e-2)
    updates, _ = optimizer.update(grads, optimizer.init(grads))
    trained = {**state, "params": optax.apply_updates(variables["params"], updates)}
    assert float(evaluate(trained)[0]) < float(value)
    certificate = ir.certify(model, trained)
    assert certificate.certified
    flow = model.flow(trained).with_bounds(certificate)
    for block, bound in zip(flow.blocks(), certificate.blocks, strict=True):
        assert [0.899 < layer.upper_bound <= 0.9 for layer in bound.layers] == [True, True]
        gradients = np.linalg.svd(sample_jacobians(block.links[-1].branch, x), compute_uv=False)
        assert gradients.max() <= bound.lipschitz <= 0.81
    solver = ir.Anderson(error_tolerance=1e-4)
    back, info = quick_jit(lambda x: flow.inverse(flow.forward(x), solver))(x)
    assert bool(info.converged.all())
    np.testing.assert_allclose(back, x, atol=1e-3)
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, trained["params"])
    failures = ir.certify(model, {**trained, "params": broken}).failures
    assert "the weights of layer 0, 1 are not finite" in failures[0].problem


def test_settings_out_of_range_are_refused():
    x = jnp.ones((2, 3))
    for module in (ir.nn.OrthonormalDense(0), ir.nn.OrthonormalDense(3, coeff=1.5)):
        with pytest.raises(ValueError, match=r"got \(3, 0\)|coeff"):
            module.init(jax.random.key(0), x)
