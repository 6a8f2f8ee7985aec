"""Models of branches that are normalised as a whole: certified, shrunk, trained, inverted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import iresnet_jax as ir
from iresnet_jax import monlip_proofs, nn
from iresnet_jax.nn.monlip import proved_factor

L = 0.9
MODEL = nn.ImageFlow(
    image_shape=(4, 4, 1), depths=(2,), features=(4,), coeff=L, make_branch=nn.monlip_branch
)
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def variables():
    x = np.random.default_rng(0).uniform(size=(16, 4, 4, 1)).astype(np.float32)
    fresh = jax.jit(MODEL.init)(KEY, x)
    grown = jax.tree_util.tree_map_with_path(
        lambda path, leaf: 20.0 * leaf if "put_" in str(path) else leaf, fresh
    )
    return grown  # whose power iterations lag behind


def test_a_model_is_certified_once_shrunk(variables):
    with nn.frozen_vectors():
        before = MODEL.flow(variables).certify()
    assert all(branch.lipschitz > 1.01 * L for branch in before.branches)
    near = MODEL.flow(nn.converge(MODEL, variables)).certify()
    assert all(branch.lipschitz < 1.001 * L for branch in near.branches)
    after = MODEL.flow(nn.shrink(MODEL, variables)).certify()
    assert after.certified and all(branch.lipschitz <= L for branch in after.branches)


def test_divided_by_a_bound_a_model_is_certified_as_it_is(variables):
    """Whatever its vectors see, and its gradient is its own without a step."""
    model = MODEL.clone(normalize="bound")
    certificate = jax.jit(model.flow)(variables).certify()
    assert certificate.certified
    assert all(0.9 * L < branch.lipschitz <= L for branch in certificate.branches)
    x = jnp.full((2, 4, 4, 1), 0.3)

    def loss(params):
        flow = model.flow({**variables, "params": params})
        return flow.log_prob(x, ir.TruncatedSeries(2), key=KEY).sum()

    gradients = jax.jit(jax.grad(loss))(variables["params"])
    kernels = [g for path, g in jax.tree.leaves_with_path(gradients) if "put_" in str(path)]
    assert kernels and all(0.0 < jnp.linalg.norm(g) < jnp.inf for g in kernels)


def test_a_vector_that_stands_still_and_misses_the_eigenvalue_is_converged_first(variables):
    signs = (-1.0) ** jnp.arange(4)  # one for each hidden channel
    wrong = jax.tree.map(lambda leaf: leaf * signs, variables["spectral"])
    stale = {**variables, "spectral": wrong}
    with nn.frozen_vectors():
        missed = [branch.lipschitz for branch in MODEL.flow(stale).certify().branches]
    held = [branch.lipschitz for branch in MODEL.flow(stale).certify().branches]
    assert min(missed) > 1.3 * L and max(held) < 1.1 * L


def test_shrinking_twice_changes_nothing_more(variables):
    once = nn.shrink(MODEL, variables)
    jax.tree.map(np.testing.assert_array_equal, nn.shrink(MODEL, once), once)


def test_a_step_advances_and_a_gradient_without_one_is_refused(variables):
    x = jnp.full((2, 4, 4, 1), 0.3)

    def loss(params, spectral):
        flow, state = MODEL.advance({"params": params, "spectral": spectral})
        return flow.log_prob(x, ir.TruncatedSeries(2), key=KEY).sum(), state

    parts = variables["params"], variables["spectral"]
    grads, state = jax.jit(jax.grad(loss, has_aux=True))(*parts)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    before, after = (jax.tree.leaves(tree) for tree in (parts[1], state["spectral"]))
    assert [leaf.shape for leaf in before] == [leaf.shape for leaf in after]

    def standing(params):
        return MODEL.flow({**variables, "params": params}).log_prob(x).sum()

    with pytest.raises(ValueError, match="power iteration stands still"):
        jax.eval_shape(jax.grad(standing), parts[0])


def test_a_model_inverts_within_its_bound(variables):
    flow = MODEL.flow(nn.shrink(MODEL, variables)).with_bounds()
    x = np.random.default_rng(1).uniform(size=(3, 4, 4, 1)).astype(np.float32)
    latents = flow.forward(x)
    back, info = jax.jit(lambda flow, z: flow.inverse(z))(flow, latents)
    bound = ir.inverse_error_bound(flow, info, latents)
    sharp = ir.inverse_error_in_double(flow, back, latents)
    assert info.converged.all() and np.all(sharp <= bound) and np.all(np.isfinite(bound))


def test_vectors_of_another_type_are_taken(variables):
    cast = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables["spectral"])
    converged = nn.converge(MODEL, {**variables, "spectral": cast})
    branches = MODEL.flow(converged).certify().branches
    assert all(branch.lipschitz < 1.001 * L for branch in branches)


def test_factors_are_found_for_huge_and_for_coarse_weights(x64):
    for kernel in (1e160 * jnp.ones((2, 3)), jnp.ones((1, 1), jnp.bfloat16)):
        operator = ir.DenseOperator(kernel)
        square = proved_factor([operator], [])
        rounded = (np.asarray(kernel) * np.sqrt(square)).astype(kernel.dtype)
        assert monlip_proofs.holds([ir.DenseOperator(jnp.asarray(rounded))], [], 1.0)
        assert square > 0.0


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": ()}, "features of a MonLip branch"),
        ({"features": (4, 0)}, "features of a MonLip branch"),
        ({"lipschitz": 1.0}, r"\(0, 1\)"),
        ({"lipschitz": None}, r"\(0, 1\)"),
        ({"activation": "sin"}, "slopes in"),
        ({"normalize": "proof"}, "normalize must be one of"),
    ],
)
def test_a_module_refuses_early(options, message):
    module = nn.MonLip(**({"features": (4,)} | options))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 3)))
