"""``python -m train density``: invertible residual networks as density models."""

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from iresnet_jax import Estimator, Flow, bits_per_dim, dequantize
from iresnet_jax.nn import FlowModel, ImageFlow, VectorFlow
from train import figures
from train.configs.density import DENSITY, DensityConfig
from train.data import Dataset
from train.estimators import MAX_TERMS, training_estimator, validation_estimator
from train.likelihood import evaluate_likelihood
from train.metrics import MetricsLog
from train.networks import model_options
from train.parallel import devices_for_determinants
from train.preprocessing import crop_and_flip
from train.progress import format_bound
from train.steps import Metrics, TrainState, example_keys
from train.task import Report, Shipped, Task

_VALIDATED = 2000
EXTENT = (-4.5, 4.5, -4.5, 4.5)


class Density(Task[DensityConfig]):
    """Maximum likelihood of dequantised images, or of points."""

    experiments: ClassVar[Mapping[str, Any]] = DENSITY
    purpose: ClassVar[str] = "train a density model"

    @property
    def loss_name(self) -> str:  # type: ignore[override]
        return "bits/dim" if self.dataset.is_image else "loss"

    @classmethod
    def load(cls, config: DensityConfig) -> Dataset:
        dataset = super().load(config)
        if config.augment and not dataset.is_image:
            raise ValueError(f"augment crops and flips images; {config.dataset!r} holds points.")
        if config.importance_samples > 1 and not dataset.is_image:
            raise ValueError(
                "importance_samples are dequantisations of an image; "
                f"{config.dataset!r} holds points, whose likelihood needs none."
            )
        return dataset

    def inputs(self, examples: np.ndarray) -> np.ndarray:
        keys = example_keys(self.config.seed + 2, jnp.int32(0), jnp.arange(len(examples)))
        return np.asarray(self.noisy(jnp.asarray(examples), keys))

    def build_model(self) -> FlowModel:
        config, options = self.config, model_options(self.config)
        if self.dataset.is_image:
            return ImageFlow(
                image_shape=self.dataset.image_shape,
                depths=config.depths,
                features=config.features,
                domain=config.domain,
                **options,
            )
        if len(config.depths) != 1:
            raise ValueError(f"depths of a flow over points is one number; got {config.depths}.")
        return VectorFlow(
            dim=self.dataset.dim, depth=config.depths[0], features=config.features, **options
        )

    def loss(self, variables: Any, batch: Any, keys: jax.Array) -> tuple[jax.Array, dict, Metrics]:
        flow, updates = self.training_model.advance(variables)
        value, metrics = self.flow_loss(variables["params"], flow, batch, keys)
        return value, updates, metrics

    def flow_loss(
        self, params: Any, flow: Flow, batch: Any, keys: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """Return the loss of a flow whose power iterations have advanced, and further metrics."""
        if self.config.augment:
            # 0 and 1 are what jax.random.split folds in, for the noise and the probes
            batch = crop_and_flip(batch, jax.vmap(jax.random.fold_in, (0, None))(keys, 2))
        estimator = training_estimator(self.config, self.dataset)
        return jnp.mean(self.bits(params, flow, batch, estimator, keys)), {}

    def bits(
        self, params: Any, flow: Flow, examples: jax.Array, estimator: Estimator, keys: jax.Array
    ) -> jax.Array:
        """Return bits per dimension of each example, [batch], for one draw of all noise."""
        noise, probes = jax.vmap(lambda k: tuple(jax.random.split(k)))(keys)
        x, log_noise = self.dequantize(params, examples, noise)
        log_prob = flow.log_prob(x, estimator, key=probes) - log_noise
        return bits_per_dim(log_prob, flow.dim, self.dataset.num_levels or 1)

    def dequantize(
        self, params: Any, examples: jax.Array, keys: jax.Array
    ) -> tuple[jax.Array, jax.Array | float]:
        """Add noise within each grey level; return examples, and its log density, [batch].

        The noise is in units of a level. Here it is uniform, with log density 0. Points stay as
        they are.
        """
        return self.noisy(examples, keys), 0.0

    def noisy(self, examples: jax.Array, keys: jax.Array) -> jax.Array:
        """Dequantise images uniformly, to [0, 1]; points stay as they are."""
        levels = self.dataset.num_levels
        return examples if levels is None else dequantize(keys, examples, levels)

    def devices(self) -> list[jax.Device] | None:
        if self.config.train_estimator != "exact":
            return None
        devices = devices_for_determinants(self.dataset.dim)
        if not self.config.distributed:
            return devices
        if len(devices) < jax.local_device_count():
            raise ValueError(
                f"--train-estimator exact in {self.dataset.dim} dimensions takes one CPU device "
                f"per process; got {jax.local_device_count()}: pass --cpu-devices 1."
            )
        return None

    def score(self, variables: Any) -> float:
        flow = self.functions.flow(variables)
        return float(self._validation_bits(variables["params"], flow))

    @cached_property
    def _validation_bits(self) -> Callable[[Any, Flow], jax.Array]:
        estimator = validation_estimator(self.dataset)
        examples = jnp.asarray(self.dataset.validation[:_VALIDATED])

        def mean_bits(params: Any, flow: Flow) -> jax.Array:
            keys = example_keys(self.config.seed + 1, jnp.int32(0), jnp.arange(len(examples)))
            return jnp.mean(self.bits(params, flow, examples, estimator, keys))

        return jax.jit(mean_bits)

    def pictures(self, state: TrainState) -> dict[str, np.ndarray]:
        if not self.dataset.is_image:
            return {}
        variables = self.functions.converge(state.averaged_variables)
        samples, _ = self._draw_samples(self.functions.invertible(variables))
        return {"samples": figures.image_grid(samples, 8), **super().pictures(state)}

    def evaluate(self, state: TrainState, folder: Path) -> Report:
        """Evaluate likelihood, inversion and samples."""
        variables = self.functions.shipped_variables(state)
        shipped = self.ship(variables, folder)
        likelihood = evaluate_likelihood(
            lambda *draw: self.bits(variables["params"], *draw),
            shipped.flow,
            self.dataset.test,
            self.config,
            shipped.certificate,
            noisy=self.dataset.is_image,
        )
        samples, converged = self._draw_samples(shipped.flow)
        self._draw(folder, shipped, samples)
        return {
            **likelihood.report(self.config),
            **shipped.back.report,
            "samples_converged": converged,
        }

    def _draw_samples(self, flow: Flow) -> tuple[np.ndarray, bool]:
        """Draw samples, and say whether all their inverses converged."""
        key = jax.random.key(self.config.seed + 3)
        with jax.default_matmul_precision("highest"):
            samples, info = self.functions.sample(flow, key, self.config.num_samples, 1.0)
        return np.asarray(samples), bool(info.converged.all())

    def _draw(self, folder: Path, shipped: Shipped, samples: np.ndarray) -> None:
        flow, _, test, back = shipped
        if not self.dataset.is_image:
            density, data = density_grid(flow, EXTENT), self.dataset.test
            figures.density_beside_data(folder / "density.png", density, EXTENT, data, samples)
            return
        images = self.shown(samples)
        figures.samples_beside_data(folder / "samples.png", images, test[: len(images)])
        error = back.report["reconstruction_max_error"]
        figures.reconstructions(folder / "reconstructions.png", test, self.shown(back.x), error)

    def draw_curve(self, path: Path, log: MetricsLog, report: Report) -> None:
        figures.training_curve(
            path,
            *log.series("loss"),
            *log.series("validation"),
            "bits/dim" if self.dataset.is_image else "bits per dimension",
            {"test": report["bits_per_dim"]},
        )

    def rows(self, report: Report) -> list[tuple[str, str]]:
        return likelihood_rows(report)


def density_grid(flow: Flow, extent, resolution: int = 300) -> np.ndarray:
    """Evaluate p(x) on a grid, [resolution, resolution], rows from low to high y."""
    left, right, low, high = extent
    xs = np.linspace(left, right, resolution, dtype=np.float32)
    ys = np.linspace(low, high, resolution, dtype=np.float32)
    grid = np.stack(np.meshgrid(xs, ys), axis=-1)
    log_prob = jax.jit(lambda flow, x: flow.log_prob(x))
    return np.exp(np.stack([np.asarray(log_prob(flow, jnp.asarray(row))) for row in grid]))


def likelihood_rows(report: Report) -> list[tuple[str, str]]:
    """Return the rows on a likelihood, with the targets that were missed."""
    stderr, bias = report["bits_per_dim_stderr"], report["bits_per_dim_bias_bound"]
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
    if not bias <= (target := report["bits_per_dim_target_bias"]):
        missed = f"a bias ≤ {target:g} needs more than {MAX_TERMS} terms, the most allowed"
        rows.append(("TARGET MISSED", missed))
    if not stderr <= (target := report["bits_per_dim_target_stderr"]):
        missed = f"a standard error of {target:g} needs more than {draws} draws"
        rows.append(("TARGET MISSED", f"{missed} (--max-draws)"))
    return rows
