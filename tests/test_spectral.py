import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    GEOMETRIES,
    dense_matrix,
    operator_norm,
    rest_slow,
)
from spectral_cases import CASES, SAME, build, converge, dense, first_estimate, start

from iresnet_jax.operators import DenseOperator, to_matrix, with_kernel
from iresnet_jax.spectral import (
    SingularVectors,
    check_coeff,
    init_singular_vectors,
    power_iteration,
    power_iteration_and_sigma,
    power_iteration_to_tolerance,
    sigma_estimate,
    spectral_normalize,
    unbegun_vectors,
)

pytestmark = pytest.mark.usefixtures("no_rank_promotion")

ROUNDING = 1.0 + 2e-6  # of a norm in float32

advance = jax.jit(power_iteration, static_argnames="num_steps")


# Power iteration


@pytest.mark.parametrize("geometry", CASES, ids=str)
def test_power_iteration_finds_the_norm_of_convolutions(geometry):
    truth = operator_norm(dense_matrix(geometry, geometry.kernel()))
    _, info, sigma = converge(build(geometry))
    assert bool(info.converged) and float(info.residual) <= 1e-5
    assert truth * (1.0 - 1e-3) <= sigma <= truth * ROUNDING


@pytest.mark.parametrize(
    "shape", rest_slow([(6, 4), (4, 6), (1, 5), (5, 1), (1, 1)], (6, 4), (1, 5), (1, 1))
)
def test_power_iteration_finds_the_norm_of_matrices(shape):
    values = 1.7 * 0.5 ** np.arange(min(shape))
    _, info, sigma = converge(dense(*shape, values))
    assert bool(info.converged)
    np.testing.assert_allclose(sigma, 1.7, rtol=2e-6)


@pytest.mark.parametrize("size", [2.0**-110, 2.0**110])
def test_the_length_of_the_vectors_does_not_matter(size):
    """Their squares would leave the range of single precision."""
    operator = dense(6, 4, [2.0, 1.0, 0.5, 0.1])
    vectors, _ = power_iteration_to_tolerance(operator, unbegun_vectors(operator), max_steps=2)
    other = SingularVectors(*(part * size for part in vectors))
    np.testing.assert_array_equal(
        sigma_estimate(operator, other), sigma_estimate(operator, vectors)
    )
    for begun, again in zip(
        advance(operator, vectors, 3), advance(operator, other, 3), strict=True
    ):
        np.testing.assert_array_equal(again, begun)
    assert float(power_iteration_and_sigma(operator, other, 20)[1]) == pytest.approx(2.0, rel=1e-6)


def test_a_step_is_taken_whatever_the_tolerance():
    operator = dense(6, 4, [2.0, 1.0, 0.5, 0.1])
    begun = unbegun_vectors(operator)
    vectors, info = power_iteration_to_tolerance(operator, begun, rtol=math.inf)
    assert info.num_steps == 1 and np.isfinite(info.residual)
    np.testing.assert_allclose(jnp.linalg.norm(vectors.u), 1.0, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_power_iterations_of_narrow_kernels_begin_with_no_pattern(dtype):
    """Sizes that the type does not count to: no constant tail, no overflow."""
    kernel = jnp.zeros((70_000, 1), dtype).at[-2:].set(jnp.array([[1.0], [-1.0]], dtype))
    begun = init_singular_vectors(DenseOperator(kernel))
    assert np.isfinite(np.asarray(begun.v, np.float32)).all()
    assert abs(float(begun.u[0])) > 0.9  # v is not orthogonal to the one singular vector


def test_converged_vectors_are_unit_and_singular(x64):
    operator = dense(6, 4, [2.0, 1.0, 0.5, 0.1], jnp.float64)
    vectors, _, _ = converge(operator, rtol=1e-10)
    left, _, right = np.linalg.svd(np.asarray(operator.kernel).T)
    for ours, oracle in ((vectors.u, left[:, 0]), (vectors.v, right[0])):
        np.testing.assert_allclose(np.linalg.norm(ours), 1.0, rtol=1e-12)
        np.testing.assert_allclose(abs(np.vdot(ours, oracle)), 1.0, rtol=1e-12)


@pytest.mark.parametrize("size", [1e37, 1e30, 1e-30])
def test_the_norm_is_found_where_squares_leave_the_range_of_floats(size):
    kernel = (np.random.default_rng(0).uniform(-1.0, 1.0, (4, 3)) * size).astype(np.float32)
    vectors, info, sigma = converge(DenseOperator(jnp.asarray(kernel)))
    truth = operator_norm(kernel)
    assert bool(info.converged)
    np.testing.assert_allclose(float(sigma) / truth, 1.0, rtol=2e-6)
    again, known = power_iteration_and_sigma(DenseOperator(jnp.asarray(kernel)), vectors, 1)
    np.testing.assert_allclose(float(known) / truth, 1.0, rtol=2e-6)
    assert np.isfinite(again.u).all() and np.isfinite(again.v).all()
    slope = jax.grad(lambda k: sigma_estimate(DenseOperator(k), vectors))(jnp.asarray(kernel))
    u, _, v = np.linalg.svd(kernel.astype(np.float64) / size)
    np.testing.assert_allclose(np.abs(slope), np.abs(np.outer(u[:, 0], v[0])), atol=1e-4)


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
