import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    GEOMETRIES,
    Geometry,
    dense_matrix,
    directional_difference,
    matrix_with_singular_values,
    operator_norm,
)

from iresnet_jax.operators import DenseOperator, conv_operator, to_matrix, with_kernel
from iresnet_jax.spectral import (
    SingularVectors,
    check_coeff,
    init_singular_vectors,
    power_iteration,
    power_iteration_and_sigma,
    power_iteration_to_tolerance,
    sigma_estimate,
    spectral_normalize,
)

pytestmark = pytest.mark.usefixtures("no_rank_promotion")

ROUNDING = 1.0 + 2e-6  # of a norm in float32
SAME = Geometry((6, 5), (3, 3), (2, 3))
CASES = [
    SAME,
    Geometry((6, 6), (3, 3), (3, 2), padding="VALID"),
    Geometry((7, 6), (3, 3), (2, 3), strides=(2, 2)),
    Geometry((2, 2), (5, 4), (2, 1), strides=(2, 2), padding=((3, 3), (2, 4))),
    Geometry((4, 4), (1, 1), (3, 4)),
    Geometry((4, 4), (1, 1), (3, 2), strides=(2, 2)),
]


def build(geometry, kernel=None):
    kernel = geometry.kernel() if kernel is None else kernel
    return conv_operator(jnp.asarray(kernel), geometry.image, **geometry.options)


def dense(rows, columns, values, dtype=jnp.float32):
    return DenseOperator(jnp.asarray(matrix_with_singular_values(0, rows, columns, values), dtype))


@jax.jit
def first_estimate(operator):
    return sigma_estimate(operator, start(operator))


@jax.jit
def start(operator):
    return init_singular_vectors(operator)


@partial(jax.jit, static_argnames=("rtol", "max_steps"))
def run(operator, rtol, max_steps):
    vectors, info = power_iteration_to_tolerance(
        operator, start(operator), rtol=rtol, max_steps=max_steps
    )
    return vectors, info, sigma_estimate(operator, vectors)


def converge(operator, rtol=1e-5, max_steps=5000):
    vectors, info, sigma = run(operator, rtol, max_steps)
    return vectors, info, float(sigma)


advance = jax.jit(power_iteration, static_argnames="num_steps")


# Power iteration


@pytest.mark.parametrize("geometry", CASES, ids=str)
def test_power_iteration_finds_the_norm_of_convolutions(geometry):
    truth = operator_norm(dense_matrix(geometry, geometry.kernel()))
    _, info, sigma = converge(build(geometry))
    assert bool(info.converged) and float(info.residual) <= 1e-5
    assert truth * (1.0 - 1e-3) <= sigma <= truth * ROUNDING


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (1, 5), (5, 1), (1, 1)])
def test_power_iteration_finds_the_norm_of_matrices(shape):
    values = 1.7 * 0.5 ** np.arange(min(shape))
    _, info, sigma = converge(dense(*shape, values))
    assert bool(info.converged)
    np.testing.assert_allclose(sigma, 1.7, rtol=2e-6)


def test_converged_vectors_are_unit_and_singular(x64):
    operator = dense(6, 4, [2.0, 1.0, 0.5, 0.1], jnp.float64)
    vectors, _, _ = converge(operator, rtol=1e-10)
    left, _, right = np.linalg.svd(np.asarray(operator.kernel).T)
    for ours, oracle in ((vectors.u, left[:, 0]), (vectors.v, right[0])):
        np.testing.assert_allclose(np.linalg.norm(ours), 1.0, rtol=1e-12)
        np.testing.assert_allclose(abs(np.vdot(ours, oracle)), 1.0, rtol=1e-12)


def test_the_residual_is_that_of_the_returned_vectors():
    geometry = CASES[2]
    vectors, info, sigma = converge(build(geometry), rtol=1e-2)
    image = dense_matrix(geometry, geometry.kernel()) @ np.ravel(vectors.v)
    residual = np.linalg.norm(image - sigma * np.ravel(vectors.u)) / sigma
    np.testing.assert_allclose(info.residual, residual, rtol=1e-2)
    assert 1e-4 < residual <= 1e-2


def test_a_smaller_tolerance_takes_more_steps():
    steps = [int(converge(build(SAME), rtol=rtol)[1].num_steps) for rtol in (1e-2, 1e-5)]
    assert steps[0] < steps[1]


