"""From a model and a train state to the network that is evaluated and shipped."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax

from iresnet_jax import (
    Anderson,
    Certificate,
    FixedPointInfo,
    FixedPointIteration,
    Flow,
    Solver,
    certify,
    inverse_error_bound,
    latent_residual,
)
from iresnet_jax.layer_walk import largest_norm
from iresnet_jax.nn import FlowModel, converge, shrink
from train.configs.base import TrainingConfig
from train.parallel import AXIS
from train.steps import TrainState


class ThereAndBack(NamedTuple):
    """Data sent to latents and back.

    Attributes:
      x: what came back.
      latents: where it was, arrays [batch, ...].
      info: how the inverses ended, fields [solves, batch].
      error_bound: rigorous bound on the distance to the latents' exact preimage, [batch].
      latent_residual: distance of the latents of ``x`` to those it was inverted from, [batch].
    """

    x: jax.Array
    latents: Any
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
    """

    def __init__(self, model: FlowModel, config: TrainingConfig):
        solver = inverse_solver(config)

        def there_and_back(flow: Flow, x: jax.Array) -> ThereAndBack:
            latents = flow.forward(x)
            back, info = flow.inverse(latents, solver)
            bound = inverse_error_bound(flow, info)
            return ThereAndBack(back, latents, info, bound, latent_residual(flow, back, latents))

        def sample(flow: Flow, key: jax.Array, count: int, temperature: float):
            return flow.sample(key, count, temperature=temperature, solver=solver)

        self.model = model
        self.converge = jax.jit(partial(converge, model))
        self.flow: Callable[[Any], Flow] = jax.jit(model.flow)
        self.there_and_back = jax.jit(there_and_back)
        self.sample = jax.jit(sample, static_argnums=(2, 3))
        self._largest_norm = jax.jit(largest_norm, static_argnums=2)
        self._config = config

    def norm_metrics(self, variables: Any) -> dict[str, float]:
        """``sigma``, the largest norm of any layer as it is used in training, if any keeps it."""
        used, converged = self.flow(variables), self.flow(self.converge(variables))
        sigma = self._largest_norm(used, converged, self.model.coeff)
        return {} if sigma is None else {"sigma": float(sigma)}

    def invertible(self, variables: Any) -> Flow:
        """The network, with its blocks' bounds where the run's inverses stop by an error bound."""
        flow = self.flow(variables)
        needs_bounds = self._config.inverse_error_tolerance is not None
        return flow.with_bounds() if needs_bounds else flow

    def shipped_variables(self, state: TrainState) -> Any:
        """Averaged parameters, converged constraints, and kernels within their rigorous bounds.

        The last only where the config says to ``shrink`` them.
        """
        variables = self.converge(state.averaged_variables)
        return shrink(self.model, variables) if self._config.shrink else variables

    def shipped_flow(self, state: TrainState) -> tuple[Flow, Certificate]:
        """The network that is evaluated and shipped; see :meth:`certified_flow`."""
        return self.certified_flow(self.shipped_variables(state))

    def certified_flow(self, variables: Any) -> tuple[Flow, Certificate]:
        """The network with its blocks' rigorous bounds attached, and its certificate."""
        flow = self.flow(variables)
        certificate = certify(flow)
        return flow.with_bounds(certificate), certificate


def model_options(config: TrainingConfig) -> dict[str, Any]:
    """What a config says of any model."""
    return {
        "coeff": config.coeff,
        "activation": config.activation,
        "num_steps": config.power_steps,
        "normalize": config.normalize,
    }


def training_model(model: FlowModel, config: TrainingConfig) -> FlowModel:
    """The model as a mapped step applies it."""
    return model.clone(axis_name=AXIS, precision=config.precision, remat=config.remat)


def inverse_solver(config: TrainingConfig) -> Solver:
    """The solver of a run's inverses."""
    kind = {"plain": FixedPointIteration, "anderson": Anderson}[config.inverse_solver]
    tolerance = config.inverse_tolerance
    return kind(
        tolerance,
        tolerance,
        config.inverse_max_steps,
        error_tolerance=config.inverse_error_tolerance,
    )
