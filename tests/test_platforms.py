"""Everything that is traced lowers for TPUs and GPUs too, on a machine that has none."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import data, image_flow
from helpers import rest_slow

import iresnet_jax as ir
from iresnet_jax import nn
from iresnet_jax.monlip_bounds import eigenvalue_bound
from train.classification import Classification
from train.configs import CLASSIFICATION, DENSITY, HYBRID
from train.data import Dataset
from train.density import Density
from train.hybrid import Hybrid
from train.parallel import AXIS
from train.steps import FirstState, training_step

PLATFORMS = ("tpu", "cuda", "rocm")
KEY = jax.random.key(0)
X = jnp.zeros((2, 8, 8, 1))
MODELS = {
    "image": image_flow((8, 8, 1), depths=(1, 2), features=4),
    "mixing": nn.ImageFlow(image_shape=(8, 8, 1), depths=(2,), features=(4,), mixing=True),
    "whole": nn.ImageFlow(
        image_shape=(8, 8, 1), depths=(2,), features=(4,), make_branch=nn.monlip_branch
    ),
}


@pytest.fixture(params=["gpu", "tpu"])
def backend(request, monkeypatch):
    """What the code sees where it chooses by the platform."""
    monkeypatch.setattr(jax, "default_backend", lambda: request.param)


def lowers(function, *args):
    """Lower for every platform; return for which."""
    return jax.export.export(jax.jit(function), platforms=PLATFORMS)(*args).platforms == PLATFORMS


@functools.cache
def flow_of(name):
    model = MODELS[name]
    return jax.eval_shape(model.flow, jax.eval_shape(model.init, KEY, data(model, 4, seed=0)))


def log_prob(estimator):
    return lambda flow: flow.log_prob(X, estimator, key=KEY)


FUNCTIONS = {
    "forward": lambda flow: flow.forward(X),
    "exact": log_prob(ir.Exact()),
    "series": log_prob(ir.TruncatedSeries(3)),
    "roulette": log_prob(ir.Roulette(0.5, lipschitz=None)),
    "inverse": lambda flow: flow.inverse(flow.forward(X)),
    "accelerated": lambda flow: flow.inverse(flow.forward(X), ir.Anderson()),
    "samples": lambda flow: flow.sample(KEY, 2),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_flow_lowers(backend, name):
    assert lowers(FUNCTIONS[name], flow_of("image"))


@pytest.mark.parametrize("name", ["mixing", "whole"])
def test_other_blocks_lower(backend, name):
    def there_and_back(flow):
        z, log_det = flow.forward_and_log_det(X, ir.TruncatedSeries(2), key=KEY)
        return flow.inverse(z), log_det

    assert lowers(there_and_back, flow_of(name))


def test_a_derivative_of_an_inverse_lowers(backend):
    def loss(flow):
        return flow.inverse(flow.forward(X))[0].sum()

    assert lowers(jax.grad(loss), flow_of("image"))


@pytest.mark.parametrize("name", rest_slow(MODELS, "image"))
def test_power_iterations_lower(backend, name):
    model = MODELS[name]
    variables = jax.eval_shape(model.init, KEY, data(model, 4, seed=0))
    assert lowers(functools.partial(nn.converge, model), variables)


def test_bounds_lower(backend):
    operator = ir.conv_operator(jnp.ones((3, 3, 2, 4)), (6, 6))
    assert lowers(ir.gram_upper_bound, operator)
    between = ir.conv_operator(jnp.ones((1, 1, 4, 4)), (6, 6))
    assert lowers(eigenvalue_bound, (operator, operator), (between,))


def images(count=8):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, 8, 8, 1), np.uint8)
    labels = np.arange(count, dtype=np.int32) % 2
    return Dataset("random", *(pixels,) * 3, *(labels,) * 3, num_levels=256, classes=2)


def small(config, **options):
    sizes = {"depths": (1, 2), "features": (4, 4), "batch_size": 4, "steps": 10}
    return type(config)(**{**vars(config), **sizes, **options})


TASKS = {
    "density": (Density, small(DENSITY["cifar10"], augment=False, precision="bfloat16")),
    "muon": (Density, small(DENSITY["mnist"], optimizer="muon", num_terms=2)),
    "roulette": (Density, small(DENSITY["mnist-small"], train_estimator="roulette")),
    "classification": (Classification, small(CLASSIFICATION["mnist"], padding=1)),
    "hybrid": (Hybrid, small(HYBRID["mnist"], dequantization="variational")),
}


#: A hybrid's loss has that of a density and that of a classification.
STEPS = [("tpu", "hybrid")]
MORE_STEPS = [pair for pair in itertools.product(("gpu", "tpu"), TASKS) if pair not in STEPS]


@pytest.mark.parametrize(
    ("backend", "name"),
    [*STEPS, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in MORE_STEPS)],
    indirect=["backend"],
)
def test_a_programs_step_lowers(backend, name):
    kind, config = TASKS[name]
    task, data = kind(config, images()), images()
    state = FirstState(task.init, config, task.inputs(data.train[:4])).template()
    batch = (data.train[:4], data.train_labels[:4]) if task.with_labels else data.train[:4]
    step = jax.vmap(training_step(task.loss, config), axis_name=AXIS)
    copies = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), (state, batch))
    assert lowers(step, *copies)
