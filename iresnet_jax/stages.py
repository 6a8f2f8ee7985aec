"""What a residual branch g is made of, as pure pytrees: stages, each with its guarantees.

A *stage* is a callable on batches [batch, ...] that treats samples independently. What it says of
itself is how certificates compose:

- ``lipschitz_bound() -> float``: a rigorous L ≥ Lip, on the host. A stage without it has none.
- ``rounding(x, error, arithmetic) -> [batch]``: a rigorous bound on the distance of what is
  computed from the exact output, where the input is off by at most ``error``. A stage without it
  leaves the error of an inverse unbounded.

Any registered pytree with these is a stage, one that holds other stages too. Its weights are its
leaves, so that it passes freely through ``jit``, ``scan``, ``while_loop`` and differentiation, and
stacks along a leading axis.
"""

import dataclasses
import math
from typing import Any, Literal, TypeVar, get_args

import jax
import jax.numpy as jnp
from jax import Array

from iresnet_jax.activations import ACTIVATION_ULPS, ACTIVATIONS
from iresnet_jax.frozen_vectors import frozen_vectors
from iresnet_jax.module_calls import unrecorded_calls
from iresnet_jax.norm_proofs import proved_norm
from iresnet_jax.operators import STATIC, LinearOperator
from iresnet_jax.rounding import (
    Arithmetic,
    activation_error,
    affine_error,
    norm_above,
    unit_roundoff,
)
from iresnet_jax.types import Branch

Tree = TypeVar("Tree")

#: How a branch computes; see :class:`Sequential`.
Precision = Literal["float32", "tensorfloat32", "bfloat16"]
_MATMUL = {"float32": "highest", "tensorfloat32": "tensorfloat32", "bfloat16": "default"}
_INPUT_ROUNDING = {"float32": 0.0, "tensorfloat32": 2.0**-11, "bfloat16": 0.0}  # of products


def stated_lipschitz(stage: Branch) -> float:
    """Return what a stage states as L ≥ Lip; infinite where it states nothing.

    Raises:
      ValueError: for a bound below 0.
    """
    if not hasattr(stage, "lipschitz_bound"):
        return math.inf
    bound = float(stage.lipschitz_bound())
    if bound < 0.0:
        raise ValueError(f"{type(stage).__name__}.lipschitz_bound() must be ≥ 0; got {bound}.")
    return bound


