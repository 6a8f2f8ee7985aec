"""Training steps of the library: images a second, memory, time to compile."""

import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from benchmarks import ours
from benchmarks.accelerator.records import Figures, Record
from benchmarks.accelerator.settings import Settings
from benchmarks.specs import Spec
from iresnet_jax.stages import Precision

#: Terms of the log-determinant's series.
TERMS = 5

Variant = tuple[Precision, bool]
_DENSITY: Sequence[Variant] = (
    ("bfloat16", True),
    ("tensorfloat32", True),
    ("bfloat16", False),
    ("float32", True),
)
_CLASSIFICATION: Sequence[Variant] = (
    ("bfloat16", False),
    ("tensorfloat32", False),
    ("float32", False),
)


def density(record: Record, settings: Settings) -> None:
    """The authors' density model of CIFAR-10, a step with five terms, in bfloat16."""
    _measure(record, settings, settings.density, _DENSITY[:1])


def density_otherwise(record: Record, settings: Settings) -> None:
    """The same in other precisions, and keeping products."""
    _measure(record, settings, settings.density, _DENSITY[1:])


def classification(record: Record, settings: Settings) -> None:
    """The classifier of the authors' script."""
    _measure(record, settings, settings.classification, _CLASSIFICATION)


def _measure(record: Record, settings: Settings, spec: Spec, variants: Sequence[Variant]) -> None:
    jax.config.update("jax_enable_compilation_cache", False)  # compile times are cold ones
    for precision, remat in variants:
        name = f"{precision}, {'recomputing blocks' if remat else 'keeping products'}"
        if name in record:
            continue
        try:
            record.add(name, **_variant(spec, precision, remat, settings))
        except jax.errors.JaxRuntimeError as error:
            record.add(name, error=str(error).splitlines()[0])


def _variant(spec: Spec, precision: Precision, remat: bool, settings: Settings) -> Figures:
    started = time.perf_counter()
    training = ours.Training(spec, TERMS, remat=remat, precision=precision)
    initialised = time.perf_counter()
    memory = training.compiled.memory_analysis()
    compiled = time.perf_counter()
    training.run(1)
    stepped = time.perf_counter()
    taken = median_seconds(training.run, settings)
    return {
        "images_per_second": spec.batch / taken,
        "seconds": taken,
        "tflop_per_second": spec.step_flops(TERMS) / taken / 1e12,
        "batch": spec.batch,
        "initialise_seconds": initialised - started,
        "compile_seconds": compiled - initialised,
        "first_step_seconds": stepped - compiled,
        "temporary_megabytes": memory.temp_size_in_bytes / 1e6,
    }


def median_seconds(run: Callable[[int], None], settings: Settings) -> float:
    """Seconds a step: the median over turns of several steps in flight."""
    run(settings.steps)
    taken = []
    for _ in range(settings.turns):
        started = time.perf_counter()
        run(settings.steps)
        taken.append((time.perf_counter() - started) / settings.steps)
    return float(np.median(taken))
