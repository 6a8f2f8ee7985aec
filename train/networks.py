"""From a model and a train state to the network that is evaluated and shipped."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from iresnet_jax.branches import largest_norm
from iresnet_jax.models import FlowModel

from iresnet_jax import (
    Certificate,
    FixedPointInfo,
    Flow,
    certify_flow,
    inverse_error_bound,
    latent_residual,
)
from iresnet_jax.flows import Latents
from train.configs.base import TrainingConfig
from train.steps import TrainState, init_state


class ThereAndBack(NamedTuple):
    """Data sent to latents and back.

    Attributes:
      x: what came back.
      latents: where it was.
      info: how the inverses ended, fields [blocks, batch].
      error_bound: rigorous bound on the distance to the latents' exact preimage, [batch].
      latent_residual: distance of the latents of ``x`` to those it was inverted from, [batch].
    """

    x: jax.Array
    latents: Latents
    info: FixedPointInfo
    error_bound: jax.Array
    latent_residual: jax.Array


class ModelFunctions:
    """A model's functions of its variables, compiled once for the whole run.

    Attributes:
      model: the model, in float32, for evaluation.
      converge: variables -> the variables with every power iteration run to its tolerance.
      flow: variables -> the network.
      there_and_back: (network, x) -> x again, through the latents; see :class:`ThereAndBack`.
      sample: (network, key, count, temperature) -> samples, and how the inverses ended.

    Args:
      model: the model.
      config: of the run.
    """

    def __init__(self, model: FlowModel, config: TrainingConfig):
        self.model = model
        self.converge = jax.jit(model.converge)
        self.flow: Callable[[Any], Flow] = jax.jit(model.flow)
        self.there_and_back = jax.jit(_there_and_back(config))
        self.sample = jax.jit(_sample(config), static_argnums=(2, 3))
        self._needs_bounds = config.inverse_error_tolerance is not None
        self._largest_norm = jax.jit(largest_norm, static_argnums=2)
        self._certify = config.normalize != "power"

    def norm_metrics(self, variables: Any) -> dict[str, float]:
        """``sigma``, the largest norm of any layer as it is used in training, if any keeps it."""
        used, converged = self.flow(variables), self.flow(self.converge(variables))
        sigma = self._largest_norm(used, converged, self.model.coeff)
        return {} if sigma is None else {"sigma": float(sigma)}

    def averaged_flow(self, state: TrainState) -> Flow:
        """The network with averaged parameters and converged constraints, ready to be inverted."""
        return self.invertible(self.flow(self.converge(state.averaged_variables)))

    def invertible(self, flow: Flow) -> Flow:
        """The network with its blocks' bounds where the run's inverses stop by an error bound."""
        return flow.with_lipschitz_bounds() if self._needs_bounds else flow

    def shipped_variables(self, state: TrainState) -> Any:
        """Averaged parameters, converged constraints, and kernels within their rigorous bounds.

        The last only where the config's ``normalize`` is not "power".
        """
        variables = self.converge(state.averaged_variables)
        return self.model.certified(variables) if self._certify else variables

    def shipped_flow(self, state: TrainState) -> tuple[Flow, Certificate]:
        """The network that is evaluated and shipped; see :meth:`certified_flow`."""
        return self.certified_flow(self.shipped_variables(state))

    def certified_flow(self, variables: Any) -> tuple[Flow, Certificate]:
        """The network with its blocks' rigorous bounds attached, and its certificate."""
        flow = self.flow(variables)
        certificate = certify_flow(flow)
        bounds = certificate.lipschitz, certificate.layer_bounds
        return flow.with_lipschitz_bounds(*bounds), certificate


def _there_and_back(config: TrainingConfig):
    def there_and_back(flow: Flow, x: jax.Array) -> ThereAndBack:
        latents = flow.forward(x)
        back, info = flow.inverse(latents, **inverse_options(config))
        bound = inverse_error_bound(flow, info)
        return ThereAndBack(back, latents, info, bound, latent_residual(flow, back, latents))

    return there_and_back


def _sample(config: TrainingConfig):
    def sample(
        flow: Flow, key: jax.Array, count: int, temperature: float
    ) -> tuple[jax.Array, FixedPointInfo]:
        return flow.sample(key, count, temperature=temperature, **inverse_options(config))

    return sample


def inverse_options(config: TrainingConfig) -> dict[str, Any]:
    """The tolerances of a run's inverses."""
    tolerance = config.inverse_tolerance
    return {
        "rtol": tolerance,
        "atol": tolerance,
        "error_tolerance": config.inverse_error_tolerance,
        "max_steps": config.inverse_max_steps,
        "solver": config.inverse_solver,
    }


def fresh_state(model: Any, config: TrainingConfig, batch: np.ndarray) -> TrainState:
    """The state before the first step, ActNorm initialised from ``batch``."""
    return FirstState(model, config, batch).values()


def state_template(
    model: Any, config: TrainingConfig, batch: np.ndarray | jax.ShapeDtypeStruct
) -> TrainState:
    """The shapes and types of a train state.

    Raises:
      ValueError: as the model does at initialisation, where it does not fit the data.
    """
    return FirstState(model, config, batch).template()


class FirstState:
    """The state before the first step, traced once for its shapes and its values.

    Args:
      model: the model.
      config: of the run.
      batch: what ActNorm is initialised from; for the shapes alone, a shape will do.
    """

    def __init__(self, model: Any, config: TrainingConfig, batch: Any):
        def fresh(key, batch):
            return init_state(model.init(key, batch), config)

        # It runs once: compiling it well would take longer than running it does.
        options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
        self._fresh = jax.jit(fresh, compiler_options=options)
        self._arguments = jax.random.key(config.seed), batch

    def template(self) -> TrainState:
        """Shapes and types; raises what the model raises at initialisation."""
        return self._fresh.eval_shape(*self._arguments)

    def values(self) -> TrainState:
        """The state, ActNorm initialised from the batch."""
        return self._fresh(*self._arguments)
