"""A biased objective is compared with an unbiased one at each validation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import rest_slow

from iresnet_jax import Exact, TruncatedSeries, bits_per_dim
from train import density
from train.configs import DENSITY
from train.data import load_dataset
from train.density import Density
from train.steps import FirstState, example_keys


def validated(**changes):
    config = dataclasses.replace(DENSITY["moons"].smoke_variant(), **changes)
    task = Density(config, load_dataset("moons", max_examples=40))
    state = FirstState(task.init, config, task.inputs(task.dataset.train)).values()
    return task, state


def test_the_flattery_is_the_series_bias_and_is_told_once(monkeypatch, capsys):
    task, state = validated(train_estimator="series", num_terms=1)
    monkeypatch.setattr(density, "_TOLERATED", -np.inf)
    found = task.validate(state)
    flow = task.functions.flow(task.functions.converge(state.averaged_variables))
    x = jnp.asarray(task.dataset.validation)
    keys = example_keys(task.config.seed + 1, jnp.int32(0), jnp.arange(len(x)))
    probes = jax.vmap(lambda k: jax.random.split(k)[1])(keys)
    bits = [
        bits_per_dim(flow.log_prob(x, e, key=probes), 2, 1).mean()
        for e in (Exact(), TruncatedSeries(1))
    ]
    assert found["flattery"] == pytest.approx(float(bits[0] - bits[1]), abs=1e-5)
    assert 1e-4 < abs(found["flattery"]) < found["loss_bias_bound"]
    task.validate(state)
    told = "".join(capsys.readouterr())
    assert told.count("flatters itself") == 1


@pytest.mark.parametrize("estimator", rest_slow(["exact", "roulette"], "roulette"))
def test_what_has_no_bias_is_not_compared(estimator):
    task, state = validated(train_estimator=estimator)
    assert "flattery" not in task.validate(state)
