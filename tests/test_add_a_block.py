"""How to add a block: one whose forward map is itself a fixed point, in this file alone.

An implicit block maps x to z by x + f(x) = z + g(z), with contractions f and g (Lu et al. 2021,
arXiv 2103.09527): one block stretches by (1 + L_f)/(1 − L_g), more than any residual block.
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

SOLVER = ir.FixedPointIteration(rtol=1e-7, atol=1e-7, max_steps=300)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Implicit(ir.Bijection):
    """x + f(x) = z + g(z).

    Attributes:
      first: f.
      second: g.
      bounds: rigorous bounds on their Lipschitz constants, or None.
    """

    first: ir.Branch
    second: ir.Branch
    bounds: tuple[jax.Array, jax.Array] | None = None

    @property
    def num_branches(self):
        return 2

    @property
    def num_solves(self):
        return 1

    def forward(self, x):
        return ir.fixed_point_inverse(self.second, x + self.first(x), SOLVER)[0]

    def forward_and_log_det(self, x, estimator, keys=None):
        keys = (None, None) if keys is None else keys
        step, log_det = estimator(self.first, x, keys[0])
        z, _ = ir.fixed_point_inverse(self.second, x + step, SOLVER)
        _, other = estimator(self.second, z, keys[1])
        return z, log_det - other

    def inverse(self, y, solver=SOLVER):
        """The rounding of y + g(y) counts as that of f: the solve's tolerance knows of it."""
        middle = y + self.second(y)
        unit = ir.rounding.unit_roundoff(y.dtype)
        shared = self.second.rounding_bound(y) + 4.0 * unit * ir.rounding.norm_above(middle)
        x, info = ir.fixed_point_inverse(
            self.first,
            middle,
            solver,
            lipschitz=None if self.bounds is None else self.bounds[0],
            rounding=lambda x: (self.first.rounding_bound(x) + shared) * (1.0 + 8.0 * unit),
        )
        return x, jax.tree.map(lambda field: field[None], info)

    def certify(self, name, shape):
        first, second = (
            ir.certify_branch(branch, name, shape) for branch in (self.first, self.second)
        )
        problem = first.problem or second.problem
        forward = inverse = math.inf
        if not problem:
            forward = (1.0 + first.lipschitz) / (1.0 - second.lipschitz) * (1.0 + 1e-12)
            inverse = (1.0 + second.lipschitz) / (1.0 - first.lipschitz) * (1.0 + 1e-12)
        block = ir.BlockCertificate(name, (first, second), forward, inverse, problem)
        return ir.Certificate((block,), forward, inverse)

    def inverse_error(self, error, info, shape):
        if self.bounds is None:
            return ir.solve_error(error.bound, None, info, shape)
        first, second = self.bounds
        grown = error.bound * (1.0 + second) * (1.0 + 1e-6)
        return ir.solve_error(grown, first, info, shape)

    def with_bounds(self, bounds):
        first, of_first = ir.bounded_branch(self.first, next(bounds))
        second, of_second = ir.bounded_branch(self.second, next(bounds))
        return Implicit(first, second, (of_first, of_second))

    @property
    def contracts(self):
        return self.bounds is not None and bool((np.asarray(self.bounds) < 1.0).all())


class ImplicitBlock(nn.Module):
    """Stores the two branches of an :class:`Implicit` block."""

    first: nn.Module
    second: nn.Module

    def pure(self, shape):
        return Implicit(self.first.pure(shape), self.second.pure(shape))


def implicit_block(dim, features, **options):
    """As a model's ``make_branch``."""
    first, second = (ir.nn.dense_branch(dim, features, **options) for _ in range(2))
    return ImplicitBlock(first, second, parent=None)


@pytest.fixture(scope="module")
def model():
    return ir.nn.VectorFlow(dim=3, depth=2, features=(8,), coeff=0.8, make_branch=implicit_block)


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(0), (16, 3))


