"""What a residual branch g is made of, as pure pytrees: stages, each with its guarantees.

A *stage* is a callable on batches [batch, ...] that treats samples independently. Certificates
compose what it states of itself:

- ``lipschitz_bound() -> float``: a rigorous L ≥ Lip, on the host. A stage without it has none.
- ``rounding(x, error, arithmetic) -> [batch]``: a rigorous bound on the distance of the computed
  output from the exact one, where the input is off by at most ``error``. A stage without it leaves
  the error of an inverse unbounded.
- ``slopes() -> (float, float)``: of an elementwise stage, bounds α ≤ (φ(x) − φ(y))/(x − y) ≤ β.
  With them :mod:`~iresnet_jax.lipsdp` sees through the stage.

A subclass with a ``__call__`` of its own inherits none of these; with a ``lipschitz_bound`` of its
own, no slopes.

Any registered pytree with these is a stage, one that holds other stages too. Its weights are its
leaves: it passes through ``jit``, ``scan`` and differentiation, and stacks along a leading axis.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Literal, Protocol, TypeVar, cast, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from iresnet_jax.activations import ACTIVATIONS, where_active
from iresnet_jax.frozen_vectors import frozen_vectors
from iresnet_jax.module_calls import unrecorded_calls
from iresnet_jax.norm_proofs import proved_norm
from iresnet_jax.operators import STATIC, LinearOperator
from iresnet_jax.outward import product_above
from iresnet_jax.rounding import (
    Arithmetic,
    activation_error,
    affine_error,
    norm_above,
    unit_roundoff,
)
from iresnet_jax.scaled_activation import ScaledActivation
from iresnet_jax.statements import not_negative, stated_lipschitz, stated_rounding, states
from iresnet_jax.types import AnyArray, Batch, Branch, PerSample, SameArray, Samples

Tree = TypeVar("Tree")

#: How a branch computes; see :class:`Sequential`.
Precision = Literal["float32", "tensorfloat32", "bfloat16"]
_MATMUL = {"float32": "highest", "tensorfloat32": "tensorfloat32", "bfloat16": "default"}
_INPUT_ROUNDING = {"float32": 0.0, "tensorfloat32": 2.0**-11, "bfloat16": 0.0}  # of products


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Activation:
    """An elementwise function with known slopes, by its name in ACTIVATIONS.

    Attributes:
      name: of the function; see :func:`~iresnet_jax.activations.register_activation`.
      active: None where it always acts. Else 1 where it acts and 0 where x passes as it is, for
        each of a stack of branches; a float, because flows are differentiated leaf by leaf.
    """

    name: str = dataclasses.field(metadata=STATIC)
    active: Float[Array, "..."] | None = None

    def __post_init__(self) -> None:
        if self.name not in ACTIVATIONS:
            raise ValueError(f"Unknown activation {self.name!r}; known: {', '.join(ACTIVATIONS)}.")

    def __call__(self, x: Float[AnyArray, "*shape"]) -> Float[Array, "*shape"]:
        x = jnp.asarray(x)
        return where_active(self.active, ACTIVATIONS[self.name].function(x), x)

    def lipschitz_bound(self) -> float:
        """Return the largest absolute slope."""
        return max(map(abs, self.slopes()))

    def slopes(self) -> tuple[float, float]:
        """Return bounds on the slopes from below and above; with the identity's if it is one."""
        low, high = ACTIVATIONS[self.name].slopes
        return (low, high) if self.active is None else (min(low, 1.0), max(high, 1.0))

    def rounding(self, x: Samples, error: PerSample, arithmetic: Arithmetic) -> PerSample:
        """See :func:`iresnet_jax.rounding.activation_error`; infinite where nothing is known."""
        known = ACTIVATIONS[self.name]
        if known.ulps is None:
            return where_active(self.active, jnp.full_like(error, jnp.inf), error)
        bound = activation_error(known.function, known.lipschitz, known.ulps, x, error, arithmetic)
        return where_active(self.active, bound, error)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Affine:
    """x ↦ A x + b.

    Attributes:
      operator: A, a linear operator.
      bias: b, shape [channels], or None.
      sigma: what the norm of A *before* it was constrained was taken to be: an estimate by power
        iteration, or an upper bound.
      norm_bound: a rigorous bound on the norm of A, which tightens that on rounding, or None.
        :func:`~iresnet_jax.layer_walk.with_layer_bounds` attaches it. Certificates never read it.
    """

    operator: LinearOperator
    bias: Float[Array, "*stack channels"] | None = None
    sigma: Float[Array, "*stack"] | None = None
    norm_bound: Float[Array, "*stack"] | None = None

    def __call__(self, x: Float[AnyArray, "..."]) -> Float[Array, "..."]:
        out = self.operator(x)
        if self.bias is None:
            return out
        if self.bias.shape != out.shape[-1:]:
            raise ValueError(
                f"The bias of a layer with {out.shape[-1]} output channels must have shape "
                f"{out.shape[-1:]}; got {self.bias.shape}."
            )
        return out + jnp.broadcast_to(self.bias, out.shape)

    def lipschitz_bound(self) -> float:
        """See :func:`iresnet_jax.bounds.layer_upper_bound`."""
        return proved_norm(self.operator)

    def rounding(self, x: Batch, error: PerSample, arithmetic: Arithmetic) -> PerSample:
        """See :func:`iresnet_jax.rounding.affine_error`."""
        return affine_error(self.operator, self.bias, self.norm_bound, x, error, arithmetic)


