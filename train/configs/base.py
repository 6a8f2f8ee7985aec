"""The settings that all runs share, as the command line shows them."""

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar

from iresnet_jax.nn.constraints import Normalize
from iresnet_jax.spectral import check_coeff
from train.data import unknown_dataset


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What every training run has in common.

    Attributes:
      program: the name of the task that these are settings of.
    """

    program: ClassVar[str]

    dataset: str
    """Name of the data set, or path of an .npz file with uint8 images."""
    data_dir: Path | None = None
    """Where TFDS keeps its data sets; its own variable TFDS_DATA_DIR by default."""
    margin: int = 0
    """Zero pixels put around every image."""
    workdir: Path = Path("runs")
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
    normalize: Normalize = "estimate"
    """What constrained kernels are divided by in training: the power iteration's estimate of their
    norm, from below, or a rigorous bound on it."""
    shrink: bool = True
    """At the end, scale every kernel to within a rigorous bound: what is evaluated and shipped is
    then proved."""

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
    precision: Literal["float32", "tensorfloat32", "bfloat16"] = "float32"
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
    inverse_solver: Literal["plain", "anderson"] = "anderson"
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
        counts = "steps", "batch_size", "num_reconstructed", "inverse_max_steps", "max_examples"
        every = "validate_every", "picture_every", "checkpoint_every", "keep_checkpoints"
        at_least(self, 1, *counts, *every, "cpu_devices", "num_processes")
        at_least(self, 0, "seed", "warmup_steps", "power_steps", "margin", "process_id")
        positive = "learning_rate", "adam_learning_rate", "clip_gradient", "inverse_error_tolerance"
        within(self, "(0, inf)", *positive)
        within(self, "(0, 1)", "inverse_tolerance", "milestone_factor", "milestones")
        within(self, "[0, inf)", "weight_decay")
        within(self, "[0, 1)", "ema_decay")
        check_coeff(self.coeff)
        self._check_processes()

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


Config = TypeVar("Config", bound=TrainingConfig)


def named(configs: Mapping[str, Config]) -> dict[str, Config]:
    """The experiments, each with a workdir of its own."""
    return {
        name: dataclasses.replace(config, workdir=Path(f"runs/{config.program}-{name}"))
        for name, config in configs.items()
    }


def find_config(
    experiments: Mapping[str, Config], config: str | None, dataset: str | None
) -> Config:
    """The experiment of a name, or of a data set where no name is given.

    Raises:
      ValueError: for an unknown one, listing those that are known.
    """
    if config is not None and config not in experiments:
        near = difflib.get_close_matches(config.lower(), experiments, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"There is no config {config!r}.{hint} Known: {', '.join(experiments)}.")
    name = config or dataset or next(iter(experiments))
    if name.endswith(".npz") and "npz" in experiments:
        return dataclasses.replace(experiments["npz"], dataset=name)
    if name not in experiments:
        known = {experiment.dataset: None for experiment in experiments.values()}
        raise ValueError(unknown_dataset(name, known))
    return experiments[name]


def at_least(settings: Any, low: int, *names: str) -> None:
    """Refuse settings of these names below ``low``."""
    for name in names:
        if (value := getattr(settings, name)) is not None and value < low:
            raise ValueError(f"{name} must be ≥ {low}; got {value}.")


def within(settings: Any, interval: str, *names: str) -> None:
    """Refuse settings of these names outside an open interval, or one that holds its lower end."""
    low, high = map(float, interval[1:-1].split(","))
    closed = interval.startswith("[")
    for name in names:
        value = getattr(settings, name)
        for number in value if isinstance(value, tuple) else (value,):
            if number is None or low < number < high or (closed and number == low):
                continue
            raise ValueError(f"{name} must lie in {interval}; got {number}.")
