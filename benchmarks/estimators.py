"""Noise and cost of log-determinant estimators on a trained flow, in value and in gradient.

Of a run by ``python -m train density``: for each estimator the bias of the value, its noise, and
the noise of the gradient of a batch's loss, beside the noise that the choice of the batch brings
and beside the seconds of a gradient. What an estimator costs in training is variance times time.
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from iresnet_jax import Estimator, Exact, Roulette, TruncatedSeries, bits_per_dim
from train.density import Density
from train.parallel import use_cpu_devices
from train.saved import load_run
from train.steps import example_keys

_SEED = 77


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimators:
    """Compare estimators on the network of a run."""

    workdir: Path
    """Folder of a finished density run, of few enough dimensions for exact log-determinants."""
    batch: int = 64
    """Images in the batch whose gradient is taken."""
    draws: int = 24
    """Draws of each estimator's noise, ≥ 2."""
    json: Path | None = None
    """Where the result goes, beside the terminal."""


def candidates() -> dict[str, Estimator]:
    """Return what is compared, by name."""
    found: dict[str, Estimator] = {
        f"series, {n} terms": TruncatedSeries(n) for n in (3, 5, 8, 10, 20)
    }
    for terms, q in ((2, 0.5), (4, 0.5), (4, 0.6), (4, 0.7), (4, 0.8), (8, 0.7)):
        for shared in (True, False):
            whose = "one length a batch" if shared else "a length a sample"
            name = f"roulette, {terms} + {q / (1 - q):.1f} terms, {whose}"
            found[name] = Roulette(q, lipschitz=None, min_terms=terms, shared_length=shared)
    return found


def run(options: Estimators) -> dict[str, Any]:
    """Measure every estimator on one batch with one draw of uniform dequantisation.

    Raises:
      ValueError: for fewer than two draws, which have no spread; for a run without a density.
    """
    if options.draws < 2:
        raise ValueError(f"--draws must be ≥ 2; got {options.draws}.")
    use_cpu_devices(1)
    saved = load_run(options.workdir, "newest")
    if not isinstance(saved.task, Density):
        raise ValueError(f"--workdir {options.workdir} holds a classifier: it has no density.")
    task, variables = saved.task, saved.functions.shipped_variables(saved.state)
    batches = [_inputs(task, options.batch, draw) for draw in range(options.draws)]

    def loss(params: Any, x: Any, keys: Any, estimator: Estimator) -> jax.Array:
        flow, _ = task.model.advance({**variables, "params": params})
        return jnp.mean(bits_per_dim(flow.log_prob(x, estimator, key=keys), flow.dim))

    value_and_grad = jax.jit(jax.value_and_grad(loss), static_argnums=3)
    measure = partial(_measured, value_and_grad, variables["params"])
    keys = [_probe_keys(options.batch, draw) for draw in range(options.draws)]
    exact = measure(Exact(), batches[:1], keys[:1])
    of_batches = measure(Exact(), batches, keys)
    rows: list[dict[str, Any]] = [{"estimator": "exact", **_row(exact, exact)}]
    rows.append({"estimator": "exact, batches drawn anew", **_row(of_batches, exact)})
    for name, estimator in candidates().items():
        found = measure(estimator, batches[:1] * options.draws, keys)
        rows.append({"estimator": name, **_row(found, exact)})
        print(json.dumps(rows[-1]), flush=True)
    return {"dim": saved.dataset.dim, "rows": rows}


@dataclasses.dataclass(frozen=True)
class Measured:
    """Losses [draws], gradients [draws, parameters], and seconds of one."""

    losses: np.ndarray
    gradients: np.ndarray
    seconds: float


def _measured(
    value_and_grad: Callable[..., Any], params: Any, estimator: Estimator, batches: Any, keys: Any
) -> Measured:
    losses, gradients, taken = [], [], []
    jax.block_until_ready(value_and_grad(params, batches[0], keys[0], estimator))
    for batch, key in zip(batches, keys, strict=True):
        started = time.perf_counter()
        value, gradient = jax.block_until_ready(value_and_grad(params, batch, key, estimator))
        taken.append(time.perf_counter() - started)
        losses.append(float(value))
        gradients.append(np.asarray(ravel_pytree(gradient)[0], np.float64))
    return Measured(np.array(losses), np.array(gradients), float(np.mean(taken)))


def _row(found: Measured, exact: Measured) -> dict[str, float]:
    """Bias and noise in bits/dim; the gradient's noise and bias over the exact gradient's norm."""
    size = float(np.linalg.norm(exact.gradients[0]))
    mean, many = found.gradients.mean(0), len(found.losses)
    noise = found.gradients.var(0, ddof=1).sum() ** 0.5 if many > 1 else 0.0
    off = np.sum((mean - exact.gradients[0]) ** 2) - noise**2 / many
    return {
        "bias": float(found.losses.mean() - exact.losses[0]),
        "bias_stderr": float(found.losses.std(ddof=1) / many**0.5) if many > 1 else 0.0,
        "noise": float(found.losses.std(ddof=1)) if many > 1 else 0.0,
        "gradient_noise": noise / size,
        "gradient_bias": math.sqrt(max(off, 0.0)) / size,
        "seconds": found.seconds,
        "gradient_variance_seconds": (noise / size) ** 2 * found.seconds,
    }


def _inputs(task: Any, batch: int, draw: int) -> jax.Array:
    """Training examples, dequantised, as the flow takes them."""
    train = task.dataset.train
    picked = np.random.default_rng((_SEED, draw)).choice(len(train), batch, replace=False)
    keys = example_keys(_SEED, jnp.int32(draw), jnp.arange(batch))
    x: jax.Array = task.noisy(jnp.asarray(train[picked]), keys)
    return x


def _probe_keys(batch: int, draw: int) -> jax.Array:
    return example_keys(_SEED + 1, jnp.int32(draw), jnp.arange(batch))
