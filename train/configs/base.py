"""The settings that all runs share, in the order of the command line."""

import dataclasses
import difflib
import math
import numbers
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar

import numpy as np

#: As iresnet_jax.nn.constraints has it, which imports JAX; --help is to be quick.
Normalize = Literal["estimate", "bound"]
#: How the names of a user's files end.
FILES = (".npz", ".csv")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The settings that every training run has.

    Attributes:
      program: name of the task that these settings are for.
      needs: setting -> another one, and its values without which the first does nothing.
    """

    program: ClassVar[str]
    needs: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "adam_learning_rate": ("optimizer", "muon"),
        "milestones": ("schedule", "steps"),
        "milestone_factor": ("schedule", "steps"),
    }

    dataset: str
    """Name of the data set, or path of an .npz file of images or points, or of a .csv file."""
    data_dir: Path | None = None
    """Folder of TFDS's data sets; TFDS_DATA_DIR by default."""
    margin: int = 0
    """Zero pixels to add around every image."""
    margins: tuple[int, int, int, int] | None = None
    """The same for each side, in place of margin: top, bottom, left, right."""
    workdir: Path = Path("runs")
    """Folder for report, pictures, metrics and checkpoints."""
    restart: bool = False
    """Start afresh; move a run that is already in the workdir aside."""
    warm_start: Path | None = None
    """Folder of a run whose averaged variables are the first ones here; the optimiser starts
    afresh. Its network must be the same, its data need not be."""
    smoke: bool = False
    """Run at a size that takes about a minute, to check that all works; compiled with few
    optimisations."""
    seed: int = 0
    """Seed of the initial weights, the batches and all noise, in [0, 2**32 - 4]."""

    depths: tuple[int, ...]
    """Number of residual blocks in each scale (points have one scale)."""
    features: tuple[int, ...]
    """Images: channels inside the branches of each scale. Points: hidden widths of the branches."""
    coeff: float | None = 0.9
    """Largest norm of each layer, in (0, 1); None for a vanilla ResNet (classification)."""
    activation: str = "elu"
    """Activation in the branches: elu, relu, leaky_relu, softplus, tanh, sin or lipswish; the same
    with a learned length for every channel (learned_elu, …); learned_lipswish, clipswish,
    maxmin."""
    branch: Literal["bottleneck", "concatenation", "monlip", "monlip-shallow"] = "bottleneck"
    """Branch of a block: the paper's, whose layers have norms up to coeff (for points, dense
    layers); i-DenseNet's concatenations, of such layers; or one that is normalised as a whole, with
    coeff for its Lipschitz constant, and two hidden layers (points: as many as features) or one."""
    block: Literal["residual", "monotone"] = "residual"
    """Kind of the blocks: y = x + g(x), or the monotone block, with the same branches g."""
    mixing: bool = False
    """Begin each block with an invertible 1×1 convolution, after ActNorm."""
    power_steps: int = 1
    """Power-iteration steps per training step."""
    normalize: Normalize = "estimate"
    """Divide kernels in training by the power iteration's estimate of their norm, which is from
    below and lags, so that norms exceed coeff a little until they are shrunk at the end; or by a
    rigorous bound on it."""
    shrink: bool = True
    """After training, scale every kernel to within its rigorous bound, so that the network that is
    evaluated and shipped is certified."""

    steps: int
    """Number of training steps. With more, a run goes on from its checkpoint, and the learning rate
    follows the longer schedule from there."""
    batch_size: int = 128
    """Examples per step, over all devices."""
    augment: bool = False
    """Images: crop at random from a mirrored margin of 4 pixels, and flip horizontally."""
    optimizer: Literal["adamw", "adamax", "sgd", "nesterov", "muon"] = "adamw"
    """sgd has momentum 0.9, nesterov Nesterov momentum 0.9; muon orthogonalises the momentum of
    constrained kernels and leaves all else to Adam."""
    learning_rate: float = 3e-3
    """Peak learning rate."""
    adam_learning_rate: float = 5e-3
    """Muon: peak learning rate of the parameters that Adam updates."""
    schedule: Literal["cosine", "constant", "steps"] = "cosine"
    """After a linear warm-up: a cosine down to 1% of the peak, a constant, or steps."""
    milestones: tuple[float, ...] = (0.3, 0.6, 0.8)
    """Schedule steps: fractions of training at which the learning rate drops."""
    milestone_factor: float = 0.2
    """Schedule steps: factor of each drop."""
    warmup_steps: int = 50
    """Steps of the linear warm-up."""
    weight_decay: float = 0.0
    """Decoupled for adamw and muon, added to the gradient for the others."""
    clip_gradient: float | None = None
    """Clip the gradient to this global norm."""
    ema_decay: float = 0.998
    """Decay of the moving average of the parameters, which is evaluated; 0 turns it off."""
    validate_every: int = 500
    """Steps between validations."""
    picture_every: int | None = None
    """Steps between samples and reconstructions in TensorBoard; None: after the last step only."""
    checkpoint_every: int = 1000
    """Steps between checkpoints, from which a run resumes."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep, beside the best on the validation set."""

    parallel: Literal["pmap", "shard_map"] = "pmap"
    """How a step is mapped over the devices."""
    cpu_devices: int | None = None
    """CPU: number of devices to split it into, up to its cores, which some convolutions would leave
    idle. None: the most, up to 8, that share a batch equally with four examples or more each; one
    per process with --distributed."""
    precision: Literal["float32", "tensorfloat32", "bfloat16"] = "float32"
    """Precision inside the branches in training; all else, and all evaluation, is in float32."""
    remat: bool = False
    """Recompute blocks in the backward pass: less memory, about the same time on a CPU."""
    distributed: bool = False
    """Join other processes, found by the three settings below or by the cluster's environment
    (SLURM, TPU pods, Kubernetes)."""
    coordinator: str | None = None
    """host:port of the first process."""
    num_processes: int | None = None
    """Number of processes."""
    process_id: int | None = None
    """Index of this process, from 0."""

    inverse_tolerance: float = 3e-7
    """Relative and absolute tolerance of the residual of each block's inverse."""
    inverse_error_tolerance: float | None = None
    """Stop by this rigorous bound on the error of each block's inverse instead; the layers are then
    bounded before the network is inverted."""
    inverse_solver: Literal["plain", "anderson"] = "anderson"
    """plain iteration, or Anderson acceleration: fewer evaluations, some more work for each."""
    inverse_max_steps: int = 500
    """Steps after which a block's inverse counts as not converged."""
    num_reconstructed: int = 1000
    """Test examples to map to latents and back, at most."""
    max_examples: int | None = None
    """Examples to read of each split, at most; None: all."""

    @property
    def pixels_added(self) -> int | tuple[int, int, int, int]:
        """The margin, of all sides or of each."""
        return self.margin if self.margins is None else self.margins

    def check(self) -> None:
        """Refuse settings out of range.

        Raises:
          ValueError: naming the setting, its value and its range.
        """
        from iresnet_jax.spectral import check_coeff
        from train.data import check_seed

        check_finite(self)
        check_seed(self.seed)
        counts = "steps", "batch_size", "num_reconstructed", "inverse_max_steps", "max_examples"
        every = "validate_every", "picture_every", "checkpoint_every", "keep_checkpoints"
        at_least(self, 1, *counts, *every, "cpu_devices", "num_processes")
        at_least(self, 0, "warmup_steps", "power_steps", "margin", "margins", "process_id")
        at_least(self, 1, "depths", "features")
        at_most(self, _MOST_STEPS, "steps", "warmup_steps")
        positive = "learning_rate", "adam_learning_rate", "clip_gradient", "inverse_error_tolerance"
        within(self, "(0, inf)", *positive)
        within(self, "(0, 1)", "inverse_tolerance", "milestone_factor", "milestones")
        within(self, "[0, inf)", "weight_decay")
        within(self, "[0, 1)", "ema_decay")
        if self.margin and self.margins is not None:
            raise ValueError(f"margin must be 0 beside margins {self.margins}; got {self.margin}.")
        check_coeff(self.coeff)
        self._check_branch()
        self._check_processes()

    def _check_branch(self) -> None:
        plain = self.branch == "bottleneck" and self.block == "residual"
        if self.coeff is None and not plain:
            raise ValueError(
                f"branch {self.branch!r} in a {self.block} block needs coeff in (0, 1); got None."
            )

    def _check_processes(self) -> None:
        names = ("coordinator", "num_processes", "process_id")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if given and not self.distributed:
            told = ", ".join(f"{name} = {value!r}" for name, value in given.items())
            raise ValueError(f"{told} would be ignored: several processes need --distributed.")
        if self.process_id is not None and self.num_processes is not None:
            top = self.num_processes - 1
            if self.process_id > top:
                told = f"process_id must lie in [0, {top}], by num_processes"
                raise ValueError(f"{told}; got {self.process_id}.")

    def refuse_ignored(self, default: Self) -> None:
        """Refuse settings that are not the default's, and would do nothing beside the others.

        Raises:
          ValueError: naming the setting, and the one that it needs.
        """
        for name, (other, *values) in self.needs.items():
            value, found = getattr(self, name), getattr(self, other)
            if value != getattr(default, name) and found not in values:
                told = f"--{other.replace('_', '-')} {' or '.join(values)}"
                raise ValueError(
                    f"{name} = {value!r} would be ignored: it needs {told}; got {found!r}."
                )

    def smoke_variant(self) -> Self:
        """Return the same experiment with a few small blocks and a few steps."""
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


