"""Certificates: rigorous bounds that say whether a network is invertible, and how well.

A residual block h + g(h) with Lip(g) ≤ L < 1 is invertible, with Lip ≤ 1 + L, and 1/(1 − L) for its
inverse. ActNorm before it multiplies these by max|s| and 1/min|s|. Along a scale the bounds
multiply; where half of the channels leave after a scale, the rest goes on, so that with Λ the bound
of what follows, the scale's own bound B gives B·max(1, Λ).

All bounds rest on :func:`iresnet_jax.bounds.layer_upper_bound`, never on power iteration; and,
where a branch has modules that are not this library's, on what those state of themselves. They are
of the weights as used, and of the real map that these define: the rounding of its evaluation is not
in them.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from iresnet_jax.actnorm import ActNorm
from iresnet_jax.branches import Affine, ModuleStage, Sequential, affine_layers
from iresnet_jax.flows import Flow
from iresnet_jax.residual import ResidualBlock
from iresnet_jax.spectral import (
    init_singular_vectors,
    power_iteration_to_tolerance,
    sigma_estimate,
)
from iresnet_jax.transforms import LOGIT_ALPHA

_MARGIN = 1e-12


class LayerCertificate(NamedTuple):
    """One affine layer of a branch.

    Attributes:
      name: of the block, and the layer's place in it.
      sigma: estimate of its norm by power iteration: from below, no guarantee.
      upper_bound: rigorous bound on its norm.
    """

    name: str
    sigma: float
    upper_bound: float


class BlockCertificate(NamedTuple):
    """One residual block.

    Attributes:
      name: scale and place.
      layers: of its branch.
      lipschitz: L ≥ Lip(g), also the contraction factor of its fixed-point inverse.
      forward: bound on the block's Lipschitz constant, ActNorm included.
      inverse: bound on that of its inverse; infinite where L ≥ 1.
      problem: why the block is not certified, its layers or its branch named; empty where it is.
    """

    name: str
    layers: tuple[LayerCertificate, ...]
    lipschitz: float
    forward: float
    inverse: float
    problem: str = ""

    @property
    def certified(self) -> bool:
        """Whether the block is proved to be invertible."""
        return not self.problem


@dataclasses.dataclass(frozen=True)
class Certificate:
    """What is proved of a network.

    Attributes:
      blocks: first to last.
      forward: bound on the Lipschitz constant of data → latents.
      inverse: bound on that of latents → data (on the network's range where channels are padded);
        infinite where a block is not certified.
    """

    blocks: tuple[BlockCertificate, ...]
    forward: float
    inverse: float

    @property
    def certified(self) -> bool:
        """Whether the network is proved to be invertible."""
        return all(block.certified for block in self.blocks)

    @property
    def lipschitz(self) -> list[float]:
        """L of every block."""
        return [block.lipschitz for block in self.blocks]

    @property
    def layer_bounds(self) -> list[list[float]]:
        """The bounds of every block's layers."""
        return [[layer.upper_bound for layer in block.layers] for block in self.blocks]

    @property
    def failures(self) -> tuple[BlockCertificate, ...]:
        """The blocks that are not proved to be invertible."""
        return tuple(block for block in self.blocks if not block.certified)

    def as_dict(self) -> dict[str, Any]:
        """The certificate as JSON holds it (infinities and NaN stay floats)."""
        return {
            "certified": self.certified,
            "forward_lipschitz": self.forward,
            "inverse_lipschitz": self.inverse,
            "blocks": [
                {**block._asdict(), "layers": [layer._asdict() for layer in block.layers]}
                for block in self.blocks
            ],
        }


def certify(model: Any, variables: Any) -> Certificate:
    """Certify a model with its variables as they are; see :func:`certify_flow`.

    Args:
      model: with a method ``flow(variables)``, such as those of :mod:`iresnet_jax.models`.
      variables: all that init returned. Kernels are constrained with the singular vectors at hand:
        pass ``model.converge(variables)`` for the network that is to be shipped.

    Raises:
      ValueError: for variables that do not fit the model.
    """
    return certify_flow(model.flow(variables))


def certify_flow(flow: Flow) -> Certificate:
    """Certify a network: bounds on every layer, block and scale, and on the whole.

    Args:
      flow: with concrete weights (not under ``jit``), such as ``model.flow(variables)``.

    Returns:
      The certificate. A layer without a finite bound (NaN or infinite weights), biases or shifts
      that are not finite, a block with L ≥ 1, or a branch or stage that states no
      ``lipschitz_bound()`` leaves the network not certified, and is named. What such a method
      states is taken at its word.
    """
    scales = [_scale_blocks(flow, i) for i in range(len(flow.scales))]
    forward, inverse = 1.0, 1.0
    for i, scale in reversed(list(enumerate(scales))):
        if flow.factor_out and i < len(scales) - 1:
            forward, inverse = max(1.0, forward), max(1.0, inverse)
        forward *= math.prod(block.forward for block in scale)
        inverse *= math.prod(block.inverse for block in scale)
    steepest, flattest = _domain_slopes(flow)
    blocks = tuple(block for scale in scales for block in scale)
    return Certificate(blocks, _up(forward * steepest), _up(inverse / flattest))


def _scale_blocks(flow: Flow, index: int) -> list[BlockCertificate]:
    blocks: list[BlockCertificate] = []
    for stack in flow.scales[index].stacks:
        sigmas = [np.asarray(_sigma(layer.operator)) for layer in _affine(stack.block.branch)]
        for place, block in enumerate(jax.device_get(stack).unstacked()):
            name = f"scale {index}, block {len(blocks)}"
            blocks.append(_block(name, block, [float(sigma[place]) for sigma in sigmas]))
    return blocks


def _block(name: str, block: ResidualBlock, sigmas: Sequence[float]) -> BlockCertificate:
    layers = tuple(
        LayerCertificate(f"{name}, layer {i}", sigma, layer.lipschitz_bound())
        for i, (layer, sigma) in enumerate(zip(_affine(block.branch), sigmas, strict=True))
    )
    lipschitz = _lipschitz(block.branch, layers)
    smallest, largest = _scales(block.actnorm)
    problem = _problem(block, layers, lipschitz)
    inverse = math.inf if problem else _up(1.0 / ((1.0 - lipschitz) * smallest))
    forward = _up((1.0 + lipschitz) * largest)
    return BlockCertificate(name, layers, lipschitz, forward, inverse, problem)


def _problem(block: ResidualBlock, layers: Sequence[LayerCertificate], lipschitz: float) -> str:
    """Why a block is not certified, or nothing."""
    smallest, largest = _scales(block.actnorm)
    bounds = {i: layer.upper_bound for i, layer in enumerate(layers)}
    if silent := _silent(block.branch):
        return f"{', '.join(silent)} states no lipschitz_bound()"
    if broken := [str(i) for i, bound in bounds.items() if not math.isfinite(bound)]:
        return f"the weights of layer {', '.join(broken)} are not finite"
    if not lipschitz < 1.0:
        above = [f"layer {i}: bound {bound:.4g}" for i, bound in bounds.items() if bound >= 1.0]
        bounded = f" ({', '.join(above)})" if above else ""  # to the nearest: no "≤"
        return f"the bound L = {lipschitz:.4g} is not below 1{bounded}"
    if not 0.0 < smallest <= largest < math.inf:
        return f"the scales of ActNorm lie in [{smallest:.4g}, {largest:.4g}]"
    if lost := [name for name, leaves in _shifts(block).items() if not _is_finite(leaves)]:
        return f"not finite: {', '.join(lost)}"
    return ""


def _shifts(block: ResidualBlock) -> dict[str, Any]:
    """By name, the weights of a block that no bound of a layer or a scale depends on."""
    found = {f"the bias of layer {i}": layer.bias for i, layer in enumerate(_affine(block.branch))}
    modules = [part for part in _parts(block.branch) if isinstance(part, ModuleStage)]
    found |= {f"the variables of {type(part.module).__name__}": part.variables for part in modules}
    return found if block.actnorm is None else found | {"the shift of ActNorm": block.actnorm.shift}


def _is_finite(leaves: Any) -> bool:
    return all(bool(np.isfinite(leaf).all()) for leaf in jax.tree.leaves(leaves))


def _parts(branch: Any) -> Sequence[Any]:
    """What states the bounds of a branch: its stages, or itself."""
    return branch.stages_as_used() if isinstance(branch, Sequential) else (branch,)


def _silent(branch: Any) -> list[str]:
    """The classes of what states no bound."""
    parts = [part.module if isinstance(part, ModuleStage) else part for part in _parts(branch)]
    return [type(part).__name__ for part in parts if not hasattr(part, "lipschitz_bound")]


def _affine(branch: Any) -> list[Affine]:
    """The affine layers of a branch made of stages, inside of stages too; none of others."""
    return affine_layers(_parts(branch)) if isinstance(branch, Sequential) else []


def _lipschitz(branch: Any, layers: Sequence[LayerCertificate]) -> float:
    """L of a branch from its layers and what else it is made of; infinite where one says nothing.

    NaN where a bound is.
    """
    if _silent(branch):
        return math.inf
    bounds = iter([layer.upper_bound for layer in layers])
    product = 1.0
    for part in _parts(branch):
        inside = [next(bounds) for _ in affine_layers(part)] if layers else []
        own = inside and isinstance(part, Affine)
        product *= inside[0] if own else float(part.lipschitz_bound())
    return _up(product)


def _scales(norm: ActNorm | None) -> tuple[float, float]:
    """The smallest and the largest scale of ActNorm, rounded outward."""
    if norm is None:
        return 1.0, 1.0
    with np.errstate(over="ignore"):
        scales = np.exp(np.asarray(norm.log_scale, np.float64))  # NaN fails every comparison
    return float(scales.min()) * (1.0 - _MARGIN), float(scales.max()) * (1.0 + _MARGIN)


def _domain_slopes(flow: Flow) -> tuple[float, float]:
    """The largest and the smallest slope of the step from data to where the network works."""
    if flow.domain != "logit":
        return 1.0, 1.0
    # d/dx logit(p), p = α + (1 − 2α)x, is (1 − 2α)/(p(1 − p)): steepest at the ends, x = 0 and 1.
    width = 1.0 - 2.0 * LOGIT_ALPHA
    steepest = width / (LOGIT_ALPHA * (1.0 - LOGIT_ALPHA))
    return steepest * (1.0 + _MARGIN), 4.0 * width * (1.0 - _MARGIN)


@jax.jit
def _sigma(operators: Any) -> jax.Array:
    def estimate(operator):
        operator = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), operator)
        start = init_singular_vectors(operator)
        vectors, _ = power_iteration_to_tolerance(operator, start, rtol=1e-3, max_steps=200)
        return sigma_estimate(operator, vectors)

    return jax.vmap(estimate)(operators)


def _up(value: float) -> float:
    """Rounded up by more than the few float64 operations before it can have lost."""
    return value * (1.0 + _MARGIN)
