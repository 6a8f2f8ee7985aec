"""``python -m train density``: invertible residual networks as density models."""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from iresnet_jax import Estimator, Flow, TruncatedSeries, bits_per_dim, dequantize
from iresnet_jax.nn import FlowModel, ImageFlow, VariationalDequantization, VectorFlow
from train import figures
from train.catalogue import PROGRAMS
from train.configs.base import FILES
from train.configs.density import DENSITY, DensityConfig
from train.data import Dataset, refuse_odd_sides
from train.estimators import (
    MAX_TERMS,
    training_bias_bound,
    training_estimator,
    validation_estimator,
)
from train.likelihood import evaluate_likelihood
from train.memory import refuse_beyond_memory
from train.metrics import MetricsLog
from train.networks import model_options
from train.output import optionally
from train.page_walk import draw_image_walk, draw_point_walk
from train.parallel import devices_for_determinants
from train.plane import draw_points
from train.preprocessing import crop_and_flip
from train.progress import format_bound
from train.steps import Metrics, TrainState, example_keys
from train.task import Picture, Report, Shipped, Task
from train.terminal import tell

#: Name of the learned dequantisation among the parameters.
DEQUANTIZER = "dequantizer"

_VALIDATED = 2000
_COMPARED = 500  # of these, to see how far a biased objective flatters itself
_TOLERATED = 0.02


