"""``python -m train export``: a saved run's model in one file, for ``iresnet_jax.load``."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from iresnet_jax import Dequantizer, Fitted, save
from iresnet_jax.nn import FlowModel
from train.configs.density import DensityConfig
from train.density import DEQUANTIZER, Density
from train.hybrid import HEAD
from train.identity import EXAMPLE, NOT_COMPARED, WARM
from train.report import parameters_sha256
from train.steps import TrainState
from train.tools import _OnRun
from train.workdir import WorkdirError, environment

#: Where data are from, and their licence, unless --licence tells another.
_PLANE = ("points drawn by the program", "none needed: the data are generated")
_SOURCES = {
    "digits": (
        "optical recognition of handwritten digits, UCI, as scikit-learn brings them: 1,797 images "
        "of 8×8 pixels in 17 grey levels (Alpaydin, Kaynak 1998)",
        "CC BY 4.0",
    ),
    "mnist": (
        "MNIST: 70,000 images of 28×28 pixels in 256 grey levels (LeCun, Cortes, Burges)",
        "CC BY-SA 3.0",
    ),
    **{name: _PLANE for name in ("checkerboard", "moons", "spirals", "rings", "pinwheel")},
    "8gaussians": _PLANE,
}
#: In a report beside results: what runs on, and the settings.
_ENVIRONMENT = ("python", "packages", "commit", "device", "num_devices")
_BESIDE_RESULTS = {*_ENVIRONMENT, "config", "seed"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export(_OnRun):
    """Write the network that is evaluated and shipped to one file, with its certificate.

    ``iresnet_jax.load`` loads it. The file tells the data and their licence, the settings, and what
    report.json says of these weights; its card is written beside it, as NAME.md. Densities can be
    exported, with a learned dequantisation; of a hybrid the density alone, without its classes. The
    exit status is 1 if the network is not proved to be invertible.
    """

    output: Path | None = None
    """File to write; model.safetensors in the workdir by default."""
    licence: str = ""
    """Licence of the data, told in the file; by default that of the data set, where it is known."""

    def run(self) -> int:
        task, config, dataset, functions, state = self._load_network()
        if not isinstance(functions.model, FlowModel) or not isinstance(task, Density):
            raise WorkdirError(f"--workdir {self.workdir} holds no density: export takes one.")
        variables = functions.shipped_variables(state)
        params = dict(variables["params"])
        classes, noise = params.pop(HEAD, None), params.pop(DEQUANTIZER, None)
        left_out = [] if classes is None else [HEAD]
        fitted = Fitted(
            task.model,
            {**variables, "params": params},
            num_levels=dataset.num_levels,
            about=self._about(config, state, left_out),
            dequantizer=_dequantizer(task, noise),
        )
        path = self.output or self.workdir / "model.safetensors"
        save(path, fitted)
        path.with_suffix(".md").write_text(fitted.card, encoding="utf-8")
        told = "certified" if fitted.certificate.certified else "NOT certified"
        print(f"{path}: {path.stat().st_size:,} bytes, {told}")
        for name in left_out:
            print(f"Left out: the {name}; the file holds the density and tells no classes.")
        return int(not fitted.certificate.certified)

    def _about(
        self, config: DensityConfig, state: TrainState, left_out: list[str]
    ) -> dict[str, object]:
        """Tell of the data, the settings, the results of these weights, and what they ran on."""
        source, licence = _SOURCES.get(config.dataset, ("", ""))
        settings, report = _read(self.workdir / "config.json"), self._report(state)
        sizes = settings.get(EXAMPLE, {}).get("sizes", (None,) * 3)
        splits = dict(zip(("training", "validation", "test"), sizes, strict=True))
        ran_on = {name: report[name] for name in _ENVIRONMENT if name in report}
        return {
            "data": config.dataset,
            "source": source,
            "licence": self.licence or licence,
            "step": int(state.step),
            "left_out": left_out,
            "examples": splits,
            "results": _results(report),
            "settings": _settings(config),
            "trained_with": ran_on,
            "exported_with": environment(),
        }

    def _report(self, state: TrainState) -> dict[str, Any]:
        """The run's report, if it is of these weights."""
        path = self.workdir / "report.json"
        report = _read(path)
        if report.get("parameters_sha256") == parameters_sha256(state.params):
            return report
        print(f"{path} is not there, or of other weights: the file tells no results.")
        return {}


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise WorkdirError(f"{path} is damaged: {error}.") from error
    return content


def _results(report: Mapping[str, Any]) -> dict[str, Any]:
    """What a report says beside settings and environment, without folders of the machine."""
    results = {name: value for name, value in report.items() if name not in _BESIDE_RESULTS}
    if WARM in results:
        results[WARM] = {k: value for k, value in results[WARM].items() if k != "workdir"}
    return results


def _settings(config: DensityConfig) -> dict[str, str]:
    """What the run computed, without where and how it was executed."""
    own = vars(config).items()
    return {name: str(value) for name, value in own if name not in NOT_COMPARED}


def _dequantizer(task: Density, params: Any) -> Dequantizer | None:
    if params is None or task.dequantizer is None:
        return None
    return Dequantizer(task.dequantizer, {"params": params})
