"""Densities of MNIST and CIFAR-10, at the published scales and at one for two CPU cores.

Published (Behrmann et al. 2019, Table 4): MNIST 1.06, CIFAR-10 3.45 bits/dim. What 1.06 counts is
not said. The authors' released code pads MNIST to 32×32, repeats it to three channels, and divides
by the entries of what the network sees, never by 784. If 1.06 is of a padded image of one channel,
1,024 dimensions, and the padding costs nothing, it is 1.38 on 784. ``mnist-padded`` is that set-up;
the other MNIST experiments are on 28×28, with two scales, since 28 can be halved twice.
"""

import dataclasses
from pathlib import Path

from train.configs.base import DensityConfig

_CIFAR10_EPOCH = 48_000 // 128
_MNIST_EPOCH = 58_000 // 128

#: The authors' script (dens_est_cifar.sh): 3 scales of 16 blocks, 512 filters, 5 terms, Adamax, an
#: epoch of warm-up, augmented images.
CIFAR10 = DensityConfig(
    dataset="cifar10",
    workdir=Path("runs/density-cifar10"),
    depths=(16, 16, 16),
    features=(512, 512, 512),
    coeff=0.9,
    augment=True,
    power_steps=5,
    num_terms=5,
    optimizer="adamax",
    learning_rate=3e-3,
    schedule="constant",
    warmup_steps=_CIFAR10_EPOCH,
    steps=200 * _CIFAR10_EPOCH,
    batch_size=128,
    remat=True,
    ema_decay=0.999,
    validate_every=_CIFAR10_EPOCH,
    picture_every=5 * _CIFAR10_EPOCH,
    checkpoint_every=_CIFAR10_EPOCH,
)

_MNIST = dataclasses.replace(
    CIFAR10,
    dataset="mnist",
    augment=False,
    depths=(16, 16),
    features=(512, 512),
    warmup_steps=_MNIST_EPOCH,
    steps=100 * _MNIST_EPOCH,
    validate_every=_MNIST_EPOCH,
    picture_every=5 * _MNIST_EPOCH,
    checkpoint_every=_MNIST_EPOCH,
)

CONFIGS = {
    "cifar10": CIFAR10,
    #: The paper: 32 blocks a scale.
    "cifar10-paper": dataclasses.replace(CIFAR10, depths=(32, 32, 32)),
    "mnist": _MNIST,
    #: The paper: 32 blocks a scale, 32 filters, 10 terms.
    "mnist-paper": dataclasses.replace(_MNIST, depths=(32, 32), features=(32, 32), num_terms=10),
    "mnist-padded": dataclasses.replace(
        _MNIST, margin=2, depths=(32, 32, 32), features=(32, 32, 32), num_terms=10
    ),
    #: For two CPU cores and twenty minutes.
    "mnist-small": dataclasses.replace(
        _MNIST,
        depths=(6, 6),
        features=(32, 32),
        coeff=0.95,
        domain="logit",
        power_steps=1,
        optimizer="adamw",
        learning_rate=4e-3,
        schedule="cosine",
        warmup_steps=100,
        steps=4000,
        batch_size=64,
        validate_every=500,
        picture_every=1000,
        checkpoint_every=500,
        max_draws=4,
        num_reconstructed=256,
    ),
    "cifar100": dataclasses.replace(CIFAR10, dataset="cifar100"),
    "fashion_mnist": dataclasses.replace(_MNIST, dataset="fashion_mnist"),
    #: A user's own images, in an .npz file.
    "npz": dataclasses.replace(CIFAR10, dataset="images.npz", augment=False),
    "svhn_cropped": dataclasses.replace(CIFAR10, dataset="svhn_cropped", augment=False),
}
CONFIGS = {
    name: dataclasses.replace(config, workdir=Path(f"runs/density-{name}"))
    for name, config in CONFIGS.items()
}