class Density(Task[DensityConfig]):
    """Maximum likelihood of dequantised images, or of points."""

    experiments: ClassVar[Mapping[str, Any]] = DENSITY
    purpose: ClassVar[str] = PROGRAMS["density"].purpose
    shown_at_validation: ClassVar[tuple[str, ...]] = ("flattery", "loss_bias_bound")
    _has_warned = False

    @property
    def loss_name(self) -> str:  # type: ignore[override]
        return "bits/dim" if self.dataset.is_image else "loss"

    @property
    def curve_name(self) -> str:  # type: ignore[override]
        return "bits/dim" if self.dataset.is_image else "bits per dimension"

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
        if config.dequantization != "uniform" and not dataset.is_image:
            raise ValueError(
                f"dequantization {config.dequantization!r} is of images; {config.dataset!r} holds "
                "points, whose likelihood needs none."
            )
        if config.domain != "centered" and not dataset.is_image:
            raise ValueError(
                f"domain {config.domain!r} is of images; {config.dataset!r} holds points, which "
                "the network sees as they are."
            )
        refuse_beyond_memory("num_samples", config.num_samples, dataset.dim)
        if dataset.is_image:
            refuse_odd_sides(dataset, len(config.depths))
        return dataset

    def inputs(self, examples: np.ndarray) -> np.ndarray:
        keys = example_keys(self.config.seed + 2, jnp.int32(0), jnp.arange(len(examples)))
        return np.asarray(self.noisy(jnp.asarray(examples), keys))

    def build_model(self) -> FlowModel:
        config, images = self.config, self.dataset.is_image
        options = model_options(config, images=images)
        if images:
            self._refuse_settings_of_points()
            return ImageFlow(
                image_shape=self.dataset.image_shape,
                depths=config.depths,
                features=config.features,
                domain=config.domain,
                **options,
            )
        if len(config.depths) != 1:
            raise ValueError(
                f"depths of a flow over points is one number; got {config.depths}. "
                f"{config.dataset} holds points {list(self.dataset.example_shape)}: pass "
                "--config points, or other depths and features."
            )
        return VectorFlow(
            dim=self.dataset.dim, depth=config.depths[0], features=config.features, **options
        )

    def init(self, key: jax.Array, x: jax.Array) -> dict[str, Any]:
        variables = super().init(key, x)
        if self.dequantizer is None:
            return variables
        levels = jnp.zeros((1, *self.dataset.example_shape), jnp.int32)
        own = self.dequantizer.init(jax.random.fold_in(key, 1), levels, key)["params"]
        return {**variables, "params": {**variables["params"], DEQUANTIZER: own}}

    @cached_property
    def dequantizer(self) -> VariationalDequantization | None:
        """The learned dequantisation, where the config asks for it."""
        if self.config.dequantization == "uniform":
            return None
        return VariationalDequantization(
            self.dataset.num_levels or 0,
            self.config.dequantization_features,
            self.config.dequantization_couplings,
        )

    def _refuse_settings_of_points(self) -> None:
        config, data = self.config, self.dataset
        if len(config.depths) == 1 and len(config.features) > 1:
            own = "npz" if config.dataset.endswith(FILES) else config.dataset
            raise ValueError(
                f"{config.dataset} holds images {list(data.example_shape)}; depths "
                f"{config.depths} and features {config.features} are settings of points: pass "
                f"--config {own}, or other depths and features."
            )

    def loss(self, variables: Any, batch: Any, keys: jax.Array) -> tuple[jax.Array, dict, Metrics]:
        flow, updates = self.training_model.advance(variables)
        value, metrics = self.flow_loss(variables["params"], flow, batch, keys)
        return value, updates, metrics

    def flow_loss(
        self, params: Any, flow: Flow, batch: Any, keys: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """Return the loss of a flow whose power iterations have advanced, and further metrics."""
        batch = self.augmented(batch, keys)
        estimator = training_estimator(self.config, self.dataset)
        return jnp.mean(self.bits(params, flow, batch, estimator, keys)), {}

    def augmented(self, images: jax.Array, keys: jax.Array) -> jax.Array:
        """Crop and flip images at random, where the config asks for it."""
        if not self.config.augment:
            return images
        # 0 and 1 are what jax.random.split folds in, for the noise and the probes
        return crop_and_flip(images, jax.vmap(jax.random.fold_in, (0, None))(keys, 2))

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

        The noise is in units of a level. Uniform noise has log density 0. Points stay as they are.
        """
        if self.dequantizer is not None:
            own = {"params": params[DEQUANTIZER]}
            drawn: tuple[jax.Array, jax.Array] = self.dequantizer.apply(own, examples, keys)  # type: ignore[assignment]
            return drawn
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
        return self._validation_bits(variables, self._honest, _VALIDATED)

    def validate_further(self, variables: Any, found: dict[str, float]) -> dict[str, float]:
        """Return how far a biased objective flatters itself, in bits/dim, and the bound on that."""
        estimator = training_estimator(self.config, self.dataset)
        if not isinstance(estimator, TruncatedSeries):
            return {}
        pair = self._honest, estimator
        true, seen = (self._validation_bits(variables, e, _COMPARED) for e in pair)
        bound = training_bias_bound(self.config, self.dataset, found.get("sigma", 0.0))
        if true - seen > _TOLERATED and not self._has_warned:
            self._has_warned = True
            tell(
                f"The likelihood flatters itself by {true - seen:.2g} bits/dim: the series of "
                f"{self.config.num_terms} terms is too short for blocks that contract this little. "
                "--train-estimator roulette has no bias."
            )
        return {"flattery": true - seen, "loss_bias_bound": bound}

    @property
    def _honest(self) -> Estimator:
        return validation_estimator(self.config, self.dataset)

    def _validation_bits(self, variables: Any, estimator: Estimator, count: int) -> float:
        flow, examples = self.functions.flow(variables), self.dataset.validation[:count]
        return float(self._mean_bits(variables["params"], flow, jnp.asarray(examples), estimator))

    @cached_property
    def _mean_bits(self) -> Callable[..., jax.Array]:
        def mean_bits(params: Any, flow: Flow, examples: Any, estimator: Estimator) -> jax.Array:
            keys = example_keys(self.config.seed + 1, jnp.int32(0), jnp.arange(len(examples)))
            return jnp.mean(self.bits(params, flow, examples, estimator, keys))

        return jax.jit(mean_bits, static_argnums=3)

    def pictures(self, state: TrainState) -> dict[str, np.ndarray]:
        if not self.dataset.is_image:
            return {}
        grid = optionally("The picture of samples", self._picture_samples, state)
        samples = {} if grid is None else {"samples": grid}
        return {**samples, **super().pictures(state)}

    def _picture_samples(self, state: TrainState) -> np.ndarray:
        variables = self.functions.converge(state.averaged_variables)
        count = min(self.config.num_samples, figures.MOST_IMAGES)
        samples, _ = self._draw_samples(self.functions.invertible(variables), count)
        return figures.image_grid(samples[: figures.most_shown(samples)], 8)

    def evaluate(self, state: TrainState, folder: Path) -> Report:
        """Evaluate likelihood, inversion and samples.

        The likelihood is written as soon as it is known; ``samples_converged`` is None where the
        samples that are drawn next could not be.
        """
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
        report = {
            **likelihood.report(self.config),
            "likelihood_examples": len(self.dataset.test),
            **shipped.back.report,
        }
        self.conclude(folder, {**report, "samples_converged": None})
        if further := self.further(variables["params"], shipped):
            report |= further
            self.conclude(folder, {**report, "samples_converged": None})
        tell(f"Drawing {self.config.num_samples:,} samples …")
        drawn = optionally("The samples", self._draw_samples, shipped.flow, self.config.num_samples)
        samples, report["samples_converged"] = (None, None) if drawn is None else drawn
        return self.conclude(folder, report, *self._drawings(folder, shipped, samples))

    def further(self, params: Any, shipped: Shipped) -> Report:
        """Evaluate what a task has beside a density."""
        return {}

    def _draw_samples(self, flow: Flow, count: int) -> tuple[np.ndarray, bool]:
        """Draw samples, and say whether all their inverses converged."""
        key = jax.random.key(self.config.seed + 3)
        with jax.default_matmul_precision("highest"):
            samples, info = self.functions.sample(flow, key, count, 1.0)
        return np.asarray(samples), bool(info.converged.all())

    def _drawings(
        self, folder: Path, shipped: Shipped, samples: np.ndarray | None
    ) -> Iterator[Picture]:
        flow, _, test, back = shipped
        walk = folder / "walk.png"
        if not self.dataset.is_image:
            if samples is not None:
                yield folder / "density.png", draw_points, flow, self.dataset, samples
                if self.dataset.dim > 1 and len(test) > 1:
                    yield walk, draw_point_walk, self.functions, flow, back.latents, samples
            return
        if samples is not None:
            images = self.shown(samples)
            yield folder / "samples.png", figures.samples_beside_data, images, test[: len(images)]
        error = back.report["reconstruction_max_error"]
        pairs = test, self.shown(back.x), error
        yield folder / "reconstructions.png", figures.reconstructions, *pairs
        inverted = flow, back.latents, self.shown, self.config.num_samples
        yield walk, draw_image_walk, self.functions, *inverted

    def draw_curve(self, path: Path, log: MetricsLog, report: Report) -> None:
        values = (
            *log.series(self.curve_metric),
            *log.series("validation"),
            self.curve_name,
            {"test": report["bits_per_dim"]},
        )
        optionally(f"The picture {path}", figures.training_curve, path, *values)

    def rows(self, report: Report) -> list[tuple[str, str]]:
        return likelihood_rows(report, smoke=self.config.smoke)


def likelihood_rows(report: Report, *, smoke: bool = False) -> list[tuple[str, str]]:
    """Return the rows on a likelihood, with the targets that were missed.

    A smoke run is not expected to meet them: its rows do not say so in capitals.
    """
    miss = "target, not expected of a smoke run" if smoke else "TARGET MISSED"
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
        unbounded = "no bound on the bias is known: it takes a certified network"
        rows.append((miss, missed if math.isfinite(bias) else unbounded))
    if not stderr <= (target := report["bits_per_dim_target_stderr"]):
        missed = f"a standard error of {target:g} needs more than {draws} draws (--max-draws)"
        undefined = "the likelihood is not finite"
        rows.append((miss, missed if math.isfinite(report["bits_per_dim"]) else undefined))
    return rows
