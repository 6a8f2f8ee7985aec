"""Kill a small run at fifty random moments, resume it, and compare it with one left alone.

``python tests/kill_fifty.py [--kills 50] [--seed 0]`` takes a process start for each kill, so it is
no test that pytest collects. It prints how many kills fell into a save, and ends with 1 where the
parameters, or what was logged, are not the same bit for bit.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_ARGUMENTS = [
    *("density", "--dataset", "moons", "--depths", "1", "--features", "4", "--batch-size", "32"),
    *("--steps", "20000", "--checkpoint-every", "20", "--validate-every", "5000"),
    *("--max-examples", "200", "--num-reconstructed", "16", "--num-samples", "16"),
]
_LONGEST = 2.0  # seconds from the first new checkpoint to a kill, at most
_SAVING = "*.orbax-checkpoint-tmp*"


def main() -> int:
    """Run the program; return 1 where a killed run ended otherwise than one left alone."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        killed, saving = Path(folder) / "killed", 0
        for kill in range(1, options.kills + 1):
            saving += _kill(killed, rng)
            print(f"kill {kill}: at step {_newest(killed)}, {saving} in a save so far", flush=True)
        steps = _newest(killed) + 20
        for workdir in (killed, Path(folder) / "whole"):
            _start(workdir, steps).wait()
        return int(not _same(killed, Path(folder) / "whole"))


def _start(workdir: Path, steps: int | None = None) -> subprocess.Popen:
    """Start the run; the learning rate is constant, so that fewer steps are the start of more."""
    last = ["--steps", str(steps)] if steps else []
    command = [sys.executable, "-m", "train", *_ARGUMENTS, "--schedule", "constant", *last]
    return subprocess.Popen(
        [*command, "--workdir", str(workdir)],
        cwd=Path(__file__).parents[1],
        env=os.environ,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _kill(workdir: Path, rng: random.Random) -> bool:
    """Kill the run some time after it saved something new; return whether that cut off a save."""
    before, unfinished, process = _newest(workdir), _unfinished(workdir), _start(workdir)
    while _newest(workdir) <= before:
        if process.poll() is not None:
            raise SystemExit(f"The run ended by itself, with status {process.returncode}.")
        time.sleep(0.01)
    time.sleep(rng.uniform(0.0, _LONGEST))
    process.send_signal(signal.SIGKILL)
    process.wait()
    return bool(_unfinished(workdir) - unfinished)


def _newest(workdir: Path) -> int:
    return max(
        (int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit()), default=0
    )


def _unfinished(workdir: Path) -> set[Path]:
    return set((workdir / "checkpoints").glob(_SAVING))


def _same(killed: Path, whole: Path) -> bool:
    """Compare the last parameters and results, and the losses that were logged, bit for bit."""
    reports = [json.loads((workdir / "report.json").read_text()) for workdir in (killed, whole)]
    names = ("steps", "parameters_sha256", "bits_per_dim")
    results = [[report[name] for name in names] for report in reports]
    losses = [_losses(workdir) for workdir in (killed, whole)]
    common = losses[0].keys() & losses[1].keys()
    logged = all(losses[0][step] == losses[1][step] for step in common)
    print(f"killed: {results[0]}\nwhole:  {results[1]}\n{len(common)} losses, the same: {logged}")
    return results[0] == results[1] and logged


def _losses(workdir: Path) -> dict[int, float]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return {r["step"]: r["loss"] for r in map(json.loads, lines) if "loss" in r}


if __name__ == "__main__":
    sys.exit(main())
