"""The same training steps in PyTorch, eager and compiled, and its inverse."""

import dataclasses
import itertools
import time
from collections.abc import Sequence

import torch

from benchmarks import memory, ours, torch_peer
from benchmarks.accelerator.records import Figures, Record
from benchmarks.accelerator.settings import Settings
from benchmarks.accelerator.steps import TERMS, median_seconds
from benchmarks.specs import Spec

_PRECISIONS = ("bfloat16", "tensorfloat32", "float32")
_PLAIN_STEPS = 100


def density(record: Record, settings: Settings) -> None:
    """The density model in bfloat16, at the largest batch, halved from ours, that fits."""
    _measure(record, settings, settings.density, _PRECISIONS[:1])


def density_otherwise(record: Record, settings: Settings) -> None:
    """The same in other precisions."""
    _measure(record, settings, settings.density, _PRECISIONS[1:])


def classification(record: Record, settings: Settings) -> None:
    """The classifier."""
    _measure(record, settings, settings.classification, _PRECISIONS)


def inverse(record: Record, settings: Settings) -> None:
    """A batch of latents to images, by 100 plain steps a block, as the authors invert."""
    spec = dataclasses.replace(settings.density, power_steps=0)
    _set_precision("float32")
    network = torch_peer.Network(spec, memory.stand_in_variables(spec)).to(_device())
    height, width, channels = spec.scale_shapes()[-1]
    z = torch.randn(spec.batch, channels, height, width, device=_device())
    z = z.contiguous(memory_format=torch.channels_last)
    steps = 2 if settings.tiny else _PLAIN_STEPS
    network.inverse(z, 1)
    _wait()
    started = time.perf_counter()
    network.inverse(z, steps)
    _wait()
    taken = time.perf_counter() - started
    record.add("100 plain steps", images_per_second=spec.batch / taken, seconds=taken)


def _measure(record: Record, settings: Settings, spec: Spec, precisions: Sequence[str]) -> None:
    for precision, compiled in itertools.product(precisions, (True, False)):
        name = f"{precision}, {'compiled' if compiled else 'eager'}"
        if name not in record:
            record.add(name, **_largest_that_fits(spec, precision, compiled, settings))


def _largest_that_fits(spec: Spec, precision: str, compiled: bool, settings: Settings) -> Figures:
    largest = min(spec.batch, settings.torch_batch or spec.batch)
    for halvings in range(5):
        smaller = dataclasses.replace(spec, batch=largest >> halvings)
        try:
            return _variant(smaller, precision, compiled, settings)
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
        except Exception as error:  # whatever a compiler raises
            return {"error": f"{type(error).__name__}: {[*str(error).splitlines(), ''][0]}"}
    return {"error": f"out of memory at a batch of {largest >> 4}"}


def _variant(spec: Spec, precision: str, compiled: bool, settings: Settings) -> Figures:
    _set_precision(precision)
    torch._dynamo.reset()
    training = torch_peer.Training(
        spec,
        memory.stand_in_variables(spec),
        ours.random_batch(spec),
        TERMS,
        device=_device(),
        autocast=torch.bfloat16 if precision == "bfloat16" else None,
        compiled=compiled,
    )
    if _device() == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    training.run(1)
    first = time.perf_counter() - started
    taken = median_seconds(training.run, settings)
    peak = torch.cuda.max_memory_allocated() / 1e6 if _device() == "cuda" else 0.0
    return {
        "images_per_second": spec.batch / taken,
        "seconds": taken,
        "batch": spec.batch,
        "first_step_seconds": first,
        "peak_megabytes": peak,
    }


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _set_precision(precision: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = precision == "tensorfloat32"
    torch.backends.cudnn.allow_tf32 = precision == "tensorfloat32"
    torch.backends.cudnn.benchmark = True
