"""``ir.fit`` itself, watched: its training step is wrapped, and nothing of it is repeated here.

What is evaluated on the way is the network that it would ship, had training ended there.
"""

import unittest.mock
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

import iresnet_jax as ir
from benchmarks.likelihood.cells import Cell
from benchmarks.likelihood.clock import Watch
from benchmarks.likelihood.methods import Options
from benchmarks.likelihood.problems import Bits, Problem, in_parts
from iresnet_jax import fitting, fitting_models
from iresnet_jax.fitted import with_entrance
from iresnet_jax.nn import converge, num_parameters, shrink

_AT_ONCE, _FEW_AT_ONCE, _MANY_DIMENSIONS = 2000, 64, 64


def run(options: Options, cell: Cell, problem: Problem, watch: Watch) -> None:
    """Fit until the fit ends by itself, or the seconds are over: that is Ctrl-C to it."""
    train, validation = _data(problem, vectors=options.get("vectors", False))
    settings = {name: options[name] for name in ("learning_rate",) if name in options}
    if problem.num_levels is not None:
        settings["num_levels"] = problem.num_levels
    with unittest.mock.patch.object(fitting, "make_step", _watched(problem, watch)):
        fitted, _ = ir.fit(
            jax.random.key(cell.seed),
            _model(train.shape[1:], options),
            train,
            validation=validation,
            progress=False,
            **settings,
        )
    log_prob = jax.jit(lambda x: fitted.log_prob(x, ir.Exact()))
    watch.finish(_bits(problem, train.shape[1:], log_prob))


def _data(problem: Problem, *, vectors: bool) -> tuple[np.ndarray, np.ndarray]:
    """What is trained and validated on: grey levels of images, unless they are to be vectors."""
    parts = problem.train, problem.validation
    if problem.num_levels is None or vectors:
        return parts[0].points[0], parts[1].points[0]
    train, validation = (part.levels for part in parts)
    assert train is not None and validation is not None
    return train, validation


def _model(shape: tuple[int, ...], options: Options) -> Any:
    """None for the default model, or one of its layout with other widths."""
    if "features" not in options:
        return None
    default = fitting_models.default_model(shape)
    width = options["features"]
    return default.clone(features=(width, width) if len(shape) == 1 else width)


def _watched(problem: Problem, watch: Watch) -> Callable[..., Any]:
    make_step = fitting.make_step

    def make(model: Any, optimizer: Any, estimator: Any, data: Any, ema_decay: float) -> Any:
        step = make_step(model, optimizer, estimator, data, ema_decay)
        converged = jax.jit(partial(converge, model))

        @jax.jit
        def log_prob(variables: Any, x: Any) -> Any:
            return with_entrance(model.flow(variables), data.entrance).log_prob(x, ir.Exact())

        def bits_of(variables: Any) -> Bits:
            shape = data.event_shape

            def bits(split: Any) -> np.ndarray:
                shipped = shrink(model, converged(variables))
                return _bits(problem, shape, partial(log_prob, shipped))(split)

            return bits

        first = True

        def watched(state: Any, indices: Any, key: Any) -> Any:
            nonlocal first
            if first:
                watch.note(parameters=num_parameters(state.variables))
            elif watch.over:
                raise KeyboardInterrupt
            first = False
            state, loss = step(state, indices, key)
            watch.step(bits_of(state.averaged), partial(jax.block_until_ready, state))
            return state, loss

        return watched

    return make


def _bits(problem: Problem, shape: tuple[int, ...], log_prob: Callable[[Any], Any]) -> Bits:
    size = _AT_ONCE if problem.dim < _MANY_DIMENSIONS else _FEW_AT_ONCE

    def of_points(points: np.ndarray) -> np.ndarray:
        return in_parts(lambda x: log_prob(x.reshape(-1, *shape)), points, size)

    return problem.bits_of(of_points)
