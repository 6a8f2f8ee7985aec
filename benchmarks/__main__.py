"""``python -m benchmarks NAME …``: one benchmark alone, to the terminal and to JSON; or all."""

import dataclasses
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks import (
    compiling,
    data,
    estimators,
    inversion,
    memory,
    norms,
    report,
    roofline,
    starting,
    training,
)
from benchmarks.accelerator import command as accelerator
from benchmarks.likelihood import command as likelihood
from benchmarks.tpu import command as tpu
from train.failures import reason
from train.parallel import fuse_loops_on_cpu

#: Name -> its options, and what measures.
BENCHMARKS: dict[str, tuple[type, Callable[[Any], dict[str, Any]]]] = {
    "train": (training.Train, training.run),
    "memory": (memory.Memory, memory.run),
    "compile": (compiling.Compile, compiling.run),
    "inverse": (inversion.Inverse, inversion.run_inverse),
    "sample": (inversion.Sample, inversion.run_sample),
    "certify": (norms.Certify, norms.run_certify),
    "power-iteration": (norms.PowerIteration, norms.run_power_iteration),
    "data": (data.Data, data.run),
    "roofline": (roofline.Roofline, roofline.run),
    "start": (starting.Start, starting.run),
    "estimators": (estimators.Estimators, estimators.run),
    "all": (report.All, report.run),
}

#: These read their own arguments, and write into a folder.
_COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "accelerator": accelerator.main,
    "tpu": tpu.main,
    "to-likelihood": likelihood.main,
}

#: These fuse loops, as training does, and what they start inherits it; ``all`` leaves it to each.
_TRAINING = ("train", "memory", "compile", "power-iteration", "data", "roofline", "estimators")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a benchmark; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    name, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if name in _COMMANDS:
        return _in_folder(_COMMANDS[name], rest)
    if name not in BENCHMARKS:
        names = ",".join((*BENCHMARKS, *_COMMANDS))
        print(f"usage: python -m benchmarks {{{names}}} [--help] …", file=sys.stderr)
        return 0 if name in ("-h", "--help") else 2
    import tyro  # which the commands do without

    options_type, measure = BENCHMARKS[name]
    options: Any = tyro.cli(options_type, args=rest, prog=f"python -m benchmarks {name}")
    if name in _TRAINING:
        fuse_loops_on_cpu()
    keep_compiled()
    try:
        result = {"benchmark": name, **_settings(options), **measure(options), **_machine()}
    except ImportError as error:
        print(f"error: {error}. Install the extra: pip install -e '.[bench]'", file=sys.stderr)
        return 2
    if name == "all":
        return 1 if result["failed"] else 0
    text = json.dumps(result, indent=2)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n", encoding="utf-8")
    return 0


def _in_folder(command: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    try:
        return command(arguments)
    except BrokenPipeError:
        raise
    except OSError as error:
        print(f"error: {reason(error)}", file=sys.stderr)
        return 2


def keep_compiled() -> None:
    """As ``python -m train`` does: a benchmark repeated starts at once."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(Path(".jax_cache").resolve()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def _settings(options: Any) -> dict[str, Any]:
    values = dataclasses.asdict(options)
    return {key: value for key, value in values.items() if isinstance(value, (str, int, float))}


def _machine() -> dict[str, Any]:
    return {
        "device": jax.devices()[0].device_kind,
        "cores": len(os.sched_getaffinity(0)),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


if __name__ == "__main__":
    sys.exit(main())
