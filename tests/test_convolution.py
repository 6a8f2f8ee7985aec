import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    FEW_GEOMETRIES,
    GEOMETRIES,
    Geometry,
    dense_matrix,
    explicit_padding,
    output_shape,
)
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

from iresnet_jax.convolution import (
    convolution_p,
    convolve,
    convolve_as_product,
    output_size,
    resolve_padding,
)

pytestmark = pytest.mark.usefixtures("no_rank_promotion")


def reference(x, kernel, *, strides, padding, dilation=(1, 1)):
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        rhs_dilation=dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def directly(x, kernel, *, strides, padding, dilation=(1, 1)):
    assert strides == dilation == (1, 1)
    return convolution_p.bind(x, kernel, padding=padding)


PLAIN = [g for g in GEOMETRIES if g.strides == g.dilation == (1, 1)]
#: Every geometry as a product, those of stride 1 directly too.
FORMS = [
    pytest.param(form, geometry, marks=[] if geometry in FEW_GEOMETRIES else pytest.mark.slow)
    for form, geometries in ((convolve_as_product, GEOMETRIES), (directly, PLAIN))
    for geometry in geometries
]


def derivatives(convolution, geometry, arguments, directions):
    """Value, gradient, forward derivative and Hessian-vector product of a nonlinear function."""
    options = {**geometry.options, "padding": explicit_padding(geometry)}

    def value(x, kernel):
        return convolution(x, kernel, **options)

    def loss(x, kernel):
        return jnp.sum(jnp.sin(value(x, kernel)))

    gradient = jax.grad(loss, (0, 1))
    return {
        "value": value(*arguments),
        "gradient": gradient(*arguments),
        "forward": jax.jvp(value, arguments, directions)[1],
        "forward over reverse": jax.jvp(gradient, arguments, directions)[1],
    }


@pytest.mark.parametrize(("form", "geometry"), FORMS, ids=lambda v: getattr(v, "__name__", str(v)))
def test_a_convolution_and_its_derivatives_equal_lax(x64, form, geometry):
    rng = np.random.default_rng(0)
    shapes = (2, *geometry.image, geometry.channels[0]), geometry.kernel_shape
    arguments = tuple(rng.normal(size=shape) for shape in shapes)
    directions = tuple(rng.normal(size=shape) for shape in shapes)

    @jax.jit
    def both(arguments, directions):
        return tuple(
            derivatives(convolution, geometry, arguments, directions)
            for convolution in (form, reference)
        )

    ours, theirs = both(arguments, directions)
    assert ours["value"].shape == (2, *output_shape(geometry))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11), ours, theirs
    )


@pytest.mark.parametrize("form", [convolve_as_product, directly])
@pytest.mark.parametrize("geometry", GEOMETRIES[:2], ids=str)
def test_reverse_over_reverse_equals_lax(x64, geometry, form):
    x = np.random.default_rng(1).normal(size=(1, *geometry.image, geometry.channels[0]))
    kernel = geometry.kernel(2, np.float64)

    @jax.jit
    def second(x, kernel):
        def norm_of_gradient(convolution, kernel):
            def loss(kernel):
                out = convolution(x, kernel, strides=(1, 1), padding=((1, 1), (1, 1)))
                return jnp.sum(jnp.sin(out))

            return jnp.sum(jax.grad(loss)(kernel) ** 2)

        return [jax.grad(norm_of_gradient, 1)(c, kernel) for c in (form, reference)]

    ours, theirs = second(x, kernel)
    np.testing.assert_allclose(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("axes", [(0, None), (1, None), (None, 0), (0, 1)], ids=str)
def test_batches_of_images_and_of_kernels(x64, axes):
    rng = np.random.default_rng(0)
    shapes = (2, 5, 4, 3), (3, 2, 3, 4)
    images, kernels = (
        rng.normal(size=shape if axis is None else (*shape[:axis], 2, *shape[axis:]))
        for shape, axis in zip(shapes, axes, strict=True)
    )

    def gradients(convolution):
        def loss(x, kernel):
            out = convolution(x, kernel, strides=(1, 1), padding=((1, 0), (2, 1)))
            return jnp.sum(jnp.sin(out))

        return jax.vmap(jax.value_and_grad(loss, (0, 1)), axes)(images, kernels)

    ours, theirs = (jax.jit(gradients, static_argnums=0)(c) for c in (directly, reference))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11), ours, theirs)


@pytest.mark.parametrize(
    ("images", "channels", "direct"),
    [(32, (16, 64), True), (32, (15, 64), False), (4, (64, 16), False)],
)
def test_large_convolutions_go_directly_with_derivatives_that_xla_has_fast(
    images, channels, direct
):
    def loss(x, kernel):
        return jnp.sum(convolve(x, kernel, strides=(1, 1), padding=((1, 1), (1, 1))) ** 2)

    shapes = (images, 16, 16, channels[0]), (3, 3, *channels)
    abstract = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    jaxpr = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(*abstract))
    assert jaxpr.count("stride_1_convolution") == (3 if direct else 0)
    assert "conv_general_dilated" not in jaxpr


