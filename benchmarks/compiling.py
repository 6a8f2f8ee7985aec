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
    json: Path | None = None
    """Where the result goes, beside the terminal."""


def run(options: Compile) -> dict[str, Any]:
    """Seconds to trace and compile the step, cold and cached, for each depth."""
    rows = []
    for depth in options.depths:
        with tempfile.TemporaryDirectory() as cache:
            environment = {
                **os.environ,
                "JAX_COMPILATION_CACHE_DIR": cache,
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            }
            arguments = [options.config, str(options.terms), str(depth), options.remat]
            cold, cached = (
                json.loads(
                    subprocess.run(
                        [sys.executable, "-m", "benchmarks.compiling", *arguments],
                        check=True,
                        capture_output=True,
                        text=True,
                        env=environment,
                    ).stdout.splitlines()[-1]
                )
                for _ in range(2)
            )
        rows.append({"depth": depth, "cold": cold, "cached": cached})
    times = [row["cold"]["seconds"] for row in rows]
    return {"compile": rows, "deepest_over_first": times[-1] / times[0]}


def measure(config: str, terms: int, depth: int, remat: str) -> dict[str, float]:
    """Seconds from the step as a Python function to the step compiled, in this process."""
    spec = SPECS[config].deeper(depth)
    lower, options = ours.step_to_lower(spec, terms, remat=REMAT[remat])
    started = time.perf_counter()
    lowered = lower()
    traced = time.perf_counter()
    lowered.compile(options)
    ended = time.perf_counter()
    return {"seconds": ended - started, "tracing": traced - started, "xla": ended - traced}


if __name__ == "__main__":
    _config, _terms, _depth, _remat = sys.argv[1:]
    use_cpu_devices(cpu_devices_for(SPECS[_config].batch))
    jax.block_until_ready(jax.numpy.zeros(1) + np.float32(1))
    print(json.dumps(measure(_config, int(_terms), int(_depth), _remat)))
