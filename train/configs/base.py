"""The settings of a run, as the command line shows them."""

import dataclasses
import math
from pathlib import Path
from typing import ClassVar, Literal, Self

from iresnet_jax.branches import Normalize, Precision

from iresnet_jax.fixed_point import Solver
from iresnet_jax.spectral import check_coeff

LogDetEstimator = Literal["series", "roulette", "exact"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What every training run has in common."""

    program: ClassVar[str]

    dataset: str
    """Name of the data set, or path of an .npz file with uint8 images."""
    data_dir: Path | None = None
    """Where TFDS keeps its data sets; its own variable TFDS_DATA_DIR by default."""
    margin: int = 0
    """Zero pixels put around every image."""
    workdir: Path
    """Folder of the run: report, pictures, metrics, checkpoints."""
    restart: bool = False
    """Start afresh; a run that is already in the workdir is moved aside."""
    smoke: bool = False
    """The same program at a size that takes about a minute, to see that it works; compiled with
    few optimisations."""
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
    normalize: Literal["power", "certified", "certified-steps"] = "certified"
    """What constrained kernels are divided by: the power iteration's estimate of their norm, from
    below (power); that in training, but in the network that is evaluated and shipped a rigorous
    bound (certified); the bound in every training step, too (certified-steps)."""

    steps: int
    """Training steps."""
    batch_size: int = 128
    """Examples in a step, over all devices."""
    augment: bool = False
    """Images: random crops out of a mirrored margin of 4 pixels, and horizontal flips."""
    optimizer: Literal["adamw", "adamax", "sgd", "nesterov", "muon"] = "adamw"
    """sgd: with momentum 0.9; nesterov: with Nesterov's; muon: orthogonalised momentum for the
    constrained kernels, Adam for all else."""
    learning_rate: float = 3e-3
    """Peak of the learning rate."""
    adam_learning_rate: float = 5e-3
    """Muon: peak of the learning rate of what goes to Adam."""
    schedule: Literal["cosine", "constant", "steps"] = "cosine"
    """After a linear warm-up: a cosine down to 1% of the peak, constant, or in steps."""
    milestones: tuple[float, ...] = (0.3, 0.6, 0.8)
    """Schedule in steps: the fractions of training at which the rate drops."""
    milestone_factor: float = 0.2
    """Schedule in steps: by how much it drops."""
    warmup_steps: int = 50
    """Steps until the peak."""
    weight_decay: float = 0.0
    """Decoupled for adamw and muon; for the others, added to the gradient."""
    clip_gradient: float | None = None
    """Largest norm of the gradient; longer ones are shortened to it."""
    ema_decay: float = 0.998
    """Of the moving average of the parameters, which is what is evaluated; 0 turns it off."""
    validate_every: int = 500
    """Steps between looks at the validation set."""
    picture_every: int | None = None
    """Steps between pictures in TensorBoard, samples and reconstructions; None: the last alone."""
    checkpoint_every: int = 1000
    """Steps between checkpoints, from which an interrupted run resumes."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept, beside the best on the validation set."""

    parallel: Literal["pmap", "shard_map"] = "pmap"
    """How a step is mapped over the devices."""
    cpu_devices: int | None = None
    """CPU: as how many devices it acts, up to its cores, which some convolutions leave idle else;
    None: as many as share a batch equally, four examples or more each, and at most 8; one in each
    of several processes."""
    precision: Precision = "float32"
    """Inside the branches while training; all else, and all evaluation, is in float32."""
    remat: bool = False
    """Recompute blocks in the backward pass: less memory, on a CPU in about the same time."""
    distributed: bool = False
    """One of several processes: the three settings below, or what the cluster's environment says
    (SLURM, TPU pods, Kubernetes)."""
    coordinator: str | None = None
    """host:port of the first process."""
    num_processes: int | None = None
    """How many processes there are."""
    process_id: int | None = None
    """Which of them this is, from 0."""

    inverse_tolerance: float = 3e-7
    """Relative and absolute tolerance of the residual of each block's inverse."""
    inverse_error_tolerance: float | None = None
    """Instead: a rigorous bound on the error of each block's inverse that is to be reached; the
    network's layers are then bounded before it is inverted."""
    inverse_solver: Solver = "anderson"
    """plain, or accelerated: fewer evaluations of a branch, some work beside each."""
    inverse_max_steps: int = 500
    """Steps after which a block's inverse is reported as not converged."""
    num_reconstructed: int = 1000
    """Test examples that are sent to latents and back, at most."""
    max_examples: int | None = None
    """Training examples that are read, and test examples; None: all."""

    def check(self) -> None:
        """Refuse settings out of their range.

        Raises:
          ValueError: naming the setting, its value and its range.
        """
        for name in _COUNTS:
            _at_least(name, getattr(self, name), 1)
        for name in ("picture_every", "max_examples", "cpu_devices"):
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), 1)
        if not 0.0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must lie in [0, inf); got {self.weight_decay}.")
        for name in ("seed", "warmup_steps", "power_steps", "margin"):
            _at_least(name, getattr(self, name), 0)
        for name in ("learning_rate", "adam_learning_rate"):
            _in_range(name, getattr(self, name), 0.0, math.inf)
        _in_range("inverse_tolerance", self.inverse_tolerance, 0.0, 1.0)
        if self.inverse_error_tolerance is not None:
            _in_range("inverse_error_tolerance", self.inverse_error_tolerance, 0.0, math.inf)
        _in_range("milestone_factor", self.milestone_factor, 0.0, 1.0)
        if self.clip_gradient is not None:
            _in_range("clip_gradient", self.clip_gradient, 0.0, math.inf)
        for fraction in self.milestones:
            _in_range("milestones", fraction, 0.0, 1.0)
        if not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(f"ema_decay must lie in [0, 1); got {self.ema_decay}.")
        check_coeff(self.coeff)
        self._check_processes()

    def _check_processes(self) -> None:
        names = ("coordinator", "num_processes", "process_id")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if given and not self.distributed:
            told = ", ".join(f"{name} = {value!r}" for name, value in given.items())
            raise ValueError(f"{told} would be ignored: several processes need --distributed.")
        if self.num_processes is not None:
            _at_least("num_processes", self.num_processes, 1)
        if self.process_id is not None:
            _at_least("process_id", self.process_id, 0)
            if self.num_processes is not None and self.process_id >= self.num_processes:
                raise ValueError(
                    f"process_id must lie in [0, {self.num_processes - 1}], by num_processes; "
                    f"got {self.process_id}."
                )

    @property
    def layer_normalize(self) -> Normalize:
        """What layers divide by in training."""
        return "certified" if self.normalize == "certified-steps" else "power"

    def smoke_variant(self) -> Self:
        """The same experiment, a few small blocks and a few steps."""
        return dataclasses.replace(
            self,
            smoke=True,
            workdir=self.workdir.with_name(f"{self.workdir.name}-smoke"),
            depths=(2,) + (1,) * (len(self.depths) - 1),
            features=(16,) * len(self.features),
            steps=min(self.steps, 10),
            warmup_steps=5,
            batch_size=min(self.batch_size, 32),
            validate_every=5,
            checkpoint_every=5,
            picture_every=None,
            num_reconstructed=16,
            max_examples=128,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DensityConfig(TrainingConfig):
    """Train an invertible residual network as a density model."""

    program: ClassVar[str] = "density"

    domain: Literal["centered", "logit"] = "centered"
    """Images: whether the network sees x − 0.5 or the logit of x."""
    train_estimator: LogDetEstimator = "series"
    """Log-determinant in training: the truncated series, biased; the series cut at random lengths
    (Russian roulette), unbiased and slower; or the full Jacobian (few dimensions)."""
    num_terms: int = 5
    """Terms of the series in training; those that the roulette always takes."""
    eval_estimator: LogDetEstimator = "series"
    """Log-determinant in evaluation; the series takes as many terms as the target bias needs."""
    target_bias: float = 1e-3
    """Bits/dim: certified bound on the truncation bias of the reported likelihood."""
    target_stderr: float = 2e-3
    """Bits/dim: standard error, of probes and dequantisation, at which evaluation stops drawing."""
    max_draws: int = 64
    """Draws of probes and dequantisation noise after which evaluation stops anyway."""
    importance_samples: int = 1
    """Images: dequantisations K of the importance-weighted bound, reported beside the plain one;
    above 1 it needs --eval-estimator exact, since noise in a log-determinant would bias it."""
    num_samples: int = 64
    """Samples in the picture."""

    def check(self) -> None:
        super().check()
        if self.coeff is None:
            raise ValueError("A density model needs coeff in (0, 1); got None.")
        for name in ("num_terms", "num_samples"):
            _at_least(name, getattr(self, name), 1)
        _at_least("importance_samples", self.importance_samples, 1)
        if self.importance_samples > 1 and self.eval_estimator != "exact":
            raise ValueError(
                f"importance_samples = {self.importance_samples} needs eval_estimator exact; got "
                f"{self.eval_estimator!r}, whose noise would make the likelihood look better."
            )
        _at_least("max_draws", self.max_draws, 2 * self.importance_samples)
        for name in ("target_bias", "target_stderr"):
            _in_range(name, getattr(self, name), 0.0, math.inf)

    def smoke_variant(self) -> Self:
        smaller = super().smoke_variant()
        return dataclasses.replace(smaller, max_draws=2 * self.importance_samples, num_samples=16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassificationConfig(TrainingConfig):
    """Train an invertible residual network as a classifier."""

    program: ClassVar[str] = "classification"

    padding: int = 0
    """Zero channels appended to the image (injective padding)."""
    mean: tuple[float, ...] = (0.5,)
    """Subtracted from images in [0, 1]: one number, or one for each channel."""
    std: tuple[float, ...] = (1.0,)
    """What they are divided by then."""

    def check(self) -> None:
        super().check()
        _at_least("padding", self.padding, 0)
        for value in self.std:
            _in_range("std", value, 0.0, math.inf)


_COUNTS = (
    "steps",
    "batch_size",
    "validate_every",
    "checkpoint_every",
    "keep_checkpoints",
    "inverse_max_steps",
    "num_reconstructed",
)


def _at_least(name: str, value: int, low: int) -> None:
    if value < low:
        raise ValueError(f"{name} must be ≥ {low}; got {value}.")


def _in_range(name: str, value: float, low: float, high: float) -> None:
    if not low < value < high:
        raise ValueError(f"{name} must lie in ({low:g}, {high:g}); got {value}.")
