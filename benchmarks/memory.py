"""Peak memory of a training step, each measurement in a process of its own.

On CPU: the process's peak resident size after three steps, above its size once everything is
imported; ours after a warm compilation cache. On a GPU: the peak that its allocator reports.
"""

import dataclasses
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import jax

from benchmarks import ours
from benchmarks.specs import SPECS
from train.parallel import cpu_devices_for, use_cpu_devices

Who = Literal["ours", "ours-keeping", "torch", "normflows"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Peak memory of a training step against terms and depth, beside the peers."""

    config: str = "D2"
    """See benchmarks/specs.py."""
    terms: tuple[int, ...] = (5,)
    """Numbers of terms to measure."""
    depths: tuple[int, ...] = (1,)
    """Multiples of the config's depth to measure."""
    who: tuple[Who, ...] = ("ours", "ours-keeping", "torch")
    """Whom to measure; ours recomputes blocks in the backward pass, unless it keeps their products
    (--no-remat)."""
    json: Path | None = None
    """Where the result goes, beside the terminal."""


def run(options: Memory) -> dict[str, Any]:
    """Megabytes of everyone asked for, and the peers' over ours for the first setting."""
    rows = []
    for depth in options.depths:
        for terms in options.terms:
            row: dict[str, Any] = {"depth": depth, "terms": terms}
            for who in options.who:
                measure = ["-m", "benchmarks.memory", options.config, str(terms), str(depth), who]
                if who.startswith("ours"):
                    _output(measure)  # compiles
                row[who] = _output(measure)
            rows.append(row)
    first = rows[0]
    result: dict[str, Any] = {"megabytes": rows}
    if "ours" in first:
        peers = [who for who in options.who if not who.startswith("ours")]
        for who in peers:
            result[f"ratio_{who}"] = first[who]["peak"] / first["ours"]["peak"]
        result["ratio"] = result.get("ratio_torch")
    return result


def _output(command: list[str]) -> dict[str, float]:
    done = subprocess.run([sys.executable, *command], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(config: str, terms: int, depth: int, who: Who) -> dict[str, float]:
    """Megabytes above imports at the peak of three steps, in this process."""
    spec = SPECS[config].deeper(depth)
    found: dict[str, float] = {}
    if who.startswith("ours"):
        from benchmarks.__main__ import keep_compiled

        keep_compiled()
        use_cpu_devices(cpu_devices_for(spec.batch))
        jax.block_until_ready(jax.numpy.zeros(1) + 1)
        before = _resident()
        training = ours.Training(spec, terms, remat=who == "ours")
        step = training.step
    else:
        import torch

        from benchmarks import normflows_peer, torch_peer

        torch.zeros(1).add_(1)
        before = _resident()
        batch = ours.random_batch(spec)
        if who == "normflows":
            step = normflows_peer.Training(spec, batch[0], terms).step
        else:
            step = torch_peer.Training(spec, stand_in_variables(spec), batch, terms).step
    for _ in range(3):
        step()
    stats = jax.devices()[0].memory_stats() if who.startswith("ours") else None
    peak = stats["peak_bytes_in_use"] / 1e6 if stats else _peak() - before
    if who.startswith("ours"):
        found["temporaries"] = training.temporary_bytes() / 1e6
    return {"peak": peak, **found}


def stand_in_variables(spec: Any) -> Any:
    """Variables of the right shapes without running the library: tiny kernels, unit vectors."""
    model = ours.build_model(spec)
    image = jax.ShapeDtypeStruct((1, *spec.image_shape), "float32")
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)
    return jax.tree.map(lambda leaf: ours.fixed_probe(leaf.shape) * 0.01, shapes)


def _resident() -> float:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 1e6


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


if __name__ == "__main__":
    _config, _terms, _depth, _who = sys.argv[1:]
    print(json.dumps(measure(_config, int(_terms), int(_depth), _who)))  # type: ignore[arg-type]
