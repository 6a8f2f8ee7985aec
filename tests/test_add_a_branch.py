"""How to add a branch: one that concatenates (dense connectivity), in this file alone.

Each layer keeps its input beside what it computes from it, x ↦ [η₁·x, η₂·f(x)] with
η = (cos θ, sin θ): Lip² ≤ η₁² + η₂²·Lip(f)² (i-DenseNets, Perugachi-Diaz et al. 2021, arXiv
2102.02694). A last layer maps back to the input's size.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import sample_jacobians

import iresnet_jax as ir


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Concatenation:
    """x ↦ [η₁·x, η₂·f(x)]: a stage that holds another.

    Attributes:
      inner: f.
      weights: η, [2].
    """

    inner: ir.Sequential
    weights: jax.Array

    def __call__(self, x):
        return jnp.concatenate([self.weights[0] * x, self.weights[1] * self.inner(x)], axis=-1)

    def lipschitz_bound(self):
        kept, added = np.abs(np.asarray(self.weights, np.float64))
        return math.hypot(kept, added * self.inner.lipschitz_bound()) * (1.0 + 1e-12)

    def rounding(self, x, error, arithmetic):
        kept, added = jnp.abs(self.weights).astype(error.dtype)
        norm, out = ir.rounding.norm_above, self.inner(x)
        unit = 4.0 * arithmetic.unit
        one = kept * (error + unit * norm(x.astype(error.dtype)))
        other = added * (
            self.inner.rounding(x, error, arithmetic) + unit * norm(out.astype(error.dtype))
        )
        return jnp.hypot(one, other) * (1.0 + 16.0 * arithmetic.unit)


class Concatenating(nn.Module):
    """Stores a :class:`Concatenation` of one layer, with a learned mixing angle."""

    features: int
    coeff: float | None
    activation: str

    @nn.compact
    def pure(self, shape):
        layer = ir.nn.SpectralDense(self.features, self.coeff, name="layer").pure(shape)
        angle = self.param("angle", nn.initializers.constant(math.pi / 4), ())
        weights = jnp.stack([jnp.cos(angle), jnp.sin(angle)])
        return Concatenation(ir.Sequential((layer, ir.Activation(self.activation))), weights)


def concatenating_branch(dim, features, *, coeff, activation, **options):
    """As a model's ``make_branch``."""
    del options
    layers = [Concatenating(width, coeff, activation, parent=None) for width in features]
    return ir.nn.Sequential((*layers, ir.nn.SpectralDense(dim, coeff, parent=None)), parent=None)


@pytest.fixture(scope="module")
def model():
    return ir.nn.VectorFlow(
        dim=3, depth=3, features=(6, 5), coeff=0.9, make_branch=concatenating_branch
    )


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(0), (16, 3))


@pytest.fixture(scope="module")
def variables(model, x):
    return ir.nn.shrink(model, jax.jit(model.init)(jax.random.key(1), x))


@pytest.fixture(scope="module")
def flow(model, variables):
    return jax.jit(model.flow)(variables)


def test_the_certificate_sees_the_layers_inside(model, variables, flow, x):
    certificate = ir.certify(model, variables)
    assert certificate.certified
    for block, residual in zip(certificate.blocks, flow.blocks(), strict=True):
        assert [layer.upper_bound <= 0.9 for layer in block.layers] == [True] * 3
        branch = residual.links[-1].branch
        norms = np.linalg.norm(sample_jacobians(branch, x), 2, axis=(1, 2))
        assert norms.max() <= block.lipschitz < 0.9


@jax.jit
def evaluate(branch, x):
    return branch(x), branch.rounding_bound(x)


def test_the_inverse_states_its_error(flow, x):
    flow = flow.with_bounds()
    layers = ir.layers_by_path(flow).values()
    assert len(layers) == 3 and all(layer.norm_bound is not None for layer in layers)
    solver = ir.Anderson(error_tolerance=1e-4)
    latents = jax.jit(lambda x: flow.forward(x))(x)
    back, info = jax.jit(lambda z: flow.inverse(z, solver))(latents)
    assert bool(info.converged.all()) and float(info.error_bound.max()) <= 1e-4
    bound = ir.inverse_error_bound(flow, info)
    assert np.all(ir.inverse_error_in_double(flow, back, latents) <= bound)
    with jax.enable_x64(True):
        double = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), flow)
        for block, exact in zip(flow.blocks(), double.blocks(), strict=True):
            branch, reference = (b.links[-1].branch for b in (block, exact))
            wide = jnp.asarray(np.asarray(x), jnp.float64)
            (y, bound), (exact_y, _) = evaluate(branch, x), evaluate(reference, wide)
            off = np.linalg.norm(np.asarray(y) - np.asarray(exact_y), axis=1)
            assert np.all(off <= bound)


def test_the_log_determinant_is_that_of_the_jacobian(flow, x):
    jacobians = sample_jacobians(lambda x: flow.forward(x)[0], x[:4])
    log_det = jax.jit(flow.forward_and_log_det)(x[:4])[1]
    np.testing.assert_allclose(log_det, np.linalg.slogdet(jacobians)[1], atol=1e-4)


@pytest.mark.slow
def test_a_training_step_lowers_the_loss_and_moves_the_angle(model, variables, x):
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(variables, opt_state):
        loss = lambda flow: -flow.log_prob(x).mean()  # noqa: E731
        value, grads, state = ir.nn.value_and_grad(model, loss, variables)
        updates, opt_state = optimizer.update(grads, opt_state)
        params = optax.apply_updates(variables["params"], updates)
        return {**state, "params": params}, opt_state, value

    trained, values = variables, []
    opt_state = optimizer.init(variables["params"])
    for _ in range(20):
        trained, opt_state, value = step(trained, opt_state)
        values.append(float(value))
    assert values[-1] < values[0]
    angles = trained["params"]["scale0_blocks"]["branch"]["stages_0"]["angle"]
    assert float(jnp.abs(angles - math.pi / 4).min()) > 0.0
    shipped = ir.nn.shrink(model, ir.nn.converge(model, trained))
    assert ir.certify(model, shipped).certified
