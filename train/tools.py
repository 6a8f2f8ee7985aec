"""Tools for saved runs: ``python -m train evaluate``, ``certify``, ``sample`` and so on."""

import abc
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from iresnet_jax import FixedPointInfo, Flow, inverse_error_in_double
from iresnet_jax.convergence import refuse_out_of_reach
from train import figures, images
from train.configs.base import at_least, at_most, check_finite
from train.configs.density import LogDetEstimator
from train.data import check_seed, unknown_dataset
from train.density import Density
from train.evaluation import diameter, there_and_back
from train.memory import refuse_beyond_memory
from train.metrics import read_records
from train.networks import ThereAndBack
from train.output import OutputError, array_path, picture_path, save_array
from train.plane import draw_points
from train.progress import certificate_table, format_bound, summary_table
from train.report import inverse_error_rows, inversion_rows
from train.saved import SavedRun, Which, load_network, load_run
from train.terminal import degrade_characters, tell
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

    def _load_network(self, **options: Any) -> SavedRun:
        """Without its data, if it is of images."""
        if self.data_dir is not None:
            options["data_dir"] = self.data_dir
        return load_network(self.workdir, self.checkpoint, **options)


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
        dataclasses.replace(config, seed=0).check()  # earlier versions took any seed
        folder = self.workdir / "evaluation"
        folder.mkdir(exist_ok=True)
        report = {"step": int(state.step), **task.evaluate(state, folder), **environment()}
        path = folder / "evaluation.json"
        write_json(path, report)
        task.write_page(folder, report, read_records(self.workdir))
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
        *_, functions, state = self._load_network()
        variables = state.variables if self.as_trained else functions.shipped_variables(state)
        _, certificate = functions.certified_flow(variables)
        name = "certificate-as-trained.json" if self.as_trained else "certificate.json"
        write_json(self.workdir / name, certificate.as_dict())
        certificate_table(certificate)
        return int(not certificate.certified)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Picture(_OnRun):
    output: Path | None = None
    """File of the picture, .png, .pdf, .svg or .jpg; in the workdir by default. A file that is no
    picture, or belongs to the run, is never written over."""
    save_arrays: bool = False
    """Also write data and latents beside the picture, as NumPy arrays: NAME.npy, as the network
    takes or gives them, and NAME-latents.npy [examples, dimensions], float32."""
    allow_unconverged: bool = False
    """Write the picture even if an inverse did not meet its tolerance."""
    count: int
    """Number of pictures."""

    arrays_beside: ClassVar[tuple[str, ...]] = ("latents",)

    def run(self) -> int:
        degrade_characters()
        self.check()
        path = self._path()
        try:
            self.draw(path)
        except OSError as error:
            reason = error.strerror or error
            raise OutputError(f"output {path} cannot be written: {reason}.") from error
        print(path)
        return 0

    def check(self) -> None:
        """Refuse settings out of range."""
        check_finite(self)
        at_least(self, 1, "count")

    def _path(self) -> Path:
        """Return where the picture goes; raise OutputError before anything is computed."""
        output = self.workdir / f"{type(self).__name__.lower()}.png"
        path = picture_path(self.output if self.output is not None else output, self.workdir)
        if self.save_arrays:
            for what in ("", *self.arrays_beside):
                array_path(path, what)
        return path

    @abc.abstractmethod
    def draw(self, path: Path) -> None:
        """Write the picture, and arrays if they are asked for, to files."""

    def _save(self, picture: Path, data: np.ndarray, **beside: np.ndarray) -> None:
        """Write arrays beside the picture, if they are asked for, and print where."""
        for what, array in {"": data, **beside}.items() if self.save_arrays else ():
            path = array_path(picture, what)
            save_array(path, array)
            print(path)

    def _tell_of_rest(self, shown: int, count: int) -> None:
        """Say that not all are in the picture."""
        if shown < count:
            rest = "" if self.save_arrays else "; --save-arrays writes all"
            tell(f"The picture shows the first {shown:,} of {count:,}{rest}.")

    def _load_images(self, count: int) -> tuple[SavedRun, np.ndarray]:
        """Load a run, and test images as its network takes them."""
        saved = self._load(max_examples=count)
        if not saved.dataset.is_image:
            raise WorkdirError(f"{saved.config.dataset} holds points, not images.")
        images = saved.dataset.test[:count]
        if len(images) < count:
            raise ValueError(f"The test set has {len(images)} images; {count} are asked for.")
        return saved, saved.task.inputs(images)

    def _inverse(self, saved: SavedRun, flow: Flow, latents: Any) -> np.ndarray:
        """Map latents to data, and check how that ended."""
        x, info = _at_full_precision(saved.functions.inverse, flow, latents)
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
    """Seed of the latents, in [0, 2**32 - 4]."""

    def check(self) -> None:
        super().check()
        check_seed(self.seed)

    def draw(self, path: Path) -> None:
        saved = self._load_network()
        if not saved.dataset.is_image:
            saved = self._load()  # its data are drawn beside
        if not isinstance(saved.task, Density):
            raise WorkdirError(f"--workdir {self.workdir} holds a classifier: it has no density.")
        refuse_beyond_memory("count", self.count, saved.dataset.dim)
        flow, key = saved.functions.shipped_flow(saved.state)[0], jax.random.key(self.seed)
        latents = saved.functions.draw_latents(flow, key, self.count, self.temperature)
        samples = self._inverse(saved, flow, latents)
        self._save(path, samples, latents=_joined(latents))
        if saved.dataset.is_image:
            self._tell_of_rest(figures.most_shown(samples), len(samples))
            figures.grid(path, samples)
            return
        draw_points(path, flow, saved.dataset, samples, len(samples))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reconstruct(_Picture):
    """Map test images to latents and back."""

    count: int = 12
    """Number of images."""

    arrays_beside = ("latents", "originals")

    def draw(self, path: Path) -> None:
        saved, x = self._load_images(self.count)
        flow, _ = saved.functions.shipped_flow(saved.state)
        there = there_and_back(saved.functions, flow, x, fill=False)
        back = np.asarray(there.x)
        self.check_converged(back, there.info, flow, saved.config.inverse_error_tolerance)
        _tell_errors(flow, there, diameter(x))
        originals, recovered = saved.task.shown(x), saved.task.shown(back)
        error = float(np.abs(recovered - originals).max())
        self._save(path, back, latents=_joined(there.latents), originals=x)
        self._tell_of_rest(12, len(x))
        figures.reconstructions(path, originals, recovered, error)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interpolate(_Picture):
    """Interpolate between pairs of test images, along straight lines of latents."""

    count: int = 6
    """Number of pairs."""
    frames: int = 9
    """Images per pair, both ends included."""

    def check(self) -> None:
        super().check()
        at_least(self, 2, "frames")
        at_most(self, 1000, "frames")

    def draw(self, path: Path) -> None:
        saved, x = self._load_images(2 * self.count)
        refuse_beyond_memory("count", self.count, self.frames * saved.dataset.dim)
        flow, _ = saved.functions.shipped_flow(saved.state)
        ends = _at_full_precision(saved.functions.forward, flow, x)
        pairs = ((z[: self.count], z[self.count :]) for z in ends)
        latents = tuple(between(start, end, self.frames) for start, end in pairs)
        frames = self._inverse(saved, flow, latents)
        self._save(path, frames, latents=_joined(latents))
        shown = saved.task.shown(frames)
        rows = max(1, figures.most_shown(shown) // self.frames)
        self._tell_of_rest(rows, self.count)
        figures.grid(path, shown[: rows * self.frames], columns=self.frames)


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


def _joined(latents: Any) -> np.ndarray:
    """Join the parts of latents, [examples, dimensions]."""
    return np.concatenate([np.asarray(z).reshape(len(z), -1) for z in latents], axis=1)


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
