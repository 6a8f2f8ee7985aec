"""Densities of digits, of points in the plane, and of MNIST and CIFAR-10.

Measured: 1.815 held-out bits/dim of the digits (seed 0); 2.557 of the checkerboard (test, seed 0),
whose entropy is 2.5.

Published (Behrmann et al. 2019, Table 4): MNIST 1.06, CIFAR-10 3.45 bits/dim. The paper does not
say what 1.06 counts. The authors' released code pads MNIST to 32×32, repeats it to three channels,
and divides by the number of entries that the network sees, never by 784. If 1.06 is for a padded
image of one channel, 1,024 dimensions, and the padding costs nothing, it is 1.38 on 784.
``mnist-padded`` is that set-up; the other MNIST experiments are on 28×28, with two scales, since 28
can be halved twice.
The paper shows densities in the plane (Figure 2) and quotes no numbers for them.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

from train.configs.base import TrainingConfig, at_least, named, within

LogDetEstimator = Literal["series", "roulette", "exact"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DensityConfig(TrainingConfig):
    """Train an invertible residual network as a density model."""

    program: ClassVar[str] = "density"
    needs: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **TrainingConfig.needs,
        "continuation": ("train_estimator", "roulette"),
        "shared_length": ("train_estimator", "roulette"),
        "num_terms": ("train_estimator", "series", "roulette"),
        "target_bias": ("eval_estimator", "series"),
        "dequantization_features": ("dequantization", "variational"),
        "dequantization_couplings": ("dequantization", "variational"),
    }

    domain: Literal["centered", "logit"] = "centered"
    """Images: the network sees x − 0.5, or the logit of x."""
    dequantization: Literal["uniform", "variational"] = "uniform"
    """Images: noise within each grey level, uniform, or learned by a small conditional flow, which
    tightens the bound on the likelihood of the discrete images."""
    dequantization_features: int = 32
    """Variational dequantisation: channels of its convolutions."""
    dequantization_couplings: int = 4
    """Variational dequantisation: number of its couplings."""
    train_estimator: LogDetEstimator = "series"
    """Log-determinant in training: the truncated series, biased; Russian roulette, unbiased and
    slower; or the full Jacobian, for few dimensions."""
    num_terms: int = 5
    """Terms of the series in training; of the roulette, the terms that are always taken."""
    continuation: float | None = None
    """Probability q with which the roulette takes a further term in training; by default L, the
    product of the layers' coeff, or of concatenations coeff. Smaller is cheaper and noisier."""
    shared_length: bool = False
    """Draw one length of the roulette a block and device in training, not one a sample: cheaper."""
    eval_estimator: LogDetEstimator = "series"
    """Log-determinant in evaluation; the series takes the terms that the target bias needs."""
    target_bias: float = 1e-3
    """Certified bound on the truncation bias of the reported likelihood, in bits/dim."""
    target_stderr: float = 2e-3
    """Standard error, over probes and dequantisation, to reach in evaluation, in bits/dim."""
    max_draws: int = 64
    """Draws of probes and dequantisation in evaluation, at most."""
    importance_samples: int = 1
    """Images: dequantisations K of the importance-weighted bound, reported beside the plain one.
    K > 1 needs --eval-estimator exact: noise in a log-determinant would bias it."""
    num_samples: int = 64
    """Number of samples to draw; a picture shows the first 1024 at most."""

    def check(self) -> None:
        super().check()
        if self.coeff is None:
            raise ValueError("coeff must lie in (0, 1) for a density model; got None.")
        at_least(self, 1, "num_terms", "num_samples", "importance_samples")
        at_least(self, 1, "dequantization_features", "dequantization_couplings")
        if self.importance_samples > 1 and self.eval_estimator != "exact":
            raise ValueError(
                f"importance_samples = {self.importance_samples} needs eval_estimator exact; got "
                f"{self.eval_estimator!r}, whose noise would make the likelihood look better."
            )
        at_least(self, 2 * self.importance_samples, "max_draws")
        within(self, "(1e-12, inf)", "target_bias", "target_stderr")
        within(self, "(0, 0.9999)", "continuation")

    def smoke_variant(self) -> Self:
        smaller = super().smoke_variant()
        return replace(
            smaller,
            max_draws=2 * self.importance_samples,
            num_samples=16,
            dequantization_features=8,
            dequantization_couplings=2,
        )


#: Log-determinants in training without bias, at the price of a short series.
UNBIASED: dict[str, Any] = {
    "train_estimator": "roulette",
    "num_terms": 4,
    "continuation": 0.7,
    "shared_length": True,
}

