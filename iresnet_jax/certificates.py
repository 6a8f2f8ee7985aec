"""Certificates: rigorous bounds that say whether a network is invertible, and how well.

A residual block h + g(h) with Lip(g) ≤ L < 1 is invertible, with Lip ≤ 1 + L, and 1/(1 − L) for its
inverse. Along a chain the bounds multiply.

All bounds rest on :func:`iresnet_jax.bounds.layer_upper_bound` and :mod:`iresnet_jax.lipsdp`, never
on power iteration; and on what stages that are not this library's state of themselves. They are of
the weights as used, and of the real map that these define: the rounding of its evaluation is not in
them.
"""

import dataclasses
import logging
import math
from collections.abc import Iterable
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp

from iresnet_jax.layer_walk import (
    layers_by_path,
    modules_by_path,
    not_finite,
    unreadable,
    weights_alone,
)
from iresnet_jax.lipsdp import whole_bound
from iresnet_jax.logdet import Estimator
from iresnet_jax.norm_proofs import proved_norm, tree_digest
from iresnet_jax.operators import LinearOperator
from iresnet_jax.outward import product_above
from iresnet_jax.spectral import converged_sigma, unbegun_vectors
from iresnet_jax.stages import Sequential, as_used
from iresnet_jax.statements import stated_lipschitz, states
from iresnet_jax.types import Branch, Scalar

#: Says at level DEBUG which branch is certified: it can take minutes in large networks.
_LOG = logging.getLogger(__name__)
_MARGIN = 1e-12


class LayerCertificate(NamedTuple):
    """One affine layer of a branch.

    Attributes:
      name: of the block, and the layer's place in it.
      sigma: estimate of its norm by power iteration: from below, no guarantee.
      upper_bound: rigorous bound on its norm.
      path: where it is in its branch.
    """

    name: str
    sigma: float
    upper_bound: float
    path: str


class BranchCertificate(NamedTuple):
    """One residual branch g.

    Attributes:
      lipschitz: L ≥ Lip(g): of the branch as a whole (:mod:`iresnet_jax.lipsdp`) where that is less
        than the product of its stages' bounds; infinite where a part of it states none.
      dim: dimensions that it acts on.
      layers: its affine layers, those inside of composite stages too.
      problem: why nothing can be built on it; empty where L < 1 and all weights are finite.
      digest: hash of the branch and its weights.
      product: of its stages' bounds, ≥ ``lipschitz``.
      log_dets: how many log-determinants its block estimates of it: each adds to the bias.
    """

    lipschitz: float
    dim: int
    layers: tuple[LayerCertificate, ...]
    problem: str = ""
    digest: str = ""
    product: float = math.inf
    log_dets: int = 1


class BlockCertificate(NamedTuple):
    """One invertible block.

    Attributes:
      name: its place.
      branches: what it is made of; one of a residual block.
      forward: bound on the block's Lipschitz constant, ActNorm included.
      inverse: bound on that of its inverse; infinite where it is not certified.
      problem: why the block is not certified, its layers or its branch named; empty where it is.
    """

    name: str
    branches: tuple[BranchCertificate, ...]
    forward: float
    inverse: float
    problem: str = ""

    @property
    def certified(self) -> bool:
        """Whether the block is proved to be invertible."""
        return not self.problem

    @property
    def lipschitz(self) -> float:
        """L, the largest of its branches': the contraction factor of its inverse."""
        return _largest(branch.lipschitz for branch in self.branches)

    @property
    def product(self) -> float:
        """The largest product of a branch's stages' bounds: what L would be without the whole."""
        return _largest(branch.product for branch in self.branches)

    @property
    def layers(self) -> tuple[LayerCertificate, ...]:
        """The layers of all its branches."""
        return tuple(layer for branch in self.branches for layer in branch.layers)

    def as_dict(self) -> dict[str, object]:
        """Return the block as JSON holds it."""
        names = ("name", "lipschitz", "product", "forward", "inverse")
        fields = {name: getattr(self, name) for name in names}
        layers = [layer._asdict() for layer in self.layers]
        return {**fields, "problem": self.problem, "layers": layers}