sides = st.integers(1, 5)


@given(
    st.tuples(sides, sides),
    st.tuples(sides, sides),
    st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(*[st.tuples(st.integers(0, 3), st.integers(0, 3))] * 2),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
)
def test_product_equals_the_definition(image, size, channels, strides, extra, dilation):
    geometry = Geometry(image, size, channels, strides, dilation=dilation)
    sides = zip(extra, geometry.window, image, strict=True)
    pads = tuple((p, q + max(k - n - p - q, 0)) for (p, q), k, n in sides)
    geometry = geometry._replace(padding=pads)
    kernel = geometry.kernel()
    x = np.random.default_rng(1).normal(size=(2, *image, channels[0])).astype(np.float32)
    convolution = jax.jit(convolve_as_product, static_argnames=tuple(geometry.options))
    out = convolution(x, kernel, **geometry.options)
    expected = x.reshape(2, -1) @ dense_matrix(geometry, kernel).T
    np.testing.assert_allclose(out.reshape(2, -1), expected, atol=1e-4)


def test_empty_batch():
    out = convolve_as_product(
        jnp.zeros((0, 4, 4, 2)), jnp.ones((3, 3, 2, 3)), strides=(1, 1), padding=((1, 1), (1, 1))
    )
    assert out.shape == (0, 4, 4, 3)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_output_keeps_the_type(dtype):
    x, kernel = jnp.ones((1, 4, 4, 1), dtype), jnp.ones((3, 3, 1, 1), dtype)
    out = convolve(x, kernel, strides=(1, 1), padding=((1, 1), (1, 1)))
    assert out.dtype == dtype and float(out[0, 1, 1, 0]) == 9.0 and float(out[0, 0, 0, 0]) == 4.0


@pytest.mark.parametrize(("backend", "uses_xla"), [("cpu", False), ("gpu", True), ("tpu", True)])
def test_derivatives_on_cpu_contain_no_xla_convolution(monkeypatch, backend, uses_xla):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)

    def loss(x, kernel):
        return jnp.sum(convolve(x, kernel, strides=(2, 1), padding=((1, 1), (1, 1))) ** 2)

    jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1)))(jnp.ones((1, 6, 6, 2)), jnp.ones((3, 3, 2, 3)))
    assert ("conv_general_dilated" in str(jaxpr)) == uses_xla


def test_narrow_convolutions_are_products_on_gpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    padding = ((1, 1), (1, 1))

    def is_product(inputs, outputs):
        x, kernel = jnp.ones((1, 4, 4, inputs)), jnp.ones((3, 3, inputs, outputs))
        run = jax.make_jaxpr(lambda x, kernel: convolve(x, kernel, strides=(1, 1), padding=padding))
        return "conv_general_dilated" not in str(run(x, kernel))

    assert is_product(2, 108) and is_product(108, 2)
    assert not is_product(2, 107) and not is_product(107, 2)


def test_other_platforms_compute_the_same(monkeypatch):
    geometry = GEOMETRIES[5]
    x = np.random.default_rng(0).normal(size=(2, *geometry.image, geometry.channels[0]))
    options = {**geometry.options, "padding": explicit_padding(geometry)}
    x, kernel = jnp.asarray(x, jnp.float32), geometry.kernel()
    here = convolve(x, kernel, **options)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    np.testing.assert_allclose(convolve(x, kernel, **options), here, atol=1e-5)


# Sizes and padding


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_sizes_follow_the_definition(geometry):
    pads = resolve_padding(geometry.image, geometry.window, geometry.strides, geometry.padding)
    assert pads == explicit_padding(geometry)
    size = output_size(geometry.image, geometry.window, geometry.strides, pads)
    assert size == output_shape(geometry)[:2]


def test_output_size_is_below_one_where_the_kernel_does_not_fit():
    assert output_size((4, 2), (3, 3), (1, 1), ((0, 0), (0, 0))) == (2, 0)
    assert min(output_size((4, 2), (3, 5), (2, 2), ((0, 0), (0, 0)))) < 1


def test_padding_names_ignore_case():
    assert resolve_padding((4, 4), (3, 3), (1, 1), "same") == ((1, 1), (1, 1))
    assert resolve_padding((4, 4), (3, 3), (1, 1), [[1, 0], [2, 3]]) == ((1, 0), (2, 3))


@pytest.mark.parametrize(
    "padding",
    [
        "CIRCULAR",
        "",
        ((-1, 0), (0, 0)),
        ((0, 0), (0, -2)),
        1,
        (1, 1),
        ((1, 1),),
        ((1, 1), (1, 1), (1, 1)),
        ((1, 1, 5), (1, 1)),
        ((1.5, 1), (1, 1)),
    ],
    ids=str,
)
def test_other_padding_is_refused(padding):
    with pytest.raises(ValueError, match="padding must be"):
        resolve_padding((4, 4), (3, 3), (1, 1), padding)
