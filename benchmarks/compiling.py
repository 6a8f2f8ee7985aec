"""Time to the first training step: cold, and with the persistent cache, against depth."""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import ours
from benchmarks.specs import SPECS
from benchmarks.training import REMAT, Remat
from train.parallel import cpu_devices_for, use_cpu_devices


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compile:
    """Time to compile the training step, each measurement in a process of its own."""

    config: str = "D2"
    """See benchmarks/specs.py."""
    terms: int = 5
    """Of the log-determinant's series."""
    depths: tuple[int, ...] = (1, 3)
    """Multiples of the config's depth to measure."""
    remat: Remat = "default"
    """Whether blocks are recomputed in the backward pass; default: where densities are trained."""
    rounds: int = 5
    """Turns of all depths; the figures are their medians."""
    json: Path | None = None
    """Where the result goes, beside the terminal."""


def run(options: Compile) -> dict[str, Any]:
    """Seconds to trace and compile the step, cold and cached, for each depth."""
    turns = [
        [_cold_and_cached(options, depth) for depth in options.depths]
        for _ in range(options.rounds)
    ]
    rows = [
        {"depth": depth, **{kind: _medians([pair[kind] for pair in pairs]) for kind in pairs[0]}}
        for depth, pairs in zip(options.depths, zip(*turns, strict=True), strict=True)
    ]
    ratios = [turn[-1]["cold"]["seconds"] / turn[0]["cold"]["seconds"] for turn in turns]
    return {"compile": rows, "deepest_over_first": float(np.median(ratios)), "turns": turns}


def _cold_and_cached(options: Compile, depth: int) -> dict[str, dict[str, float]]:
    """What :func:`measure` finds in a process without, then in one with a compilation cache."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {
            **os.environ,
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        arguments = [options.config, str(options.terms), str(depth), options.remat]
        command = [sys.executable, "-m", "benchmarks.compiling", *arguments]
        found = {}
        for kind in ("cold", "cached"):
            done = subprocess.run(
                command, check=True, stdout=subprocess.PIPE, text=True, env=environment
            )
            found[kind] = json.loads(done.stdout.splitlines()[-1])
        return found


def _medians(results: list[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.median([result[name] for result in results])) for name in results[0]}


def measure(config: str, terms: int, depth: int, remat: str) -> dict[str, float]:
    """Seconds from the step as a Python function to the step compiled, in this process."""
    spec = SPECS[config].deeper(depth)
    lower = ours.step_to_lower(spec, terms, remat=REMAT[remat])
    started = time.perf_counter()
    lowered = lower()
    traced = time.perf_counter()
    lowered.compile()
    ended = time.perf_counter()
    return {"seconds": ended - started, "tracing": traced - started, "xla": ended - traced}


if __name__ == "__main__":
    _config, _terms, _depth, _remat = sys.argv[1:]
    use_cpu_devices(cpu_devices_for(SPECS[_config].batch))
    jax.block_until_ready(jax.numpy.zeros(1) + np.float32(1))
    print(json.dumps(measure(_config, int(_terms), int(_depth), _remat)))
