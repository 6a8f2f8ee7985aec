"""What a saved run can do: ``python -m train evaluate``, ``certify``, ``sample`` and so on."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from iresnet_jax import (
    Certificate,
    FixedPointInfo,
    Flow,
    certify_flow,
    inverse_error_in_double,
)
from iresnet_jax.fixed_point import refuse_out_of_reach
from train import classification, density, figures, images
from train.configs.base import LogDetEstimator, TrainingConfig
from train.data import unknown_dataset
from train.evaluation import diameter
from train.networks import ThereAndBack, inverse_options
from train.progress import certificate_table, format_bound, summary_table
from train.report import inverse_error_rows, inversion_rows
from train.saved import SavedRun, Which, load_run
from train.workdir import WorkdirError, environment, write_json

#: Name -> what it does.
TOOLS = {
    "evaluate": "evaluate a run's checkpoint on the test set",
    "certify": "bound every layer's norm, and say whether the network is invertible",
    "sample": "draw samples from a density model",
    "reconstruct": "send test images through the network and back",
    "interpolate": "walk between test images through the latents",
    "prepare": "download and prepare a TFDS data set (needs TensorFlow)",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Evaluate a run's checkpoint on the test set."""

    workdir: Path
    """Folder of the run; evaluation.json and pictures go to its folder "evaluation"."""
    checkpoint: Which = "newest"
    """newest, best (on the validation set), or a step."""
    data_dir: Path | None = None
    """Where TFDS keeps its data sets; its own variable TFDS_DATA_DIR by default."""
    max_examples: int | None = None
    """Test examples, at most; this and what follows: the run's own setting by default."""
    eval_estimator: LogDetEstimator | None = None
    """Density: log-determinant by the series, the roulette, or the full Jacobian."""
    target_bias: float | None = None
    """Density: certified bound on the series' truncation bias, in bits/dim (the paper's: 1e-4)."""
    target_stderr: float | None = None
    """Density: standard error, in bits/dim, at which drawing ends."""
    max_draws: int | None = None
    """Density: draws after which it ends anyway."""
    importance_samples: int | None = None
    """Density of images: dequantisations K of an importance-weighted bound."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Certify:
    """Bound every layer's norm, and say whether the network is proved to be invertible.

    The exit status is 1 where it is not.
    """

    workdir: Path
    """Folder of the run; certificate.json goes there."""
    checkpoint: Which = "newest"
    """newest, best (on the validation set), or a step."""
    as_trained: bool = False
    """The network as the last training step used it: parameters and power iterations as they are,
    instead of the network that is evaluated and shipped."""
    data_dir: Path | None = None
    """Where TFDS keeps its data sets; its own variable TFDS_DATA_DIR by default."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Pictures:
    workdir: Path
    """Folder of the run."""
    checkpoint: Which = "newest"
    """newest, best (on the validation set), or a step."""
    output: Path | None = None
    """The picture; in the workdir by default."""
    allow_unconverged: bool = False
    """Write the picture even where an inverse did not meet its tolerance."""
    data_dir: Path | None = None
    """Where TFDS keeps its data sets; its own variable TFDS_DATA_DIR by default."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample(_Pictures):
    """Draw samples from a density model."""

    count: int = 64
    """How many."""
    temperature: float = 1.0
    """Scales the prior's standard deviation."""
    seed: int = 0
    """Of the latents."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reconstruct(_Pictures):
    """Send test images through the network and back."""

    count: int = 12
    """How many."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interpolate(_Pictures):
    """Walk between pairs of test images, straight through the latents."""

    count: int = 6
    """How many pairs."""
    frames: int = 9
    """Images of a walk, both ends included."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepare:
    """Download and prepare a data set through TFDS, which needs TensorFlow."""

    dataset: str
    """Its name."""
    data_dir: Path | None = None
    """Where TFDS keeps its data sets; its own variable TFDS_DATA_DIR by default."""


def run(name: str, arguments: Sequence[str]) -> int:
    """Run a tool; returns the exit status.

    Raises:
      ValueError, WorkdirError, CheckpointError: for settings or a workdir that do not fit.
    """
    kind, tool = _RUNS[name]
    result = tool(tyro.cli(kind, prog=f"python -m train {name}", args=arguments))
    return int(isinstance(result, Certificate) and not result.certified)


def evaluate(options: Evaluate) -> dict[str, Any]:
    """Evaluate a checkpoint as at the end of training; returns the report."""
    own = ("workdir", "checkpoint", "max_examples")
    changes = {k: v for k, v in vars(options).items() if k not in own and v is not None}
    saved = load_run(options.workdir, options.checkpoint, max_test=options.max_examples, **changes)
    saved.config.check()
    folder = options.workdir / "evaluation"
    folder.mkdir(exist_ok=True)
    result = saved.program.evaluate(
        saved.config, saved.dataset, saved.functions, saved.state, folder
    )
    report = {"step": int(saved.state.step), **result, **environment()}
    path = folder / "evaluation.json"
    write_json(path, report)
    is_density = saved.program is density
    rows = density.likelihood_rows if is_density else classification.accuracy_rows
    summary_table(f"{saved.config.dataset}: {path}", [*rows(report), *inversion_rows(report)])
    return report


def certify(options: Certify) -> Certificate:
    """Certify a checkpoint; prints and writes the certificate."""
    saved = _load_few(options, 1)
    if options.as_trained:
        certificate = certify_flow(saved.functions.flow(saved.state.variables))
    else:
        _, certificate = saved.functions.shipped_flow(saved.state)
    name = "certificate-as-trained.json" if options.as_trained else "certificate.json"
    write_json(options.workdir / name, certificate.as_dict())
    certificate_table(certificate)
    return certificate


def sample(options: Sample) -> Path:
    """Draw samples; returns the picture's path."""
    _at_least_one("count", options.count)
    saved = _load_few(options, options.count)
    if saved.program is not density:
        raise WorkdirError(f"--workdir {options.workdir} holds a classifier: it has no density.")
    flow, _ = saved.functions.shipped_flow(saved.state)
    key = jax.random.key(options.seed)
    samples, info = _at_full_precision(
        saved.functions.sample, flow, key, options.count, options.temperature
    )
    _check_converged(samples, info, flow, options, saved.config)
    path = options.output or options.workdir / "sample.png"
    if saved.dataset.is_image:
        return _report(figures.grid(path, samples))
    extent = density.EXTENT
    values = density.density_grid(flow, extent)
    data = saved.dataset.test[: options.count]
    return _report(figures.density_beside_data(path, values, extent, data, samples))


