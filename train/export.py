"""``python -m train export``: a saved run's model in one file, for ``iresnet_jax.load``."""

import dataclasses
from pathlib import Path

from iresnet_jax import Fitted, save
from iresnet_jax.nn import FlowModel
from train.density import DEQUANTIZER
from train.hybrid import HEAD
from train.tools import _OnRun
from train.workdir import WorkdirError

#: What a task keeps among the parameters beside the model's -> what a file lacks without it.
_LEFT_OUT = {
    DEQUANTIZER: "so that bits per dimension with uniform noise are more than those reported",
    HEAD: "so that the file holds the density and tells no classes",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export(_OnRun):
    """Write the network that is evaluated and shipped to one file, with its certificate.

    ``iresnet_jax.load`` loads it. Densities can be exported; of a hybrid the density alone, without
    its classes, and of a learned dequantisation the density without its noise. The exit status is
    1 if the network is not proved to be invertible.
    """

    output: Path | None = None
    """File to write; model.safetensors in the workdir by default."""
    licence: str = ""
    """Licence of the data and the weights, told in the file."""

    def run(self) -> int:
        task, config, dataset, functions, state = self._load_network()
        if not isinstance(functions.model, FlowModel) or not hasattr(config, "train_estimator"):
            raise WorkdirError(f"--workdir {self.workdir} holds no density: export takes one.")
        variables = functions.shipped_variables(state)
        kept = {name: p for name, p in variables["params"].items() if name not in _LEFT_OUT}
        left_out = sorted(variables["params"].keys() - kept)
        about = {
            "data": config.dataset,
            "licence": self.licence,
            "step": int(state.step),
            "settings": {name: str(value) for name, value in vars(config).items()},
            "left_out": left_out,
        }
        levels = getattr(dataset, "num_levels", None) if dataset.is_image else None
        fitted = Fitted(task.model, {**variables, "params": kept}, num_levels=levels, about=about)
        path = self.output or self.workdir / "model.safetensors"
        save(path, fitted)
        told = "certified" if fitted.certificate.certified else "NOT certified"
        print(f"{path}: {path.stat().st_size:,} bytes, {told}")
        for name in left_out:
            print(f"Left out: the {name}, {_LEFT_OUT[name]}.")
        return int(not fitted.certificate.certified)
