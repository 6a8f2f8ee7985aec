"""What the Flax layers refuse: settings, geometries, inputs of another size."""

import jax
import jax.numpy as jnp
import pytest
from layer_cases import KEY, initialised

from iresnet_jax.nn import SpectralConv, SpectralDense


@pytest.mark.parametrize("coeff", [0.0, 1.0, -0.5, 1.5, float("nan"), float("inf")])
@pytest.mark.parametrize("layer", [SpectralDense(3), SpectralConv(3)])
def test_coeff_outside_the_unit_interval(layer, coeff):
    with pytest.raises(ValueError, match=rf"coeff must lie in \(0, 1\).*got {coeff}"):
        jax.eval_shape(layer.clone(coeff=coeff).init, KEY, jnp.zeros((1, 4, 4, 2)))


def test_vectors_for_a_convolution():
    with pytest.raises(ValueError, match=r"images \[height, width, channels\]; got shape \(4,\)"):
        jax.eval_shape(SpectralConv(3).init, KEY, jnp.zeros((1, 4)))


def test_a_convolution_that_does_not_fit():
    with pytest.raises(ValueError, match="3x3 convolution with padding VALID does not fit"):
        jax.eval_shape(SpectralConv(3, padding="VALID").init, KEY, jnp.zeros((1, 2, 4, 1)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"padding": "FULL"}, "padding must be .*got 'FULL'"),
        ({"strides": 0}, "strides must be one or two integers ≥ 1; got 0"),
        ({"dilation": (1, 0)}, r"dilation must be one or two integers ≥ 1; got \(1, 0\)"),
        ({"normalize": "exact"}, "normalize must be one of estimate, bound; got 'exact'"),
    ],
)
def test_unknown_geometry(settings, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(SpectralConv(3, **settings).init, KEY, jnp.zeros((1, 4, 4, 1)))


def test_negative_steps():
    layer, variables, x, _ = initialised("dense")
    with pytest.raises(ValueError, match="num_steps of a power iteration must be ≥ 0; got -1"):
        layer.clone(num_steps=-1).apply(variables, x, mutable=["spectral"])


@pytest.mark.parametrize("mutable", [False, ["spectral"]])
def test_an_image_of_another_size_than_the_singular_vectors(mutable):
    layer, variables, _, _ = initialised("conv")
    with pytest.raises(ValueError, match=r"v \(5, 4, 2\).*v \(7, 4, 2\).*another image size"):
        layer.apply(variables, jnp.zeros((1, 7, 4, 2)), mutable=mutable)


@pytest.mark.parametrize("name", ["dense", "conv"])
def test_an_input_with_another_number_of_features(name):
    layer, variables, _, shape = initialised(name)
    with pytest.raises(
        ValueError, match=f"{shape[-1]}.*{shape[-1] + 1}|{shape[-1] + 1}.*{shape[-1]}"
    ):
        layer.apply(variables, jnp.zeros((1, *shape[:-1], shape[-1] + 1)))


@pytest.mark.parametrize(
    "layer", [SpectralDense(0), SpectralConv(0), SpectralConv(2, kernel_size=0)]
)
def test_sizes_below_one(layer):
    with pytest.raises(ValueError, match="≥ 1; got"):
        jax.eval_shape(layer.init, KEY, jnp.zeros((1, 4, 4, 2)))
