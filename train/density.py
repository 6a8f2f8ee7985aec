"""``python -m train density``: an invertible residual network as a density model."""

import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from iresnet_jax.models import FlowModel

from iresnet_jax import Flow, ImageFlow, VectorFlow, exact, truncated_series
from train import figures
from train.configs.base import DensityConfig
from train.data import Dataset, load_dataset
from train.estimators import MAX_TERMS
from train.evaluation import Reconstruction, reconstruct
from train.likelihood import Likelihood, evaluate_likelihood
from train.metrics import MetricsLog
from train.networks import ModelFunctions
from train.parallel import devices_for_determinants, is_primary
from train.progress import format_bound, summary_table
from train.report import common_rows, inversion_report, run_report
from train.steps import TrainState, density_bits, density_step, example_keys, to_unit_interval
from train.training import train_model
from train.workdir import write_json

_EXACT_UP_TO_DIM = 128
_VALIDATED, _INVERTED = 2000, 64
EXTENT = (-4.5, 4.5, -4.5, 4.5)


def build_model(config: DensityConfig, dataset: Dataset) -> FlowModel:
    """The untrained model for a data set."""
    options: dict[str, Any] = {
        "coeff": config.coeff,
        "activation": config.activation,
        "num_steps": config.power_steps,
        "normalize": config.layer_normalize,
    }
    if dataset.is_image:
        return ImageFlow(
            image_shape=dataset.image_shape,
            depths=config.depths,
            features=config.features,
            domain=config.domain,
            **options,
        )
    if len(config.depths) != 1:
        raise ValueError(f"depths of a flow over points is one number; got {config.depths}.")
    return VectorFlow(dim=dataset.dim, depth=config.depths[0], features=config.features, **options)


def run(config: DensityConfig) -> dict[str, Any]:
    """Train, evaluate, draw, and write the report; returns it."""
    started = time.perf_counter()
    dataset = load(config)
    model = build_model(config, dataset)
    with train_model(
        model,
        config,
        dataset,
        first_batch=as_floats(dataset, dataset.train[:512], config.seed),
        step=density_step(model, config, dataset),
        with_labels=False,
        validation=lambda functions: _Validation(functions, config, dataset),
        best="min",
        loss_name="bits/dim" if dataset.is_image else "loss",
        devices=_training_devices(config, dataset),
    ) as trained:
        if not is_primary():
            return {}
        result = evaluate(config, dataset, trained.functions, trained.result.state, trained.workdir)
        _draw_curve(trained.workdir, trained.log, dataset, result["bits_per_dim"])
        report = {**result, **run_report(config, trained, time.perf_counter() - started)}
        write_json(trained.workdir / "report.json", report)
    path = config.workdir / "report.json"
    summary_table(f"{config.dataset}: {path}", [*likelihood_rows(report), *common_rows(report)])
    return report


def load(config: DensityConfig) -> Dataset:
    """The data set that a config names.

    Raises:
      ValueError: if it cannot be read, or holds points where a setting is about images.
    """
    dataset = load_dataset(
        config.dataset,
        data_dir=config.data_dir,
        max_examples=config.max_examples,
        margin=config.margin,
    )
    if config.augment and not dataset.is_image:
        raise ValueError(f"augment crops and flips images; {config.dataset!r} holds points.")
    if config.importance_samples > 1 and not dataset.is_image:
        raise ValueError(
            "importance_samples are dequantisations of an image; "
            f"{config.dataset!r} holds points, whose likelihood needs none."
        )
    return dataset


def evaluate(
    config: DensityConfig,
    dataset: Dataset,
    functions: ModelFunctions,
    state: TrainState,
    workdir: Path,
) -> dict[str, Any]:
    """Likelihood, inversion and samples of a state on the test set, with pictures in a folder."""
    flow, certificate = functions.shipped_flow(state)
    write_json(workdir / "certificate.json", certificate.as_dict())
    likelihood = evaluate_likelihood(
        flow, dataset.test, dataset.num_levels, config, certificate.lipschitz
    )
    test = as_floats(dataset, dataset.test[: config.num_reconstructed], config.seed)
    reconstruction = reconstruct(functions, flow, test, in_double=True)
    samples, samples_converged = _draw_samples(functions, flow, config)
    _draw(workdir, flow, dataset, test, reconstruction, samples)
    return {
        **_likelihood_report(likelihood, config),
        **inversion_report(reconstruction, certificate),
        "samples_converged": samples_converged,
    }