def stated_rounding(stage: Branch, x: Array, error: Array, arithmetic: Arithmetic) -> Array:
    """Return what a stage states of its rounding, [batch]; infinite where it states nothing."""
    if not hasattr(stage, "rounding"):
        return jnp.full_like(error, jnp.inf)
    bound: Array = stage.rounding(x, error, arithmetic)
    return bound


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Activation:
    """An elementwise function with a known Lipschitz constant, by its name in ACTIVATIONS.

    Attributes:
      name: of the function; see :func:`~iresnet_jax.activations.register_activation`.
      active: 1 where it acts, 0 where it is left out and x passes as it is. A stack of branches has
        one number for each, a float because flows are differentiated leaf by leaf. None where it
        always acts.
    """

    name: str = dataclasses.field(metadata=STATIC)
    active: Array | None = None

    def __post_init__(self) -> None:
        if self.name not in ACTIVATIONS:
            raise ValueError(f"Unknown activation {self.name!r}; known: {', '.join(ACTIVATIONS)}.")

    def __call__(self, x: Array) -> Array:
        return self._where_active(ACTIVATIONS[self.name][0](x), x)

    def lipschitz_bound(self) -> float:
        """Return the largest slope, or the identity's where it may be left out and that is more."""
        slope = ACTIVATIONS[self.name][1]
        return slope if self.active is None else max(slope, 1.0)

    def rounding(self, x: Array, error: Array, arithmetic: Arithmetic) -> Array:
        """See :func:`iresnet_jax.rounding.activation_error`; infinite where nothing is known."""
        function, lipschitz = ACTIVATIONS[self.name]
        if self.name not in ACTIVATION_ULPS:
            return self._where_active(jnp.full_like(error, jnp.inf), error)
        ulps = ACTIVATION_ULPS[self.name]
        bound = activation_error(function, lipschitz, ulps, x, error, arithmetic)
        return self._where_active(bound, error)

    def _where_active(self, acting: Array, idle: Array) -> Array:
        return acting if self.active is None else jnp.where(self.active > 0.5, acting, idle)


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
    bias: Array | None = None
    sigma: Array | None = None
    norm_bound: Array | None = None

    def __call__(self, x: Array) -> Array:
        out = self.operator(x)
        return out if self.bias is None else out + self.bias

    def lipschitz_bound(self) -> float:
        """See :func:`iresnet_jax.bounds.layer_upper_bound`."""
        return proved_norm(self.operator)

    def rounding(self, x: Array, error: Array, arithmetic: Arithmetic) -> Array:
        """See :func:`iresnet_jax.rounding.affine_error`."""
        return affine_error(self.operator, self.bias, self.norm_bound, x, error, arithmetic)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ModuleStage:
    """The map of a Flax module that is not this library's, with its variables.

    Attributes:
      module: hashable, with ``apply(variables, x)`` on batches. L ≥ Lip(x ↦ apply(variables, x)) is
        what its ``lipschitz_bound(variables)`` says, if it has that method: it is taken at its
        word. How a module rounds is not known.
      variables: what it is applied with.
    """

    module: Any = dataclasses.field(metadata=STATIC)
    variables: Any

    def __call__(self, x: Array) -> Array:
        # Singular vectors of layers of this library in it have moved by now.
        with frozen_vectors(), unrecorded_calls():
            out: Array = self.module.apply(self.variables, x)
        return out

    def lipschitz_bound(self) -> float:
        """Return the module's own statement; infinite where it makes none.

        Raises:
          ValueError: for a bound below 0.
        """
        if not hasattr(self.module, "lipschitz_bound"):
            return math.inf
        variables = jax.tree.map(jnp.asarray, self.variables)
        bound = float(self.module.lipschitz_bound(variables))
        if bound < 0.0:
            raise ValueError(
                f"{type(self.module).__name__}.lipschitz_bound must be ≥ 0; got {bound}."
            )
        return bound


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

    def __call__(self, x: Array) -> Array:
        out = self._cast(x)
        with jax.default_matmul_precision(_MATMUL[self.precision]):
            for stage in self._cast_stages():
                out = stage(out)
        return out.astype(x.dtype)

    def lipschitz_bound(self) -> float:
        """Return L ≥ Lip: the product of the stages' bounds.

        The bounds are of the weights as used. The rounding of an evaluation is not in them.
        """
        return math.prod(stated_lipschitz(stage) for stage in self._cast_stages())

    def rounding_bound(self, x: Array) -> Array:
        """Bound ‖fl(g(x)) − g(x)‖₂ of each sample rigorously, [batch].

        g is the real map of the weights as used, fl(g) what ``self(x)`` returns where the
        assumptions of :mod:`iresnet_jax.rounding` hold. The bound is far tighter where the layers'
        bounds are attached. It is infinite where a stage states nothing of its rounding, or sums
        too many products for the precision: in bfloat16, from 48.
        """
        error = self.rounding(x, jnp.zeros(x.shape[0], x.dtype))
        return jnp.where(jnp.isnan(error), jnp.inf, error)

    def rounding(self, x: Array, error: Array, arithmetic: Arithmetic | None = None) -> Array:
        """Bound the error of the output, as a stage: the stages' own, first to last.

        Args:
          x: as computed here, [batch, ...].
          error: bound on the distance of ``x`` from the exact input, [batch].
          arithmetic: not used: precision and type of the values say how it computes.
        """
        del arithmetic
        value = self._cast(x)
        own = Arithmetic(unit_roundoff(value.dtype), _INPUT_ROUNDING[self.precision])
        if value.dtype != x.dtype:
            error = error * (1.0 + 2.0 * own.unit) + own.unit * norm_above(x)
        with jax.default_matmul_precision(_MATMUL[self.precision]):
            for stage in self._cast_stages():
                error = stated_rounding(stage, value, error, own)
                value = stage(value)
        return error

    def silent_about_rounding(self) -> list[str]:
        """Name the stages whose rounding is not known: the bound on it is infinite then."""
        silent: list[str] = []
        for stage in self.stages:
            if isinstance(stage, Sequential):
                silent += stage.silent_about_rounding()
            elif isinstance(stage, Activation):
                silent += [] if stage.name in ACTIVATION_ULPS else [stage.name]
            elif not hasattr(stage, "rounding"):
                silent.append(type(getattr(stage, "module", stage)).__name__)
        return sorted(set(silent))

    def _cast(self, x: Array) -> Array:
        return x.astype(jnp.bfloat16) if self.precision == "bfloat16" else x

    def _cast_stages(self) -> tuple[Branch, ...]:
        if self.precision != "bfloat16":
            return self.stages
        cast: tuple[Branch, ...] = jax.tree.map(_in_bfloat16, self.stages)
        return cast


def as_used(tree: Tree) -> Tree:
    """Return a branch, or a stage, with all weights in the type that they are used in."""

    def used(node: object) -> object:
        if not isinstance(node, Sequential):
            return node
        return Sequential(as_used(node._cast_stages()), node.precision)

    out: Tree = jax.tree.map(used, tree, is_leaf=lambda node: isinstance(node, Sequential))
    return out


def _in_bfloat16(leaf: Array) -> Array:
    if not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf
    return leaf.astype(jnp.bfloat16)


def first_without_activation(branches: Branch, depth: int) -> Branch:
    """Let the first of a stack of branches leave out the activation that it begins with.

    A branch that is no :class:`Sequential`, or begins with something else, stays as it is.

    Args:
      branches: with leaves stacked along a leading axis.
      depth: their number.
    """
    first = branches.stages[:1] if isinstance(branches, Sequential) else ()
    if not isinstance(branches, Sequential) or not isinstance(next(iter(first), None), Activation):
        return branches
    active = jnp.minimum(jnp.arange(depth, dtype=float), 1.0)
    marked = Activation(branches.stages[0].name, active)  # type: ignore[attr-defined]
    return dataclasses.replace(branches, stages=(marked, *branches.stages[1:]))
