"""What the Flax models and their flows refuse: settings, data, latents, solvers, estimators."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    CLASSIFIER,
    IMAGE,
    VECTOR,
    build,
    data,
    image_flow,
    init_shapes,
    small_variables,
)

from iresnet_jax import Anderson, Exact, FixedPointIteration, TruncatedSeries
from iresnet_jax.nn import InvertibleClassifier, Sequential, SpectralDense, VectorFlow

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def variables():
    return small_variables()


# Refusals: settings


BAD_SETTINGS = [
    *[
        (model, {"coeff": coeff}, rf"coeff must lie in \(0, 1\).*got {coeff}")
        for model in (VECTOR, IMAGE, CLASSIFIER)
        for coeff in (0.0, 1.0, -0.1, 1.5, math.nan)
    ],
    *[
        (model, {"activation": "gelu"}, "Unknown activation 'gelu'; known: elu, ")
        for model in (VECTOR, IMAGE, CLASSIFIER)
    ],
    *[
        (model, {"num_steps": -1}, "num_steps of power iteration must be ≥ 0; got -1")
        for model in (VECTOR, IMAGE, CLASSIFIER)
    ],
    (VECTOR, {"depth": 0}, r"at least one block; got depths \(0,\)"),
    (VECTOR, {"depth": -1}, r"at least one block; got depths \(-1,\)"),
    (IMAGE, {"depths": (0,)}, r"at least one block; got depths \(0,\)"),
    (IMAGE, {"depths": (1, 0)}, r"at least one block; got depths \(1, 0\)"),
    (IMAGE, {"depths": ()}, r"at least one block; got depths \(\)"),
    (CLASSIFIER, {"depths": (1, 0)}, r"at least one block; got depths \(1, 0\)"),
    (IMAGE, {"features": (2, 3)}, r"one number ≥ 1, or one for each of 1 scales; got \(2, 3\)"),
    (IMAGE, {"features": 0}, r"features must be one number ≥ 1.*got \(0,\)"),
    (CLASSIFIER, {"features": (2,)}, r"one for each of 2 scales; got \(2,\)"),
    (CLASSIFIER, {"padding": -1}, "must be ≥ 0; got -1"),
    (VECTOR, {"features": (4, 0)}, r"features must be.*≥ 1.*got \(4, 0\)"),
    (VECTOR, {"features": (-1,)}, r"features must be.*≥ 1.*got \(-1,\)"),
    (VECTOR, {"dim": 0}, "dim must be ≥ 1; got 0"),
    (CLASSIFIER, {"num_classes": 0}, "num_classes must be ≥ 1; got 0"),
    (IMAGE, {"domain": "unit"}, r"domain must be .*got 'unit'"),
    (CLASSIFIER, {"domain": "unit"}, r"domain must be .*got 'unit'"),
    (IMAGE, {"image_shape": (4, 4)}, r"image_shape must be .*got \(4, 4\)"),
]


@pytest.mark.parametrize(
    ("model", "setting", "message"),
    BAD_SETTINGS,
    ids=[f"{type(model).__name__}-{setting}" for model, setting, _ in BAD_SETTINGS],
)
def test_settings_out_of_range(model, setting, message):
    model = dataclasses.replace(model, **setting)
    shape = (model.dim,) if isinstance(model, VectorFlow) else tuple(model.image_shape)
    with pytest.raises(ValueError, match=message):
        init_shapes(model, jnp.zeros((2, *shape)))


@pytest.mark.parametrize(
    ("model", "setting", "message"),
    [
        (IMAGE, {"depths": 2}, r"depths must be a row of integers ≥ 1.*got 2"),
        (IMAGE, {"depths": "22"}, "depths must be a row of integers ≥ 1.*got '22'"),
        (IMAGE, {"depths": (1.5,)}, r"depths must be integers ≥ 1; got \(1.5,\)"),
        (VECTOR, {"features": None}, "features must be a row of integers ≥ 1.*got None"),
        (VECTOR, {"features": (4, 2.5)}, r"features must be integers ≥ 1; got \(4, 2.5\)"),
    ],
)
def test_settings_of_another_type(model, setting, message):
    shape = (model.dim,) if isinstance(model, VectorFlow) else tuple(model.image_shape)
    with pytest.raises(TypeError, match=message):
        init_shapes(dataclasses.replace(model, **setting), jnp.zeros((2, *shape)))


def test_one_number_of_features_is_one_hidden_layer():
    x = jnp.zeros((2, VECTOR.dim))
    shapes = [init_shapes(VECTOR.clone(features=width), x) for width in (5, (5,))]
    assert jax.tree.map(lambda leaf: leaf.shape, shapes[0]) == jax.tree.map(
        lambda leaf: leaf.shape, shapes[1]
    )


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (jnp.tanh, "got tanh. Give a function of your own a name"),
        (nn.BatchNorm(use_running_average=True), "BatchNorm cannot be part of a branch: its stat"),
        (nn.Dropout(0.1, deterministic=True), "Dropout cannot be part of a branch: it is random"),
    ],
    ids=["function", "BatchNorm", "Dropout"],
)
def test_what_cannot_be_a_stage(stage, message):
    def branch(dim, features, **options):
        return Sequential((SpectralDense(4, parent=None), stage, SpectralDense(dim, parent=None)))

    model = VECTOR.clone(make_branch=branch)
    with pytest.raises(TypeError, match=message):
        init_shapes(model, jnp.zeros((2, VECTOR.dim)))


@pytest.mark.parametrize(
    ("model", "sides"),
    [
        (image_flow((5, 4, 1), depths=(1,)), "height 5, width 4"),
        (image_flow((4, 7, 1), depths=(1,)), "height 4, width 7"),
        (image_flow((6, 6, 1), depths=(1, 1)), "height 6, width 6"),
        (image_flow((4, 4, 1), depths=(1, 1, 1)), "height 4, width 4"),
        (InvertibleClassifier(image_shape=(5, 5, 1), depths=(1, 1)), "height 5, width 5"),
    ],
)
def test_odd_sides_under_a_squeeze(model, sides):
    with pytest.raises(ValueError, match=f"squeeze needs even image sides; got {sides}"):
        init_shapes(model, jnp.zeros((2, *model.image_shape)))


def test_odd_sides_without_a_squeeze():
    model = image_flow((5, 3, 2), depths=(1,), squeeze_first=False)
    assert init_shapes(model, jnp.zeros((2, 5, 3, 2)))


# Refusals: data


@pytest.mark.parametrize(
    ("model", "shape", "built_for"),
    [
        (VECTOR, (2, 4), "batch, 3"),
        (VECTOR, (1,), "batch, 3"),
        (VECTOR, (2, 1, 3), "batch, 3"),
        (IMAGE, (2, 8, 8, 1), "batch, 4, 4, 1"),
        (IMAGE, (2, 4, 4, 3), "batch, 4, 4, 1"),
        (IMAGE, (4, 4, 2), "batch, 4, 4, 1"),
        (CLASSIFIER, (2, 4, 4, 1), "batch, 4, 4, 2"),
    ],
)
def test_data_of_another_shape(model, shape, built_for, variables):
    x = jnp.full(shape, 0.5)
    got = ", ".join(map(str, shape))
    message = rf"data of shape \[{built_for}\]; got \({got},?\)"
    with pytest.raises(ValueError, match=message):
        init_shapes(model, x)
    own = variables[{VECTOR: "vector", IMAGE: "image", CLASSIFIER: "classifier"}[model]]
    flow = model.flow(own)
    for call in (
        lambda: model.apply(own, x),
        lambda: flow.forward(x),
        lambda: jax.jit(flow.forward)(x),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("model", [VECTOR, IMAGE, CLASSIFIER], ids=lambda m: type(m).__name__)
def test_a_model_is_not_initialised_from_one_example(model):
    with pytest.raises(ValueError, match=r"data of shape \[batch, \d"):
        init_shapes(model, data(model, 1, seed=0)[0])


BAD_VALUES = [
    ("image", 1, 1.5, ValueError, r"data in \[0, 1\].*first offending value is 1.5 at index \(1, "),
    ("image", 0, -0.1, ValueError, r"data in \[0, 1\].*got values from -0.1 to"),
    ("image", 1, math.nan, ValueError, r"finite; the first offending value is nan at index \(1, "),
    ("image", 1, math.inf, ValueError, r"finite; the first offending value is inf at index \(1, "),
    (
        "vector",
        1,
        math.nan,
        ValueError,
        r"finite; the first offending value is nan at index \(1, 0",
    ),
    ("vector", 0, -math.inf, ValueError, r"finite; the first offending value is -inf at index"),
    ("classifier", 1, math.nan, ValueError, "finite; the first offending value is nan at"),
]


@pytest.mark.parametrize(("name", "sample", "value", "error", "message"), BAD_VALUES)
def test_data_with_bad_values(name, sample, value, error, message, variables):
    model = {"vector": VECTOR, "image": IMAGE, "classifier": CLASSIFIER}[name]
    x = data(model, 2, seed=0)
    x = x.at[(sample, *(0,) * (x.ndim - 1))].set(value)
    flow = model.flow(variables[name])
    calls = [lambda: model.init(KEY, x), lambda: model.apply(variables[name], x)]
    calls.append(lambda: flow.forward(x))
    if flow.priors:
        calls.append(lambda: flow.forward_and_log_det(x, Exact()))
        calls.append(lambda: flow.log_prob(x, Exact()))
    for call in calls:
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int32, bool])
@pytest.mark.parametrize("name", ["vector", "image", "classifier"])
def test_data_that_are_not_floating_point(name, dtype, variables):
    model = {"vector": VECTOR, "image": IMAGE, "classifier": CLASSIFIER}[name]
    x = jnp.ones(data(model, 2, seed=0).shape, dtype)
    message = rf"floating point; got {jnp.dtype(dtype).name}.*iresnet_jax\.dequantize"
    flow = model.flow(variables[name])
    for call in (lambda: init_shapes(model, x), lambda: flow.forward(x)):
        with pytest.raises(TypeError, match=message):
            call()


def test_the_ends_of_the_unit_interval_are_welcome(variables):
    flow = IMAGE.flow(variables["image"])
    for value in (0.0, 1.0):
        assert jnp.isfinite(flow.forward(jnp.full((1, 4, 4, 1), value))[0]).all()


# Refusals: latents, samples


def test_latents_that_do_not_fit():
    _, _, flow, x = build("image")
    z0, z1 = flow.forward(x)
    for latents, message in [
        ((z0,), r"2 latent array\(s\), in a tuple; got 1"),
        ((z0, z1, z1), r"2 latent array\(s\), in a tuple; got 3"),
        (z0, r"2 latent array\(s\), in a tuple; got ArrayImpl"),
        ((z1, z0), r"Latent 0 must have shape \[3, 2, 2, 6\]; got \(3, 1, 1, 24\)"),
        ((z0, z1[:2]), r"Latent 1 must have shape \[3, 1, 1, 24\]; got \(2, 1, 1, 24\)"),
        ((z0[0], z1), r"Latent 0 must have shape \[.*, 2, 2, 6\]; got \(2, 2, 6\)"),
        ((jnp.zeros(()), z1), r"Latent 0 must have shape \[.*2, 2, 6\]; got \(\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            flow.inverse(latents)


def test_integer_latents():
    _, _, flow, x = build("vector")
    with pytest.raises(TypeError, match="Latent 0 must be floating point; got int32"):
        flow.inverse((jnp.ones(x.shape, int),))


def test_latents_and_data_that_are_no_arrays():
    _, _, flow, x = build("vector")
    with pytest.raises(TypeError, match=r"Data must be an array.*; got list"):
        flow.forward(np.asarray(x).tolist())
    with pytest.raises(TypeError, match=r"Latent 0 must be an array.*; got list"):
        flow.inverse((np.asarray(x).tolist(),))


@pytest.mark.parametrize("num_samples", [2.5, "4"])
def test_a_number_of_samples_that_is_no_integer(num_samples):
    with pytest.raises(TypeError, match=f"num_samples must be an integer ≥ 1; got {num_samples!r}"):
        build("vector").flow.sample(KEY, num_samples)


@pytest.mark.parametrize("num_samples", [0, -1])
def test_too_few_samples(num_samples):
    with pytest.raises(ValueError, match=f"num_samples must be ≥ 1; got {num_samples}"):
        build("vector").flow.sample(KEY, num_samples)


def test_a_negative_temperature():
    with pytest.raises(ValueError, match=r"temperature must be ≥ 0; got -1\.0"):
        build("vector").flow.sample(KEY, 1, temperature=-1.0)


@pytest.mark.parametrize("solver_class", [FixedPointIteration, Anderson])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": 0}, "max_steps must be ≥ 1; got 0"),
        ({"rtol": -1.0}, r"Tolerances must be ≥ 0 .*got rtol=-1\.0"),
        ({"rtol": 0.0, "atol": 0.0}, r"Tolerances must be ≥ 0 and one of them > 0"),
        ({"rtol": math.nan}, r"Tolerances must be ≥ 0 .*got rtol=nan"),
        ({"error_tolerance": 0.0}, r"error_tolerance must be > 0; got 0\.0"),
    ],
)
def test_options_of_the_inverse(solver_class, options, message):
    with pytest.raises(ValueError, match=message):
        solver_class(**options)


@pytest.mark.parametrize("solver", [1e-6, "anderson", Anderson, None], ids=str)
def test_what_is_no_solver(solver):
    _, _, flow, x = build("vector")
    for call in (lambda: flow.inverse((x,), solver), lambda: flow.sample(KEY, 2, solver=solver)):
        with pytest.raises(TypeError, match=r"solver must be a Solver, such as .*; got "):
            call()


@pytest.mark.parametrize("estimator", [10, "exact", None, KEY], ids=["10", "exact", "None", "key"])
def test_what_is_no_estimator(estimator):
    _, _, flow, x = build("vector")
    for call in (flow.log_prob, flow.forward_and_log_det):
        with pytest.raises(TypeError, match=r"estimator must be an Estimator, such as .*; got "):
            call(x, estimator)


def test_a_series_without_key():
    _, _, flow, x = build("vector")
    with pytest.raises(ValueError, match="pass a key"):
        flow.log_prob(x, TruncatedSeries(2))


def test_keys_of_another_number_than_the_batch():
    _, _, flow, x = build("vector")
    with pytest.raises(ValueError, match=r"one for each of 3 samples; got \(2,\)"):
        flow.log_prob(x, TruncatedSeries(2), key=jax.random.split(KEY, 2))