@dataclasses.dataclass(frozen=True)
class Certificate:
    """What is proved of a network, or of a part of one.

    Attributes:
      blocks: first to last.
      forward: bound on the Lipschitz constant of the map, such as data → latents.
      inverse: bound on that of its inverse (on the map's range where channels are padded);
        infinite where something is not certified.
      problems: what else is not certified, beside blocks.
    """

    blocks: tuple[BlockCertificate, ...] = ()
    forward: float = 1.0
    inverse: float = 1.0
    problems: tuple[str, ...] = ()

    @property
    def certified(self) -> bool:
        """Whether the network is proved to be invertible."""
        return not self.problems and all(block.certified for block in self.blocks)

    @property
    def lipschitz(self) -> list[float]:
        """L of every block."""
        return [block.lipschitz for block in self.blocks]

    @property
    def branches(self) -> list[BranchCertificate]:
        """The branches of all blocks, first to last."""
        return [branch for block in self.blocks for branch in block.branches]

    @property
    def failures(self) -> tuple[BlockCertificate, ...]:
        """The blocks that are not proved to be invertible."""
        return tuple(block for block in self.blocks if not block.certified)

    def bias_bound(self, estimator: Estimator) -> float:
        """Bound the bias of the network's log-determinant by an estimator, in nats."""
        bounds = (b.log_dets * estimator.bias_bound(b.lipschitz, b.dim) for b in self.branches)
        return math.fsum(bounds) * (1.0 + _MARGIN)

    def then(self, after: Self) -> Self:
        """Certify the composition: this map first, ``after`` second."""
        return dataclasses.replace(
            self,
            blocks=self.blocks + after.blocks,
            forward=rounded_up(product_above(self.forward, after.forward)),
            inverse=rounded_up(product_above(self.inverse, after.inverse)),
            problems=self.problems + after.problems,
        )

    def with_problems(self, problems: Iterable[str]) -> Self:
        """Certify nothing of a map with problems; bounds along it are then none."""
        if not (found := tuple(problems)):
            return self
        found = self.problems + found
        return dataclasses.replace(self, forward=math.inf, inverse=math.inf, problems=found)

    def beside_identity(self) -> Self:
        """Certify the map where some coordinates pass it by, unchanged: max(1, ·)."""
        bounds = self.forward, self.inverse
        forward, inverse = (math.nan if math.isnan(b) else max(1.0, b) for b in bounds)
        return dataclasses.replace(self, forward=forward, inverse=inverse)

    def as_block(self, name: str) -> "Certificate":
        """Certify the same map as one block, whatever it is composed of."""
        problem = next((b.problem for b in self.blocks if b.problem), "")
        problem = problem or "; ".join(self.problems)
        inverse = math.inf if problem else self.inverse
        block = BlockCertificate(name, tuple(self.branches), self.forward, inverse, problem)
        return Certificate((block,), self.forward, inverse)

    def as_dict(self) -> dict[str, object]:
        """Return the certificate as JSON holds it (infinities and NaN stay floats)."""
        return {
            "certified": self.certified,
            "forward_lipschitz": self.forward,
            "inverse_lipschitz": self.inverse,
            "problems": list(self.problems),
            "blocks": [block.as_dict() for block in self.blocks],
        }


def in_a_row(parts: Iterable[Certificate]) -> Certificate:
    """Certify a chain, first to last."""
    whole = Certificate()
    for part in parts:
        whole = whole.then(part)
    return whole


def certify_branch(branch: Branch, name: str, shape: tuple[int, ...]) -> BranchCertificate:
    """Certify the branch, with concrete weights, of the block ``name``.

    Args:
      branch: g.
      name: of its block.
      shape: of one input, without batch axis.
    """
    _LOG.debug("certifying %s", name)
    used = as_used(branch)
    layers = tuple(
        LayerCertificate(
            f"{name}, layer {i}",
            float(_estimated_norm(layer.operator)),
            proved_norm(layer.operator),
            path,
        )
        for i, (path, layer) in enumerate(layers_by_path(used).items())
    )
    product = rounded_up(stated_lipschitz(branch))
    digest = tree_digest(weights_alone(branch))
    lipschitz, problem = product, _shape_problem(branch, shape)
    if isinstance(branch, Sequential) and not problem:
        lipschitz = min(product, rounded_up(whole_bound(branch, shape)))
    problem = _problem(used, layers, lipschitz) or problem
    return BranchCertificate(lipschitz, math.prod(shape), layers, problem, digest, product)


def _largest(bounds: Iterable[float]) -> float:
    found = list(bounds)
    return math.nan if any(map(math.isnan, found)) else max(found, default=0.0)


def rounded_up(value: float) -> float:
    """Return a bound raised by more than the few float64 operations before it can have lost."""
    return value * (1.0 + _MARGIN)


def rounded_down(value: float) -> float:
    """Return a bound from below, lowered likewise."""
    return value * (1.0 - _MARGIN)


def _problem(branch: Branch, layers: tuple[LayerCertificate, ...], lipschitz: float) -> str:
    bounds = {i: layer.upper_bound for i, layer in enumerate(layers)}
    if silent := _silent(branch):
        return f"{', '.join(silent)} states no lipschitz_bound()"
    if broken := [str(i) for i, bound in bounds.items() if not math.isfinite(bound)]:
        return f"the weights of layer {', '.join(broken)} are not finite"
    if opaque := unreadable(branch):
        return f"{', '.join(opaque)} is no registered pytree: its weights cannot be looked at"
    if lost := not_finite(branch):
        return f"not finite: {', '.join(lost)}"
    if not lipschitz < 1.0:
        above = [f"layer {i}: bound {bound:.4g}" for i, bound in bounds.items() if bound >= 1.0]
        bounded = f" ({', '.join(above)})" if above else ""  # to the nearest: no "≤"
        return f"the bound L = {lipschitz:.4g} is not below 1{bounded}"
    return ""


def _shape_problem(branch: Branch, shape: tuple[int, ...]) -> str:
    sample = jax.ShapeDtypeStruct((1, *shape), jnp.result_type(float))
    after = jax.eval_shape(branch, sample).shape[1:]
    return "" if after == shape else f"the branch maps the shape {shape} to {after}"


def _silent(branch: Branch) -> list[str]:
    """The classes of the stages, and of the foreign modules anywhere, that state no bound."""
    stages = branch.stages if isinstance(branch, Sequential) else (branch,)
    parts: list[object] = [stage for stage in stages if not isinstance(stage, Sequential)]
    parts += [stage.module for stage in modules_by_path(branch).values()]
    silent = [type(part).__name__ for part in parts if not states(part, "lipschitz_bound")]
    inner = [name for s in stages if isinstance(s, Sequential) for name in _silent(s)]
    return list(dict.fromkeys(silent + inner))


@jax.jit
def _estimated_norm(operator: LinearOperator) -> Scalar:
    operator = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), operator)
    return converged_sigma(operator, unbegun_vectors(operator), rtol=1e-3, max_steps=200)