#: Steps are counted in 32 bits.
_MOST_STEPS = 2**31 - 1

Config = TypeVar("Config", bound=TrainingConfig)


def named(configs: Mapping[str, Config]) -> dict[str, Config]:
    """Give each experiment a workdir of its own."""
    return {
        name: dataclasses.replace(config, workdir=Path(f"runs/{config.program}-{name}"))
        for name, config in configs.items()
    }


def find_config(
    experiments: Mapping[str, Config], config: str | None, dataset: str | None
) -> Config:
    """Find an experiment by its name, or by its data set where no name is given.

    Raises:
      ValueError: for an unknown name, listing the known ones.
    """
    if config is not None and config not in experiments:
        near = difflib.get_close_matches(config.lower(), experiments, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"There is no config {config!r}.{hint} Known: {', '.join(experiments)}.")
    name = config or dataset or next(iter(experiments))
    if config is None and name.endswith(FILES):
        return _config_of_file(experiments, name)
    if name not in experiments:
        from train.data import unknown_dataset

        known = {experiment.dataset: None for experiment in experiments.values()}
        raise ValueError(unknown_dataset(name, known))
    return experiments[name]


def _config_of_file(experiments: Mapping[str, Config], name: str) -> Config:
    from train.data import holds_points

    kind = "points" if holds_points(name) else "npz"
    if kind not in experiments:
        raise ValueError(f"{name} holds points; classes need images and labels, in .npz.")
    return dataclasses.replace(experiments[kind], dataset=name)