@pytest.mark.parametrize("max_steps", [1, 3])
def test_running_out_of_steps_is_reported(max_steps):
    _, info, _ = converge(build(SAME), rtol=1e-6, max_steps=max_steps)
    assert int(info.num_steps) == max_steps
    assert not bool(info.converged) and float(info.residual) > 1e-6


def test_a_tolerance_below_rounding_is_not_reported_as_met():
    _, info, _ = converge(build(SAME), rtol=1e-12, max_steps=300)
    assert not bool(info.converged) and int(info.num_steps) == 300


def test_a_converged_state_stops_after_one_step():
    operator = dense(5, 5, [1.0, 0.2, 0.1, 0.1, 0.1])
    vectors, _, _ = converge(operator)
    _, info = power_iteration_to_tolerance(operator, vectors, rtol=1e-3)
    assert int(info.num_steps) == 1 and bool(info.converged)


def test_the_state_improves_over_calls_and_persists():
    operator, truth = build(SAME), operator_norm(dense_matrix(SAME, SAME.kernel()))
    states = [start(operator)]
    for _ in range(6):
        states.append(advance(operator, states[-1], 2))
    sigmas = [float(sigma_estimate(operator, state)) for state in states]
    assert all(a <= b * ROUNDING for a, b in zip(sigmas, [*sigmas[1:], truth], strict=True))
    assert truth - sigmas[-1] < 0.1 * (truth - sigmas[0])
    at_once = advance(operator, states[0], 12)
    for ours, expected in zip(at_once, states[-1], strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_a_warm_start_follows_moving_weights():
    vectors, _, _ = converge(build(SAME))
    kernel = SAME.kernel() + 0.02 * SAME.kernel(1)
    moved, truth = build(SAME, kernel), operator_norm(dense_matrix(SAME, kernel))
    warm = float(sigma_estimate(moved, advance(moved, vectors, 1)))
    cold = float(sigma_estimate(moved, advance(moved, start(moved), 1)))
    assert cold < 0.97 * truth and 0.999 * truth < warm <= truth * ROUNDING


def test_zero_steps_return_the_vectors_as_they_are():
    operator = build(SAME)
    vectors = start(operator)
    jax.tree.map(np.testing.assert_array_equal, power_iteration(operator, vectors, 0), vectors)


@pytest.mark.parametrize("geometry", [GEOMETRIES[i] for i in (3, 9, 12, 16, 17)], ids=str)
def test_the_estimate_is_never_above_the_norm(geometry):
    operator, truth = build(geometry), operator_norm(dense_matrix(geometry, geometry.kernel()))
    sigma = float(first_estimate(operator))
    assert 0.0 <= sigma <= truth * ROUNDING


@pytest.mark.parametrize("geometry", CASES, ids=str)
def test_the_start_is_made_of_unit_vectors(geometry):
    for part in start(build(geometry)):
        np.testing.assert_allclose(np.linalg.norm(part), 1.0, rtol=1e-5)


def test_the_start_misses_no_singular_vector():
    """A rank-one operator whose only singular direction it missed would seem to be zero."""
    for seed in range(20):
        left, right = np.random.default_rng(seed).normal(size=(2, 12))
        kernel = np.outer(left, right) / np.linalg.norm(left) / np.linalg.norm(right)
        operator = DenseOperator(jnp.asarray(kernel, jnp.float32))
        np.testing.assert_allclose(first_estimate(operator), 1.0, rtol=1e-5)


def test_a_stack_of_operators_maps():
    stack = DenseOperator(jnp.stack([dense(4, 4, [s, 0.1, 0.1, 0.1]).kernel for s in (0.5, 2.0)]))
    vectors = jax.vmap(init_singular_vectors)(stack)
    vectors, info = jax.vmap(power_iteration_to_tolerance)(stack, vectors)
    assert info.converged.shape == (2,) and bool(info.converged.all())
    np.testing.assert_allclose(jax.vmap(sigma_estimate)(stack, vectors), [0.5, 2.0], rtol=1e-5)


# Degenerate kernels


@pytest.mark.parametrize("operator", [build(SAME), dense(4, 3, [1, 1, 1])], ids=["conv", "dense"])
def test_a_zero_kernel_gives_no_nan(operator):
    zero = with_kernel(operator, jnp.zeros_like(operator.kernel))

    def normalized(op):
        vectors, info = power_iteration_to_tolerance(op, start(op))
        sigma = sigma_estimate(op, vectors)
        return jnp.sum(spectral_normalize(op, sigma, 0.9).kernel), (sigma, vectors, info)

    run = jax.jit(jax.value_and_grad(normalized, has_aux=True))
    (total, (sigma, vectors, info)), gradient = run(zero)
    assert float(total) == 0.0 and float(sigma) == 0.0
    assert bool(info.converged) and float(info.residual) == 0.0
    for leaf in jax.tree.leaves((vectors, gradient)):
        assert bool(jnp.isfinite(leaf).all())
    np.testing.assert_array_equal(gradient.kernel, jnp.ones_like(zero.kernel))


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_a_kernel_that_is_not_finite_does_not_converge(value):
    operator = build(SAME, jnp.asarray(SAME.kernel()).at[0, 0, 0, 0].set(value))
    _, info, sigma = converge(operator)
    assert not bool(info.converged) and int(info.num_steps) < 5000
    assert not math.isfinite(sigma)


# Gradient of the estimate


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


@pytest.mark.parametrize("num_steps", [0, 1, 3])
@pytest.mark.parametrize("geometry", [*CASES, None], ids=str)
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
    kernels = np.stack([matrix_with_singular_values(i, 3, 2, [2.0, 1.0]) for i in range(2)])
    direction = matrix_with_singular_values(2, 3, 2, [1.0, 1.0])
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

    ours, expected = derivatives(by_the_way), derivatives(afterwards)
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


# Normalisation


def test_kernels_below_coeff_stay_untouched():
    operator = dense(4, 4, [0.5, 0.2, 0.1, 0.1])
    for sigma in (0.5, 0.9):
        same = spectral_normalize(operator, jnp.float32(sigma), 0.9)
        np.testing.assert_array_equal(same.kernel, operator.kernel)


@pytest.mark.parametrize("coeff", [0.3, 0.9, 0.99])
def test_larger_kernels_get_the_norm_coeff(coeff):
    operator = build(SAME)
    _, _, sigma = converge(operator)
    bounded = spectral_normalize(operator, jnp.float32(sigma), coeff)
    norm = operator_norm(to_matrix(bounded))
    np.testing.assert_allclose(norm, coeff, rtol=1e-4)
    np.testing.assert_allclose(bounded.kernel * sigma, operator.kernel * coeff, rtol=1e-5)


def test_none_leaves_the_layer_unconstrained():
    operator = build(SAME)
    assert spectral_normalize(operator, jnp.float32(5.0), None) is operator


@pytest.mark.parametrize("coeff", [0.0, 1.0, -0.5, 1.5, math.nan, math.inf])
def test_coeff_outside_the_open_unit_interval_is_refused(coeff):
    for refuse in (check_coeff, lambda c: spectral_normalize(build(SAME), jnp.float32(1.0), c)):
        with pytest.raises(ValueError, match=r"coeff must lie in \(0, 1\).*got " + str(coeff)):
            refuse(coeff)


# Refusals


def test_vectors_of_another_image_size_are_refused():
    small, large = (build(SAME._replace(image=(n, n))) for n in (5, 6))
    vectors = start(small)
    for use in (
        lambda: sigma_estimate(large, vectors),
        lambda: power_iteration(large, vectors, 1),
        lambda: power_iteration_to_tolerance(large, vectors),
    ):
        with pytest.raises(ValueError, match="another image size"):
            use()


def test_swapped_vectors_are_refused():
    operator = build(SAME)
    u, v = start(operator)
    with pytest.raises(ValueError, match="do not fit this operator"):
        sigma_estimate(operator, SingularVectors(v, u))


@pytest.mark.parametrize("options", [{"rtol": 0.0}, {"rtol": -1.0}, {"max_steps": 0}], ids=str)
def test_settings_out_of_range_are_refused(options):
    operator = build(SAME)
    with pytest.raises(ValueError, match="rtol > 0 and max_steps ≥ 1"):
        power_iteration_to_tolerance(operator, start(operator), **options)


def test_a_negative_number_of_steps_is_refused():
    operator = build(SAME)
    with pytest.raises(ValueError, match="≥ 0; got -1"):
        power_iteration(operator, start(operator), -1)
