"""The settings of a run, as the command line shows them."""

import dataclasses
import math
from pathlib import Path
from typing import Literal, Self

from iresnet_jax.spectral import check_coeff


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What every training run has in common."""

    dataset: str
    """Name of the data set; it also selects the defaults of everything below."""
    workdir: Path
    """Folder of the run: report, pictures, checkpoint."""
    restart: bool = False
    """Start afresh; a run that is already in the workdir is moved aside."""
    smoke: bool = False
    """The same program at a size that takes seconds, to see that it works."""
    seed: int = 0
    """Of the initial weights, the batches and all noise."""

    depths: tuple[int, ...]
    """Residual blocks of each scale (points have one scale)."""
    features: tuple[int, ...]
    """Images: channels inside the branches of each scale. Points: hidden widths of the branch."""
    coeff: float | None = 0.9
    """Norm allowed to each layer, in (0, 1); None: a vanilla ResNet (classification)."""
    activation: str = "elu"
    """Activation inside the branches."""
    power_steps: int = 1
    """Power-iteration steps per training step."""

    steps: int
    """Training steps."""
    batch_size: int = 128
    """Examples in a step."""
    learning_rate: float = 3e-3
    """Peak of the learning rate: linear warm-up, then a cosine down to 1% of it."""
    warmup_steps: int = 50
    """Steps until the peak."""
    weight_decay: float = 0.0
    """Decoupled weight decay (AdamW)."""
    ema_decay: float = 0.998
    """Of the moving average of the parameters, which is what is evaluated; 0 turns it off."""
    validate_every: int = 500
    """Steps between looks at the validation set."""
    checkpoint_every: int = 1000
    """Steps between checkpoints, from which an interrupted run resumes."""

    inverse_tolerance: float = 3e-7
    """Relative and absolute tolerance of each block's inverse."""
    inverse_max_steps: int = 500
    """Steps after which a block's inverse is reported as not converged."""

    def check(self) -> None:
        """Refuse settings out of their range.

        Raises:
          ValueError: naming the setting, its value and its range.
        """
        counts = ("steps", "batch_size", "validate_every", "checkpoint_every", "inverse_max_steps")
        for name in counts:
            _at_least(name, getattr(self, name), 1)
        if not 0.0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must lie in [0, inf); got {self.weight_decay}.")
        for name in ("seed", "warmup_steps", "power_steps"):
            _at_least(name, getattr(self, name), 0)
        _in_range("learning_rate", self.learning_rate, 0.0, math.inf)
        _in_range("inverse_tolerance", self.inverse_tolerance, 0.0, 1.0)
        if not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(f"ema_decay must lie in [0, 1); got {self.ema_decay}.")
        check_coeff(self.coeff)

    def smoke_variant(self) -> Self:
        """The same experiment, a few small blocks and a few steps."""
        return dataclasses.replace(
            self,
            depths=(2,) * len(self.depths),
            features=(16,) * len(self.features),
            steps=min(self.steps, 20),
            warmup_steps=5,
            batch_size=min(self.batch_size, 64),
            validate_every=10,
            checkpoint_every=10,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DensityConfig(TrainingConfig):
    """Train an invertible residual network as a density model."""

    domain: Literal["centered", "logit"] = "centered"
    """Images: whether the network sees x − 0.5 or the logit of x."""
    train_estimator: Literal["series", "exact"] = "series"
    """Log-determinant in training: the truncated series or the full Jacobian (few dimensions)."""
    num_terms: int = 5
    """Terms of the series in training."""
    eval_estimator: Literal["series", "exact"] = "series"
    """Log-determinant in evaluation; the series takes as many terms as the target bias needs."""
    target_bias: float = 2e-3
    """Bits/dim: certified bound on the truncation bias of the reported likelihood."""
    target_stderr: float = 2e-3
    """Bits/dim: standard error, of probes and dequantisation, at which evaluation stops drawing."""
    max_draws: int = 64
    """Draws of probes and dequantisation noise after which evaluation stops anyway."""
    num_samples: int = 64
    """Samples in the picture."""
    num_reconstructed: int = 1000
    """Test examples that are sent to latents and back, at most."""

    def check(self) -> None:
        super().check()
        if self.coeff is None:
            raise ValueError("A density model needs coeff in (0, 1); got None.")
        for name in ("num_terms", "num_samples", "num_reconstructed"):
            _at_least(name, getattr(self, name), 1)
        _at_least("max_draws", self.max_draws, 2)
        for name in ("target_bias", "target_stderr"):
            _in_range(name, getattr(self, name), 0.0, math.inf)

    def smoke_variant(self) -> Self:
        smaller = super().smoke_variant()
        return dataclasses.replace(smaller, max_draws=2, num_samples=16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassificationConfig(TrainingConfig):
    """Train an invertible residual network as a classifier."""

    padding: int = 0
    """Zero channels appended to the image (injective padding)."""

    def check(self) -> None:
        super().check()
        _at_least("padding", self.padding, 0)


def _at_least(name: str, value: int, low: int) -> None:
    if value < low:
        raise ValueError(f"{name} must be ≥ {low}; got {value}.")


def _in_range(name: str, value: float, low: float, high: float) -> None:
    if not low < value < high:
        raise ValueError(f"{name} must lie in ({low:g}, {high:g}); got {value}.")
