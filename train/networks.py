"""The network that is evaluated and shipped, from a model and a train state."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

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
from iresnet_jax.nn import (
    BranchFactory,
    FlowModel,
    bottleneck_branch,
    concatenation_branch,
    converge,
    dense_branch,
    frozen_vectors,
    monlip_branch,
    shallow_monlip_branch,
    shrink,
)
from train.configs.base import TrainingConfig
from train.parallel import AXIS, PER_EXAMPLE, PER_SOLVE_AND_EXAMPLE, LocalDevices
from train.steps import TrainState
from train.terminal import counting

_ENTRIES_AT_ONCE = 500_000
_FEWEST_AT_ONCE = 64


class ThereAndBack(NamedTuple):
    """Data mapped to latents and back.

    Attributes:
      x: the reconstructions.
      latents: arrays [batch, ...].
      info: report of the inverses, fields [solves, batch].
      error_bound: rigorous bound on the distance to the latents' exact preimage, [batch].
      latent_residual: distance between ``latents`` and the latents of ``x``, [batch].
    """

    x: jax.Array
    latents: Any
    info: FixedPointInfo
    error_bound: jax.Array
    latent_residual: jax.Array


class ModelFunctions:
    """The functions of a model, compiled once for the whole run.

    Attributes:
      model: the model, in float32, for evaluation.
      converge: variables -> variables with every power iteration run to its tolerance.
      flow: variables -> the network.
      there_and_back: (devices, network, x) -> :class:`ThereAndBack`; each device takes its part.
      draw_latents: (network, key, count, temperature) -> latents from the priors.
      forward: (network, x) -> latents.
      invert: (devices, network, latents) -> data, and the report of the inverses; likewise.
    """

    def __init__(self, model: FlowModel, config: TrainingConfig):
        solver = inverse_solver(config)

        def there_and_back(flow: Flow, x: jax.Array) -> ThereAndBack:
            latents = flow.forward(x)
            back, info = flow.inverse(latents, solver)
            bound = inverse_error_bound(flow, info, latents)
            return ThereAndBack(back, latents, info, bound, latent_residual(flow, back, latents))

        self.model = model
        self.converge = jax.jit(partial(converge, model))
        self.flow: Callable[[Any], Flow] = jax.jit(model.flow)
        self._flow_as_it_is: Callable[[Any], Flow] = jax.jit(partial(_as_it_is, model))
        self.there_and_back = _over_devices(there_and_back, _THERE_AND_BACK)
        self.draw_latents = jax.jit(_draw_latents, static_argnums=(2, 3))
        self.forward: Callable[[Flow, Any], Any] = jax.jit(Flow.forward)
        self.invert = _over_devices(lambda flow, latents: flow.inverse(latents, solver), _INVERSE)
        self._largest_norm = jax.jit(largest_norm, static_argnums=2)
        self._config = config

    def sample(
        self, flow: Flow, key: jax.Array, count: int, temperature: float = 1.0
    ) -> tuple[np.ndarray, FixedPointInfo]:
        """Draw samples as ``flow.sample`` does; return them, and the report of the inverses."""
        return self.inverse(flow, self.draw_latents(flow, key, count, temperature))

    def inverse(self, flow: Flow, latents: Any) -> tuple[np.ndarray, FixedPointInfo]:
        """Map latents to data over this process's devices; return them, and the report.

        They go through in batches that fit the memory.
        """
        devices, count = LocalDevices(), len(jax.tree.leaves(latents)[0])
        size = min(count, max(_FEWEST_AT_ONCE, _ENTRIES_AT_ONCE // flow.dim))
        size = -(-size // devices.count) * devices.count
        flow = devices.replicate(flow)
        parts, infos = [], []
        for start in range(0, count, size):
            batch = jax.tree.map(lambda z, i=start: _filled(z[i : i + size], size), latents)
            x, info = self.invert(devices, flow, devices.split(batch))
            own = min(size, count - start)
            parts.append(np.asarray(x)[:own])
            infos.append(jax.tree.map(lambda a, n=own: np.asarray(a)[:, :n], info))
        joined = jax.tree.map(lambda *a: np.concatenate(a, axis=1), *infos)
        return np.concatenate(parts), joined

    def norm_metrics(self, variables: Any) -> dict[str, float]:
        """Estimate ``sigma``, the largest norm of a layer as used in training, if any keeps it."""
        used, converged = map(self._flow_as_it_is, (variables, self.converge(variables)))
        sigma = self._largest_norm(used, converged, self.model.coeff)
        return {} if sigma is None else {"sigma": float(sigma)}

    def invertible(self, variables: Any) -> Flow:
        """Return the network, with bounds attached where the run's inverses stop by them."""
        flow = self.flow(variables)
        needs_bounds = self._config.inverse_error_tolerance is not None
        return flow.with_bounds() if needs_bounds else flow

    def shipped_variables(self, state: TrainState) -> Any:
        """Return the averaged variables, power iterations converged.

        With the setting ``shrink``, every kernel is then within its rigorous bound.
        """
        variables = self.converge(state.averaged_variables)
        return shrink(self.model, variables) if self._config.shrink else variables

    def shipped_flow(self, state: TrainState) -> tuple[Flow, Certificate]:
        """Return the network that is evaluated and shipped; see :meth:`certified_flow`."""
        return self.certified_flow(self.shipped_variables(state))

    def certified_flow(self, variables: Any) -> tuple[Flow, Certificate]:
        """Return the network with its rigorous bounds attached, and its certificate."""
        flow = self.flow(variables)
        branches = sum(level.num_branches for level in flow.levels)
        with counting("iresnet_jax.certificates", "Certifying: branch", branches):
            certificate = certify(flow)
        return flow.with_bounds(certificate), certificate


