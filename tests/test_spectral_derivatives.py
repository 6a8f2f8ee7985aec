"""Derivatives of the estimated norm, and of kernels that are divided by it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    dense_matrix,
    directional_difference,
    matrix_with_singular_values,
    operator_norm,
    rest_slow,
)
from spectral_cases import CASES, build, converge, dense, start

from iresnet_jax.operators import DenseOperator
from iresnet_jax.spectral import (
    SingularVectors,
    power_iteration,
    power_iteration_and_sigma,
    power_iteration_to_tolerance,
    sigma_estimate,
    spectral_normalize,
)

pytestmark = pytest.mark.usefixtures("no_rank_promotion")


def test_gradient_of_sigma_for_a_matrix_is_the_outer_product(x64):
    operator = dense(5, 4, [2.0, 1.0, 0.5, 0.1], jnp.float64)
    vectors, _, _ = converge(operator, rtol=1e-12)
    gradient = jax.grad(sigma_estimate)(operator, vectors).kernel
    left, _, right = np.linalg.svd(np.asarray(operator.kernel))
    np.testing.assert_allclose(gradient, np.outer(left[:, 0], right[0]), atol=1e-10)


@pytest.mark.parametrize("geometry", [CASES[0], CASES[2]], ids=str)
def test_gradient_of_sigma_for_a_convolution_is_that_of_the_norm(x64, geometry):
    operator = build(geometry, geometry.kernel(2, np.float64))
    direction = geometry.kernel(1, np.float64)

    @jax.jit
    def slope(operator):
        vectors, info = power_iteration_to_tolerance(
            operator, start(operator), rtol=1e-9, max_steps=5000
        )
        gradient = jax.grad(sigma_estimate)(operator, vectors).kernel
        return jnp.vdot(gradient, direction), info.converged

    expected = directional_difference(
        lambda kernel: operator_norm(dense_matrix(geometry, kernel)),
        np.asarray(operator.kernel),
        direction,
    )
    ours, converged = slope(operator)
    assert bool(converged)
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_no_gradient_flows_through_the_power_iteration(x64):
    operator = dense(4, 4, [2.0, 1.0, 0.5, 0.1], jnp.float64)
    vectors = start(operator)

    def through(op):
        return sigma_estimate(op, power_iteration(op, vectors, 1))

    moved = power_iteration(operator, vectors, 1)
    expected = jax.grad(sigma_estimate)(operator, moved).kernel
    np.testing.assert_allclose(jax.grad(through)(operator).kernel, expected, atol=1e-14)

    def of_vectors(op):
        vectors_of_op, _ = power_iteration_to_tolerance(op, vectors)
        return jnp.sum(vectors_of_op.u) + jnp.sum(power_iteration(op, vectors, 2).v)

    np.testing.assert_array_equal(jax.grad(of_vectors)(operator).kernel, 0.0)
    for part in jax.grad(sigma_estimate, 1)(operator, vectors):
        np.testing.assert_array_equal(part, 0.0)


@pytest.mark.parametrize("num_steps", rest_slow([0, 1, 3], 0, 3))
@pytest.mark.parametrize("geometry", rest_slow([*CASES, None], CASES[0], CASES[2], None), ids=str)
def test_the_sigma_of_an_iteration_is_the_estimate_in_value_and_derivatives(
    x64, geometry, num_steps
):
    operator = (
        dense(5, 4, [2.0, 1.0, 0.5, 0.1], jnp.float64)
        if geometry is None
        else build(geometry, geometry.kernel(2, np.float64))
    )
    vectors = start(operator)

    def by_the_way(op):
        moved, sigma = power_iteration_and_sigma(op, vectors, num_steps)
        return sigma**2, moved

    def afterwards(op):
        moved = power_iteration(op, vectors, num_steps)
        return sigma_estimate(op, moved) ** 2, moved

    ours, expected = (
        jax.jit(jax.value_and_grad(f, has_aux=True))(operator) for f in (by_the_way, afterwards)
    )
    assert float(expected[0][0]) > 0.0
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Masked:
    """x ↦ mask · x[order] W: an operator of more leaves than its kernel."""

    kernel: jax.Array
    mask: jax.Array
    order: jax.Array

    @property
    def domain_shape(self):
        return self.kernel.shape[:1]

    @property
    def codomain_shape(self):
        return self.kernel.shape[1:]

    def __call__(self, x):
        return self.mask * (x[..., self.order] @ self.kernel)


def test_the_sigma_of_an_iteration_has_all_derivatives_of_the_estimate(x64):
    both = [matrix_with_singular_values(i, 3, 2, [2.0, 1.0]) for i in range(2)]
    kernels = jnp.asarray(np.stack(both))
    direction = jnp.asarray(matrix_with_singular_values(2, 3, 2, [1.0, 1.0]))
    mask, order = jnp.array([0.5, 2.0]), jnp.array([2, 0, 1])
    vectors = SingularVectors(jnp.array([0.6, 0.8]), jnp.array([0.0, 0.6, 0.8]))

    def by_the_way(kernel, mask):
        return power_iteration_and_sigma(Masked(kernel, mask, order), vectors, 2)[1] ** 2

    def afterwards(kernel, mask):
        operator = Masked(kernel, mask, order)
        return sigma_estimate(operator, power_iteration(operator, vectors, 2)) ** 2

    def derivatives(f):
        along = (direction, jnp.ones_like(mask))
        return (
            jax.vmap(jax.grad(f, (0, 1)), (0, None))(kernels, mask),
            jax.jvp(f, (kernels[0], mask), along),
            jax.hessian(f, (0, 1))(kernels[0], mask),
        )

    ours, expected = (jax.jit(derivatives, static_argnums=0)(f) for f in (by_the_way, afterwards))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)
        assert np.abs(b).max() > 0.0


def test_the_sigma_of_an_iteration_of_the_zero_operator_is_zero():
    operator = DenseOperator(jnp.zeros((3, 2)))
    vectors = SingularVectors(jnp.array([0.6, 0.8]), jnp.array([0.0, 1.0, 0.0]))
    moved, sigma = power_iteration_and_sigma(operator, vectors, 2)
    assert float(sigma) == 0.0
    jax.tree.map(np.testing.assert_array_equal, moved, vectors)


def test_gradient_of_a_normalized_kernel_is_that_of_the_quotient(x64):
    operator = dense(4, 4, [2.0, 1.0, 0.5, 0.1], jnp.float64)
    vectors, _, _ = converge(operator, rtol=1e-12)
    probe = matrix_with_singular_values(1, 4, 4, [1, 1, 1, 1])
    direction = matrix_with_singular_values(2, 4, 4, [1, 1, 1, 1])

    def loss(op):
        return jnp.vdot(spectral_normalize(op, sigma_estimate(op, vectors), 0.7).kernel, probe)

    expected = directional_difference(
        lambda w: np.vdot(0.7 * w / operator_norm(w), probe), np.asarray(operator.kernel), direction
    )
    slope = jnp.vdot(jax.grad(loss)(operator).kernel, direction)
    np.testing.assert_allclose(slope, expected, rtol=1e-6)