@pytest.fixture(scope="module")
def variables(model, x):
    return ir.nn.shrink(model, jax.jit(model.init)(jax.random.key(1), x))


@pytest.fixture(scope="module")
def flow(model, variables):
    return jax.jit(model.flow)(variables)


def test_the_log_determinant_is_that_of_the_jacobian(flow, x):
    jacobians = sample_jacobians(lambda x: flow.forward(x)[0], x[:4])
    latents, log_det = jax.jit(flow.forward_and_log_det)(x[:4])
    np.testing.assert_allclose(log_det, np.linalg.slogdet(jacobians)[1], atol=1e-4)
    series, keys = ir.TruncatedSeries(30), jax.random.split(jax.random.key(2), 400)
    draw = lambda key: flow.forward_and_log_det(x[:4], series, key=key)[1]  # noqa: E731
    draws = np.asarray(jax.jit(jax.vmap(draw))(keys))
    stderr = draws.std(axis=0, ddof=1) / np.sqrt(len(draws))
    assert np.all(np.abs(draws.mean(axis=0) - log_det) <= 5.0 * stderr + 1e-3)
    np.testing.assert_allclose(jax.jit(flow.forward)(x[:4])[0], latents[0], atol=1e-5)


def test_it_is_certified_with_both_branches(model, variables, flow, x):
    certificate = ir.certify(model, variables)
    assert certificate.certified
    assert [len(block.branches) for block in certificate.blocks] == [2, 2]
    assert [len(block.layers) for block in certificate.blocks] == [4, 4]
    jacobians = sample_jacobians(lambda x: flow.forward(x)[0], x)
    norms = np.linalg.norm(jacobians, 2, axis=(1, 2))
    smallest = 1.0 / np.linalg.svd(jacobians, compute_uv=False)[:, -1]
    assert norms.max() <= certificate.forward and smallest.max() <= certificate.inverse
    bias = certificate.bias_bound(ir.TruncatedSeries(10))
    expected = sum(
        float(ir.truncation_error_bound(branch.lipschitz, 3, 10))
        for block in certificate.blocks
        for branch in block.branches
    )
    assert bias == pytest.approx(expected)


def test_a_broken_branch_is_named(model, variables):
    params = jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].set(jnp.nan), variables["params"])
    certificate = ir.certify(model, {**variables, "params": params})
    assert not certificate.certified and math.isinf(certificate.inverse)
    assert "not finite" in certificate.failures[0].problem


def test_the_inverse_states_its_error(flow, x):
    flow = flow.with_bounds()
    latents = jax.jit(flow.forward)(x)
    back, info = jax.jit(lambda z: flow.inverse(z, SOLVER))(latents)
    assert info.residual.shape == (2, 16)
    bound = ir.inverse_error_bound(flow, info)
    double = ir.inverse_error_in_double(flow, back, latents)
    assert np.all(np.isfinite(bound)) and np.all(double <= bound)
    with jax.enable_x64(True):
        exact_flow = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), flow)
        exact_latents = tuple(jnp.asarray(np.asarray(z), jnp.float64) for z in latents)
        tight = ir.FixedPointIteration(rtol=1e-14, atol=1e-14, max_steps=2000)
        exact, _ = jax.jit(lambda z: exact_flow.inverse(z, tight))(exact_latents)
    distance = np.linalg.norm(np.asarray(back, np.float64) - np.asarray(exact), axis=1)
    assert np.all(distance <= double)


def test_an_error_tolerance_is_met(flow, x):
    flow = flow.with_bounds()
    solver = ir.Anderson(error_tolerance=1e-3)
    _, info = jax.jit(lambda x: flow.inverse(flow.forward(x), solver))(x)
    assert bool(info.converged.all()) and float(info.error_bound.max()) <= 1e-3


@pytest.mark.slow
def test_a_training_step_lowers_the_loss(model, variables, x):
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
    assert np.isfinite(values).all() and values[-1] < values[0]
