import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import FEW_GEOMETRIES, GEOMETRIES, dense_matrix, output_shape, rest_slow

from iresnet_jax.operators import (
    ConvOperator,
    DenseOperator,
    LinearOperator,
    adjoint,
    conv_operator,
    to_matrix,
    with_kernel,
)

pytestmark = pytest.mark.usefixtures("no_rank_promotion")


def build(geometry, seed=0):
    return conv_operator(
        jnp.asarray(geometry.kernel(seed)),
        geometry.image,
        **geometry.options,
    )


def draw(seed, shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@jax.jit
def apply_both(operator, x, y):
    return operator(x), adjoint(operator, y), to_matrix(operator)


# The map


@pytest.mark.parametrize("geometry", rest_slow(GEOMETRIES, *FEW_GEOMETRIES), ids=str)
def test_convolution_its_adjoint_and_its_matrix(geometry):
    operator, oracle = build(geometry), dense_matrix(geometry, geometry.kernel())
    assert operator.domain_shape == (*geometry.image, geometry.channels[0])
    assert operator.codomain_shape == output_shape(geometry)
    x, y = draw(1, (2, *operator.domain_shape)), draw(2, (2, *operator.codomain_shape))
    out, back, matrix = apply_both(operator, x, y)
    np.testing.assert_array_equal(matrix, oracle.astype(np.float32))
    np.testing.assert_allclose(out.reshape(2, -1), x.reshape(2, -1) @ oracle.T, atol=2e-5)
    np.testing.assert_allclose(back.reshape(2, -1), y.reshape(2, -1) @ oracle, atol=2e-5)
    np.testing.assert_allclose(jnp.vdot(out, y), jnp.vdot(x, back), rtol=1e-4, atol=1e-4)


def test_dense_its_adjoint_and_its_matrix():
    kernel = draw(0, (3, 5))
    operator = DenseOperator(kernel)
    assert operator.domain_shape == (3,) and operator.codomain_shape == (5,)
    x, y = draw(1, (2, 3)), draw(2, (2, 5))
    out, back, matrix = apply_both(operator, x, y)
    np.testing.assert_array_equal(matrix, kernel.T)
    np.testing.assert_allclose(out, np.asarray(x) @ np.asarray(kernel), atol=1e-6)
    np.testing.assert_allclose(back, np.asarray(y) @ np.asarray(kernel).T, atol=1e-6)


def test_pointwise_convolution_becomes_dense():
    kernel = draw(0, (1, 1, 2, 3))
    operator, x = conv_operator(kernel, (4, 5)), draw(1, (2, 4, 5, 2))
    assert isinstance(operator, DenseOperator)
    expected = np.einsum("bhwi,io->bhwo", x, kernel[0, 0])
    np.testing.assert_allclose(operator(x), expected, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{"strides": 2}, {"strides": (1, 2)}, {"padding": ((0, 1), (0, 0))}], ids=str
)
def test_other_pointwise_convolutions_stay_convolutions(options):
    assert isinstance(conv_operator(jnp.ones((1, 1, 2, 3)), (4, 4), **options), ConvOperator)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (0,)])
@pytest.mark.parametrize("operator", [build(GEOMETRIES[6]), DenseOperator(draw(0, (3, 2)))])
def test_any_leading_axes(operator, lead):
    x, y = draw(1, (*lead, *operator.domain_shape)), draw(2, (*lead, *operator.codomain_shape))
    out, back, matrix = apply_both(operator, x, y)
    assert out.shape == y.shape and back.shape == x.shape
    flat = np.reshape(x, (-1, matrix.shape[1]))
    np.testing.assert_allclose(np.reshape(out, (-1, matrix.shape[0])), flat @ matrix.T, atol=1e-5)


def test_dense_acts_on_the_last_axis_of_images():
    x, kernel = draw(0, (2, 4, 4, 3)), draw(1, (3, 2))
    expected = np.einsum("bhwi,io->bhwo", x, kernel)
    np.testing.assert_allclose(DenseOperator(kernel)(x), expected, atol=1e-6)


@pytest.mark.parametrize("operator", [build(GEOMETRIES[0]), DenseOperator(draw(0, (3, 2)))])
def test_operators_meet_the_protocol(operator):
    assert isinstance(operator, LinearOperator)


def test_gradient_reaches_the_kernel():
    geometry = GEOMETRIES[0]
    operator = build(geometry)
    x, y = draw(1, (2, *operator.domain_shape)), draw(2, (2, *operator.codomain_shape))
    gradient = jax.grad(lambda op: jnp.vdot(op(x), y))(operator)
    direction = geometry.kernel(3)
    expected = np.vdot(x.reshape(2, -1) @ dense_matrix(geometry, direction).T, y.reshape(2, -1))
    np.testing.assert_allclose(jnp.vdot(gradient.kernel, direction), expected, rtol=1e-4)


