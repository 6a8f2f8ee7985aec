"""Branches g as pure pytrees: affine maps with known norm, and activations with known slope.

A branch is a callable on batches that also states ``lipschitz_bound()``. It holds its
(constrained) weights, so it passes freely through ``jit``, ``scan``, ``while_loop`` and
differentiation; stacked along a leading axis of its leaves it is a whole stack of branches.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from iresnet_jax.activations import ACTIVATION_ULPS, ACTIVATIONS
from iresnet_jax.bounds import layer_upper_bound
from iresnet_jax.operators import STATIC, LinearOperator
from iresnet_jax.rounding import (
    Arithmetic,
    activation_error,
    affine_error,
    norm_above,
    unit_roundoff,
)

#: How a branch computes; see :class:`Sequential`.
Precision = Literal["float32", "tensorfloat32", "bfloat16"]
#: What a layer divides its kernel by; see :class:`iresnet_jax.layers.SpectralConv`.
Normalize = Literal["power", "certified"]
_MATMUL = {"float32": "highest", "tensorfloat32": "tensorfloat32", "bfloat16": "default"}
_INPUT_ROUNDING = {"float32": 0.0, "tensorfloat32": 2.0**-11, "bfloat16": 0.0}  # of products


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Activation:
    """An elementwise function with a known Lipschitz constant, by its name in ACTIVATIONS.

    Attributes:
      name: of the function.
      active: 1 where it acts, 0 where it is left out and x passes as it is: in a stack of branches
        one number for each, a float because flows are differentiated leaf by leaf. None where it
        always acts.
    """

    name: str = dataclasses.field(metadata=STATIC)
    active: jax.Array | None = None

    def __post_init__(self):
        if self.name not in ACTIVATIONS:
            raise ValueError(f"Unknown activation {self.name!r}; known: {', '.join(ACTIVATIONS)}.")

    def __call__(self, x: jax.Array) -> jax.Array:
        return self._where_active(ACTIVATIONS[self.name][0](x), x)

    def lipschitz_bound(self) -> float:
        """The function's largest slope, known by its name, or the identity's if that is larger."""
        slope = ACTIVATIONS[self.name][1]
        return slope if self.active is None else max(slope, 1.0)

    def rounding(self, x: jax.Array, error: jax.Array, arithmetic: Arithmetic) -> jax.Array:
        """See :func:`iresnet_jax.rounding.activation_error`."""
        function, lipschitz = ACTIVATIONS[self.name]
        ulps = ACTIVATION_ULPS[self.name]
        bound = activation_error(function, lipschitz, ulps, x, error, arithmetic)
        return self._where_active(bound, error)

    def _where_active(self, acting, idle):
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
      norm_bound: a rigorous bound on the norm of A, or None where none was attached.
    """

    operator: LinearOperator
    bias: jax.Array | None = None
    sigma: jax.Array | None = None
    norm_bound: jax.Array | None = None

    def __call__(self, x: jax.Array) -> jax.Array:
        out = self.operator(x)
        return out if self.bias is None else out + self.bias

    def lipschitz_bound(self) -> float:
        """See :func:`iresnet_jax.bounds.layer_upper_bound`."""
        return layer_upper_bound(self.operator)

    def rounding(self, x: jax.Array, error: jax.Array, arithmetic: Arithmetic) -> jax.Array:
        """See :func:`iresnet_jax.rounding.affine_error`."""
        return affine_error(self.operator, self.bias, self.norm_bound, x, error, arithmetic)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ModuleStage:
    """The map of a module that is not this library's, with its variables.

    Attributes:
      module: hashable, with ``apply(variables, x)`` on batches. L ≥ Lip(x ↦ apply(variables, x)) is
        what its ``lipschitz_bound(variables)`` says; this library takes its word for it.
      variables: what it is applied with.
    """

    module: Any = dataclasses.field(metadata=STATIC)
    variables: Any

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.module.apply(self.variables, x)

    def lipschitz_bound(self) -> float:
        """The module's own statement; infinite where it makes none.

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

    def rounding(self, x: jax.Array, error: jax.Array, arithmetic: Arithmetic) -> jax.Array:
        """Infinite: how a module rounds is not known."""
        del x, arithmetic
        return jnp.full_like(error, jnp.inf)


Stage = Activation | Affine | ModuleStage


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Sequential:
    """The composition of stages, first to last; its bound is the product of theirs.

    Attributes:
      stages: what is composed.
      precision: "float32" multiplies at full precision whatever the accelerator's default, so that
        forward and inverse are the same map; "tensorfloat32" allows the faster products of recent
        GPUs; "bfloat16" computes inside the branch in bfloat16, its output in the input's type.
    """

    stages: tuple[Stage, ...]
    precision: Precision = dataclasses.field(default="float32", metadata=STATIC)

    def __post_init__(self):
        if self.precision not in get_args(Precision):
            names = ", ".join(get_args(Precision))
            raise ValueError(f"precision must be one of {names}; got {self.precision!r}.")

    def __call__(self, x: jax.Array) -> jax.Array:
        out = x.astype(jnp.bfloat16) if self.precision == "bfloat16" else x
        with jax.default_matmul_precision(_MATMUL[self.precision]):
            for stage in self.stages_as_used():
                out = stage(out)
        return out.astype(x.dtype)

    def stages_as_used(self) -> tuple[Stage, ...]:
        """The stages with their weights in the type that they are used in."""
        if self.precision != "bfloat16":
            return self.stages
        return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), self.stages)

    def lipschitz_bound(self) -> float:
        """L ≥ Lip(g): the product of the layers' bounds and the activations' constants.

        The bounds are of the weights as used; rounding inside the branch is not in them.
        """
        return math.prod(stage.lipschitz_bound() for stage in self.stages_as_used())

    def silent_about_rounding(self) -> list[str]:
        """The classes of the modules whose rounding is not known: that bound is infinite then."""
        modules = (stage.module for stage in self.stages if isinstance(stage, ModuleStage))
        return sorted({type(module).__name__ for module in modules})

    def rounding_bound(self, x: jax.Array) -> jax.Array:
        """A rigorous bound on ‖fl(g(x)) − g(x)‖₂ of each sample, [batch].

        g is the real map of the weights as used, fl(g) what ``self(x)`` returns where the
        assumptions of :mod:`iresnet_jax.rounding` hold. Far tighter where the layers' bounds are
        attached. Infinite where too many products are summed for the precision: in bfloat16, from
        48.
        """
        value = x.astype(jnp.bfloat16) if self.precision == "bfloat16" else x
        arithmetic = Arithmetic(unit_roundoff(value.dtype), _INPUT_ROUNDING[self.precision])
        casts = value.dtype != x.dtype
        error = arithmetic.unit * norm_above(x) if casts else jnp.zeros(x.shape[0], x.dtype)
        with jax.default_matmul_precision(_MATMUL[self.precision]):
            for stage in self.stages_as_used():
                error = stage.rounding(value, error, arithmetic)
                value = stage(value)
        return jnp.where(jnp.isnan(error), jnp.inf, error)


def first_without_activation(branches: Any, depth: int) -> Any:
    """A stack of branches of which the first leaves out the activation that it begins with.

    Those that are no :class:`Sequential`, or begin with something else, stay as they are.

    Args:
      branches: with leaves stacked along a leading axis.
      depth: their number.
    """
    first = branches.stages[:1] if isinstance(branches, Sequential) else ()
    if not first or not isinstance(first[0], Activation):
        return branches
    active = jnp.minimum(jnp.arange(depth, dtype=float), 1.0)
    marked = dataclasses.replace(first[0], active=active)
    return dataclasses.replace(branches, stages=(marked, *branches.stages[1:]))


def affine_layers(tree: Any) -> list[Affine]:
    """All affine stages of a branch, a flow or any other pytree, in order."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, Affine))
    return [leaf for leaf in leaves if isinstance(leaf, Affine)]


