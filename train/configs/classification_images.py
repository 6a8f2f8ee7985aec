"""Classification of CIFAR-10, CIFAR-100 and MNIST, at the published scales and a small one.

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
from pathlib import Path

from train.configs.base import ClassificationConfig

_EPOCH = 48_000 // 128

#: The authors' script (classify_cifar.sh): 7-7-7 blocks, 32-64-128 filters, 13 injected channels,
#: 200 epochs, the first ten of them warming up.
CIFAR10 = ClassificationConfig(
    dataset="cifar10",
    workdir=Path("runs/classification-cifar10"),
    depths=(7, 7, 7),
    features=(32, 64, 128),
    padding=13,
    coeff=0.9,
    power_steps=1,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2023, 0.1994, 0.2010),
    augment=True,
    optimizer="sgd",
    learning_rate=0.1,
    weight_decay=5e-4,
    schedule="steps",
    milestones=(0.3, 0.6, 0.8),
    milestone_factor=0.2,
    warmup_steps=10 * _EPOCH,
    steps=200 * _EPOCH,
    batch_size=128,
    ema_decay=0.0,
    validate_every=_EPOCH,
    checkpoint_every=_EPOCH,
    num_reconstructed=500,
)

_CIFAR100 = dataclasses.replace(
    CIFAR10, dataset="cifar100", mean=(0.5071, 0.4867, 0.4408), std=(0.2675, 0.2565, 0.2761)
)

CONFIGS = {
    "cifar10": CIFAR10,
    #: i-ResNet-164: 54 blocks.
    "cifar10-paper": dataclasses.replace(CIFAR10, depths=(18, 18, 18)),
    "cifar100": _CIFAR100,
    "cifar100-paper": dataclasses.replace(_CIFAR100, depths=(18, 18, 18)),
    "mnist": dataclasses.replace(
        CIFAR10, dataset="mnist", padding=15, mean=(0.1307,), std=(0.3081,), augment=False
    ),
    #: For two CPU cores and ten minutes.
    "cifar10-small": dataclasses.replace(
        CIFAR10,
        depths=(2, 2, 2),
        features=(16, 32, 64),
        optimizer="nesterov",
        schedule="cosine",
        learning_rate=0.1,
        warmup_steps=100,
        steps=1500,
        batch_size=64,
        ema_decay=0.99,
        validate_every=250,
        checkpoint_every=250,
        num_reconstructed=256,
    ),
    "fashion_mnist": dataclasses.replace(
        CIFAR10, dataset="fashion_mnist", padding=15, mean=(0.286,), std=(0.353,)
    ),
    #: A user's own images and labels, in an .npz file.
    "npz": dataclasses.replace(
        CIFAR10, dataset="images.npz", mean=(0.5,), std=(0.25,), augment=False
    ),
    "svhn_cropped": dataclasses.replace(
        CIFAR10, dataset="svhn_cropped", mean=(0.5,), std=(0.2,), augment=False
    ),
}
CONFIGS = {
    name: dataclasses.replace(config, workdir=Path(f"runs/classification-{name}"))
    for name, config in CONFIGS.items()
}
