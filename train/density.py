"""``python -m train density``: an invertible residual network as a density model."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from iresnet_jax import Flow, ImageFlow, VectorFlow, exact, truncated_series
from iresnet_jax.models import FlowModel
from train import figures
from train.configs.base import DensityConfig
from train.data import Dataset, load_dataset
from train.evaluation import (
    Likelihood,
    evaluate_likelihood,
    reconstruct,
)
from train.networks import ModelFunctions
from train.progress import summary_table
from train.report import common_rows, inversion_report, run_report
from train.steps import (
    TrainState,
    density_bits,
    density_step,
    example_keys,
    make_optimizer,
    to_unit_interval,
)
from train.training import train_model
from train.workdir import write_json

_EXACT_UP_TO_DIM = 128
_EXTENT = (-4.5, 4.5, -4.5, 4.5)


def build_model(config: DensityConfig, dataset: Dataset) -> FlowModel:
    """The untrained model for a data set."""
    options: dict[str, Any] = {
        "coeff": config.coeff,
        "activation": config.activation,
        "num_steps": config.power_steps,
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
    dataset = load_dataset(config.dataset)
    model = build_model(config, dataset)
    trained = train_model(
        model,
        config,
        dataset,
        first_batch=_as_floats(dataset, dataset.train[:512], config.seed),
        step=density_step(model, make_optimizer(config), config, dataset),
        batch=lambda indices: jnp.asarray(dataset.train[indices]),
        validation=lambda functions: _validation(functions, config, dataset),
        loss_name="bits/dim" if dataset.is_image else "loss",
    )
    workdir = trained.workdir

    flow, lipschitz = trained.functions.shipped_flow(trained.result.state)
    likelihood = evaluate_likelihood(flow, dataset.test, dataset.num_levels, config, lipschitz)
    test = _as_floats(dataset, dataset.test[: config.num_reconstructed], config.seed)
    reconstruction = reconstruct(flow, test, config.inverse_tolerance, config.inverse_max_steps)
    samples, samples_converged = _sample(flow, config)
    _draw(workdir, flow, dataset, test, reconstruction, samples, trained.log, likelihood)
    report = {
        **_likelihood_report(likelihood),
        **inversion_report(reconstruction, lipschitz),
        "samples_converged": samples_converged,
        **run_report(config, trained, time.perf_counter() - started),
    }
    write_json(workdir / "report.json", report)
    summary_table(f"{config.dataset}: {workdir / 'report.json'}", _summary(report, likelihood))
    return report


def _validation(functions: ModelFunctions, config: DensityConfig, dataset: Dataset):
    estimator = exact() if dataset.dim <= _EXACT_UP_TO_DIM else truncated_series(20)
    examples = jnp.asarray(dataset.validation)

    @jax.jit
    def evaluate(flow):
        keys = example_keys(config.seed + 1, jnp.int32(0), len(examples))
        return jnp.mean(density_bits(flow, examples, dataset.num_levels, estimator, keys))

    def validate(state: TrainState) -> dict[str, float]:
        flow = functions.flow(functions.converge(state.averaged_variables))
        sigma = functions.largest_norm(state.variables)
        return {"validation": float(evaluate(flow)), "sigma": sigma}

    return validate


def _as_floats(dataset: Dataset, examples: np.ndarray, seed: int) -> np.ndarray:
    """Examples as the flow takes them, images dequantised by one fixed draw."""
    keys = example_keys(seed + 2, jnp.int32(0), len(examples))
    return np.asarray(to_unit_interval(jnp.asarray(examples), dataset.num_levels, keys))


def _sample(flow: Flow, config: DensityConfig) -> tuple[np.ndarray, bool]:
    @jax.jit
    def sample(flow, key):
        return flow.sample(
            key,
            config.num_samples,
            rtol=config.inverse_tolerance,
            atol=config.inverse_tolerance,
            max_steps=config.inverse_max_steps,
        )

    with jax.default_matmul_precision("highest"):
        samples, info = sample(flow, jax.random.key(config.seed + 3))
    return np.asarray(samples), bool(info.converged.all())


def _likelihood_report(likelihood: Likelihood) -> dict[str, Any]:
    return {
        "bits_per_dim": likelihood.bits_per_dim,
        "bits_per_dim_stderr": likelihood.stderr,
        "bits_per_dim_bias_bound": likelihood.bias_bound,
        "bits_per_dim_sampling_stderr": likelihood.sampling_stderr,
        "log_det_terms": likelihood.num_terms,
        "likelihood_draws": likelihood.num_draws,
    }


def _draw(workdir, flow, dataset, test, reconstruction, samples, log, likelihood) -> None:
    ylabel = "bits/dim" if dataset.is_image else "bits per dimension"
    steps, bits = log.series("loss")
    validation_steps, validation_bits = log.series("validation")
    figures.training_curve(
        workdir / "training_curve.png",
        steps,
        bits,
        validation_steps,
        validation_bits,
        ylabel,
        {"test": likelihood.bits_per_dim},
    )
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
        density = _density_grid(flow, _EXTENT)
        figures.density_beside_data(
            workdir / "density.png", density, _EXTENT, dataset.test, samples
        )


def _density_grid(flow: Flow, extent, resolution: int = 300) -> np.ndarray:
    """p(x) on a grid, [resolution, resolution], rows from low to high y."""
    left, right, low, high = extent
    xs = np.linspace(left, right, resolution, dtype=np.float32)
    ys = np.linspace(low, high, resolution, dtype=np.float32)
    grid = np.stack(np.meshgrid(xs, ys), axis=-1)
    log_prob = jax.jit(lambda flow, x: flow.log_prob(x, exact()))
    return np.exp(np.stack([np.asarray(log_prob(flow, jnp.asarray(row))) for row in grid]))


def _summary(report: dict[str, Any], likelihood: Likelihood) -> list[tuple[str, str]]:
    value = (
        f"{likelihood.bits_per_dim:.4f} ± {likelihood.stderr:.4f} "
        f"(bias ≤ {likelihood.bias_bound:.1g})"
    )
    how = f"{likelihood.num_terms} terms" if likelihood.num_terms else "exact log-determinants"
    return [
        ("test bits/dim", value),
        ("estimated by", f"{likelihood.num_draws} draws, {how}"),
        ("spread over the test set", f"± {likelihood.sampling_stderr:.4f}"),
        *common_rows(report),
    ]
