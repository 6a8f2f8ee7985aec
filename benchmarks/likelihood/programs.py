"""``python -m train density``, without its files and pictures: configs of images, watched.

Both dequantisations bound the same likelihood, that of the discrete images.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import iresnet_jax as ir
from benchmarks.likelihood.cells import Cell
from benchmarks.likelihood.clock import Watch
from benchmarks.likelihood.layouts import image_config
from benchmarks.likelihood.methods import Options
from benchmarks.likelihood.problems import Bits, Problem, Split
from iresnet_jax.fitting import final_estimator
from iresnet_jax.nn import num_parameters
from train.configs import DensityConfig
from train.data import Dataset
from train.density import Density
from train.estimators import validation_estimator
from train.likelihood import examples_at_once
from train.parallel import fuse_loops_on_cpu
from train.short_training import set_up
from train.steps import example_keys

_OF_EVALUATION = 1_000_003  # added to the seed, as the programs do


def run(options: Options, cell: Cell, problem: Problem, watch: Watch) -> None:
    """Train for the config's steps, or until the seconds are over; then certify."""
    fuse_loops_on_cpu()
    config = config_of(options, cell)
    training = set_up(config, dataset_of(cell, problem))
    task, devices, state = training.task, training.devices, training.state
    watch.note(parameters=num_parameters({"params": devices.one(state).params}))
    evaluated = _Evaluated(task)
    for _ in range(config.steps):
        if watch.over:
            break
        state, _ = training.step(state, devices.split(next(training.batches)))
        now = partial(devices.one, state)
        watch.step(evaluated.quickly(now), partial(jax.block_until_ready, state))
    variables = task.functions.shipped_variables(devices.one(state))
    flow, certificate = task.functions.certified_flow(variables)
    jax.block_until_ready(flow)
    watch.finish(*evaluated.whole(variables, flow, certificate))


def config_of(options: Options, cell: Cell) -> DensityConfig:
    """Return the config of a cell: of its data set, with the schedule as long as is asked for."""
    config = image_config(cell.data)
    config = dataclasses.replace(
        config,
        dequantization=options["dequantization"],
        learning_rate=options["rate"] * config.learning_rate,
        steps=max(1, round(options["length"] * cell.share * config.steps)),
        seed=cell.seed,
    )
    if not cell.smoke:
        return config
    small = config.smoke_variant()
    return dataclasses.replace(small, smoke=False, max_examples=None)


def dataset_of(cell: Cell, problem: Problem) -> Dataset:
    """Return the problem's grey levels as the programs take them."""
    splits = (problem.train, problem.validation, problem.test)
    levels = [split.levels for split in splits]
    assert all(part is not None for part in levels)
    return Dataset(cell.data, *levels, num_levels=problem.num_levels)  # type: ignore[arg-type]


class _Evaluated:
    """Bits per dimension of a state, or of what is shipped; each function is compiled once."""

    def __init__(self, task: Density):
        self._task = task
        self._bits = jax.jit(task.bits, static_argnums=3)
        self._estimator = validation_estimator(task.config, task.dataset)

    def quickly(self, state: Any) -> Bits:
        """Of the averaged parameters as they would be shipped; without bias, but not certified."""

        def bits(split: Split) -> np.ndarray:
            variables = self._task.functions.shipped_variables(state())
            return self._of(variables, self._task.functions.flow(variables), split, self._estimator)

        return bits

    def whole(self, variables: Any, flow: ir.Flow, certificate: ir.Certificate) -> tuple[Bits, str]:
        """Of what is shipped: exact, or without bias and of a proved variance; and by what."""
        if isinstance(self._estimator, ir.Exact):
            return lambda split: self._of(variables, flow, split, self._estimator), "exact"
        estimator = final_estimator(max(certificate.lipschitz, default=0.0))
        return lambda split: self._of(variables, flow, split, estimator), estimator.describe()

    def _of(
        self, variables: Any, flow: ir.Flow, split: Split, estimator: ir.Estimator
    ) -> np.ndarray:
        """[draws, examples], of as many draws of the noise as the points have."""
        levels, params = split.levels, variables["params"]
        assert levels is not None
        seed = self._task.config.seed + _OF_EVALUATION
        size = min(examples_at_once(estimator, flow.dim), len(levels))
        draws = []
        for draw in range(len(split.points)):
            parts = []
            for start in range(0, len(levels), size):
                rows = np.minimum(np.arange(start, start + size), len(levels) - 1)
                keys = example_keys(seed, jnp.int32(draw), rows)
                with jax.default_matmul_precision("highest"):
                    found = self._bits(params, flow, levels[rows], estimator, keys)
                parts.append(np.asarray(found, np.float64))
            draws.append(np.concatenate(parts)[: len(levels)])
        return np.stack(draws)
