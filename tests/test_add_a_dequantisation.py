"""How to add a dequantisation that is learned; in this file alone.

It is a subclass with its settings, registered as a program. Training, resuming, the report and the
tools for saved runs then work as they do for the tasks that come with the project.
"""

import dataclasses
import json
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.stats import norm

from train.__main__ import main
from train.configs import DENSITY, DensityConfig
from train.density import Density
from train.programs import TASKS, register
from train.saved import load_run

SMALL = "--smoke --depths 2 --features 4 --batch-size 32 --steps 30 --learning-rate 0.02"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearnedNoiseConfig(DensityConfig):
    """Train a density model, and the noise that its images are dequantised by."""

    program: ClassVar[str] = "learned-noise"


class LearnedNoise(Density):
    """Noise u = sigmoid(μ + s·ε) within a level, ε normal, μ and s learned for each pixel."""

    experiments: ClassVar = {"digits": LearnedNoiseConfig(**vars(DENSITY["digits"]))}
    purpose: ClassVar = "train a density model and its dequantisation"

    def init(self, key, x):
        variables, shape = super().init(key, x), self.dataset.example_shape
        noise = {"mean": jnp.zeros(shape), "log_std": jnp.full(shape, 0.5)}
        return {**variables, "params": {**variables["params"], "noise": noise}}

    def dequantize(self, params, examples, keys):
        mean, log_std = params["noise"]["mean"], params["noise"]["log_std"]
        drawn = jax.vmap(lambda key: jax.random.normal(key, examples.shape[1:]))(keys)
        place = mean + jnp.exp(log_std) * drawn
        u = jax.nn.sigmoid(place)
        slope = jax.nn.log_sigmoid(place) + jax.nn.log_sigmoid(-place)
        log_density = norm.logpdf(drawn) - log_std - slope
        axes = tuple(range(1, examples.ndim))
        return (examples + u) / self.dataset.num_levels, log_density.sum(axes)


@pytest.fixture(scope="module")
def registered():
    """The registry is left as it was."""
    register(LearnedNoise)
    yield
    del TASKS["learned-noise"]


@pytest.fixture(scope="module")
def workdir(registered, tmp_path_factory):
    """The folder of a run by the command line."""
    workdir = tmp_path_factory.mktemp("own") / "run"
    assert main(["learned-noise", *SMALL.split(), "--workdir", str(workdir)]) == 0
    return workdir


@pytest.mark.slow
def test_it_trains_reports_and_is_certified(workdir):
    report = json.loads((workdir / "report.json").read_text())
    assert report["steps"] == 30 and report["certified"] and report["all_converged"]
    assert report["bits_per_dim"] < np.log2(17)


@pytest.mark.slow
def test_its_own_parameters_have_been_trained_and_are_averaged(workdir):
    state = load_run(workdir, "newest").state
    averaged = jax.tree.leaves(state.averages["params"])
    assert np.abs(state.params["noise"]["mean"]).max() > 0.01
    assert len(averaged) == len(jax.tree.leaves(state.params))


@pytest.mark.slow
def test_the_tools_work_on_its_runs(workdir, capsys):
    assert main(["evaluate", "--workdir", str(workdir)]) == 0
    report, evaluation = (
        json.loads((workdir / name).read_text())
        for name in ("report.json", "evaluation/evaluation.json")
    )
    assert evaluation["bits_per_dim"] == pytest.approx(report["bits_per_dim"], rel=1e-4)
    assert main(["certify", "--workdir", str(workdir)]) == 0
    assert main(["sample", "--workdir", str(workdir), "--count", "4"]) == 0


def test_it_is_a_program_with_its_own_settings(registered, capsys):
    assert main(["--help"]) == 0
    assert f"{'learned-noise':<16}{LearnedNoise.purpose}" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["learned-noise", "--help"])
    assert "--target-bias" in capsys.readouterr().out


def test_the_learned_noise_has_the_density_that_it_states():
    """Against a histogram of its draws: −E[log q] is the entropy of the histogram's density."""
    config = LearnedNoise.experiments["digits"]
    task = LearnedNoise(dataclasses.replace(config, max_examples=2))
    noise = {"mean": jnp.full((1, 1, 1), 0.7), "log_std": jnp.full((1, 1, 1), -0.2)}
    draws = 200_000
    keys = jax.random.split(jax.random.key(0), draws)
    x, log_q = task.dequantize({"noise": noise}, jnp.full((draws, 1, 1, 1), 3), keys)
    u = np.asarray(x).ravel() * 17 - 3
    assert u.min() > 0.0 and u.max() < 1.0
    heights, _ = np.histogram(u, bins=100, range=(0, 1), density=True)
    used = heights[heights > 0]
    entropy = -np.sum(used * np.log(used)) / 100
    assert float(-log_q.mean()) == pytest.approx(entropy, abs=0.01)