#: Three scales: 4×4×4, 2×2×8, 1×1×16.
_DIGITS = DensityConfig(
    dataset="digits",
    depths=(6, 6, 6),
    features=(48, 48, 48),
    coeff=0.97,
    activation="learned_elu",
    domain="logit",
    dequantization="variational",
    steps=1400,
    batch_size=64,
    optimizer="muon",
    learning_rate=0.02,
    weight_decay=0.1,
    ema_decay=0.999,
    **UNBIASED,
)

#: One scale of dense blocks, with the exact log-determinant.
_POINTS = DensityConfig(
    dataset="checkerboard",
    depths=(32,),
    features=(64, 64),
    coeff=0.99,
    activation="sin",
    train_estimator="exact",
    eval_estimator="exact",
    steps=6000,
    batch_size=200,
    optimizer="muon",
    learning_rate=0.02,
    warmup_steps=100,
    inverse_tolerance=1e-5,
    max_draws=2,
    num_samples=4000,
    num_reconstructed=1000,
)

#: The paper's architecture, 100 blocks of 2-64-64-64-2; the optimisation is ours.
_POINTS_PAPER = replace(
    _POINTS,
    depths=(100,),
    features=(64, 64, 64),
    coeff=0.9,
    activation="elu",
    power_steps=5,
    steps=50_000,
    batch_size=500,
    optimizer="adamw",
    learning_rate=1e-3,
    warmup_steps=50,
)


def _epochs(batches: int, count: int) -> Any:
    """Settings counted in epochs: a warm-up of one, validation and checkpoints after each."""
    return {
        "warmup_steps": batches,
        "steps": count * batches,
        "validate_every": batches,
        "picture_every": 5 * batches,
        "checkpoint_every": batches,
    }


#: The authors' script (dens_est_cifar.sh): 3 scales of 16 blocks, 512 filters, 5 terms, Adamax, an
#: epoch of warm-up, augmented images.
_CIFAR10 = DensityConfig(
    dataset="cifar10",
    depths=(16, 16, 16),
    features=(512, 512, 512),
    augment=True,
    power_steps=5,
    optimizer="adamax",
    schedule="constant",
    remat=True,
    ema_decay=0.999,
    **_epochs(48_000 // 128, 200),
)

_MNIST = replace(
    _CIFAR10,
    dataset="mnist",
    augment=False,
    depths=(16, 16),
    features=(512, 512),
    **_epochs(58_000 // 128, 100),
)

#: The paper: 32 blocks a scale, 32 filters, 10 terms.
_MNIST_PAPER = replace(_MNIST, depths=(32, 32), features=(32, 32), num_terms=10)

#: For two CPU cores: 50 minutes beside other jobs.
_MNIST_SMALL = replace(
    _MNIST,
    depths=(8, 8),
    features=(64, 64),
    coeff=0.97,
    mixing=True,
    domain="logit",
    dequantization="variational",
    dequantization_features=16,
    power_steps=1,
    optimizer="muon",
    learning_rate=0.04,
    weight_decay=0.05,
    schedule="cosine",
    warmup_steps=100,
    steps=4000,
    batch_size=64,
    validate_every=500,
    picture_every=1000,
    checkpoint_every=500,
    max_draws=4,
    num_reconstructed=256,
    **UNBIASED,
)

_NAMES = ("8gaussians", "moons", "checkerboard", "spirals", "rings", "pinwheel")

DENSITY = named(
    {
        "digits": _DIGITS,
        **{name: replace(_POINTS, dataset=name) for name in _NAMES},
        **{f"{name}-paper": replace(_POINTS_PAPER, dataset=name) for name in _NAMES},
        "cifar10": _CIFAR10,
        "cifar10-paper": replace(_CIFAR10, depths=(32, 32, 32)),
        "mnist": _MNIST,
        "mnist-paper": _MNIST_PAPER,
        "mnist-padded": replace(_MNIST_PAPER, margin=2, depths=(32, 32, 32), features=(32, 32, 32)),
        "mnist-small": _MNIST_SMALL,
        "cifar100": replace(_CIFAR10, dataset="cifar100"),
        "fashion_mnist": replace(_MNIST, dataset="fashion_mnist"),
        #: A user's own points, in an .npz or a .csv file.
        "points": replace(_POINTS, dataset="points.npz"),
        #: A user's own images, in an .npz file.
        "npz": replace(_CIFAR10, dataset="images.npz", augment=False),
        "svhn_cropped": replace(_CIFAR10, dataset="svhn_cropped", augment=False),
    }
)
