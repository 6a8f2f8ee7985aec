"""The measures behind the paper's figures and tables, and the coupling networks beside them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_properties
from cases import in_double, quick_jit

from iresnet_jax.nn import ImageFlow, converge, num_parameters
from paper import coupling, tables
from paper.blocks import first_scale_sites, jacobians, largest_norm, strongest
from paper.bounds import check
from paper.convergence import block_decay
from paper.figure_1 import count_crossings, magnify
from paper.figure_2 import bits_per_dim, coupling_flow, grid_of
from paper.figure_4 import measure
from paper.tables import interval
from paper.trainings import classifier_config
from train.data import load_dataset
from train.figures import sheet

# Measures


def test_crossings_are_counted_between_layers():
    paths = np.array([[0.0, 1.0, 2.0], [1.0, 0.0, 2.0], [1.0, 0.5, 0.0], [1.0, 1.0, 0.0]])
    assert count_crossings(paths) == 1 + 2 + 0


def test_the_layers_with_the_most_crossings_are_magnified(tmp_path):
    paths = np.array([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0], [0.3, 0.2, 0.1], [0.0, 1.0, 1.5]])
    with sheet(tmp_path / "x.png") as axes:
        axes[0, 0].plot(paths)
        magnify(axes[0, 0], paths)
    (frame,) = axes[0, 0].child_axes
    assert frame.get_xlim() == (1.0, 3.0) and frame.get_ylim() == (0.0, 2.0)
    for line, path in zip(frame.lines, paths.T, strict=True):
        np.testing.assert_array_equal(line.get_ydata(), path)


def test_the_interval_is_students():
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == pytest.approx(2.0)
    assert half == pytest.approx(4.302652729911275 / math.sqrt(3.0))
    assert math.isnan(interval([1.0])[1])


def test_every_mark_of_table_1_has_its_test():
    for name in tables.PROPERTIES.values():
        assert callable(getattr(test_properties, name))


@pytest.fixture(scope="module")
def image_flow():
    """A flow over 8×8 images with branches of some strength, and its blocks on them."""
    model = ImageFlow(image_shape=(8, 8, 1), depths=(2,), features=4, coeff=0.9)
    x = np.random.default_rng(0).uniform(size=(3, 8, 8, 1)).astype(np.float32)

    @quick_jit
    def make(key, x):
        variables = model.init(key, x)
        kernels = jax.tree.map(lambda leaf: 3.0 * leaf, variables["params"])
        return model.flow(converge(model, {**variables, "params": kernels}))

    flow = make(jax.random.key(0), x)
    return flow, x, first_scale_sites(flow, x)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_blocks_on_crops_are_the_networks_own(image_flow):
    flow, x, sites = image_flow
    flow = in_double(flow)
    last = sites[-1]
    output = last.inputs + last.block.branch(jnp.asarray(last.inputs))
    np.testing.assert_allclose(output, flow.forward(jnp.asarray(x, float))[0], atol=1e-12)
    for site in sites:
        assert largest_norm(jacobians(site)) <= site.lipschitz < 1.0


def test_bounds_hold_and_a_false_one_is_noticed(image_flow):
    site = image_flow[2][0]
    assert check(site)["holds"]
    assert not check(site._replace(lipschitz=0.01))["holds"]


def test_the_series_is_measured_within_its_bound(image_flow):
    site = strongest(*image_flow[:2])
    measured = measure(site, 4, 4)
    bias, gradient = measured.series["bias"], measured.series["gradient error"]
    assert (bias <= measured.series["certified bound"]).all() and bias[3] < bias[0]
    assert (measured.series["standard deviation"] > 0.0).all()
    assert gradient[3] < site.lipschitz**3 * gradient[0]


@pytest.mark.slow
def test_a_block_converges_at_least_as_fast_as_banach_says(image_flow):
    site = strongest(*image_flow[:2])
    decay = block_decay(site, 12)
    for n in range(13):
        assert decay.plain[n] <= site.lipschitz**n * (1.0 + 1e-9)
    assert decay.plain[1] > 1e-3 and decay.jacobian <= site.lipschitz


# Peers


@pytest.fixture(scope="module")
def coupled():
    """A coupling classifier of about 5,000 parameters, fresh, and four images."""
    dataset = load_dataset("digits")
    model = coupling.build_model(classifier_config("smoke", "mnist"), dataset, 5000)
    x = np.random.default_rng(0).normal(size=(4, *dataset.image_shape)).astype("float32")
    return model, jax.device_get(quick_jit(model.init)(jax.random.key(0), x)), x


def test_the_coupling_classifier_inverts_and_has_the_size_asked_for(coupled):
    model, variables, x = coupled
    variables = jax.tree.map(lambda leaf: leaf + np.float32(0.05), variables)
    assert abs(num_parameters(variables) - 5000) < 500
    flow = model.flow(variables)
    back, latents = quick_jit(lambda x: (flow.inverse(flow.features_of(x)), flow.features_of(x)))(x)
    np.testing.assert_allclose(back, x, atol=1e-4)
    assert latents.size == x.size * (1 + classifier_config("smoke", "mnist").padding)


@pytest.mark.slow
def test_a_coupling_whose_scale_underflows_is_reported_as_not_inverted(coupled):
    model, variables, x = coupled
    far = np.concatenate([1e4 * x[:1], x[1:]])
    variables = jax.tree.map(lambda leaf: leaf - np.float32(0.05), variables)
    found = coupling.reconstruction(model, variables, far)
    assert found["smallest_scale"] == 0.0 and found["reconstructions_finite"] == 3
    assert np.isnan(found["reconstruction_max_error"])


@pytest.mark.slow
def test_the_coupling_flow_is_a_density():
    pytest.importorskip("flowjax")
    points = np.random.default_rng(0).normal(size=(64, 2)).astype(np.float32)
    log_prob, _ = coupling_flow(points, layers=2, steps=3, batch_size=16)
    density = grid_of(log_prob, 91)
    assert density.sum() * 0.1**2 == pytest.approx(1.0, abs=1e-2)  # EXTENT holds all but 1e-4
    assert 1.5 < bits_per_dim(log_prob, points) < 3.0