def layer_bounds_of(branch: Any) -> list[float]:
    """A rigorous bound on the norm of each affine layer of a branch, of the weights as used.

    Empty for a branch that is not a :class:`Sequential`.
    """
    stages = branch.stages_as_used() if isinstance(branch, Sequential) else ()
    return [layer.lipschitz_bound() for layer in affine_layers(stages)]


def with_layer_bounds(branch: Any, bounds: Sequence[Sequence[float]]) -> Any:
    """A stack of branches with its layers' bounds attached; as it is where there are none.

    Args:
      branch: with leaves stacked along a leading axis.
      bounds: for each block, the bounds of its affine layers.
    """
    if not any(len(block) for block in bounds):
        return branch
    columns = iter(rounded_up(column) for column in zip(*bounds, strict=True))

    def attached(node: Any) -> Any:
        if not isinstance(node, Affine):
            return node
        return dataclasses.replace(node, norm_bound=next(columns))

    return jax.tree.map(attached, branch, is_leaf=lambda node: isinstance(node, Affine))


def rounded_up(bounds: Sequence[float]) -> jax.Array:
    """The bounds in float32, none of them smaller."""
    rounded = np.asarray(bounds, np.float64).astype(np.float32)
    return jnp.asarray(np.nextafter(rounded, np.float32(np.inf)))


def largest_norm(used: Any, converged: Any, coeff: float | None) -> jax.Array | None:
    """The largest norm of any constrained layer, estimated by a converged power iteration.

    A layer's kernel is scaled by min(1, coeff/σ) with the σ of the vectors it was constrained with;
    where those lag behind the weights, the layer stands above ``coeff``.

    Args:
      used: branch, flow or other pytree as constrained with the vectors at hand.
      converged: the same with converged vectors.
      coeff: the norm that was to be allowed, or None.

    Returns:
      The norm; None where no layer keeps its estimate σ, as in branches made of other modules.
    """
    norms = []
    for old, new in zip(affine_layers(used), affine_layers(converged), strict=True):
        if old.sigma is None or new.sigma is None:
            continue
        factor = 1.0 if coeff is None else coeff / jnp.maximum(old.sigma, coeff)
        norms.append(jnp.max(new.sigma * factor))
    return jnp.max(jnp.stack(norms)) if norms else None
