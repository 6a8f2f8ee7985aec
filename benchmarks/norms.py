"""Certificates on the host, and power iterations of all layers."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import ours
from benchmarks.specs import SPECS
from benchmarks.timing import alternate, seconds
from iresnet_jax import certify


@dataclasses.dataclass(frozen=True, kw_only=True)
class Certify:
    """Rigorous bounds of every layer and block of a network."""

    config: str = "D2"
    """See benchmarks/specs.py."""
    rounds: int = 3
    """Repetitions."""
    json: Path | None = None
    """Where the result goes, beside the terminal."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PowerIteration:
    """Collecting the constrained weights: power iterations of all layers, and their scaling."""

    config: str = "D2"
    """See benchmarks/specs.py."""
    steps: int = 1
    """Power-iteration steps."""
    rounds: int = 20
    """Repetitions."""
    json: Path | None = None
    """Where the result goes, beside the terminal."""


def run_certify(options: Certify) -> dict[str, Any]:
    """Seconds for a whole network, and for one of its layers on average."""
    spec = SPECS[options.config]
    model = ours.build_model(spec)
    flow = jax.block_until_ready(jax.jit(model.flow)(_variables(model, spec)))
    taken = [seconds(lambda: certify(flow)) for _ in range(options.rounds)]
    middle = float(np.median(taken))
    return {"seconds": middle, "seconds_per_layer": middle / (3 * sum(spec.depths))}


def run_power_iteration(options: PowerIteration) -> dict[str, Any]:
    """Seconds to collect the weights with this many steps, and without any."""
    spec = SPECS[options.config]
    variables = _variables(ours.build_model(spec), spec)
    taken = alternate(
        {
            "advanced": _collect(spec, variables, options.steps),
            "kept": _collect(spec, variables, 0),
        },
        options.rounds,
    )
    advanced, kept = (float(np.median(taken[name])) for name in ("advanced", "kept"))
    return {"seconds": advanced, "seconds_without": kept, "layers": 3 * sum(spec.depths)}


def _variables(model: Any, spec: Any) -> Any:
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    images = ours.random_batch(spec)[0].astype(np.float32) / 256.0
    return jax.jit(model.init, compiler_options=options)(jax.random.key(0), images)


def _collect(spec: Any, variables: Any, num_steps: int) -> Any:
    model = ours.build_model(dataclasses.replace(spec, power_steps=num_steps))
    collect = jax.jit(model.advance)
    return lambda: jax.block_until_ready(collect(variables))
