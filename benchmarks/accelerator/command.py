"""The command: items in turn, each in a process of its own, within the minutes that are given."""

import argparse
import importlib.util
import math
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.accelerator.child import ITEMS
from benchmarks.accelerator.records import COMPLETE, read, shown
from benchmarks.accelerator.settings import Settings

#: Item -> most seconds that it may take, most important first; training runs only by name.
SECONDS: Mapping[str, float] = {
    "rates": 60.0,
    "density": 240.0,
    "torch-density": 240.0,
    "numerics": 240.0,
    "classification": 180.0,
    "torch-classification": 180.0,
    "inverse": 180.0,
    "torch-inverse": 60.0,
    "density-otherwise": 240.0,
    "torch-density-otherwise": 240.0,
}
#: The file in the output folder that holds the size of what is measured.
_SIZE = "size.txt"
#: Items that train -> the option that names their file.
_DATA = {"mnist-rate": "mnist", "train-mnist": "mnist", "train-cifar10": "cifar10"}
_OPTIONAL = {
    "tyro": "options are read by argparse",
    "grain": "NumPy shuffles the batches",
    "tensorflow_datasets": "images come from .npz files",
    "tensorboardX": "no TensorBoard",
    "torch": "nothing is compared",
    "pytest": "the records of the authors' code are not compared",
}


def main(arguments: Sequence[str]) -> int:
    """Measure what is asked for and not measured yet; 1 if anything failed or does not hold."""
    parser = _parser()
    options = parser.parse_args(list(arguments))
    for item in options.only or ():
        if item in _DATA and not _is_file(getattr(options, _DATA[item])):
            parser.error(f"{item} needs --{_DATA[item]} FILE.npz, a file that exists.")
    settings = _settings(options)
    settings.out.mkdir(parents=True, exist_ok=True)
    if (size := _size_before(settings)) != settings.size:
        print(
            f"error: {settings.out} has results of --size {size}: choose another.", file=sys.stderr
        )
        return 2
    _tell_missing()
    ends = time.monotonic() + 60.0 * settings.minutes
    for item in options.only or [name for name in SECONDS if _possible(name)]:
        seconds = _allowed(item, ends)
        if COMPLETE in read(settings.out / f"{item}.json"):
            print(f"{item}: measured before", flush=True)
        elif seconds > 0.0:
            _measure(item, settings, seconds)
    items = [name for name in ITEMS if (settings.out / f"{name}.json").exists()]
    table = markdown(settings.out, items)
    (settings.out / "table.md").write_text(table, encoding="utf-8")
    print(f"\n{table}")
    return int(any(_failed(settings.out, item) for item in options.only or items))


def _is_file(path: Path | None) -> bool:
    return path is not None and path.is_file()


def _size_before(settings: Settings) -> str:
    """The size of the results in the folder, which names it from its first run on."""
    path = settings.out / _SIZE
    if not path.exists():
        path.write_text(settings.size, encoding="utf-8")
    return path.read_text(encoding="utf-8")


def _allowed(item: str, ends: float) -> float:
    """Seconds for an item; a training run takes its minutes for its steps, and ends by itself."""
    return min(ends - time.monotonic(), SECONDS[item]) if item in SECONDS else math.inf


def markdown(out: Path, items: Sequence[str]) -> str:
    """Every figure found so far, one row a part."""
    lines = ["| item | part | figures |", "| --- | --- | --- |"]
    for item in items:
        for part, figures in read(out / f"{item}.json").items():
            if part != COMPLETE:
                told = ", ".join(f"{k.replace('_', ' ')} {shown(v)}" for k, v in figures.items())
                lines.append(f"| {item} | {part} | {told} |")
    return "\n".join(lines) + "\n"


def _measure(item: str, settings: Settings, seconds: float) -> None:
    """Run an item; its output goes to a log and to the terminal."""
    print(f"{item}:", flush=True)
    command = [sys.executable, "-m", "benchmarks.accelerator.child", item, settings.to_json()]
    log = settings.out / f"{item}.log"
    started = time.monotonic()
    with log.open("a", encoding="utf-8") as file:
        limit = seconds if math.isfinite(seconds) else None
        try:
            code = subprocess.run(command, stdout=file, stderr=file, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            code = None
    for part, figures in read(settings.out / f"{item}.json").items():
        if part != COMPLETE:
            print(f"  {part}: " + ", ".join(f"{k} {shown(v)}" for k, v in figures.items()))
    ended = {None: "stopped, its time was over", 0: "done"}.get(code, f"failed, see {log.name}")
    print(f"  {ended}, after {time.monotonic() - started:.0f} s", flush=True)
    if code not in (0, None):
        print("  " + "\n  ".join(log.read_text(encoding="utf-8").splitlines()[-5:]), flush=True)


def _failed(out: Path, item: str) -> bool:
    parts = read(out / f"{item}.json")
    broken = any(not part.get("holds", True) or "error" in part for part in parts.values())
    return COMPLETE not in parts or broken


def _possible(item: str) -> bool:
    return not item.startswith("torch-") or importlib.util.find_spec("torch") is not None


def _tell_missing() -> None:
    for package, instead in _OPTIONAL.items():
        if importlib.util.find_spec(package) is None:
            print(f"{package} is not installed: {instead}.")


def _settings(options: argparse.Namespace) -> Settings:
    return Settings(
        out=options.out.resolve(),
        size=options.size,
        minutes=options.minutes,
        mnist=options.mnist and options.mnist.resolve(),
        cifar10=options.cifar10 and options.cifar10.resolve(),
        golden=options.golden and options.golden.resolve(),
        torch_batch=options.torch_batch,
    )


def _minutes(text: str) -> float:
    minutes = float(text)
    if not 0.0 <= minutes < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number ≥ 0; got {text}")
    return minutes


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks accelerator",
        description="Measure one machine with one accelerator; the same command resumes.",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument(
        "--minutes", type=_minutes, default=8.0, help="for all; of train-…, for the steps"
    )
    parser.add_argument("--only", nargs="+", choices=list(ITEMS), help="these items alone")
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="tiny: for a CPU")
    parser.add_argument("--mnist", type=Path, help=".npz file for train-mnist")
    parser.add_argument("--cifar10", type=Path, help=".npz file for train-cifar10")
    parser.add_argument("--golden", type=Path, help="folder of the records of the authors' code")
    parser.add_argument("--torch-batch", type=int, help="largest batch to try in PyTorch")
    return parser
