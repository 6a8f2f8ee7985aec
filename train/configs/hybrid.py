"""Hybrids: one network that is a density of images and a classifier of them.

Published (Chen et al. 2019, arXiv 1906.02735, Table 3; the weight of the likelihood as a share of
its dimensions): residual flows on CIFAR-10 with weights 1/D and 1.
"""

import dataclasses
from typing import ClassVar, Self

from train.configs.base import at_least, named, within
from train.configs.density import DENSITY, UNBIASED, DensityConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class HybridConfig(DensityConfig):
    """Train an invertible residual network as a density model whose latents tell the classes."""

    program: ClassVar[str] = "hybrid"

    likelihood_weight: float = 1.0
    """Weight α of the negative log-likelihood, in nats per dimension, beside the cross-entropy."""
    head_features: int = 64
    """Channels of the head's convolution on each scale's latents."""
    unknown: tuple[str, ...] = ("noise", "shuffled", "inverted")
    """What the log-density is asked to tell from the test set: noise (uniform grey levels), the
    test images with their pixels shuffled, the same for all images, or inverted; or the test set of
    another data set of the same shape."""

    def check(self) -> None:
        super().check()
        at_least(self, 1, "head_features")
        within(self, "[0, inf)", "likelihood_weight")

    def smoke_variant(self) -> Self:
        return dataclasses.replace(super().smoke_variant(), head_features=8)


def _hybrid(density: str) -> HybridConfig:
    return HybridConfig(**{**vars(DENSITY[density]), **UNBIASED})


HYBRID = named(
    {
        "digits": _hybrid("digits"),
        "mnist": _hybrid("mnist"),
        "mnist-small": _hybrid("mnist-small"),
        "cifar10": _hybrid("cifar10"),
        #: A user's own images and labels, in an .npz file.
        "npz": _hybrid("npz"),
    }
)
