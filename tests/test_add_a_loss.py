"""How to add a loss: density and classes in one network; in this file alone.

It is a subclass with its settings, registered as a program. Training, resuming, the report and the
tools for saved runs then work as they do for the tasks that come with the project.
"""

import dataclasses
import json
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from train.__main__ import main
from train.configs import DENSITY, DensityConfig
from train.density import Density
from train.programs import TASKS, register
from train.saved import load_run

pytestmark = pytest.mark.slow  # the hybrid program has the same parts

SMALL = "--smoke --depths 2 --features 4 --batch-size 32 --steps 30 --learning-rate 0.02"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoLossesConfig(DensityConfig):
    """Train a density model whose latents tell the classes apart."""

    program: ClassVar[str] = "two-losses"

    class_weight: float = 1.0
    """Weight of the cross-entropy beside the bits/dim."""


class TwoLosses(Density):
    """Bits/dim, and the cross-entropy of a linear layer on the latents."""

    experiments: ClassVar = {"digits": TwoLossesConfig(**vars(DENSITY["digits"]))}
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


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """The folder of a run by the command line; the registry is left as it was."""
    register(TwoLosses)
    workdir = tmp_path_factory.mktemp("own") / "run"
    assert main(["two-losses", *SMALL.split(), "--workdir", str(workdir)]) == 0
    yield workdir
    del TASKS["two-losses"]


def test_it_trains_reports_and_is_certified(workdir):
    report = json.loads((workdir / "report.json").read_text())
    assert report["steps"] == 30 and report["certified"] and report["all_converged"]
    assert report["bits_per_dim"] < np.log2(17)
    assert report["accuracy"] > 0.3  # of ten classes


def test_its_own_parameters_have_been_trained_and_are_averaged(workdir):
    state = load_run(workdir, "newest").state
    averaged = jax.tree.leaves(state.averages["params"])
    assert np.abs(state.params["head"]).max() > 0.01
    assert len(averaged) == len(jax.tree.leaves(state.params))


def test_the_tools_work_on_its_runs(workdir, capsys):
    assert main(["evaluate", "--workdir", str(workdir)]) == 0
    assert "accuracy" in capsys.readouterr().out
    report, evaluation = (
        json.loads((workdir / name).read_text())
        for name in ("report.json", "evaluation/evaluation.json")
    )
    assert evaluation["bits_per_dim"] == pytest.approx(report["bits_per_dim"], rel=1e-4)
    assert main(["certify", "--workdir", str(workdir)]) == 0
    assert main(["sample", "--workdir", str(workdir), "--count", "4"]) == 0


def test_it_is_a_program_with_its_own_settings(workdir, capsys):
    assert main(["--help"]) == 0
    assert f"{'two-losses':<16}{TwoLosses.purpose}" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["two-losses", "--help"])
    assert "--class-weight" in capsys.readouterr().out
