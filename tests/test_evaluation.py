"""What reports say of inverses, against inverses in float64."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from cases import in_double, norms, quick_jit

import iresnet_jax as ir
from iresnet_jax.nn import VectorFlow
from train.configs import DENSITY
from train.evaluation import diameter, reconstruct
from train.networks import ModelFunctions, inverse_solver
from train.report import inverse_error_rows

DEEP = VectorFlow(dim=2, depth=20, features=(8, 8), coeff=0.95)
DOUBLE, SINGLE, SIZE = (
    "inverse_error_in_double_guaranteed",
    "inverse_error_bound_guaranteed",
    "data_diameter",
)
CONFIG = dataclasses.replace(DENSITY["8gaussians"], inverse_tolerance=1e-6)


@pytest.fixture(scope="module")
def deep():
    """A network of 20 blocks, and what a report says of its inverse on 70 points."""
    x = np.random.default_rng(0).normal(size=(70, 2)).astype(np.float32)
    functions = ModelFunctions(DEEP, CONFIG)
    variables = functions.converge(quick_jit(DEEP.init)(jax.random.key(0), x))
    # Full norms: without them the guarantee would not suffer from depth.
    variables["params"] = jax.tree.map(lambda p: 4.0 * p, variables["params"])
    flow, _ = functions.certified_flow(ir.nn.shrink(DEEP, functions.converge(variables)))
    return functions, flow, x, reconstruct(functions, flow, x, in_double=True)


def test_the_bound_by_double_precision_holds_and_is_nearly_sharp(deep):
    _, flow, x, told = deep
    latents = jax.jit(lambda flow, x: flow.forward(x))(flow, x[:64])
    with jax.enable_x64(True):
        solver = ir.FixedPointIteration(1e-14, 0.0, 2000)
        invert = quick_jit(lambda flow, latents: flow.inverse(latents, solver))
        exact, info = invert(in_double(flow), in_double(latents))
    assert info.converged.all() and told.report["inverse_error_in_double_examples"] == 64
    error = norms(told.x[:64].astype(np.float64) - np.asarray(exact)).max()
    assert error <= told.report[DOUBLE] <= 2.0 * error


def test_float32_alone_says_nothing_of_a_deep_network_and_is_not_shown(deep):
    *_, told = deep
    assert not told.report[SINGLE] < told.report[SIZE]
    rows = inverse_error_rows(
        told.report[DOUBLE],
        told.report[SINGLE],
        told.report[SIZE],
    )
    ((what, value),) = rows
    assert "proved" in what and "double" in value
    shown = float(value.split()[1])
    assert told.report[DOUBLE] <= shown <= 1.1 * told.report[DOUBLE]


def test_float32_is_shown_where_it_says_something():
    rows = inverse_error_rows(1e-6, 0.31, diameter=1.5)
    assert [value.split()[1] for _, value in rows] == ["1e-06", "0.31"]
    assert len(inverse_error_rows(1e-6, 1.5, diameter=1.5)) == 1
    assert len(inverse_error_rows(1e-6, math.nan, diameter=1.5)) == 1


def test_a_bound_of_some_examples_says_so():
    ((_, value),) = inverse_error_rows(1e-6, math.inf, 1.5, examples=64)
    assert value == "≤ 1e-06 (by double precision, first 64 examples)"


def test_what_is_not_certified_has_no_guarantee_and_costs_no_inverse_in_double(deep):
    functions, flow, x, _ = deep
    certificate = ir.certify(flow)
    *others, last = certificate.blocks
    last = last._replace(branches=(last.branches[0]._replace(lipschitz=1.0),))
    loose = flow.with_bounds(dataclasses.replace(certificate, blocks=(*others, last)))
    told = reconstruct(functions, loose, x, in_double=True)
    assert told.report[DOUBLE] == math.inf
    ((_, value),) = inverse_error_rows(math.inf, math.inf, told.report[SIZE])
    assert value == "none: the bound is infinite"
    ((_, value),) = inverse_error_rows(9.0, math.inf, diameter=1.5)
    assert value == "none: vacuous at this depth"


def test_without_asking_nothing_is_inverted_in_double(deep):
    functions, flow, x, _ = deep
    assert DOUBLE not in reconstruct(functions, flow, x).report


def test_the_diameter_is_that_of_the_box():
    x = np.array([[[0.0, 1.0]], [[3.0, -3.0]], [[1.0, 0.0]]], np.float32)
    assert diameter(x) == 5.0


def test_samples_in_batches_are_those_of_the_flow(monkeypatch):
    """And so are the reports of their inverses, sample by sample."""
    scale, prior = np.array([0.5, -0.2], np.float32), ir.DiagonalGaussian(*np.ones((2, 2), "f"))
    flow = ir.Flow((ir.ActNorm(scale, 1.0 + scale),), (2,), (prior,))
    functions = ModelFunctions(DEEP, CONFIG)
    monkeypatch.setattr("train.networks._FEWEST_AT_ONCE", 4)
    monkeypatch.setattr("train.networks._ENTRIES_AT_ONCE", 8)
    key, solver = jax.random.key(1), inverse_solver(CONFIG)
    x, info = functions.sample(flow, key, 6)
    whole, told = quick_jit(lambda flow: flow.sample(key, 6, solver=solver))(flow)
    np.testing.assert_allclose(x, whole, rtol=1e-5)
    assert info.residual.shape == told.residual.shape == (0, 6)


def test_the_norm_while_training_is_seen_where_vectors_lag():
    """The layers' kernels grow by 3; their vectors, and so the factors, stay."""
    model = VectorFlow(dim=3, depth=2, features=(8,), coeff=0.9)
    functions = ModelFunctions(model, CONFIG)
    x = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    variables = functions.converge(quick_jit(model.init)(jax.random.key(0), x))
    signs = {"spectral": jax.tree.map(np.abs, variables["spectral"])}
    grown = {"params": jax.tree.map(lambda p: 3.0 * p, variables["params"])}
    assert functions.norm_metrics({**variables, **grown})["sigma"] == pytest.approx(0.9, rel=1e-3)
    assert functions.norm_metrics({**signs, **grown})["sigma"] > 1.2