def check_finite(settings: Any) -> None:
    """Refuse NaN and infinity in any setting, in tuples too."""
    for field in dataclasses.fields(settings):
        for number in _values(settings, field.name):
            if isinstance(number, numbers.Real) and not math.isfinite(number):
                raise ValueError(f"{field.name} must be finite; got {number}.")


def at_least(settings: Any, low: int, *names: str) -> None:
    """Refuse the named settings where they are below ``low``, or no integers; None is allowed."""
    for name in names:
        for value in _values(settings, name):
            if value is None or (isinstance(value, int | np.integer) and value >= low):
                continue
            whole = "" if isinstance(value, int | np.integer) else " and an integer"
            raise ValueError(f"{name} must be ≥ {low}{whole}; got {value}.")


def at_most(settings: Any, high: int, *names: str) -> None:
    """Refuse the named settings where they are above ``high``; None is allowed."""
    for name in names:
        if (value := getattr(settings, name)) is not None and value > high:
            raise ValueError(f"{name} must be ≤ {high:,}; got {value}.")


def within(settings: Any, interval: str, *names: str) -> None:
    """Refuse the named settings outside an interval: "(low, high)" or "[low, high)"."""
    low, high = map(float, interval[1:-1].split(","))
    closed = interval.startswith("[")
    for name in names:
        for number in _values(settings, name):
            if number is None or low < number < high or (closed and number == low):
                continue
            raise ValueError(f"{name} must lie in {interval}; got {number}.")


def _values(settings: Any, name: str) -> tuple[Any, ...]:
    """Return the values of a setting: of a tuple, each."""
    value = getattr(settings, name)
    return value if isinstance(value, tuple) else (value,)
