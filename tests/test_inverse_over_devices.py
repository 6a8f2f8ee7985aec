"""The inverse over two devices, against the same inverse on one."""

import dataclasses

import jax
import numpy as np
import pytest
from cases import in_double, quick_jit
from helpers import rest_slow

from iresnet_jax.nn import ImageFlow, VectorFlow
from train.configs import DENSITY
from train.evaluation import there_and_back
from train.networks import ModelFunctions
from train.parallel import LocalDevices

POINTS = VectorFlow(dim=2, depth=3, features=(8, 8), coeff=0.9)
IMAGES = ImageFlow(image_shape=(4, 4, 1), depths=(1, 1), features=4, coeff=0.9)


def functions_of(model, solver="plain"):
    config = dataclasses.replace(DENSITY["8gaussians"], inverse_solver=solver)
    return ModelFunctions(model, dataclasses.replace(config, inverse_tolerance=1e-6))


def network_and_examples(model, shape):
    """A network with full norms, and seven examples of unequal size."""
    x = np.random.default_rng(0).normal(size=(7, *shape)).astype(np.float32)
    x *= np.geomspace(0.1, 4.0, len(x), dtype=np.float32).reshape(-1, *(1,) * len(shape))
    variables = quick_jit(model.init)(jax.random.key(0), x)

    def grown(path, leaf):
        return 4.0 * leaf if path[-1].key == "kernel" else leaf

    params = jax.tree_util.tree_map_with_path(grown, variables["params"])
    functions = functions_of(model)
    return functions.flow(functions.converge({**variables, "params": params})), x


@pytest.mark.parametrize(
    ("model", "shape", "solver"),
    [
        (POINTS, (2,), "plain"),
        pytest.param(IMAGES, IMAGES.image_shape, "anderson", marks=pytest.mark.slow),
    ],
    ids=["points, plain", "images, anderson"],
)
def test_it_is_that_of_one_device_sample_by_sample(monkeypatch, model, shape, solver):
    """In float64: the programs' sums may take another order, and no more.

    Of seven examples, an eighth is filled in; the reports have each example's own steps.
    """
    flow, x = network_and_examples(model, shape)
    devices, results = jax.devices(), []
    with jax.enable_x64(True):
        flow, x = in_double(flow), in_double(x)
        for count in (1, 2):
            monkeypatch.setattr(jax, "local_devices", lambda n=count: devices[:n])
            functions = functions_of(model, solver)
            there = there_and_back(functions, flow, x, fill=False)
            results.append((there, functions.inverse(flow, there.latents)))
    one, two = map(jax.tree.leaves, results)
    for a, b in zip(one, two, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(b, a, rtol=1e-8, atol=1e-11)
    _, info = results[1][1]
    assert info.num_steps.shape == (len(flow.solve_names()), len(x))
    assert info.converged.all() and np.ptp(info.num_steps) >= 2


@pytest.mark.parametrize("name", rest_slow(["there_and_back", "invert"], "invert"))
def test_devices_do_not_wait_for_each_other(name):
    """A program that ``jit`` alone splits asks both, at each turn of a loop, whether it goes on."""
    flow, x = network_and_examples(POINTS, (2,))
    devices, functions = LocalDevices(jax.devices()[:2]), functions_of(POINTS)
    batch = x[:6] if name == "there_and_back" else jax.eval_shape(functions.forward, flow, x[:6])
    arguments = devices.shapes(flow, batch)
    function = getattr(functions, name)
    assert "all-reduce" not in function.lower(devices, *arguments).compile().as_text()
    of_one = LocalDevices(jax.devices()[:1])  # maps nothing
    assert "all-reduce" in function.lower(of_one, *arguments).compile().as_text()


def test_the_same_devices_compile_once():
    """Each call makes its own ``LocalDevices``."""
    traced = []

    def double(tree, batch):
        traced.append(batch.shape)
        return 2.0 * batch

    mapped = jax.jit(lambda devices, x: devices.map(double)(0.0, x), static_argnums=0)
    for _ in range(2):
        devices = LocalDevices(jax.devices()[:2])
        out = mapped(devices, devices.split(np.arange(4.0, dtype=np.float32)))
    np.testing.assert_array_equal(out, [0.0, 2.0, 4.0, 6.0])
    assert traced == [(2,)]
    assert LocalDevices(jax.devices()[:1]) != devices
