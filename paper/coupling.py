"""A Glow-style coupling network as a classifier, for comparison with the i-ResNet.

It is written here because FlowJAX's couplings act on vectors, with dense conditioners, while
Table 3 compares convolutional networks on images. Each step is Glow's (Kingma & Dhariwal 2018):
ActNorm, an invertible 1×1 convolution, an affine coupling. Channels are padded, scales begin with a
squeeze, and the head is the i-ResNet classifier's.
"""

import bisect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from iresnet_jax import ActNorm, injective_pad, injective_unpad, squeeze, unsqueeze
from iresnet_jax.nn import num_parameters
from iresnet_jax.nn.classifier import Head
from train.classification import Classification
from train.configs import ClassificationConfig
from train.data import Dataset
from train.steps import TrainState
from train.task import Report

_INVERTED = 64

_DIAGNOSTICS = "diagnostics"


class GlowStep(nn.Module):
    """ActNorm, invertible 1×1 convolution, affine coupling; forward or inverse.

    ``features`` are the channels inside the conditioner.
    """

    features: int
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, inverse: bool = False) -> jax.Array:
        channels = x.shape[-1]
        half = channels // 2
        norm = self._actnorm(x)
        mixing = self.param("mixing", nn.initializers.orthogonal(), (channels, channels))
        if not inverse:
            x = norm.forward(x) @ mixing
        kept, moved = x[..., :half], x[..., half:]
        scale, shift = self._condition(kept, channels - half)
        if not self.is_initializing():
            self.sow(_DIAGNOSTICS, "smallest_scale", jnp.min(scale))
        moved = moved / scale - shift if inverse else (moved + shift) * scale
        x = jnp.concatenate([kept, moved], axis=-1)
        return norm.backward(x @ jnp.linalg.inv(mixing)) if inverse else x

    def _actnorm(self, x: jax.Array) -> ActNorm:
        return self.param("actnorm", lambda _: ActNorm.from_data(x, self.axis_name))

    def _condition(self, kept: jax.Array, channels: int) -> tuple[jax.Array, jax.Array]:
        """Compute scale and shift, initially 0.88 and 0.

        As in Glow the scale is a sigmoid. Nothing keeps it away from 0, and far from the training
        data it underflows to 0. Then the step is not injective, and its inverse is NaN.
        """
        h = nn.relu(nn.Conv(self.features, (3, 3))(kept))
        h = nn.relu(nn.Conv(self.features, (1, 1))(h))
        last = nn.Conv(2 * channels, (3, 3), kernel_init=nn.initializers.zeros)(h)
        scale, shift = jnp.split(last, 2, axis=-1)
        return nn.sigmoid(scale + 2.0), shift


class CouplingClassifier(nn.Module, kw_only=True):
    """Glow steps at several resolutions under the i-ResNet classifier's head; float32.

    Attributes:
      depths: steps of each scale; all but the first begin with a squeeze.
      features: channels inside the conditioners of each scale.
      padding: zero channels appended to the image.
      axis_name: mapped axis over which statistics are averaged.
      precision, remat: set by the training step for every model; unused here.
    """

    depths: Sequence[int]
    features: Sequence[int]
    num_classes: int
    padding: int = 0
    axis_name: str | None = None
    precision: str = "float32"
    remat: bool = False

    def setup(self):
        self.steps = [
            [GlowStep(width, self.axis_name) for _ in range(depth)]
            for depth, width in zip(self.depths, self.features, strict=True)
        ]
        self.head = Head(self.num_classes, self.axis_name)

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Map images [batch, height, width, channels] to logits [batch, num_classes]."""
        return self.head(self.features_of(x), train=train)

    def features_of(self, x: jax.Array) -> jax.Array:
        """Return the head's input, an invertible function of x."""
        x = injective_pad(x, self.padding) if self.padding else x
        for i, steps in enumerate(self.steps):
            x = squeeze(x) if i else x
            for step in steps:
                x = step(x)
        return x

    def inverse(self, z: jax.Array) -> jax.Array:
        """Map latents to images, in closed form."""
        for i, steps in reversed(list(enumerate(self.steps))):
            for step in reversed(steps):
                z = step(z, inverse=True)
            z = unsqueeze(z) if i else z
        return injective_unpad(z, self.padding) if self.padding else z

    def flow(self, variables: Any) -> "CouplingClassifier":
        """Return the model bound to its variables."""
        return self.bind(variables)

    def converge(self, variables: Any) -> Any:
        """Return the variables: without constrained norms there is nothing to converge."""
        return variables


class Coupling(Classification):
    """A config's classification task, with a coupling network of about so many parameters."""

    def __init__(self, config: ClassificationConfig, target_parameters: int):
        dataset = self.load(config)
        model: Any = build_model(config, dataset, target_parameters)
        super().__init__(config, dataset, model)

    def validate(self, state: TrainState) -> dict[str, float]:
        return {"validation": self.score(state.averaged_variables)}

    def pictures(self, state: TrainState) -> dict[str, np.ndarray]:
        return {}

    def evaluate(self, state: TrainState, folder: Path) -> Report:
        """Evaluate accuracy, and the reconstruction of images from latents."""
        del folder
        variables = self.recalibrate(state.averaged_variables)
        correct = self.classify(variables, self.dataset.test) == self.dataset.labels("test")
        x = self.inputs(self.dataset.test[:_INVERTED])
        return {"accuracy": float(np.mean(correct)), **reconstruction(self.model, variables, x)}

    def rows(self, report: Report) -> list[tuple[str, str]]:
        return [("test accuracy", f"{report['accuracy']:.2%}")]


def build_model(
    config: ClassificationConfig, dataset: Dataset, target_parameters: int
) -> CouplingClassifier:
    """Build the classifier of the config's depth whose size is closest to the target."""

    def model(width: int) -> CouplingClassifier:
        return CouplingClassifier(
            depths=config.depths,
            features=tuple(width * 2**i for i in range(len(config.depths))),
            num_classes=dataset.num_classes,
            padding=config.padding,
        )

    def size(width: int) -> int:
        example = jax.ShapeDtypeStruct((1, *dataset.image_shape), "float32")
        return num_parameters(jax.eval_shape(model(width).init, jax.random.key(0), example))

    wider = 1 + bisect.bisect_left(range(1, 1025), target_parameters, key=size)
    widths = max(wider - 1, 1), wider
    return model(min(widths, key=lambda width: abs(size(width) - target_parameters)))


def reconstruction(model: CouplingClassifier, variables: Any, x: np.ndarray) -> Report:
    """Measure the reconstruction of images from latents, and the smallest scale on the way."""
    flow = model.flow(variables)
    back = jax.jit(lambda x: flow.inverse(flow.features_of(x)))(x)
    errors = np.abs(np.asarray(back) - x).max((1, 2, 3))
    _, found = model.apply(variables, x, method="features_of", mutable=[_DIAGNOSTICS])
    return {
        "reconstruction_max_error": float(errors.max()),
        "reconstructions_finite": int(np.isfinite(errors).sum()),
        "smallest_scale": float(min(jax.tree.leaves(found[_DIAGNOSTICS]))),
    }
