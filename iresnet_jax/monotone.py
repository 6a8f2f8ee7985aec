"""The monotone block, the Cayley transform of a contraction g (Ahn et al. 2022, arXiv 2210.08176).

Its input x and its output y are made of one point w:

    x = (w + g(w))/√2,    y = (w − g(w))/√2,    Lip(g) ≤ L < 1.

- **It is a bijection.** Each x has exactly one w, and each y too: w ↦ √2·x − g(w) and
  w ↦ √2·y + g(w) contract. The inverse is the block of −g.
- **Both ways are one equation.** As w = (x + y)/√2, forward is y + √2·g((y + x)/√2) = x, and
  inverse is x − √2·g((x + y)/√2) = y: of the form z + h(z) = c with Lip(h) ≤ L.
- **Log-determinant.** ∂y/∂x = (I − J)(I + J)⁻¹ with the Jacobian J of g at w, so log|det ∂y/∂x| =
  log|det(I − J)| − log|det(I + J)| = −2·Σ tr(Jᵏ)/k over odd k.
- **Slopes.** If two points differ by u in w and by v in g(w), then ‖v‖ ≤ L‖u‖, and y differs by
  ‖u − v‖/‖u + v‖ times as much as x: by at most (1 + L)/(1 − L), at least the inverse of that.
  Their differences have the inner product (‖u‖² − ‖v‖²)/2 ≥ 0: the map is monotone.

A residual block of the same g has slopes in [1 − L, 1 + L] alone.
"""

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
from iresnet_jax.fixed_point import Rounding, check_solver, solve
from iresnet_jax.iterations import Flags, expand, sample_norm
from iresnet_jax.logdet import Estimator
from iresnet_jax.operators import STATIC
from iresnet_jax.residual import OPERATIONS, bounded_branch, same_shape, solve_error
from iresnet_jax.rounding import gamma, norm_above, unit_roundoff
from iresnet_jax.solvers import Anderson, FixedPointIteration, Solver
from iresnet_jax.stages import Sequential
from iresnet_jax.types import Batch, Branch, Keys, PerSample, Samples, Shape

#: Of the forward equation: to working precision, for L up to about 0.99.
FORWARD_SOLVER = Anderson(rtol=1e-13, atol=1e-13, max_steps=2000)

_ROOT = math.sqrt(2.0)
_REACHABLE = 8  # times the distance from 1 to the next number: a residual that can be seen
_COARSE = {"tensorfloat32": 2.0**-10, "bfloat16": 2.0**-7}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Monotone(Bijection):
    """y = √2·w − x, where w + g(w) = √2·x.

    Where the forward equation misses its tolerance, a sample and its log-determinant are NaN, and
    so are their derivatives: nothing under ``jit`` can warn, and a map that is off would make a
    wrong likelihood. :meth:`forward_with_report` tells what happened. It is to be expected of a
    branch that does not contract, and of L close to 1 with too few steps.

    Attributes:
      branch: g, a pytree that is callable on batches; Lip(g) < 1 makes the block invertible.
      lipschitz: a rigorous bound L ≥ Lip(g), or None where none was attached.
      solver: of the forward equation, and of its derivatives'. Its tolerances are raised to what
        the input's precision can meet, 8 units in the last place. A branch in bfloat16 or
        tensorfloat32 cannot meet the default, and is refused unless ``rtol`` is as coarse.
    """

    branch: Branch
    lipschitz: Float[Array, "*stack"] | None = None
    solver: Solver = dataclasses.field(default=FORWARD_SOLVER, metadata=STATIC)

    def __post_init__(self) -> None:
        check_solver(self.solver)

    @property
    def num_branches(self) -> int:
        return 1

    @property
    def num_solves(self) -> int:
        return 1

    def forward(self, x: Samples) -> Samples:
        y, info = self.forward_with_report(x)
        return _nan_unless(info.converged, y)

    def forward_and_log_det(self, x: Batch, estimator: Estimator, keys: Keys = None) -> Mapped:
        """Map a batch, with log|det(I − J)| − log|det(I + J)| at w, each by the estimator, [batch].

        Both draw by the same key: even powers of J cancel along every probe. The bias is at most
        twice that of one, as the certificate counts it.
        """
        check_keys(keys, 1)
        key = None if keys is None else keys[0]
        y, info = self.forward_with_report(x)
        w = _middle(x, y)
        _, of_minus = estimator(lambda w: -self.branch(w), w, key, self.lipschitz)
        _, of_plus = estimator(self.branch, w, key, self.lipschitz)
        log_det = of_minus - of_plus
        return _nan_unless(info.converged, y), _nan_unless(info.converged, log_det)

    def forward_with_report(self, x: Samples) -> tuple[Samples, FixedPointInfo]:
        """Map a batch whether or not the tolerance is met; with how it went, fields [batch].

        The report's ``error_bound`` is a rigorous bound on ‖ŷ − F(x)‖₂, where L is attached.

        Raises:
          ValueError: for a branch that computes more coarsely than the solver's ``rtol``.
        """
        _check_reachable(self.branch, self.solver)
        least = _REACHABLE * float(jnp.finfo(jnp.result_type(x, float)).eps)
        rtol, atol = max(self.solver.rtol, least), max(self.solver.atol, least)
        return self._solved(x, _ROOT, dataclasses.replace(self.solver, rtol=rtol, atol=atol))

    def inverse(self, y: Samples, solver: Solver = FixedPointIteration()) -> Inverted:
        """Solve x − √2·g((x + y)/√2) = y; residual and error bound of the report are those of x.

        ``rtol`` is relative to ‖x‖ + ‖y‖.
        """
        x, info = self._solved(y, -_ROOT, solver)
        return x, jax.tree.map(lambda field: field[None], info)

    def certify(self, name: str, shape: Shape) -> Certificate:
        """Bound both ways by (1 + L)/(1 − L); the branch counts twice in biases: as g and as −g."""
        branch = certify_branch(self.branch, name, shape)._replace(log_dets=2)
        bound = math.inf if branch.problem else rounded_up(_stretch(branch.lipschitz))
        block = BlockCertificate(name, (branch,), bound, bound, branch.problem)
        return Certificate((block,), bound, bound)

    def inverse_error(self, error: Error, info: FixedPointInfo | None, shape: Shape) -> Error:
        """ε ← ε·(1 + L)/(1 − L) + b, where b is the error bound of the block's own inverse."""
        assert info is not None
        grown = error.bound
        if self.lipschitz is not None:
            slack = 1.0 + 4.0 * gamma(OPERATIONS, unit_roundoff(grown.dtype))
            grown = grown * (1.0 + self.lipschitz.astype(grown.dtype)) * slack
        return solve_error(grown, self.lipschitz, info, shape)

    def with_bounds(self, bounds: Iterator[BranchBounds]) -> Self:
        branch, lipschitz = bounded_branch(self.branch, next(bounds))
        return dataclasses.replace(self, branch=branch, lipschitz=lipschitz)

    @property
    def contracts(self) -> bool:
        return self.lipschitz is not None and bool((np.asarray(self.lipschitz) < 1.0).all())

    def _solved(
        self, given: Samples, factor: float, solver: Solver
    ) -> tuple[Samples, FixedPointInfo]:
        """Solve z + factor·g((z + c)/√2) = c, where c is given."""
        given = jnp.asarray(given)
        half = _OtherHalf(self.branch, given, factor, self.lipschitz)
        return solve(half, given, solver, lipschitz=self.lipschitz, scale=sample_norm(given))