def network_images(config: DensityConfig, dataset: Dataset, images: np.ndarray):
    """Integer images as the network takes them, and how to show what it gives back."""
    return as_floats(dataset, images, config.seed), lambda x: np.clip(x, 0.0, 1.0)


class _Validation:
    """Bits per dimension of the validation set under the averaged parameters.

    Args:
      functions: of the model.
      config: of the run.
      dataset: whose validation set it is.
    """

    def __init__(self, functions: ModelFunctions, config: DensityConfig, dataset: Dataset):
        self.score = float("inf")
        self._functions, self._config, self._dataset = functions, config, dataset
        self._examples = as_floats(dataset, dataset.validation[:_INVERTED], config.seed)
        self._bits = jax.jit(_mean_bits(config, dataset))

    def evaluate(self, state: TrainState, log: MetricsLog) -> dict[str, float]:
        flow = self._functions.averaged_flow(state)
        back = reconstruct(self._functions, flow, self._examples)
        self.score = float(self._bits(flow))
        shown = {
            "validation": self.score,
            **self._functions.norm_metrics(state.variables),
        }
        log.write(int(state.step), **shown, inverse_residual=back.residual_max)
        return shown

    def draw(self, state: TrainState, log: MetricsLog) -> None:
        if not self._dataset.is_image:
            return
        flow = self._functions.averaged_flow(state)
        samples, _ = _draw_samples(self._functions, flow, self._config)
        back = reconstruct(self._functions, flow, self._examples)
        step = int(state.step)
        log.picture(step, "samples", figures.image_grid(samples, 8))
        pairs = np.concatenate([self._examples[:16], back.x[:16]])
        log.picture(step, "reconstructions", figures.image_grid(pairs, 16))


def _training_devices(config: DensityConfig, dataset: Dataset) -> list[jax.Device] | None:
    if config.train_estimator != "exact":
        return None
    devices = devices_for_determinants(dataset.dim)
    if not config.distributed:
        return devices
    if len(devices) < jax.local_device_count():
        raise ValueError(
            f"--train-estimator exact in {dataset.dim} dimensions takes one CPU device a process; "
            f"got {jax.local_device_count()}: pass --cpu-devices 1."
        )
    return None


def _mean_bits(config: DensityConfig, dataset: Dataset):
    estimator = exact() if dataset.dim <= _EXACT_UP_TO_DIM else truncated_series(20)
    examples = jnp.asarray(dataset.validation[:_VALIDATED])

    def mean_bits(flow: Flow) -> jax.Array:
        keys = example_keys(config.seed + 1, jnp.int32(0), jnp.arange(len(examples)))
        return jnp.mean(density_bits(flow, examples, dataset.num_levels, estimator, keys))

    return mean_bits


def as_floats(dataset: Dataset, examples: np.ndarray, seed: int) -> np.ndarray:
    """Examples as the flow takes them, images dequantised by one fixed draw."""
    keys = example_keys(seed + 2, jnp.int32(0), jnp.arange(len(examples)))
    return np.asarray(to_unit_interval(jnp.asarray(examples), dataset.num_levels, keys))


def _draw_samples(
    functions: ModelFunctions, flow: Flow, config: DensityConfig
) -> tuple[np.ndarray, bool]:
    """Samples, and whether the inverse of every one of them converged."""
    key = jax.random.key(config.seed + 3)
    with jax.default_matmul_precision("highest"):
        samples, info = functions.sample(flow, key, config.num_samples, 1.0)
    return np.asarray(samples), bool(info.converged.all())


