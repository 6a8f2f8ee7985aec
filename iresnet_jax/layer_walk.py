"""The one walk over the layers of a branch, wherever they are in it, keyed by their path."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from iresnet_jax.stages import Affine, ModuleStage
from iresnet_jax.types import Scalar

Tree = TypeVar("Tree")


def layers_by_path(tree: object) -> dict[str, Affine]:
    """Find every affine layer of a branch, a flow or any other pytree, in order."""
    return {path: node for path, node in _walk(tree) if isinstance(node, Affine)}


def modules_by_path(tree: object) -> dict[str, ModuleStage]:
    """Find every foreign Flax module of a pytree, in order."""
    return {path: node for path, node in _walk(tree) if isinstance(node, ModuleStage)}


def with_layer_bounds(tree: Tree, bounds: Mapping[str, float | np.ndarray]) -> Tree:
    """Attach rigorous bounds on their norms to the layers of a branch, or of a stack of branches.

    ``bounds`` are by path, one for each of a stack; layers without one stay as they are.
    """

    def attached(path: tuple[object, ...], node: object) -> object:
        key = jax.tree_util.keystr(path)
        if not isinstance(node, Affine) or key not in bounds:
            return node
        return dataclasses.replace(node, norm_bound=float32_above(bounds[key]))

    out: Tree = jax.tree_util.tree_map_with_path(attached, tree, is_leaf=_is_part)
    return out


def weights_alone(tree: Tree) -> Tree:
    """Return a branch without what is not part of its map: layers' estimates and bounds."""

    def bare(node: object) -> object:
        if not isinstance(node, Affine):
            return node
        return dataclasses.replace(node, sigma=None, norm_bound=None)

    out: Tree = jax.tree.map(bare, tree, is_leaf=_is_part)
    return out


def not_finite(tree: object) -> list[str]:
    """Name the weights of a branch that are not finite, but for kernels, which bounds see."""
    layers = enumerate(layers_by_path(tree).values())
    found = [f"the bias of layer {i}" for i, layer in layers if not _is_finite(layer.bias)]
    for path, node in _walk(tree):
        if isinstance(node, ModuleStage) and not _is_finite(node.variables):
            found.append(f"the variables of {type(node.module).__name__}")
        elif not isinstance(node, Affine | ModuleStage) and not _is_finite(node):
            found.append(f"the weights at {path}")
    return found


def unreadable(tree: object) -> list[str]:
    """Name the classes of what a branch holds that is neither an array nor a registered pytree."""
    leaves = [node for _, node in _walk(tree) if not isinstance(node, Affine | ModuleStage)]
    kinds = {type(leaf).__name__ for leaf in leaves if not hasattr(leaf, "dtype")}
    return sorted(kinds - {"float", "int", "bool", "complex"})


def float32_above(bounds: ArrayLike | Sequence[float]) -> Float[Array, "..."]:
    """Return the bounds in float32, none of them smaller."""
    rounded = np.asarray(bounds, np.float64).astype(np.float32)
    return jnp.asarray(np.nextafter(rounded, np.float32(np.inf)))


def largest_norm(used: object, converged: object, coeff: float | None) -> Scalar | None:
    """Estimate the largest norm of any constrained layer; None where none keeps its σ.

    A layer's kernel is scaled by min(1, coeff/σ) with the σ of the vectors it was constrained with.
    Where those lag behind the weights, the layer stands above ``coeff``.

    Args:
      used: branch, flow or other pytree as constrained with the vectors at hand.
      converged: the same with converged vectors.
      coeff: the norm that was to be allowed, or None.
    """
    norms = []
    pairs = zip(*(layers_by_path(tree).values() for tree in (used, converged)), strict=True)
    for old, new in pairs:
        if old.sigma is None or new.sigma is None:
            continue
        factor = 1.0 if coeff is None else coeff / jnp.maximum(old.sigma, coeff)
        norms.append(jnp.max(new.sigma * factor))
    return jnp.max(jnp.stack(norms)) if norms else None


def _walk(tree: object) -> list[tuple[str, object]]:
    """Layers, foreign modules and what leaves are in neither, with their paths."""
    found, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_part)
    return [(jax.tree_util.keystr(path), node) for path, node in found]


def _is_part(node: object) -> bool:
    return isinstance(node, Affine | ModuleStage)


def _is_finite(tree: object) -> bool:
    numbers = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    floats = [x for x in numbers if jnp.issubdtype(x.dtype, jnp.inexact)]
    return all(bool(np.isfinite(x.astype(np.float64)).all()) for x in floats)