def reconstruct(options: Reconstruct) -> Path:
    """Send test images there and back; returns the picture's path."""
    _at_least_one("count", options.count)
    saved = _load_few(options, options.count)
    x, shown = _test_images(saved, options.count)
    flow, _ = saved.functions.shipped_flow(saved.state)
    there = _at_full_precision(saved.functions.there_and_back, flow, x)
    _check_converged(there.x, there.info, flow, options, saved.config)
    _tell_errors(flow, there, diameter(x))
    originals, recovered = shown(x), shown(there.x)
    error = float(np.abs(recovered - originals).max())
    path = options.output or options.workdir / "reconstruct.png"
    return _report(figures.reconstructions(path, originals, recovered, error))


def interpolate(options: Interpolate) -> Path:
    """Walk between pairs of test images; returns the picture's path."""
    _at_least_one("count", options.count)
    if options.frames < 2:
        raise ValueError(f"frames must be ≥ 2; got {options.frames}.")
    saved = _load_few(options, 2 * options.count)
    x, shown = _test_images(saved, 2 * options.count)
    flow, _ = saved.functions.shipped_flow(saved.state)
    weights = np.linspace(0.0, 1.0, options.frames, dtype=np.float32)

    @jax.jit
    def walk(flow: Flow, x: jax.Array):
        latents = flow.forward(x)
        between = [_between(z[: options.count], z[options.count :], weights) for z in latents]
        return flow.inverse(tuple(between), **inverse_options(saved.config))

    frames, info = _at_full_precision(walk, flow, x)
    _check_converged(frames, info, flow, options, saved.config)
    path = options.output or options.workdir / "interpolate.png"
    return _report(figures.grid(path, shown(frames), columns=options.frames))