def _likelihood_report(likelihood: Likelihood, config: DensityConfig) -> dict[str, Any]:
    log_det = likelihood.log_det
    report: dict[str, Any] = {
        "bits_per_dim": likelihood.bits_per_dim,
        "bits_per_dim_stderr": likelihood.stderr,
        "bits_per_dim_target_stderr": config.target_stderr,
        "bits_per_dim_bias_bound": log_det.bias_bound,
        "bits_per_dim_target_bias": config.target_bias,
        "bits_per_dim_sampling_stderr": likelihood.sampling_stderr,
        "bits_per_dim_estimator": log_det.name,
        "log_det_terms": log_det.num_terms,
        "log_det_continuation": log_det.continuation,
        "log_det_description": log_det.description,
        "likelihood_draws": likelihood.num_draws,
    }
    if likelihood.importance_weighted is not None:
        report |= {
            "bits_per_dim_importance_weighted": likelihood.importance_weighted,
            "bits_per_dim_importance_weighted_stderr": likelihood.importance_weighted_stderr,
            "importance_samples": config.importance_samples,
        }
    return report


def _draw_curve(workdir: Path, log: MetricsLog, dataset: Dataset, test: float) -> None:
    figures.training_curve(
        workdir / "training_curve.png",
        *log.series("loss"),
        *log.series("validation"),
        "bits/dim" if dataset.is_image else "bits per dimension",
        {"test": test},
    )


def _draw(
    workdir: Path,
    flow: Flow,
    dataset: Dataset,
    test: np.ndarray,
    reconstruction: Reconstruction,
    samples: np.ndarray,
) -> None:
    if dataset.is_image:
        images = np.clip(samples, 0.0, 1.0)
        figures.samples_beside_data(workdir / "samples.png", images, test[: len(images)])
        figures.reconstructions(
            workdir / "reconstructions.png",
            test,
            np.clip(reconstruction.x, 0.0, 1.0),
            reconstruction.max_error,
        )
    else:
        density = density_grid(flow, EXTENT)
        figures.density_beside_data(workdir / "density.png", density, EXTENT, dataset.test, samples)


def density_grid(flow: Flow, extent, resolution: int = 300) -> np.ndarray:
    """p(x) on a grid, [resolution, resolution], rows from low to high y."""
    left, right, low, high = extent
    xs = np.linspace(left, right, resolution, dtype=np.float32)
    ys = np.linspace(low, high, resolution, dtype=np.float32)
    grid = np.stack(np.meshgrid(xs, ys), axis=-1)
    log_prob = jax.jit(lambda flow, x: flow.log_prob(x, exact()))
    return np.exp(np.stack([np.asarray(log_prob(flow, jnp.asarray(row))) for row in grid]))


def likelihood_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows of the table shown at the end; targets that were missed are named."""
    stderr, bias = report["bits_per_dim_stderr"], report["bits_per_dim_bias_bound"]
    target_stderr, target_bias = (
        report[f"bits_per_dim_target_{name}"] for name in ("stderr", "bias")
    )
    draws = report["likelihood_draws"]
    value = f"{report['bits_per_dim']:.4f} ± {stderr:.4f} (bias ≤ {format_bound(bias)})"
    rows = [
        ("test bits/dim", value),
        ("estimated by", f"{draws} draws, {report['log_det_description']}"),
        ("spread over the test set", f"± {report['bits_per_dim_sampling_stderr']:.4f}"),
    ]
    if "importance_samples" in report:
        weighted, error = (
            report[f"bits_per_dim_importance_weighted{end}"] for end in ("", "_stderr")
        )
        what = f"importance-weighted, {report['importance_samples']} samples"
        rows.append((what, f"{weighted:.4f} ± {error:.4f}"))
    if not bias <= target_bias:
        missed = f"a bias ≤ {target_bias:g} needs more than the maximal {MAX_TERMS} terms"
        rows.append(("TARGET MISSED", missed))
    if not stderr <= target_stderr:
        missed = f"a standard error of {target_stderr:g} needs more than {draws} draws"
        rows.append(("TARGET MISSED", f"{missed} (--max-draws)"))
    return rows
