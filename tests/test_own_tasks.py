"""Tasks of one's own, each in one place: a loss that also classifies, and learned dequantisation.

Each is a subclass with its settings, registered as a program. Training, resuming, the report and
the tools for saved runs then work as they do for the tasks that come with the project.
"""

import dataclasses
import json
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.scipy.stats import norm

from train.__main__ import main
from train.configs import DENSITY, DensityConfig
from train.density import Density
from train.programs import TASKS, register
from train.saved import load_run

SMALL = "--smoke --depths 2 --features 4 --batch-size 32 --steps 30 --learning-rate 0.02"


# Density and classes


@dataclasses.dataclass(frozen=True, kw_only=True)
class HybridConfig(DensityConfig):
    """Train a density model whose latents tell the classes apart."""

    program: ClassVar[str] = "hybrid"

    class_weight: float = 1.0
    """Weight of the cross-entropy beside the bits/dim."""


class Hybrid(Density):
    """Bits/dim, and the cross-entropy of a linear layer on the latents."""

    experiments: ClassVar = {"digits": HybridConfig(**vars(DENSITY["digits"]))}
    purpose: ClassVar = "train a density model that classifies"
    with_labels: ClassVar = True
    shown_metrics: ClassVar = ("bits", "accuracy")

    def init(self, key, x):
        variables = super().init(key, x)
        head = jnp.zeros((self.dataset.dim, self.dataset.num_classes))
        return {**variables, "params": {**variables["params"], "head": head}}

    def flow_loss(self, params, flow, batch, keys):
        images, labels = batch
        bits, _ = super().flow_loss(params, flow, images, keys)
        noise = jax.vmap(lambda key: jax.random.split(key)[0])(keys)  # as the density's own
        logits = self.logits(params, flow, self.noisy(images, noise))
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        accuracy = jnp.mean(logits.argmax(-1) == labels)
        return bits + self.config.class_weight * loss, {"bits": bits, "accuracy": accuracy}

    def logits(self, params, flow, x):
        latents = [z.reshape(len(x), -1) for z in flow.forward(x)]
        return jnp.concatenate(latents, axis=1) @ params["head"]

    def evaluate(self, state, folder):
        variables = self.functions.shipped_variables(state)
        flow, x = self.functions.flow(variables), self.inputs(self.dataset.test)
        predicted = self.logits(variables["params"], flow, x).argmax(-1)
        accuracy = float(np.mean(predicted == self.dataset.labels("test")))
        return {"accuracy": accuracy, **super().evaluate(state, folder)}

    def rows(self, report):
        return [("accuracy", f"{report['accuracy']:.0%}"), *super().rows(report)]


# Noise with parameters


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


@pytest.fixture(scope="module", params=[Hybrid, LearnedNoise])
def trained(request, tmp_path_factory):
    """The task, and the folder of a run by the command line; the registry is left as it was."""
    name = next(iter(request.param.experiments.values())).program
    register(request.param)
    workdir = tmp_path_factory.mktemp("own") / "run"
    assert main([name, *SMALL.split(), "--workdir", str(workdir)]) == 0
    yield request.param, workdir
    del TASKS[name]


def test_it_trains_reports_and_is_certified(trained):
    task, workdir = trained
    report = json.loads((workdir / "report.json").read_text())
    assert report["steps"] == 30 and report["certified"] and report["all_converged"]
    assert report["bits_per_dim"] < np.log2(17)
    if task is Hybrid:
        assert report["accuracy"] > 0.3  # of ten classes


def test_its_own_parameters_have_been_trained_and_are_averaged(trained):
    task, workdir = trained
    state = load_run(workdir, "newest").state
    own = state.params["head"] if task is Hybrid else state.params["noise"]["mean"]
    averaged = jax.tree.leaves(state.averages["params"])
    assert np.abs(own).max() > 0.01 and len(averaged) == len(jax.tree.leaves(state.params))


def test_the_tools_work_on_its_runs(trained, capsys):
    task, workdir = trained
    assert main(["evaluate", "--workdir", str(workdir)]) == 0
    assert ("accuracy" in capsys.readouterr().out) == (task is Hybrid)
    report, evaluation = (
        json.loads((workdir / name).read_text())
        for name in ("report.json", "evaluation/evaluation.json")
    )
    assert evaluation["bits_per_dim"] == pytest.approx(report["bits_per_dim"], rel=1e-4)
    assert main(["certify", "--workdir", str(workdir)]) == 0
    assert main(["sample", "--workdir", str(workdir), "--count", "4"]) == 0


def test_a_registered_task_is_a_program_with_its_own_settings(trained, capsys):
    task, _ = trained
    name = next(iter(task.experiments.values())).program
    assert main(["--help"]) == 0
    assert f"{name:<16}{task.purpose}" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([name, "--help"])
    assert ("--class-weight" in capsys.readouterr().out) == (task is Hybrid)


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
