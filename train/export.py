"""``python -m train export``: a saved run's model in one file, for ``iresnet_jax.load``."""

import dataclasses
from pathlib import Path

from iresnet_jax import Fitted, save
from iresnet_jax.nn import FlowModel
from train.tools import _OnRun
from train.workdir import WorkdirError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export(_OnRun):
    """Write the network that is evaluated and shipped to one file, with its certificate.

    ``iresnet_jax.load`` loads it. Densities can be exported. The exit status is 1 if the network is
    not proved to be invertible.
    """

    output: Path | None = None
    """File to write; model.safetensors in the workdir by default."""
    licence: str = ""
    """Licence of the data and the weights, told in the file."""

    def run(self) -> int:
        task, config, dataset, functions, state = self._load_network()
        if not isinstance(functions.model, FlowModel) or not hasattr(config, "train_estimator"):
            raise WorkdirError(f"--workdir {self.workdir} holds no density: export takes one.")
        about = {
            "data": config.dataset,
            "licence": self.licence,
            "step": int(state.step),
            "settings": {name: str(value) for name, value in vars(config).items()},
        }
        levels = getattr(dataset, "num_levels", None) if dataset.is_image else None
        variables = functions.shipped_variables(state)
        fitted = Fitted(task.model, variables, num_levels=levels, about=about)
        path = self.output or self.workdir / "model.safetensors"
        save(path, fitted)
        told = "certified" if fitted.certificate.certified else "NOT certified"
        print(f"{path}: {path.stat().st_size:,} bytes, {told}")
        return int(not fitted.certificate.certified)
