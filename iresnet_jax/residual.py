"""The residual block y = x + g(x), invertible where Lip(g) < 1 (Behrmann et al. 2019)."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from iresnet_jax.bijections import (
    Bijection,
    BranchBounds,
    Error,
    Inverted,
    Mapped,
    check_keys,
)
from iresnet_jax.certificates import BlockCertificate, Certificate, certify_branch, rounded_up
from iresnet_jax.convergence import FixedPointInfo
from iresnet_jax.fixed_point import contraction_gap, solve
from iresnet_jax.layer_walk import float32_above, weights_alone, with_layer_bounds
from iresnet_jax.logdet import Estimator
from iresnet_jax.norm_proofs import tree_digest
from iresnet_jax.rounding import gamma, unit_roundoff
from iresnet_jax.solvers import FixedPointIteration, Solver
from iresnet_jax.types import Batch, Branch, Keys, PerSample, Samples, Shape

OPERATIONS = 16  # roundings of a step, an exponential's 4 among them, with room to spare


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Residual(Bijection):
    """y = x + g(x).

    Attributes:
      branch: g, a pytree that is callable on batches; Lip(g) < 1 makes the block invertible.
      lipschitz: a rigorous bound L ≥ Lip(g), or None where none was attached.
    """

    branch: Branch
    lipschitz: Float[Array, "*stack"] | None = None

    @property
    def num_branches(self) -> int:
        return 1

    @property
    def num_solves(self) -> int:
        return 1

    def forward(self, x: Samples) -> Samples:
        return x + same_shape(self.branch(x), x)

    def forward_and_log_det(self, x: Batch, estimator: Estimator, keys: Keys = None) -> Mapped:
        check_keys(keys, 1)
        key = None if keys is None else keys[0]
        residual, log_det = estimator(self.branch, x, key, self.lipschitz)
        return x + same_shape(residual, x), log_det

    def inverse(self, y: Samples, solver: Solver = FixedPointIteration()) -> Inverted:
        x, info = solve(self.branch, y, solver, lipschitz=self.lipschitz)
        return x, jax.tree.map(lambda field: field[None], info)

    def certify(self, name: str, shape: Shape) -> Certificate:
        branch = certify_branch(self.branch, name, shape)
        inverse = math.inf if branch.problem else rounded_up(1.0 / (1.0 - branch.lipschitz))
        forward = rounded_up(1.0 + branch.lipschitz)
        block = BlockCertificate(name, (branch,), forward, inverse, branch.problem)
        return Certificate((block,), forward, inverse)

    def inverse_error(self, error: Error, info: FixedPointInfo | None, shape: Shape) -> Error:
        """ε ← ε/(1 − L) + b, where b is the error bound of the block's own inverse."""
        assert info is not None
        return solve_error(error.bound, self.lipschitz, info, shape)

    def with_bounds(self, bounds: Iterator[BranchBounds]) -> Self:
        branch, lipschitz = bounded_branch(self.branch, next(bounds))
        return dataclasses.replace(self, branch=branch, lipschitz=lipschitz)

    @property
    def contracts(self) -> bool:
        return self.lipschitz is not None and bool((np.asarray(self.lipschitz) < 1.0).all())


def bounded_branch(branch: Branch, bounds: BranchBounds) -> tuple[Branch, Float[Array, "*stack"]]:
    """Return a branch, or a stack of branches, with its layers' bounds attached, and L in float32.

    Raises:
      ValueError: for bounds of other weights, where their values can be seen.
    """
    _check_weights(branch, bounds)
    return with_layer_bounds(branch, bounds.layers), float32_above(bounds.lipschitz)


def _check_weights(branch: Branch, bounds: BranchBounds) -> None:
    weights = weights_alone(branch)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(weights)):
        return
    weights = jax.tree.map(np.asarray, weights)
    for place in np.ndindex(bounds.digest.shape):
        own = jax.tree.map(lambda leaf, at=place: leaf[at], weights)
        if tree_digest(own) != bounds.digest[place]:
            raise ValueError(
                "The certificate is of other weights than this network's, which must be the "
                "same bit for bit. Certify it itself: flow.with_bounds(ir.certify(flow)), or "
                "block.bounded_by(block.certify(name, shape))."
            )


def same_shape(residual: Batch, x: Samples) -> Samples:
    """Refuse a branch whose output would broadcast: x + g(x) would be another map."""
    if residual.shape != x.shape:
        raise ValueError(
            f"A residual branch must keep the shape of its input; this one maps {x.shape} to "
            f"{residual.shape}."
        )
    return residual


def solve_error(
    error: PerSample, lipschitz: Float[Array, ""] | None, info: FixedPointInfo, shape: Shape
) -> Error:
    """Bound the error of a solution x of x + g(x) = y, given that of y.

    ε/(1 − L) + b, where b is the error bound that the solve itself reports.

    Args:
      error: ε, of y, [batch].
      lipschitz: a rigorous L ≥ Lip(g); None where none is known: then the bound is infinite.
      info: of the solve, fields [1, batch].
      shape: of one x, without batch axis.
    """
    slack = 1.0 + 2.0 * gamma(math.prod(shape) + OPERATIONS, unit_roundoff(error.dtype))
    gap = jnp.zeros(()) if lipschitz is None else contraction_gap(lipschitz, error.dtype)
    bound = jnp.where(gap > 0, error / jnp.where(gap > 0, gap, 1.0), jnp.inf)
    bound = (bound + info.error_bound[0]) * slack
    return Error(jnp.where(jnp.isnan(bound), jnp.inf, bound), info.norm[0] * slack)