#: Where examples are in what the mapped functions return.
_INVERSE = PER_EXAMPLE, PER_SOLVE_AND_EXAMPLE
_THERE_AND_BACK = ThereAndBack._make(
    PER_SOLVE_AND_EXAMPLE if name == "info" else PER_EXAMPLE for name in ThereAndBack._fields
)


def _over_devices(function: Callable[[Flow, Any], Any], out: Any) -> Any:
    """Compile a function of (network, batch) as one of (devices, network, batch)."""

    def mapped(devices: LocalDevices, flow: Flow, batch: Any) -> Any:
        return devices.map(function, out)(flow, batch)

    return jax.jit(mapped, static_argnums=0)


def _draw_latents(flow: Flow, key: jax.Array, count: int, temperature: float) -> Any:
    draws = zip(flow.priors, jax.random.split(key, len(flow.priors)), strict=True)
    return tuple(prior.sample(k, count, temperature) for prior, k in draws)


def _filled(z: Any, size: int) -> np.ndarray:
    """Repeat the last example, so that every batch has one size and one compiled program."""
    z = np.asarray(z)
    return np.concatenate([z, np.repeat(z[-1:], size - len(z), axis=0)])


#: Branches by name, for images and for points.
_BRANCHES: Mapping[str, tuple[BranchFactory, BranchFactory]] = {
    "bottleneck": (bottleneck_branch, dense_branch),
    "concatenation": (concatenation_branch, concatenation_branch),
    "monlip": (monlip_branch, monlip_branch),
    "monlip-shallow": (shallow_monlip_branch, shallow_monlip_branch),
}


def model_options(config: TrainingConfig, *, images: bool) -> dict[str, Any]:
    """Return the options that every model takes from a config, for images or points."""
    return {
        "coeff": config.coeff,
        "activation": config.activation,
        "num_steps": config.power_steps,
        "normalize": config.normalize,
        "make_branch": _BRANCHES[config.branch][0 if images else 1],
        "monotone": config.block == "monotone",
        "mixing": config.mixing,
    }


def training_model(model: FlowModel, config: TrainingConfig) -> FlowModel:
    """Return the model as a mapped training step applies it."""
    return model.clone(axis_name=AXIS, precision=config.precision, remat=config.remat)


def inverse_solver(config: TrainingConfig) -> Solver:
    """Return the solver of a run's inverses."""
    kind = {"plain": FixedPointIteration, "anderson": Anderson}[config.inverse_solver]
    tolerance = config.inverse_tolerance
    return kind(
        tolerance,
        tolerance,
        config.inverse_max_steps,
        error_tolerance=config.inverse_error_tolerance,
    )


def _as_it_is(model: FlowModel, variables: Any) -> Flow:
    """Return the network with kernels divided by what the vectors at hand see of their norms."""
    with frozen_vectors():
        return model.flow(variables)
