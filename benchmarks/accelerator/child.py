"""``python -m benchmarks.accelerator.child ITEM SETTINGS``: one measurement, in this process."""

import importlib
import os
import sys
from collections.abc import Mapping

from benchmarks.accelerator.records import Record
from benchmarks.accelerator.settings import Settings

#: Item -> module and function; what the module needs is imported only there.
ITEMS: Mapping[str, tuple[str, str]] = {
    "rates": ("rates", "measure"),
    "numerics": ("numerics", "measure"),
    "density": ("steps", "density"),
    "torch-density": ("torch_steps", "density"),
    "density-otherwise": ("steps", "density_otherwise"),
    "torch-density-otherwise": ("torch_steps", "density_otherwise"),
    "classification": ("steps", "classification"),
    "torch-classification": ("torch_steps", "classification"),
    "inverse": ("inverses", "measure"),
    "torch-inverse": ("torch_steps", "inverse"),
    "mnist-rate": ("training_runs", "mnist_rate"),
    "train-mnist": ("training_runs", "mnist"),
    "train-cifar10": ("training_runs", "cifar10"),
}


def main(item: str, settings: Settings) -> None:
    """Measure one item, adding to what an interrupted process has left."""
    if item.startswith("torch-"):
        os.environ["JAX_PLATFORMS"] = "cpu"  # leaves the accelerator's memory to PyTorch
    else:
        _check_device(settings)
    module, function = ITEMS[item]
    measure = getattr(importlib.import_module(f"benchmarks.accelerator.{module}"), function)
    record = Record(settings.out / f"{item}.json")
    measure(record, settings)
    record.complete()


def _check_device(settings: Settings) -> None:
    """Refuse to measure full networks where there is no accelerator."""
    import jax

    from train.parallel import check_devices

    try:
        check_devices()
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    if jax.default_backend() == "cpu" and not settings.tiny:
        raise SystemExit(
            "error: JAX finds no accelerator here, only a CPU. Install JAX for yours, such as "
            "jax[cuda], or pass --size tiny to see that all runs."
        )


if __name__ == "__main__":
    main(sys.argv[1], Settings.from_json(sys.argv[2]))
