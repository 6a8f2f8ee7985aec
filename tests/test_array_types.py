"""Arrays have the shapes and dtypes that the library's annotations state.

``IRESNET_JAX_CHECK_ARRAYS=1`` checks them in any test; here, in a selection that calls every module
that states them.
"""

import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from array_types import of_arrays
from jaxtyping import Array, Float, TypeCheckError, jaxtyped

HERE = Path(__file__).parent

SELECTION = {
    "activations": ["derivatives", "values"],
    "convolution": [
        *("a_convolution_and_its_derivatives_equal_lax", "batches_of_images_and_of_kernels"),
        *("product_equals_the_definition", "other_padding_is_refused"),
    ],
    "iterations": ["each_sample_goes_its_own_way"],
    "lipsdp": ["no_slopes_exceed_the_bound_by_frequencies", "frames_of_an_image_agree"],
    "model_refusals": ["latents_that_do_not_fit"],
    "operators": [
        *("a_stack_of_convolutions_maps_and_scans", "any_leading_axes"),
        *("images_of_another_shape_are_refused", "kernels_of_another_rank_are_refused"),
    ],
    "priors": ["log_prob_is_the_sum_of_normal_log_densities", "samples_have_the_stated_moments"],
    "rounding": ["an_unknown_operator_has_no_rounding_bound", "attached_bounds_tighten"],
    "spectral": ["larger_kernels_get_the_norm_coeff"],
    "gram_bounds": ["gram_bound_comes_close_to_the_one_on_the_host"],
    "upper_bounds": [
        "upper_bound_is_above_the_norm_in_every_geometry",
        "upper_bound_of_an_unknown_operator_is_refused",
    ],
}


@pytest.mark.slow
def test_arrays_are_as_annotated():
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", "-x"]
    environment = os.environ | {"IRESNET_JAX_CHECK_ARRAYS": "1"}
    tests = [f"test_{file}.py::test_{name}" for file in SELECTION for name in SELECTION[file]]
    out = subprocess.run(
        [*command, *tests], cwd=HERE, env=environment, text=True, capture_output=True
    )
    assert out.returncode == 0, out.stdout[-4000:] + out.stderr[-1000:]


Vectors = Float[Array, "batch dim"]
Numbers = Float[Array, " batch"]


@jaxtyped(typechecker=of_arrays)
def scaled(x: Vectors, by: float | Numbers) -> Vectors:
    return x * by if isinstance(by, int | float) else x * by[:, None]


@pytest.mark.parametrize("by", [2, 2.0, jnp.full(3, 2.0)], ids=str)
def test_the_checker_accepts_what_the_annotations_allow(by):
    np.testing.assert_array_equal(scaled(jnp.ones((3, 2)), by), jnp.full((3, 2), 2.0))


@pytest.mark.parametrize(
    ("x", "by"),
    [
        (jnp.ones(3), 2.0),
        (jnp.ones((3, 2), int), 2.0),
        (jnp.ones((3, 2)), jnp.ones(2)),
        (np.ones((3, 2)), 2.0),
    ],
    ids=["rank", "dtype", "batch", "NumPy"],
)
def test_the_checker_refuses_other_arrays(x, by):
    with pytest.raises(TypeCheckError):
        scaled(x, by)


def test_the_checker_looks_at_arrays_alone():
    @jaxtyped(typechecker=of_arrays)
    def count(x: Vectors, name: str) -> int:
        return name

    assert count(jnp.ones((1, 1)), 3) == 3
