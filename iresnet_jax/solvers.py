"""How the fixed-point equation of an inverse is solved: settings as frozen dataclasses."""

import abc
import dataclasses
import math

import jax
from jax import lax

from iresnet_jax.checks import check_at_least_one
from iresnet_jax.iterations import Rule, Solution, Update, anderson, plain
from iresnet_jax.types import AnyArray, Samples


@dataclasses.dataclass(frozen=True)
class Solver(abc.ABC):
    """An iteration and when it stops.

    A sample stops as soon as its residual ‖y − g(x) − x‖₂ is at most atol + rtol·‖x‖₂, or, where
    ``error_tolerance`` is given, as soon as its proved error is at most that.

    Equal settings are equal solvers, so one may be a static argument of ``jit``, or any other: as a
    pytree it has no leaves.

    Attributes:
      rtol: relative tolerance, ≥ 0.
      atol: absolute tolerance, ≥ 0; one of the two must be > 0.
      max_steps: evaluations of the branch after which a sample stops unconverged, ≥ 1.
      error_tolerance: rigorous bound on the error to reach, > 0, or None. It needs a bound on the
        branch's Lipschitz constant and one on its rounding. Steps near the end cost three
        evaluations of the branch each, because they bound its rounding.

    Raises:
      TypeError, ValueError: for settings out of range.
    """

    rtol: float = 1e-6
    atol: float = 1e-6
    max_steps: int = 100
    error_tolerance: float | None = dataclasses.field(default=None, kw_only=True)

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        jax.tree_util.register_static(cls)

    def __post_init__(self) -> None:
        rtol, atol = self.rtol, self.atol
        if not (rtol >= 0 and atol >= 0 and 0 < rtol + atol < math.inf):
            raise ValueError(f"Tolerances must be ≥ 0 and one of them > 0; got {rtol=}, {atol=}.")
        check_at_least_one("max_steps", self.max_steps)
        if self.error_tolerance is not None and not self.error_tolerance > 0:
            raise ValueError(f"error_tolerance must be > 0; got {self.error_tolerance}.")

    @abc.abstractmethod
    def iterate(
        self, update: Update, start: Samples, rule: Rule, lipschitz: float | AnyArray | None
    ) -> Solution:
        """Solve x = f(x) for each sample, until the rule is met or the steps run out.

        Args:
          update: f.
          start: [batch, ...].
          rule: when a sample stops.
          lipschitz: a rigorous bound on Lip(f), or None.
        """


@dataclasses.dataclass(frozen=True)
class FixedPointIteration(Solver):
    """The plain iteration x ← y − g(x) (Behrmann et al. 2019, Algorithm 1)."""

    def iterate(
        self, update: Update, start: Samples, rule: Rule, lipschitz: float | AnyArray | None
    ) -> Solution:
        return plain(update, start, rule, self.max_steps)


@dataclasses.dataclass(frozen=True)
class Anderson(Solver):
    """Anderson's acceleration, safeguarded: it needs fewer evaluations of the branch.

    An extrapolation that lets the residual shrink by less than the branch's Lipschitz constant is
    rejected, so that the iteration is at most one evaluation slower than the plain one's bound; see
    :func:`~iresnet_jax.iterations.anderson`.

    Attributes:
      window: differences that are kept, ≥ 1.
    """

    window: int = dataclasses.field(default=3, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one("window", self.window)

    def iterate(
        self, update: Update, start: Samples, rule: Rule, lipschitz: float | AnyArray | None
    ) -> Solution:
        known = 1.0 if lipschitz is None else lax.stop_gradient(lipschitz)
        return anderson(update, start, rule, self.max_steps, window=self.window, lipschitz=known)
