"""Models with the layers of i-ResNets' successors: trained, certified, inverted."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import quick_jit
from helpers import rest_slow, sample_jacobians

import iresnet_jax as ir


def idensenet(dim, features, *, coeff, activation, **options):
    """Dense concatenations and a layer back, as a model's ``make_branch``."""
    del options
    layer = lambda width: ir.nn.SpectralDense(width, coeff, parent=None)  # noqa: E731
    dense = [ir.nn.DenseConcatenation((layer(w), activation), parent=None) for w in features]
    return ir.nn.Sequential((*dense, layer(dim)), parent=None)


MODELS = {
    "learned_lipswish": ir.nn.VectorFlow(
        dim=2, depth=1, features=(6,), activation="learned_lipswish"
    ),
    "learned_elu": ir.nn.VectorFlow(dim=2, depth=1, features=(6,), activation="learned_elu"),
    "maxmin": ir.nn.VectorFlow(dim=2, depth=1, features=(6,), activation="maxmin"),
    "i-DenseNet": ir.nn.VectorFlow(
        dim=2, depth=1, features=(4, 3), activation="clipswish", make_branch=idensenet
    ),
}


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(0), (16, 2))


@pytest.fixture(scope="module", params=rest_slow(MODELS))
def trained(request, x):
    """A model after a few steps, which lower its loss; and its variables before."""
    model = MODELS[request.param]
    variables = jax.jit(model.init)(jax.random.key(1), x)
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(variables, opt_state):
        loss = lambda flow: -flow.log_prob(x).mean()  # noqa: E731
        value, grads, state = ir.nn.value_and_grad(model, loss, variables)
        updates, opt_state = optimizer.update(grads, opt_state)
        return (
            {**state, "params": optax.apply_updates(variables["params"], updates)},
            opt_state,
            value,
        )

    before, opt_state, values = variables, optimizer.init(variables["params"]), []
    for _ in range(8):
        variables, opt_state, value = step(variables, opt_state)
        values.append(float(value))
    assert values[-1] < values[0]
    return model, ir.nn.shrink(model, ir.nn.converge(model, variables)), before


def test_models_are_certified_and_inverted_with_an_error(trained, x):
    model, variables, _ = trained
    certificate = ir.certify(model, variables)
    assert certificate.certified
    flow = model.flow(variables).with_bounds(certificate)
    latents = quick_jit(lambda x: flow.forward(x))(x)
    solver = ir.Anderson(error_tolerance=1e-4)
    back, info = quick_jit(lambda z: flow.inverse(z, solver))(latents)
    assert bool(info.converged.all()) and float(info.error_bound.max()) <= 1e-4
    double = ir.inverse_error_in_double(flow, back, latents)
    assert (double <= ir.inverse_error_bound(flow, info, latents)).all()
    np.testing.assert_allclose(back, x, atol=1e-3)
    jacobians = sample_jacobians(lambda x: flow.forward(x)[0], x[:4])
    log_det = quick_jit(lambda x: flow.forward_and_log_det(x)[1])(x[:4])
    np.testing.assert_allclose(log_det, np.linalg.slogdet(jacobians)[1], atol=1e-4)
    for block, bound in zip(flow.blocks(), certificate.blocks, strict=True):
        slopes = np.linalg.norm(sample_jacobians(block.links[-1].branch, 4 * x), 2, axis=(1, 2))
        assert slopes.max() <= bound.lipschitz < 1.0


def test_what_is_learned_moves_and_what_is_not_finite_is_named(trained):
    model, variables, before = trained
    pairs = jax.tree_util.tree_leaves_with_path(before["params"])
    learned = ("theta", "weights", "log_length_0")
    moved = [
        (path, leaf)
        for path, leaf in pairs
        # The first activation of the first block is left out.
        if path[-1].key in learned and not ("log" in path[-1].key and path[-2].key == "stages_0")
    ]
    assert moved or model.activation == "maxmin"
    for path, leaf in moved:
        after = variables["params"]
        for part in path:
            after = after[part.key]
        assert float(jnp.abs(after - leaf).min()) > 0.0

        def broken(at, value, path=path):
            return value * jnp.nan if at == path else value

        bad = jax.tree_util.tree_map_with_path(broken, variables["params"])
        certificate = ir.certify(model, {**variables, "params": bad})
        assert not certificate.certified
        problem = certificate.failures[0].problem
        assert any(name in problem for name in ("beta", "weights", "length"))
        assert "not finite" in problem


def test_names_make_modules_of_their_own():
    branch = ir.nn.Sequential(
        ("learned_lipswish", ir.nn.SpectralDense(4), "learned_lipswish", "maxmin")
    )
    x = jnp.ones((2, 4))
    variables = quick_jit(branch.init)(jax.random.key(0), x)
    assert set(variables["params"]) == {"stages_0", "stages_1", "stages_2"}
    with pytest.raises(ValueError, match="Unknown activation 'clipswitch'"):
        ir.nn.VectorFlow(dim=2, activation="clipswitch").init(jax.random.key(0), jnp.ones((2, 2)))
    for module, width in [(ir.nn.LipSwish(), 4), (ir.nn.CLipSwish(), 8), (ir.nn.GroupSort(4), 4)]:
        out, _ = jax.eval_shape(module.init_with_output, jax.random.key(0), x)
        assert out.shape == (2, width)
    alone = ir.nn.DenseConcatenation((ir.nn.SpectralDense(3), "elu"))
    out, _ = jax.eval_shape(alone.init_with_output, jax.random.key(0), x)
    assert out.shape == (2, 7)
