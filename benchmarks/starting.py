"""Time from a command's start to ``--help``, to the first training step, and to the first sample.

Cold: the files are not in memory, where the system lets them be dropped, and nothing is compiled.
Warm: as it was the time before.
"""

import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

_Start = Callable[[Mapping[str, str]], float]

HELP = "python -m train --help"
_SAMPLE = """
import jax
import iresnet_jax as ir
jax.block_until_ready(ir.load("digits").sample(jax.random.key(0), 16))
"""
DIGITS_SAMPLED = 'ir.load("digits"), 16 samples'
_DROP = Path("/proc/sys/vm/drop_caches")
_PATIENCE = 600.0  # seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """Seconds until a command shows something, cold and warm, each in a process of its own."""

    programs: tuple[str, ...] = (
        "density --dataset digits",
        "density --dataset checkerboard",
        "classification --dataset digits",
    )
    """Arguments of ``python -m train``, whose first step is waited for."""
    rounds: int = 3
    """Warm starts; the figure is their median."""
    json: Path | None = None
    """Where the result goes, beside the terminal."""


def run(options: Start) -> dict[str, Any]:
    """Seconds of each start, and whether the files could be dropped from memory."""
    if options.rounds < 1:
        raise SystemExit(f"rounds must be ≥ 1; got {options.rounds}.")
    starts: dict[str, _Start] = {
        HELP: partial(_until_end, ["-m", "train", "--help"]),
        "python -m train density --help": partial(_until_end, ["-m", "train", "density", "--help"]),
        "import iresnet_jax": partial(_until_end, ["-c", "import iresnet_jax"]),
        DIGITS_SAMPLED: partial(_until_end, ["-c", _SAMPLE]),
        **{f"first step of {p}": partial(_until_first_step, p.split()) for p in options.programs},
    }
    rows = [
        {"what": what, **_cold_and_warm(start, options.rounds)} for what, start in starts.items()
    ]
    return {"starts": rows, "files_dropped": os.access(_DROP, os.W_OK)}


def _cold_and_warm(start: _Start, rounds: int) -> dict[str, float | list[float]]:
    with tempfile.TemporaryDirectory() as cache:
        environment = {
            **os.environ,
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        _drop_files()
        cold = start(environment)
        warm = [start(environment) for _ in range(rounds)]
    return {"cold": cold, "warm": statistics.median(warm), "each": warm}


def _drop_files() -> None:
    """Drop what memory holds of files, where this user may."""
    if os.access(_DROP, os.W_OK):
        os.sync()
        _DROP.write_text("3")


def _until_end(arguments: list[str], environment: Mapping[str, str]) -> float:
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, *arguments], env=environment, stdout=subprocess.DEVNULL, check=True
    )
    return time.perf_counter() - started


def _until_first_step(program: list[str], environment: Mapping[str, str]) -> float:
    """Until the metrics of the first step are on disk; the run is then killed."""
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder) / "run"
        command = [sys.executable, "-m", "train", *program, "--workdir", str(workdir)]
        started = time.perf_counter()
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            try:
                while not _written(workdir / "metrics.jsonl"):
                    if process.poll() is not None or time.perf_counter() - started > _PATIENCE:
                        raise SystemExit(f"{' '.join(command)} took no step.")
                    time.sleep(0.01)
                return time.perf_counter() - started
            finally:
                process.kill()


def _written(file: Path) -> bool:
    return file.exists() and file.stat().st_size > 0
