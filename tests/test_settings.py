"""Estimators and solvers are values: equal settings are equal, hashed, printed, compiled once."""

import copy
import pickle

import jax
import jax.numpy as jnp
import pytest
from cases import build
from helpers import rest_slow

from iresnet_jax import (
    Anderson,
    Estimator,
    Exact,
    FixedPointIteration,
    Roulette,
    Solver,
    TruncatedSeries,
)

KEY = jax.random.key(0)

#: How each is made, and one setting of it that differs.
SETTINGS = {
    "Exact": (Exact, None),
    "TruncatedSeries": (
        lambda: TruncatedSeries(3, num_probes=2),
        lambda: TruncatedSeries(4, num_probes=2),
    ),
    "TruncatedSeries-probe": (
        lambda: TruncatedSeries(3, probe="gaussian"),
        lambda: TruncatedSeries(3),
    ),
    "Roulette": (
        lambda: Roulette(0.9, lipschitz=0.8),
        lambda: Roulette(0.9, lipschitz=0.8, min_terms=3),
    ),
    "FixedPointIteration": (
        lambda: FixedPointIteration(1e-5, max_steps=50),
        lambda: FixedPointIteration(1e-5, max_steps=51),
    ),
    "Anderson": (lambda: Anderson(1e-5, window=2), lambda: Anderson(1e-5)),
}

every_setting = pytest.mark.parametrize("name", SETTINGS)


@every_setting
def test_equal_settings_are_equal_and_others_are_not(name):
    make, other = SETTINGS[name]
    assert make() == make() and hash(make()) == hash(make()) and make() is not make()
    if other is not None:
        assert make() != other()
    assert len({make(), make()}) == 1
    assert pickle.loads(pickle.dumps(make())) == copy.deepcopy(make()) == make()


def test_different_kinds_are_different():
    assert FixedPointIteration() != Anderson()
    assert len({Exact(), TruncatedSeries(2), FixedPointIteration(), Anderson()}) == 4


@every_setting
def test_what_is_printed_makes_it_again(name):
    value = SETTINGS[name][0]()
    assert eval(repr(value)) == value
    assert repr(value).startswith(name.split("-")[0] + "(")


@every_setting
def test_settings_do_not_change(name):
    value = SETTINGS[name][0]()
    with pytest.raises(AttributeError):
        value.num_terms = value.rtol = 1


@pytest.mark.parametrize("name", rest_slow(SETTINGS, "Roulette", "Anderson"))
@pytest.mark.parametrize("static", rest_slow([True, False], True))
def test_equal_settings_are_traced_once(name, static):
    make, other = SETTINGS[name]
    _, _, flow, x = build("vector")
    traces = []

    def evaluate(flow, x, value):
        traces.append(value)
        if isinstance(value, Solver):
            return flow.inverse(flow.forward(x), value)[0]
        return flow.log_prob(x, value, key=KEY if value.needs_key else None)

    evaluate = jax.jit(evaluate, static_argnums=(2,) if static else ())
    for _ in range(3):
        assert jnp.isfinite(evaluate(flow, x, make())).all()
    assert len(traces) == 1
    if other is not None:
        evaluate(flow, x, other())
        assert len(traces) == 2


@every_setting
def test_as_a_pytree_it_has_no_leaves(name):
    value = SETTINGS[name][0]()
    assert jax.tree.leaves(value) == []
    assert jax.tree.map(lambda leaf: leaf, value) == value


@pytest.mark.parametrize("name", [name for name in SETTINGS if "-" not in name])
def test_each_is_of_its_base_class(name):
    value = SETTINGS[name][0]()
    assert isinstance(value, Estimator) != isinstance(value, Solver)
    if isinstance(value, Estimator):
        assert value.describe() and value.needs_key == (name != "Exact")
