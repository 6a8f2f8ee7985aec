"""Tools for saved runs: ``python -m train evaluate``, ``certify``, ``sample`` and so on."""

import abc
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from iresnet_jax import FixedPointInfo, Flow, inverse_error_in_double
from iresnet_jax.convergence import refuse_out_of_reach
from train import figures, images
from train.configs.base import at_least
from train.configs.density import LogDetEstimator
from train.data import unknown_dataset
from train.density import EXTENT, Density, density_grid
from train.evaluation import diameter
from train.networks import ThereAndBack, inverse_solver
from train.progress import certificate_table, format_bound, summary_table
from train.report import inverse_error_rows, inversion_rows
from train.saved import SavedRun, Which, load_run
from train.workdir import WorkdirError, environment, write_json


class _Tool(abc.ABC):
    @abc.abstractmethod
    def run(self) -> int:
        """Run the tool, and return the exit status.

        Raises:
          ValueError, WorkdirError, CheckpointError: for settings or a workdir that do not fit.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class _OnRun(_Tool):
    workdir: Path
    """Folder of the run; output goes there too."""
    checkpoint: Which = "newest"
    """newest, best (on the validation set), or a step."""
    data_dir: Path | None = None
    """Folder of TFDS's data sets; TFDS_DATA_DIR by default."""

    def _load(self, **options: Any) -> SavedRun:
        if self.data_dir is not None:
            options["data_dir"] = self.data_dir
        return load_run(self.workdir, self.checkpoint, **options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(_OnRun):
    """Evaluate a checkpoint on the test set, into the folder "evaluation"."""

    max_examples: int | None = None
    """Test examples, at most. This and all settings below default to the run's own."""
    eval_estimator: LogDetEstimator | None = None
    """Density: log-determinants by the series, the roulette, or the full Jacobian."""
    target_bias: float | None = None
    """Density: certified bound on the truncation bias to reach, in bits/dim (the paper's: 1e-4)."""
    target_stderr: float | None = None
    """Density: standard error to reach, in bits/dim."""
    max_draws: int | None = None
    """Density: draws, at most."""
    importance_samples: int | None = None
    """Density of images: dequantisations K of the importance-weighted bound."""

    def run(self) -> int:
        own = {f.name for f in dataclasses.fields(_OnRun)} | {"max_examples"}
        changes = {k: v for k, v in vars(self).items() if k not in own and v is not None}
        task, config, *_, state = self._load(max_test=self.max_examples, **changes)
        config.check()
        folder = self.workdir / "evaluation"
        folder.mkdir(exist_ok=True)
        report = {"step": int(state.step), **task.evaluate(state, folder), **environment()}
        path = folder / "evaluation.json"
        write_json(path, report)
        summary_table(f"{config.dataset}: {path}", task.rows(report) + inversion_rows(report))
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Certify(_OnRun):
    """Bound every layer's norm, and say whether the network is proved to be invertible.

    The exit status is 1 if it is not.
    """

    as_trained: bool = False
    """Certify the network as the last training step used it, with parameters and power iterations
    as they are, instead of the network that is evaluated and shipped."""

    def run(self) -> int:
        *_, functions, state = self._load(max_examples=1)
        variables = state.variables if self.as_trained else functions.shipped_variables(state)
        _, certificate = functions.certified_flow(variables)
        name = "certificate-as-trained.json" if self.as_trained else "certificate.json"
        write_json(self.workdir / name, certificate.as_dict())
        certificate_table(certificate)
        return int(not certificate.certified)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Picture(_OnRun):
    output: Path | None = None
    """File of the picture; in the workdir by default."""
    allow_unconverged: bool = False
    """Write the picture even if an inverse did not meet its tolerance."""
    count: int
    """Number of pictures."""

    def run(self) -> int:
        at_least(self, 1, "count")
        path = self.output or self.workdir / f"{type(self).__name__.lower()}.png"
        self.draw(path)
        print(path)
        return 0

    @abc.abstractmethod
    def draw(self, path: Path) -> None:
        """Write the picture to a file."""

    def _load_images(self, count: int) -> tuple[SavedRun, np.ndarray]:
        """Load a run, and test images as its network takes them."""
        saved = self._load(max_examples=count)
        if not saved.dataset.is_image:
            raise WorkdirError(f"{saved.config.dataset} holds points, not images.")
        images = saved.dataset.test[:count]
        if len(images) < count:
            raise ValueError(f"The test set has {len(images)} images; {count} are asked for.")
        return saved, saved.task.inputs(images)

    def _inverse(self, saved: SavedRun, flow: Flow, function: Callable, *args: Any) -> np.ndarray:
        """Call ``function(flow, …)``, and check how the inverse that it returns ended."""
        x, info = _at_full_precision(function, flow, *args)
        self.check_converged(x, info, flow, saved.config.inverse_error_tolerance)
        return x

    def check_converged(
        self, x: np.ndarray, info: FixedPointInfo, flow: Flow, error_tolerance: float | None
    ) -> None:
        """Refuse a picture from an inverse that missed its tolerance, or overflowed.

        Raises:
          ValueError: naming the worst sample and block.
        """
        if self.allow_unconverged:
            return
        anyway = "--allow-unconverged writes the picture anyway."
        finite = np.isfinite(x).reshape(len(x), -1).all(axis=1)
        if info.converged.all() and not finite.all():
            raise ValueError(
                f"{int((~finite).sum())} of {len(x)} inverses are not finite, the first of sample "
                f"{int(np.argmin(finite))}. {anyway}"
            )
        if info.converged.all():
            return
        if error_tolerance is not None:
            refuse_out_of_reach(info, error_tolerance, flow.solve_names())
        residuals = np.where(info.converged, -np.inf, np.nan_to_num(info.residual, nan=np.inf))
        worst = block, example = np.unravel_index(np.argmax(residuals), residuals.shape)
        missed = int((~info.converged).any(axis=0).sum())
        raise ValueError(
            f"{missed} of {residuals.shape[1]} inverses did not meet their tolerance; the worst is "
            f"sample {example} at {flow.solve_names()[block]}, with a residual of "
            f"{info.residual[worst]:.3g} and an error of at most "
            f"{format_bound(float(info.error_bound[worst]), 3)}. {anyway}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample(_Picture):
    """Draw samples from a density model."""

    count: int = 64
    """Number of samples."""
    temperature: float = 1.0
    """Scale of the prior's standard deviation."""
    seed: int = 0
    """Seed of the latents."""

    def draw(self, path: Path) -> None:
        saved = self._load(max_examples=self.count)
        if not isinstance(saved.task, Density):
            raise WorkdirError(f"--workdir {self.workdir} holds a classifier: it has no density.")
        flow, key = saved.functions.shipped_flow(saved.state)[0], jax.random.key(self.seed)
        options = self.count, self.temperature
        samples = self._inverse(saved, flow, saved.functions.sample, key, *options)
        if saved.dataset.is_image:
            figures.grid(path, samples)
            return
        data = saved.dataset.test[: self.count]
        figures.density_beside_data(path, density_grid(flow, EXTENT), EXTENT, data, samples)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reconstruct(_Picture):
    """Map test images to latents and back."""

    count: int = 12
    """Number of images."""

    def draw(self, path: Path) -> None:
        saved, x = self._load_images(self.count)
        flow, _ = saved.functions.shipped_flow(saved.state)
        there = _at_full_precision(saved.functions.there_and_back, flow, x)
        self.check_converged(there.x, there.info, flow, saved.config.inverse_error_tolerance)
        _tell_errors(flow, there, diameter(x))
        originals, recovered = saved.task.shown(x), saved.task.shown(there.x)
        error = float(np.abs(recovered - originals).max())
        figures.reconstructions(path, originals, recovered, error)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interpolate(_Picture):
    """Interpolate between pairs of test images, along straight lines of latents."""

    count: int = 6
    """Number of pairs."""
    frames: int = 9
    """Images per pair, both ends included."""

    def draw(self, path: Path) -> None:
        at_least(self, 2, "frames")
        saved, x = self._load_images(2 * self.count)
        flow, _ = saved.functions.shipped_flow(saved.state)

        @jax.jit
        def walk(flow: Flow, x: jax.Array):
            ends = ((z[: self.count], z[self.count :]) for z in flow.forward(x))
            latents = tuple(between(start, end, self.frames) for start, end in ends)
            return flow.inverse(latents, inverse_solver(saved.config))

        frames = self._inverse(saved, flow, walk, x)
        figures.grid(path, saved.task.shown(frames), columns=self.frames)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepare(_Tool):
    """Download and prepare a TFDS data set (needs TensorFlow)."""

    dataset: str
    """Name of the data set."""
    data_dir: Path | None = None
    """Folder of TFDS's data sets; TFDS_DATA_DIR by default."""

    def run(self) -> int:
        if self.dataset not in images.TFDS:
            raise ValueError(unknown_dataset(self.dataset, images.TFDS))
        folder = images.prepared_folder(self.dataset, self.data_dir)
        print(folder or images.prepare(self.dataset, self.data_dir))
        return 0


TOOLS: dict[str, type[_Tool]] = {
    kind.__name__.lower(): kind
    for kind in (Evaluate, Certify, Sample, Reconstruct, Interpolate, Prepare)
}


def between(start: jax.Array, end: jax.Array, frames: int) -> jax.Array:
    """Interpolate, [pairs·frames, …]: the frames of a pair in a row, both ends included."""
    return jnp.linspace(start, end, frames, axis=1).reshape(-1, *start.shape[1:])


def _at_full_precision(function: Callable, *args: Any) -> Any:
    with jax.default_matmul_precision("highest"):
        return jax.tree.map(np.asarray, function(*args))


def _tell_errors(flow: Flow, there: ThereAndBack, size: float) -> None:
    """Print what is proved of the inverse, and what is measured; ``size`` is the data's."""
    in_double = inverse_error_in_double(flow, there.x, there.latents)
    rows = inverse_error_rows(float(in_double.max()), float(there.error_bound.max()), size)
    residual = float(there.latent_residual.max())
    for what, value in [*rows, ("‖F(x) − z‖, measured", f"{residual:.2g}")]:
        print(f"{what}: {value}")
