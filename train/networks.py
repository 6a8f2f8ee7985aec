"""From a model and a train state to the network that is evaluated and shipped."""

from typing import Any

import jax
import numpy as np

from iresnet_jax import Flow
from iresnet_jax.branches import largest_norm
from iresnet_jax.models import FlowModel
from train.checkpoints import Checkpoints
from train.configs.base import TrainingConfig
from train.data import Dataset
from train.steps import TrainState, init_state, make_optimizer


class ModelFunctions:
    """A model's functions of its variables, compiled once for the whole run.

    Args:
      model: the model.
    """

    def __init__(self, model: FlowModel):
        self._coeff = model.coeff
        self.converge = jax.jit(model.converge)
        self.flow = jax.jit(model.flow)
        self._largest_norm = jax.jit(largest_norm, static_argnums=2)

    def largest_norm(self, variables: Any) -> float:
        """The largest norm of any layer as it is used in training."""
        used, converged = self.flow(variables), self.flow(self.converge(variables))
        return float(self._largest_norm(used, converged, self._coeff))

    def shipped_flow(self, state: TrainState) -> tuple[Flow, list[float]]:
        """The network with averaged parameters, its constraints converged, and its rigorous L."""
        flow = self.flow(self.converge(state.averaged_variables)).with_lipschitz_bounds()
        return flow, flow.lipschitz_bounds()


def check_model(model: FlowModel, dataset: Dataset) -> None:
    """Refuse a model that cannot be built for a data set, before anything is written.

    Raises:
      ValueError: as the model does at initialisation.
    """
    batch = jax.ShapeDtypeStruct((1, *dataset.example_shape), "float32")
    jax.eval_shape(model.init, jax.random.key(0), batch)


def start_state(
    model: Any, config: TrainingConfig, batch: np.ndarray, checkpoints: Checkpoints
) -> tuple[TrainState, int]:
    """The newest checkpoint's state, or a fresh one initialised from ``batch``; and its step."""
    optimizer = make_optimizer(config)

    def fresh(key, batch):
        return init_state(model.init(key, batch), optimizer)

    # It runs once: compiling it well would take longer than running it does.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    state = jax.jit(fresh, compiler_options=options)(jax.random.key(config.seed), batch)
    restored = checkpoints.restore(state)
    if restored is None:
        return state, 0
    print(f"Resuming from step {int(restored.step)}.")
    return restored, int(restored.step)