@dataclasses.dataclass(frozen=True, eq=False)
class _OtherHalf:
    """h(z) = factor·g((z + c)/√2), |factor| = √2, as the branch of a residual block.

    Its rounding is that of ŵ = fl((z + c)/√2), carried through g, that of g, and of the product.
    """

    branch: Branch
    given: Samples
    factor: float
    lipschitz: Float[Array, ""] | None

    def __call__(self, z: Samples) -> Samples:
        w = _middle(z, self.given)
        return self.factor * same_shape(self.branch(w), w)

    def rounding_bound(self, z: Samples) -> PerSample:
        """Bound ‖fl(h(z)) − h(z)‖₂ of each sample, [batch]; infinite where nothing is known.

        ŵ is within γ₃‖w‖ of w = (z + c)/√2, and the product with the rounded √2 within γ₂ of exact:
        γ₁₆ covers both, and the operations here. Numbers flushed to zero cost √n·tiny each.
        """
        w = _middle(z, self.given)
        factor = gamma(OPERATIONS, unit_roundoff(z.dtype))
        flushed = 4.0 * math.sqrt(math.prod(z.shape[1:])) * float(jnp.finfo(z.dtype).tiny)
        inside = self._rounding_inside(w, factor * norm_above(w) + flushed)
        product = factor * (norm_above(self.branch(w)) + 2.0 * inside) + flushed
        return (_ROOT * (inside + product) * (1.0 + 2.0 * factor)).astype(z.dtype)

    def _rounding_inside(self, w: Samples, error: PerSample) -> PerSample:
        """Bound ‖fl(g(ŵ)) − g(w)‖₂, where ŵ is off by at most ``error``.

        A branch that only states its rounding at a point is taken to see the ŵ that is given here.
        """
        if type(self.branch) is Sequential:
            return self.branch.rounding(w, error)
        rounding: Rounding | None = getattr(self.branch, "rounding_bound", None)
        if self.lipschitz is None or rounding is None:
            return jnp.full_like(error, jnp.inf)
        return rounding(w) + self.lipschitz * error

    def silent_about_rounding(self) -> list[str]:
        """Name what the branch holds that does not bound its rounding."""
        if not hasattr(self.branch, "rounding_bound"):
            return [getattr(self.branch, "__name__", type(self.branch).__name__)]
        silent: list[str] = getattr(self.branch, "silent_about_rounding", list)()
        return silent


def _middle(x: Samples, y: Samples) -> Samples:
    """w = (x + y)/√2."""
    return (x + y) * math.sqrt(0.5)


def _check_reachable(branch: Branch, solver: Solver) -> None:
    precision = getattr(branch, "precision", "float32")
    if solver.rtol < (least := _COARSE.get(precision, 0.0)):
        raise ValueError(
            f"A monotone block solves an equation to map forward. A branch in {precision} can meet "
            f"no rtol below {least:g}; the solver's is {solver.rtol:g}. Use float32, or a solver "
            "with a larger rtol, whose map is as inexact."
        )


def _stretch(lipschitz: float) -> float:
    return (1.0 + lipschitz) / (1.0 - lipschitz)


def _nan_unless(valid: Flags, x: Samples) -> Samples:
    return jnp.where(expand(valid, x), x, jnp.nan)
