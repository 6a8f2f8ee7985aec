"""What makes a gradient the Neumann gradient, and leaves second derivatives right."""

from typing import Any, NoReturn, TypeVar

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.custom_derivatives import SymbolicZero, custom_jvp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

from iresnet_jax.types import PerSample

Tree = TypeVar("Tree")

_forward_p = Primitive("forward_alone")


def constant_once(tree: Tree) -> Tree:
    """Return the tree; one differentiation takes it for constant, and a further one does not.

    All of a tree is held constant together, whichever of its leaves are differentiated.
    """
    leaves, structure = jax.tree.flatten(tree)
    places = [i for i, leaf in enumerate(leaves) if _is_inexact(leaf)]
    if places:
        for i, leaf in zip(places, _held(*(leaves[i] for i in places)), strict=True):
            leaves[i] = leaf
    held: Tree = jax.tree.unflatten(structure, leaves)
    return held


@custom_jvp
def with_gradient_of(surrogate: PerSample, value: PerSample) -> PerSample:
    """Return ``value`` with the gradient of ``surrogate``; second derivatives are that gradient's.

    What is left of ``value`` after one differentiation has its own derivatives.
    """
    del surrogate
    return value


def forward_alone(tree: Tree, estimator: str) -> Tree:
    """Return the tree, what a loop of unknown length made: cotangents are refused, tangents pass.

    Args:
      tree: of floating-point arrays.
      estimator: what is named in the refusal.
    """
    marked: Tree = jax.tree.map(lambda leaf: _forward_p.bind(leaf, estimator=estimator), tree)
    return marked


@with_gradient_of.defjvp
def _slope_of_surrogate(
    primals: tuple[PerSample, PerSample], tangents: tuple[PerSample, PerSample]
) -> tuple[PerSample, PerSample]:
    return primals[1], tangents[0]


@custom_jvp
def _held(*leaves: jax.Array) -> tuple[jax.Array, ...]:
    return leaves


def _no_slope(primals: tuple[Array, ...], tangents: object) -> tuple[tuple[Array, ...], Any]:
    del tangents
    zeros = tuple(SymbolicZero(jax.typeof(p).to_tangent_aval()) for p in primals)
    return primals, zeros


_held.defjvp(_no_slope, symbolic_zeros=True)


def _is_inexact(leaf: object) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def _same(leaf: Array, *, estimator: str) -> Array:
    del estimator
    return leaf


def _same_aval(leaf: ShapedArray, *, estimator: str) -> ShapedArray:
    del estimator
    return leaf


def _refuse_cotangent(cotangent: object, leaf: object, *, estimator: str) -> NoReturn:
    del cotangent, leaf
    raise ValueError(
        f"A second derivative of {estimator} is taken in reverse mode, and its number of terms is "
        "not known before it runs. Take it in forward mode (jax.hessian, or jax.jacfwd or jax.jvp "
        "of a gradient), or use Exact() or TruncatedSeries, which differentiate either way."
    )


def _batched(arguments: tuple[Array], axes: tuple[int], *, estimator: str) -> tuple[Array, int]:
    return _forward_p.bind(arguments[0], estimator=estimator), axes[0]


_forward_p.def_impl(_same)
_forward_p.def_abstract_eval(_same_aval)
ad.deflinear2(_forward_p, _refuse_cotangent)
batching.primitive_batchers[_forward_p] = _batched
mlir.register_lowering(_forward_p, mlir.lower_fun(_same, multiple_results=False))