def prepare(options: Prepare) -> Path:
    """Prepare a data set, unless it is prepared; returns its folder."""
    if options.dataset not in images.TFDS:
        raise ValueError(unknown_dataset(options.dataset, images.TFDS))
    folder = images.prepared_folder(options.dataset, options.data_dir)
    return _report(folder or images.prepare(options.dataset, options.data_dir))


def _between(start: jax.Array, end: jax.Array, weights: np.ndarray) -> jax.Array:
    """[pairs·frames, …], the frames of a pair one after the other."""
    steps = weights.reshape(1, -1, *(1,) * (start.ndim - 1))
    frames = (1.0 - steps) * start[:, None] + steps * end[:, None]
    return frames.reshape(-1, *start.shape[1:])


def _at_full_precision(function: Callable, *args: Any) -> Any:
    with jax.default_matmul_precision("highest"):
        return jax.tree.map(np.asarray, function(*args))


def _load_few(options: Any, count: int) -> SavedRun:
    return load_run(options.workdir, options.checkpoint, max_examples=count, **_data_dir(options))


def _test_images(saved: SavedRun, count: int) -> tuple[np.ndarray, Callable]:
    """Test images as the network takes them, and how to show what comes back."""
    if not saved.dataset.is_image:
        raise WorkdirError(f"{saved.config.dataset} holds points, not images.")
    images = saved.dataset.test[:count]
    if len(images) < count:
        raise ValueError(f"The test set has {len(images)} images; {count} are asked for.")
    return saved.program.network_images(saved.config, saved.dataset, images)


def _data_dir(options: Any) -> dict[str, Any]:
    return {} if options.data_dir is None else {"data_dir": options.data_dir}


def _tell_errors(flow: Flow, there: ThereAndBack, size: float) -> None:
    """Print what is guaranteed of the inverse, and what is estimated; ``size`` is the data's."""
    in_double = inverse_error_in_double(flow, there.x, there.latents)
    rows = inverse_error_rows(float(in_double.max()), float(there.error_bound.max()), size)
    residual = float(there.latent_residual.max())
    for what, value in [*rows, ("‖F(x) − z‖, an estimate", f"{residual:.2g}")]:
        print(f"{what}: {value}")


def _check_converged(
    x: np.ndarray, info: FixedPointInfo, flow: Flow, options: Any, config: TrainingConfig
) -> None:
    """Refuse a picture from an inverse that missed its tolerance, or overflowed.

    Raises:
      ValueError: naming the worst sample and block.
    """
    if options.allow_unconverged:
        return
    finite = np.isfinite(x).reshape(len(x), -1).all(axis=1)
    if info.converged.all() and not finite.all():
        raise ValueError(
            f"{int((~finite).sum())} of {len(x)} inverses are not finite, the first of sample "
            f"{int(np.argmin(finite))}. --allow-unconverged writes the picture anyway."
        )
    if info.converged.all():
        return
    if config.inverse_error_tolerance is not None:
        refuse_out_of_reach(info, config.inverse_error_tolerance, flow.block_names())
    residuals = np.where(info.converged, -np.inf, np.nan_to_num(info.residual, nan=np.inf))
    block, example = np.unravel_index(np.argmax(residuals), residuals.shape)
    missed = int((~info.converged).any(axis=0).sum())
    raise ValueError(
        f"{missed} of {residuals.shape[1]} inverses did not meet their tolerance; the worst is "
        f"sample {example} at {flow.block_names()[block]}, with a residual of "
        f"{info.residual[block, example]:.3g} and an error of at most "
        f"{format_bound(float(info.error_bound[block, example]), 3)}. "
        "--allow-unconverged writes the picture anyway."
    )


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be ≥ 1; got {value}.")


def _report(path: Path) -> Path:
    print(path)
    return path


_RUNS: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "evaluate": (Evaluate, evaluate),
    "certify": (Certify, certify),
    "sample": (Sample, sample),
    "reconstruct": (Reconstruct, reconstruct),
    "interpolate": (Interpolate, interpolate),
    "prepare": (Prepare, prepare),
}