class Applicable(Protocol):
    """A module that stores no weights itself, such as Flax's."""

    @property
    def apply(self) -> Callable[..., object]:
        """(variables, x) -> the output."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ModuleStage:
    """The map of a Flax module that is not this library's, with its variables.

    Attributes:
      module: hashable, with ``apply(variables, x)`` on batches. If it has a method
        ``lipschitz_bound(variables)``, that is L ≥ Lip(x ↦ apply(variables, x)): it is taken at its
        word. How a module rounds is not known.
      variables: what it is applied with.
      vectors_as_they_are: whether singular vectors of this library's layers in it count as they
        are, since they have advanced; otherwise a layer whose vectors miss its norm converges them
        in every call.
    """

    module: Applicable = dataclasses.field(metadata=STATIC)
    variables: Mapping[str, object]
    vectors_as_they_are: bool = dataclasses.field(default=True, metadata=STATIC)

    def __call__(self, x: Batch) -> Batch:
        frozen = frozen_vectors() if self.vectors_as_they_are else contextlib.nullcontext()
        with frozen, unrecorded_calls():
            return cast(Array, self.module.apply(self.variables, x))

    def lipschitz_bound(self) -> float:
        """Return the module's own statement; infinite where it makes none.

        Raises:
          ValueError: for a bound below 0.
        """
        if not states(self.module, "lipschitz_bound"):
            return math.inf
        variables = jax.tree.map(jnp.asarray, self.variables)
        bound = self.module.lipschitz_bound(variables)  # type: ignore[attr-defined]
        return not_negative(bound, f"{type(self.module).__name__}.lipschitz_bound")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Sequential:
    """Stages in a row, first to last: a stage itself, and usually a whole branch.

    Attributes:
      stages: what is composed.
      precision: "float32" multiplies at full precision whatever the accelerator's default, so that
        forward and inverse are the same map; "tensorfloat32" allows the faster products of recent
        GPUs; "bfloat16" computes inside in bfloat16, with the output in the input's type.
    """

    stages: tuple[Branch, ...]
    precision: Precision = dataclasses.field(default="float32", metadata=STATIC)

    def __post_init__(self) -> None:
        if self.precision not in get_args(Precision):
            names = ", ".join(get_args(Precision))
            raise ValueError(f"precision must be one of {names}; got {self.precision!r}.")

    def __call__(self, x: Batch) -> Batch:
        out = self._cast(x)
        with jax.default_matmul_precision(_MATMUL[self.precision]):
            for stage in self.stages_as_used():
                out = stage(out)
        return out.astype(x.dtype)

    def lipschitz_bound(self) -> float:
        """Return L ≥ Lip, of the weights as used: the product of the stages' bounds.

        The rounding of an evaluation is not in it.
        """
        return product_above(*map(stated_lipschitz, self.stages_as_used()))

    def rounding_bound(self, x: Batch) -> PerSample:
        """Bound ‖fl(g(x)) − g(x)‖₂ of each sample rigorously, [batch].

        g is the real map of the weights as used, fl(g) what ``self(x)`` returns where the
        assumptions of :mod:`iresnet_jax.rounding` hold. The bound is far tighter where the layers'
        bounds are attached. It is infinite where a stage states nothing of its rounding, or sums
        too many products for the precision: in bfloat16, from 48.
        """
        error = self.rounding(x, jnp.zeros(x.shape[0], x.dtype))
        return jnp.where(jnp.isnan(error), jnp.inf, error)

    def rounding(
        self, x: Batch, error: PerSample, arithmetic: Arithmetic | None = None
    ) -> PerSample:
        """Bound the error of the output, [batch], where ``x`` is off by at most ``error``.

        The stages' own precision and type say how they compute, not ``arithmetic``.
        """
        del arithmetic
        value = self._cast(x)
        own = Arithmetic(unit_roundoff(value.dtype), _INPUT_ROUNDING[self.precision])
        if value.dtype != x.dtype:
            error = error * (1.0 + 2.0 * own.unit) + own.unit * norm_above(x)
        with jax.default_matmul_precision(_MATMUL[self.precision]):
            for stage in self.stages_as_used():
                error = stated_rounding(stage, value, error, own)
                value = stage(value)
        return error

    def silent_about_rounding(self) -> list[str]:
        """Name the stages whose rounding is not known: the bound on it is infinite then."""
        silent: set[str] = set()
        for stage in self.stages:
            if hasattr(stage, "silent_about_rounding") and states(stage, "rounding"):
                silent |= set(stage.silent_about_rounding())
            elif isinstance(stage, Activation):
                silent |= {stage.name} if ACTIVATIONS[stage.name].ulps is None else set()
            elif not states(stage, "rounding"):
                silent.add(type(getattr(stage, "module", stage)).__name__)
        return sorted(silent)

    def _cast(self, x: SameArray) -> SameArray:
        return x.astype(jnp.bfloat16) if self.precision == "bfloat16" else x

    def stages_as_used(self) -> tuple[Branch, ...]:
        """Return the stages with their weights in the type that they are used in."""
        if self.precision != "bfloat16":
            return self.stages
        cast: tuple[Branch, ...] = jax.tree.map(_in_bfloat16, self.stages)
        return cast


def as_used(tree: Tree) -> Tree:
    """Return a branch, or a stage, with all weights in the type that they are used in."""

    def used(node: object) -> object:
        if type(node) is not Sequential:  # what a subclass does with its weights is its own
            return node
        return Sequential(as_used(node.stages_as_used()), node.precision)

    out: Tree = jax.tree.map(used, tree, is_leaf=lambda node: isinstance(node, Sequential))
    return out


def _in_bfloat16(leaf: Array) -> Array:
    floats = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
    return leaf.astype(jnp.bfloat16) if floats else leaf


def first_without_activation(branches: Branch, depth: int) -> Branch:
    """Let the first of ``depth`` stacked branches leave out the activation that it begins with.

    A branch that is no :class:`Sequential`, or begins with something else, stays as it is.
    """
    if not isinstance(branches, Sequential) or not branches.stages:
        return branches
    first, *others = branches.stages
    if not isinstance(first, Activation | ScaledActivation):
        return branches
    active = jnp.minimum(jnp.arange(depth, dtype=float), 1.0)
    return dataclasses.replace(
        branches, stages=(dataclasses.replace(first, active=active), *others)
    )
