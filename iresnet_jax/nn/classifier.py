"""The paper's classifier, and new statistics for the BatchNorm in its head.

BatchNorm's statistics describe the network as it was in training. Averaged parameters, or kernels
scaled to their rigorous bounds, make another network: :func:`recalibrated` gives it its own.
"""

from collections.abc import Iterable
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from iresnet_jax.bijections import Bijection
from iresnet_jax.checks import check_at_least_one
from iresnet_jax.flows import Flow
from iresnet_jax.nn.models import Domain, ImageNetwork
from iresnet_jax.nn.variables import Variables
from iresnet_jax.transforms import Pad
from iresnet_jax.types import AnyArray, Batch

Scores = Float[Array, "batch classes"]
PerChannel = Float[Array, " channels"]


class InvertibleClassifier(ImageNetwork, kw_only=True):
    """The paper's classifier: an invertible network, then BatchNorm, ReLU, pooling, a linear layer.

    The head mixes the batch (BatchNorm) and is not invertible; the network below it is.

    Attributes:
      num_classes: number of classes.
      padding: zero channels appended to the image (injective padding).
      squeeze_first: as published, the first scale keeps the image's resolution.
      domain: "real" where the caller normalises images.
    """

    num_classes: int = 10
    padding: int = 0
    squeeze_first: bool = False
    domain: Domain = "real"

    def setup(self) -> None:
        check_at_least_one("num_classes", self.num_classes)
        self.head = Head(self.num_classes, self.axis_name)

    def __call__(self, x: AnyArray, *, train: bool = False) -> Scores:
        """Return logits; with ``train``, BatchNorm uses the batch's statistics."""
        return self.head(self.features_of(x), train=train)

    def features_of(self, x: AnyArray) -> Batch:
        """Return what the head sees [batch, ...]: the invertible network's output."""
        return self._forward(x)[-1]

    @nn.compact
    def pure(self, x: Batch | None = None) -> Flow:
        """Return the invertible part as a pytree, from within a module."""
        return Flow(self._levels(x, factor_out=False), tuple(self.image_shape))

    def _entrance(self) -> tuple[Bijection, ...]:
        padding = (Pad(self.padding),) if self.padding else ()
        return (*super()._entrance(), *padding)


class Head(nn.Module):
    """BatchNorm, ReLU, global average pooling, linear."""

    num_classes: int
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Batch, *, train: bool) -> Scores:
        x = nn.BatchNorm(
            use_running_average=not train, momentum=0.9, axis_name=self.axis_name, name="norm"
        )(x)
        x = nn.relu(x).mean(axis=tuple(range(1, x.ndim - 1)))
        return nn.Dense(self.num_classes, precision="highest", name="linear")(x)


class FeatureMoments(NamedTuple):
    """Mean and variance of the features of a batch, by channel.

    Attributes:
      num_images: in the batch.
      mean: E[h] over batch and pixels, [channels].
      var: E[(h − E[h])²], [channels].
    """

    num_images: int
    mean: PerChannel
    var: PerChannel


def feature_moments(model: nn.Module, variables: Variables, x: AnyArray) -> FeatureMoments:
    """Compute the moments of ``model.features_of(x)``, what a classifier's head sees; to be jitted.

    Raises:
      ValueError: for no image, or images of another shape.
    """
    if not len(x):
        raise ValueError(f"feature_moments needs an image; got an array of shape {x.shape}.")
    h = jnp.asarray(model.apply(variables, x, method="features_of"))
    axes = tuple(range(h.ndim - 1))
    return FeatureMoments(len(x), jnp.mean(h, axes), jnp.var(h, axes))


def recalibrated(variables: Variables, batches: Iterable[FeatureMoments]) -> Variables:
    """Return the variables with BatchNorm's statistics those of the batches together.

    With n_b images in batch b, n = Σ n_b:  μ = Σ n_b μ_b / n,  v = Σ n_b (v_b + (μ_b − μ)²) / n.
    Known as precise BatchNorm (Wu & Johnson 2021, arXiv:2105.07576). All else stays as it is.

    Args:
      variables: a classifier's, with a :class:`Head` named "head".
      batches: moments of training images' features, under these very variables; images of every
        class belong among them.

    Raises:
      ValueError: without a batch, without such a head, or for another number of channels.
    """
    moments = list(batches)
    if not moments:
        raise ValueError("recalibrated needs the moments of at least one batch; got none.")
    old = variables.get("batch_stats", {}).get("head", {}).get("norm")
    if old is None:
        names = ", ".join(sorted(variables))
        raise ValueError(
            f"The variables, of collections {names}, have no BatchNorm in a head to recalibrate."
        )
    for m in moments:
        _check_channels(m, old["mean"].shape)
    total = sum(m.num_images for m in moments)
    mean = sum(m.mean * (m.num_images / total) for m in moments)
    var = sum((m.var + (m.mean - mean) ** 2) * (m.num_images / total) for m in moments)
    new = {k: jnp.asarray(v, old[k].dtype) for k, v in (("mean", mean), ("var", var))}
    stats = variables["batch_stats"]
    head = {**stats["head"], "norm": {**old, **new}}
    return {**variables, "batch_stats": {**stats, "head": head}}


def _check_channels(moments: FeatureMoments, shape: tuple[int, ...]) -> None:
    for name in ("mean", "var"):
        if (found := getattr(moments, name).shape) != shape:
            raise ValueError(
                f"The moments' {name} has shape {found}; this classifier's features have {shape}."
            )