# Pytrees


@pytest.mark.parametrize("geometry", [GEOMETRIES[2], GEOMETRIES[9]], ids=str)
def test_a_stack_of_convolutions_maps_and_scans(geometry):
    operators = [build(geometry, seed) for seed in range(3)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *operators)
    assert stack.domain_shape == operators[0].domain_shape
    assert stack.codomain_shape == operators[0].codomain_shape
    x = draw(4, (3, 2, *stack.domain_shape))
    expected = np.stack([op(part) for op, part in zip(operators, x, strict=True)])
    mapped = jax.vmap(lambda op, part: op(part))(stack, x)
    np.testing.assert_allclose(mapped, expected, atol=1e-5)
    _, scanned = jax.lax.scan(lambda _, pair: (None, pair[0](pair[1])), None, (stack, x))
    np.testing.assert_allclose(scanned, expected, atol=1e-5)


def test_a_stack_of_dense_operators_maps():
    stack, x = DenseOperator(draw(0, (4, 3, 2))), draw(1, (4, 5, 3))
    assert stack.domain_shape == (3,) and stack.codomain_shape == (2,)
    out = jax.vmap(lambda op, part: op(part))(stack, x)
    np.testing.assert_allclose(out, np.einsum("kbi,kio->kbo", x, stack.kernel), atol=1e-6)


def test_jit_returns_the_operator_with_its_geometry():
    operator = build(GEOMETRIES[9])
    doubled = jax.jit(lambda op: with_kernel(op, 2.0 * op.kernel))(operator)
    assert isinstance(doubled, ConvOperator)
    for field in ("image_shape", "strides", "padding"):
        assert getattr(doubled, field) == getattr(operator, field)
    np.testing.assert_array_equal(doubled.kernel, 2.0 * operator.kernel)


def test_the_kernel_is_the_only_leaf_and_geometry_is_structure():
    small, large = (conv_operator(jnp.ones((3, 3, 1, 1)), (n, n)) for n in (4, 5))
    assert len(jax.tree.leaves(small)) == 1
    assert jax.tree.structure(small) != jax.tree.structure(large)


# Refusals


@pytest.mark.parametrize(
    ("image", "size", "padding"),
    [((4, 2), (3, 3), "VALID"), ((2, 2), (3, 1), ((0, 0), (0, 0))), ((1, 5), (4, 1), "VALID")],
)
def test_kernels_that_do_not_fit_are_refused(image, size, padding):
    with pytest.raises(ValueError, match=f"{size[0]}x{size[1]}.*{image[0]}x{image[1]}"):
        conv_operator(jnp.ones((*size, 1, 1)), image, padding=padding)


@pytest.mark.parametrize("padding", ["CIRCULAR", ((-1, 0), (0, 0))])
def test_unknown_padding_is_refused(padding):
    with pytest.raises(ValueError, match="padding must be"):
        conv_operator(jnp.ones((3, 3, 1, 1)), (4, 4), padding=padding)


@pytest.mark.parametrize("shape", [(3, 3, 2), (2, 3, 3, 1, 1), (3, 2)])
def test_kernels_of_another_rank_are_refused(shape):
    with pytest.raises(ValueError, match="height, width, in_channels, out_channels"):
        conv_operator(jnp.ones(shape), (4, 4))


@pytest.mark.parametrize("strides", [0, (1, 0), (1, 1, 1), -1, (1.5, 1), 2.0])
def test_strides_other_than_one_or_two_positive_integers_are_refused(strides):
    with pytest.raises(ValueError, match="strides must be"):
        conv_operator(jnp.ones((3, 3, 1, 1)), (4, 4), strides=strides)


@pytest.mark.parametrize("image", [(4,), (4, 0), (4, 4, 3), (4.5, 4)])
def test_image_shapes_other_than_two_sides_are_refused(image):
    with pytest.raises(ValueError, match="image_shape must be"):
        conv_operator(jnp.ones((3, 3, 1, 1)), image)


@pytest.mark.parametrize("shape", [(2, 5, 4, 2), (2, 4, 4, 3), (4, 2), (2,)])
def test_images_of_another_shape_are_refused(shape):
    operator = conv_operator(jnp.ones((3, 3, 2, 1)), (4, 4))
    with pytest.raises(ValueError, match=r"images of shape \(4, 4, 2\)"):
        operator(jnp.ones(shape))


def test_geometry_in_numpy_integers_is_accepted():
    operator = conv_operator(jnp.ones((3, 3, 1, 1)), np.array([6, 4]), strides=np.int64(2))
    assert operator.codomain_shape == (3, 2, 1)
