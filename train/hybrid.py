"""``python -m train hybrid``: density of images and their classes in one network."""

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.stats import mannwhitneyu

from iresnet_jax import Estimator, Flow, bits_per_dim
from train.catalogue import PROGRAMS
from train.classification import accuracy_report, accuracy_row
from train.configs.hybrid import HYBRID, HybridConfig
from train.data import Dataset, load_dataset
from train.density import Density
from train.estimators import evaluation_estimator, training_estimator
from train.evaluation import padded_batches
from train.likelihood import examples_at_once
from train.steps import Metrics, example_keys
from train.task import Report, Shipped
from train.terminal import tell

#: log p(x) in nats, [images], and the classes' probabilities, [images, classes].
Scores = tuple[np.ndarray, np.ndarray]

#: Name of the head among the parameters.
HEAD = "head"

_AT_ONCE, _SCORED = 250, 1000
#: Images that no image of the test set looks like, made of it: (levels, number of levels, rng).
_MADE: Mapping[str, Callable[[np.ndarray, int, np.random.Generator], np.ndarray]] = {
    "noise": lambda x, levels, rng: rng.integers(0, levels, x.shape).astype(x.dtype),
    "shuffled": lambda x, levels, rng: _shuffled(x, rng),
    "inverted": lambda x, levels, rng: (levels - 1 - x).astype(x.dtype),
}


class Head(nn.Module):
    """Logits of a flow's latents: a convolution on each, its mean, and a linear layer on all."""

    features: int
    num_classes: int

    @nn.compact
    def __call__(self, latents: tuple[jax.Array, ...]) -> jax.Array:
        parts = []
        for i, z in enumerate(latents):
            layer = nn.Conv(self.features, (3, 3), precision="highest", name=f"convolution_{i}")
            parts.append(jnp.mean(nn.silu(layer(z)), axis=(1, 2)))
        linear = nn.Dense(self.num_classes, precision="highest", name="linear")
        out: jax.Array = linear(jnp.concatenate(parts, axis=-1))
        return out


