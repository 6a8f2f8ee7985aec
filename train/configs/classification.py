"""Classifiers of the digits, CIFAR-10, CIFAR-100 and MNIST, at the published scales and small.

Measured: 98.9% of the held-out digits (seed 0; standard error 0.6%).

Published test errors in % (Behrmann et al. 2019, Table 2; quoted from memory, not yet checked
against the paper; 54 blocks on CIFAR, 21 on MNIST), for the vanilla ResNet (``--coeff None``) and
for c = 0.9, 0.8, 0.7, 0.6, 0.5:

========= ======= ===== ===== ===== ===== =====
           vanilla   0.9   0.8   0.7   0.6   0.5
========= ======= ===== ===== ===== ===== =====
MNIST        0.38  0.40  0.42  0.40  0.42  0.86
CIFAR-10     6.69  6.78  6.86  6.93  7.72  8.71
CIFAR-100   23.97 24.58 24.99 25.99 27.30 29.45
========= ======= ===== ===== ===== ===== =====
"""

import dataclasses
from dataclasses import replace
from typing import ClassVar

from train.configs.base import TrainingConfig, at_least, named, within


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassificationConfig(TrainingConfig):
    """Train an invertible residual network as a classifier."""

    program: ClassVar[str] = "classification"

    padding: int = 0
    """Zero channels to append to the image (injective padding)."""
    mean: tuple[float, ...] = (0.5,)
    """Subtract from images in [0, 1]: one number, or one per channel."""
    std: tuple[float, ...] = (1.0,)
    """Then divide by: one number, or one per channel."""

    def check(self) -> None:
        super().check()
        at_least(self, 0, "padding")
        # Beyond these, float32 would keep few of the grey levels apart.
        within(self, "(-1000, 1000)", "mean")
        within(self, "(1e-6, 1e6)", "std")


_DIGITS = ClassificationConfig(
    dataset="digits",
    depths=(3, 3),
    features=(32, 32),
    padding=3,
    steps=1000,
    weight_decay=1e-3,
    ema_decay=0.99,
    validate_every=200,
)

_EPOCH = 48_000 // 128

#: The authors' script (classify_cifar.sh): 7-7-7 blocks, 32-64-128 filters, 13 injected channels,
#: 200 epochs, the first ten of them warming up.
_CIFAR10 = ClassificationConfig(
    dataset="cifar10",
    depths=(7, 7, 7),
    features=(32, 64, 128),
    padding=13,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2023, 0.1994, 0.2010),
    augment=True,
    optimizer="sgd",
    learning_rate=0.1,
    weight_decay=5e-4,
    schedule="steps",
    warmup_steps=10 * _EPOCH,
    steps=200 * _EPOCH,
    ema_decay=0.0,
    validate_every=_EPOCH,
    checkpoint_every=_EPOCH,
    num_reconstructed=500,
)

_CIFAR100 = replace(
    _CIFAR10, dataset="cifar100", mean=(0.5071, 0.4867, 0.4408), std=(0.2675, 0.2565, 0.2761)
)

#: For two CPU cores and a quarter of an hour.
_CIFAR10_SMALL = replace(
    _CIFAR10,
    depths=(2, 2, 2),
    features=(16, 32, 64),
    activation="maxmin",
    optimizer="muon",
    learning_rate=0.03,
    weight_decay=0.0,
    schedule="cosine",
    warmup_steps=100,
    steps=1500,
    batch_size=64,
    ema_decay=0.99,
    validate_every=250,
    checkpoint_every=250,
    num_reconstructed=256,
)

_UNAUGMENTED = replace(_CIFAR10, mean=(0.5,), augment=False)

CLASSIFICATION = named(
    {
        "digits": _DIGITS,
        "cifar10": _CIFAR10,
        #: i-ResNet-164: 54 blocks.
        "cifar10-paper": replace(_CIFAR10, depths=(18, 18, 18)),
        "cifar100": _CIFAR100,
        "cifar100-paper": replace(_CIFAR100, depths=(18, 18, 18)),
        "mnist": replace(_UNAUGMENTED, dataset="mnist", padding=15, mean=(0.1307,), std=(0.3081,)),
        "cifar10-small": _CIFAR10_SMALL,
        "fashion_mnist": replace(
            _CIFAR10, dataset="fashion_mnist", padding=15, mean=(0.286,), std=(0.353,)
        ),
        #: A user's own images and labels, in an .npz file.
        "npz": replace(_UNAUGMENTED, dataset="images.npz", std=(0.25,)),
        "svhn_cropped": replace(_UNAUGMENTED, dataset="svhn_cropped", std=(0.2,)),
    }
)
