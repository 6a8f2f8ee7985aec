"""Training runs of a few minutes, from .npz files: density of MNIST and of a part of CIFAR-10.

A run is that of ``python -m train density``: checkpoints, curve, certificate and report in its
workdir, from which the same command resumes. The minutes are those of its training steps: timing
one, compiling, validating and evaluating come on top.
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax

from benchmarks.accelerator.records import Figures, Record
from benchmarks.accelerator.settings import Settings
from train.configs import DENSITY, DensityConfig
from train.density import Density
from train.parallel import Devices
from train.steps import FirstState, training_step
from train.training import run

_TIMED_STEPS = 20

_SHARED: dict[str, Any] = {
    "optimizer": "muon",
    "learning_rate": 0.04,
    "weight_decay": 0.05,
    "mixing": True,
    "dequantization": "variational",
    "dequantization_features": 16,
    "train_estimator": "roulette",
    "num_terms": 4,
    "continuation": 0.7,
    "shared_length": True,
    "schedule": "cosine",
    "precision": "bfloat16",
    "coeff": 0.97,
    "domain": "logit",
    "power_steps": 1,
    "warmup_steps": 100,
    "ema_decay": 0.998,
    "max_draws": 2,
    "num_reconstructed": 64,
    "remat": False,
}
#: For six minutes of one data-centre GPU.
CONFIGS = {
    "mnist": dataclasses.replace(
        DENSITY["mnist"], depths=(16, 16), features=(256, 256), batch_size=256, **_SHARED
    ),
    "cifar10": dataclasses.replace(
        DENSITY["cifar10"],
        depths=(8, 16, 16),
        features=(256, 256, 256),
        batch_size=128,
        **_SHARED,
    ),
}
_TINY: dict[str, Any] = {"batch_size": 8, "max_examples": 64, "max_draws": 2}
_KEPT = (
    *("bits_per_dim", "bits_per_dim_stderr", "bits_per_dim_bias_bound", "certified"),
    *("block_lipschitz_max", "train_seconds", "total_seconds", "num_parameters", "steps"),
)


def mnist(record: Record, settings: Settings) -> None:
    """Density of MNIST, 28×28."""
    _train(record, settings, "mnist", settings.mnist)


def cifar10(record: Record, settings: Settings) -> None:
    """Density of CIFAR-10, from the part of it that is given."""
    _train(record, settings, "cifar10", settings.cifar10)


def mnist_rate(record: Record, settings: Settings) -> None:
    """Images a second of the MNIST run, from which it chooses its number of steps."""
    config = _config(settings, "mnist", _given("mnist", settings.mnist), 10_000)
    record.add("rate", **_rate(config))


def _train(record: Record, settings: Settings, name: str, data: Path | None) -> None:
    data = _given(name, data)
    _keep_compiled(settings.out)
    steps = _steps_begun(settings.out / f"train-{name}") or _steps(settings, name, data)
    config = _config(settings, name, data, steps)
    report = run(Density(config))
    record.add("test", **{key: report[key] for key in _KEPT})


def _given(name: str, data: Path | None) -> Path:
    if data is None:
        raise ValueError(f"--{name} FILE.npz was not given.")
    return data


def _keep_compiled(out: Path) -> None:
    """The step is compiled twice, to be timed and to train; the second time costs little."""
    jax.config.update("jax_compilation_cache_dir", str(out / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def _steps_begun(workdir: Path) -> int | None:
    """The number of steps of a run that an interruption left."""
    path = workdir / "config.json"
    return json.loads(path.read_text())["steps"] if path.is_file() else None


def _steps(settings: Settings, name: str, data: Path) -> int:
    if settings.tiny:
        return 20
    measured = Record(settings.out / f"{name}-rate.json")
    if "rate" not in measured:
        measured.add("rate", **_rate(_config(settings, name, data, 10_000)))
    seconds = measured.parts["rate"]["seconds"]
    return max(1, int(60.0 * settings.minutes / seconds))


def _config(settings: Settings, name: str, data: Path, steps: int) -> DensityConfig:
    config = CONFIGS[name]
    if settings.tiny:
        scales = len(config.depths)
        tiny = _TINY | {"depths": (1,) * scales, "features": (8,) * scales}
        config = dataclasses.replace(config, **tiny)
    return dataclasses.replace(
        config,
        dataset=str(data),
        workdir=settings.out / f"train-{name}",
        steps=steps,
        warmup_steps=min(config.warmup_steps, steps),
        validate_every=max(1, steps // 4),
        picture_every=None,
        checkpoint_every=max(1, steps // 4),
    )


def _rate(config: DensityConfig) -> Figures:
    """Time steps of a run, without its validations."""
    task = Density(config)
    inputs = task.inputs(task.dataset.train[:512])
    state = FirstState(task.init, config, inputs).values()
    devices = Devices(config.parallel, config.batch_size)
    step = devices.map(training_step(task.loss, config))
    replicated = devices.replicate(state)
    batch = devices.split(task.dataset.train[: config.batch_size])
    started = time.perf_counter()
    replicated, metrics = step(replicated, batch)
    float(devices.one(metrics)["loss"])
    first = time.perf_counter() - started
    started = time.perf_counter()
    for _ in range(_TIMED_STEPS):
        replicated, metrics = step(replicated, batch)
    float(devices.one(metrics)["loss"])
    taken = (time.perf_counter() - started) / _TIMED_STEPS
    return {
        "images_per_second": config.batch_size / taken,
        "seconds": taken,
        "first_step_seconds": first,
    }