class Hybrid(Density):
    """−(α/d) log p(x) − log p(y | x) in nats, the classes told by a head on the latents."""

    config: HybridConfig
    experiments: ClassVar[Mapping[str, Any]] = HYBRID
    purpose: ClassVar[str] = PROGRAMS["hybrid"].purpose
    with_labels: ClassVar[bool] = True
    shown_metrics: ClassVar[tuple[str, ...]] = ("bits_per_dim", "accuracy")
    curve_metric: ClassVar[str] = "bits_per_dim"

    @property
    def loss_name(self) -> str:  # type: ignore[override]
        return "loss"

    @classmethod
    def load(cls, config: HybridConfig) -> Dataset:  # type: ignore[override]
        dataset = super().load(config)
        if not dataset.is_image:
            raise ValueError(f"hybrid is for images; {config.dataset!r} holds points.")
        dataset.labels("train")
        for name in config.unknown:
            unknown_images(name, config, dataset, 1)
        return dataset

    @cached_property
    def head(self) -> Head:
        """The head on the latents."""
        return Head(self.config.head_features, self.dataset.num_classes)

    def init(self, key: jax.Array, x: jax.Array) -> dict[str, Any]:
        variables = super().init(key, x)
        latents = jax.eval_shape(self.model.apply, variables, x)
        zeros = tuple(jnp.zeros((1, *z.shape[1:]), z.dtype) for z in latents)
        own = self.head.init(jax.random.fold_in(key, 2), zeros)["params"]
        return {**variables, "params": {**variables["params"], HEAD: own}}

    def flow_loss(
        self, params: Any, flow: Flow, batch: Any, keys: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        images, labels = batch
        images = self.augmented(images, keys)
        estimator = training_estimator(self.config, self.dataset)
        log_prob, latents = self._log_prob(params, flow, images, estimator, keys)
        logits = self._logits(params, latents)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        weighted = self.config.likelihood_weight / flow.dim * jnp.mean(log_prob)
        metrics = {
            "bits_per_dim": jnp.mean(self._as_bits(log_prob, flow.dim)),
            "accuracy": jnp.mean(jnp.argmax(logits, -1) == labels),
        }
        return jnp.mean(losses) - weighted, metrics

    def bits(
        self, params: Any, flow: Flow, examples: jax.Array, estimator: Estimator, keys: jax.Array
    ) -> jax.Array:
        log_prob, _ = self._log_prob(params, flow, examples, estimator, keys)
        return self._as_bits(log_prob, flow.dim)

    def _as_bits(self, log_prob: jax.Array, dim: int) -> jax.Array:
        return bits_per_dim(log_prob, dim, self.dataset.num_levels or 1)

    def _log_prob(
        self, params: Any, flow: Flow, images: jax.Array, estimator: Estimator, keys: jax.Array
    ) -> tuple[jax.Array, Any]:
        """log p(x) − log q(noise) of each image in nats, and its latents, for one draw of noise."""
        noise, probes = jax.vmap(lambda k: tuple(jax.random.split(k)))(keys)
        x, log_noise = self.dequantize(params, images, noise)
        latents, log_det = flow.forward_and_log_det(x, estimator, key=probes)
        return flow.prior_log_prob(latents) + log_det - log_noise, latents

    def _logits(self, params: Any, latents: Any) -> jax.Array:
        out: jax.Array = self.head.apply({"params": params[HEAD]}, latents)  # type: ignore[assignment]
        return out

    # Evaluation

    def further(self, params: Any, shipped: Shipped) -> Report:
        """Evaluate the accuracy, and what log p(x) and the classes' probabilities tell apart."""
        test, labels = self.dataset.test, self.dataset.labels("test")
        tell(f"Classifying {len(test):,} test images, and telling them from others …")
        estimator = evaluation_estimator(self.config, shipped.certificate, shipped.flow.dim)
        score = self._scorer(params, shipped.flow.with_bounds(shipped.certificate), estimator)
        typical = float(np.mean(score(self.dataset.validation[:_SCORED])[0]))
        known = score(test)
        predicted = known[1].argmax(-1)
        unknown = {
            name: told_apart(
                known, score(unknown_images(name, self.config, self.dataset, _SCORED)), typical
            )
            for name in self.config.unknown
        }
        accuracy = float(np.mean(predicted == labels))
        return {**accuracy_report(accuracy, len(test)), "unknown": unknown}

    def _scorer(self, params: Any, flow: Flow, estimator: Estimator) -> Callable[..., Scores]:
        at_once = min(_AT_ONCE, examples_at_once(estimator, flow.dim))

        @jax.jit
        def scored(flow: Flow, images: jax.Array, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
            log_prob, latents = self._log_prob(params, flow, images, estimator, keys)
            return log_prob, jax.nn.softmax(self._logits(params, latents))

        def score(images: np.ndarray) -> Scores:
            parts = []
            for i, (batch, count) in enumerate(padded_batches(images, at_once, 1, fill=True)):
                indices = i * at_once + jnp.arange(at_once)
                keys = example_keys(self.config.seed + 4, jnp.int32(0), indices)
                with jax.default_matmul_precision("highest"):
                    found = scored(flow, batch, keys)
                parts.append([np.asarray(a, np.float64)[:count] for a in found])
            log_prob, probabilities = map(np.concatenate, zip(*parts, strict=True))
            return log_prob, probabilities

        return score

    def rows(self, report: Report) -> list[tuple[str, str]]:
        found = [
            (f"told from {name} (AUROC)", _told(areas)) for name, areas in report["unknown"].items()
        ]
        return [*super().rows(report), accuracy_row(report), *found]


def told_apart(known: Scores, unknown: Scores, typical: float) -> dict[str, float]:
    """Return the areas under the ROC curve by which scores tell unknown images from known ones.

    The scores are −log p(x); |log p(x) − typical|, for images may be too likely (Nalisnick et al.
    2019); and 1 − max p(y | x) (Hendrycks and Gimpel 2017). One half is chance.
    """
    (known_log, known_classes), (log, classes) = known, unknown
    return {
        "log_prob": _area(-known_log, -log),
        "typicality": _area(abs(known_log - typical), abs(log - typical)),
        "confidence": _area(-known_classes.max(-1), -classes.max(-1)),
    }


def _area(known: np.ndarray, unknown: np.ndarray) -> float:
    """P(a score of an unknown image exceeds one of a known image), ties counting one half."""
    largest = np.finfo(np.float64).max
    scores = [
        np.nan_to_num(a, nan=largest, posinf=largest, neginf=-largest) for a in (unknown, known)
    ]
    return float(mannwhitneyu(*scores).statistic / (len(known) * len(unknown)))


def _told(areas: Mapping[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {area:.3f}" for name, area in areas.items())


def unknown_images(name: str, config: HybridConfig, dataset: Dataset, count: int) -> np.ndarray:
    """Return at most ``count`` images that a model of ``dataset`` does not know.

    Raises:
      ValueError: for a data set of another shape, or other grey levels.
    """
    if name in _MADE:
        rng = np.random.default_rng(config.seed)
        return _MADE[name](dataset.test[:count], dataset.num_levels or 0, rng)
    other = load_dataset(
        name, data_dir=config.data_dir, max_examples=count, margin=config.pixels_added
    )
    wanted, found = ((d.example_shape, d.num_levels) for d in (dataset, other))
    if wanted != found:
        raise ValueError(
            f"unknown {name!r} has images of shape {found[0]} with {found[1]} grey levels; "
            f"{dataset.name!r} has images of shape {wanted[0]} with {wanted[1]}."
        )
    return other.test[:count]


def _shuffled(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    flat = images.reshape(len(images), -1)
    return flat[:, rng.permutation(flat.shape[1])].reshape(images.shape)
