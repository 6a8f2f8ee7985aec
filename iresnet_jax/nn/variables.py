"""What is done to the variables of a model that holds layers of this library, whoever wrote it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Self, TypeVar

import flax.linen as nn
import jax
import numpy as np
from flax import errors
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array

from iresnet_jax.module_calls import recorded_calls
from iresnet_jax.nn.constraints import Constraint, CopyAxes, is_pair, singular_vectors
from iresnet_jax.nn.stack import PlacedStack

Variables = Mapping[str, Any]
Path = tuple[str, ...]
Tree = TypeVar("Tree")

_flat: Callable[..., dict[Path, Any]] = flatten_dict
_nested: Callable[[Mapping[Path, object]], dict[str, object]] = unflatten_dict

_MISFITS = (
    errors.ApplyScopeInvalidVariablesStructureError,
    errors.ApplyScopeInvalidVariablesTypeError,
    errors.ScopeParamNotFoundError,
    errors.ScopeParamShapeError,
)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _FirstAxisAlone(CopyAxes):
    """Put beside the variables of a layer: they may be taken apart along their first axis alone.

    Attributes:
      collection, place: what it is beside of.
    """

    collection: str = ""
    place: str = ""

    def remove_axis(self, index: int, params: Mapping[str, object]) -> Self:
        CopyAxes((index,)).check(self.collection, self.place)
        return self


class Parts(NamedTuple):
    """What a model is found to hold.

    Attributes:
      constraints: path of the layer -> what is asked of it.
      stacks: path of the stack -> each of its uses, with leading axes where a lifted transform
        repeats it.
    """

    constraints: dict[Path, Constraint]
    stacks: dict[Path, tuple[PlacedStack, ...]]


def converge(
    model: nn.Module, variables: Variables, *inputs: object, **options: object
) -> Variables:
    """Return the variables with every power iteration run to its tolerance.

    Args:
      model: any Flax model that holds layers of this library, at any depth.
      variables: all that init returned.
      *inputs: what the model is applied to; the models of this library need none.
      **options: of ``model.apply``, such as ``rngs`` or a model's own ``train=False``.

    Raises:
      ValueError: for variables that do not fit; where a layer is not reached (see
        :func:`parts_of`), or shares its variables between copies, or a lifted transform stacks
        them on another axis than the first.
    """
    variables = with_named_vectors(variables)
    constraints = _constraints_of(model, variables, *inputs, **options)
    vectors = {
        (*path, layer.vectors_name): layer.converged() for path, layer in constraints.items()
    }
    return _replaced(variables, "spectral", vectors)


def shrink(model: nn.Module, variables: Variables, *inputs: object, **options: object) -> Variables:
    """Return the variables with every constrained kernel of a norm above its coeff scaled to it.

    A branch that is normalised as a whole (:class:`~iresnet_jax.nn.MonLip`) is scaled as a whole,
    and then proved to be L-Lipschitz.
    The layers are then proved to be within coeff, whatever the singular vectors: the raw kernels
    themselves have :func:`~iresnet_jax.bounds.layer_upper_bound` ≤ coeff, which leaves nothing to
    the power iteration. A branch of k layers and 1-Lipschitz activations has Lip(g) ≤ coeff^k.
    Weights that are not finite stay as they are. On the host, not under ``jit``; in bfloat16 the
    rounding of the weights comes on top. A head with BatchNorm is to be recalibrated afterwards:
    its statistics are of the features before.

    Args, raises: as of :func:`converge`.
    """
    variables = with_named_vectors(variables)
    constraints = _constraints_of(model, variables, *inputs, **options)
    if not constraints:
        return variables
    for path, layer in constraints.items():
        for name, kernel in layer.raw_kernels().items():
            _check_as_stored(kernel, (*path, name), variables)
    kernels = {
        (*path, name): kernel
        for path, layer in constraints.items()
        for name, kernel in layer.shrunk_kernels().items()
    }
    return _replaced(variables, "params", kernels)


def parts_of(model: nn.Module, variables: Variables, *inputs: object, **options: object) -> Parts:
    """Find the constrained layers and the stacks of a model by applying it.

    Args: as of :func:`converge`.

    Raises:
      ValueError: where a layer or a stack is not found though it is there: the inputs do not reach
        it, or a lifted transform, such as ``nn.scan``, does not list "intermediates" in
        ``variable_axes``, or on another axis than 0.
    """
    variables = with_named_vectors(variables)
    with recorded_calls() as calls:
        _, state = apply(model, variables, *inputs, mutable=["intermediates"], **options)
    found = _flat(state.get("intermediates", {}))
    constraints = {path[:-1]: c for path, c in found.items() if path[-1] == "constraint"}
    stored = {path[:-1] for path in _flat(variables.get("spectral", {}))}
    stacks = {path[:-1]: stack for path, stack in found.items() if path[-1] == "stack"}
    unseen = (stored - set(constraints)) | (calls - set(stacks))
    if missing := sorted("/".join(path) for path in unseen):
        raise ValueError(
            f"Layers or stacks were not found: {', '.join(missing)}. The inputs must reach "
            'them, and lifted transforms (nn.scan, nn.vmap, nn.remat) must list "intermediates": '
            'variable_axes={..., "intermediates": 0}.'
        )
    uses = [(path, use) for path, stack in stacks.items() for use in stack]
    for path, part in [*constraints.items(), *uses]:
        part.copy_axes.check("intermediates", "/".join(path))
    return Parts(constraints, stacks)


def apply(model: nn.Module, variables: Variables, *inputs: object, **options: object) -> Any:
    """Apply a model, one of this library without inputs by its method ``pure``.

    Raises:
      ValueError: for variables that do not fit the model.
      TypeError: for anything but a mapping.
    """
    if not isinstance(variables, Mapping):
        raise TypeError(
            "variables must be the mapping of collections that init returned; got "
            f"{type(variables).__name__}."
        )
    variables = with_named_vectors(variables)
    if getattr(model, "describes_itself", False) and not inputs:
        options = {"method": "pure", **options}
    run: Callable[..., object] = model.apply
    try:
        return run(variables, *inputs, **options)
    except _MISFITS as error:
        raise ValueError(f"The variables do not fit this model: {error}") from error


def with_named_vectors(variables: Variables) -> Variables:
    """Return the variables with all singular vectors in their own container.

    Serialisation without a template makes dicts and lists of them; anything else stays as it is.
    """
    if not isinstance(variables, Mapping) or "spectral" not in variables:
        return variables
    return {**variables, "spectral": _named_within(variables["spectral"])}


def _named_within(tree: Any) -> Any:
    if not isinstance(tree, Mapping):
        return tree
    return {
        name: singular_vectors(value)
        if name == "vectors" and is_pair(value)
        else _named_within(value)
        for name, value in tree.items()
    }


def _constraints_of(
    model: nn.Module, variables: Variables, *inputs: object, **options: object
) -> dict[Path, Constraint]:
    """Find the layers whose variables are to be replaced, and refuse what could not be stored."""
    return parts_of(model, _guarded(variables), *inputs, **options).constraints


def _guarded(variables: Variables) -> Variables:
    """With a guard of their axes beside the kernel and the singular vectors of every layer."""
    if not isinstance(variables, Mapping):
        return variables
    layers = [path[:-1] for path in _flat(variables.get("spectral", {}))]
    for name in {"params", "spectral"} & set(variables):
        guards = {(*p, "copy_axes"): _FirstAxisAlone((), name, "/".join(p)) for p in layers}
        variables = _with(variables, name, guards)
    return variables


def _check_as_stored(used: Array, path: Path, variables: Variables) -> None:
    kernel = _flat(variables["params"])[path]
    used = _fitting(used, kernel, path)
    if not np.array_equal(np.asarray(used), np.asarray(kernel), equal_nan=True):
        raise ValueError(
            f"{'/'.join(path)} is not used as it is stored: it cannot be replaced through a "
            "transform of variables, such as nn.map_variables."
        )


def _replaced(variables: Variables, name: str, found: Mapping[Path, object]) -> Variables:
    """With other values, by their paths, in one collection, in the shapes that are stored."""
    if not found:
        return variables
    stored = _flat(variables[name])
    return _with(variables, name, {p: _fitting(tree, stored[p], p) for p, tree in found.items()})


def _fitting(found: Tree, stored: Tree, path: Path) -> Tree:
    """In the shapes stored: a 1×1 convolution is stored as one, and acts as a matrix."""
    shapes = jax.tree.map(np.shape, (found, stored))
    if [*map(np.size, jax.tree.leaves(found))] != [*map(np.size, jax.tree.leaves(stored))]:
        raise ValueError(
            f"The values of {'/'.join(path)} are used in shapes {shapes[0]}, and stored in "
            f"{shapes[1]}: copies that share them, as a lifted transform with "
            "variable_axes={..., None} or variable_broadcast makes them, are not told apart."
        )
    fitting: Tree = jax.tree.map(lambda new, old: new.reshape(np.shape(old)), found, stored)
    return fitting


def _with(variables: Variables, name: str, leaves: Mapping[Path, object]) -> Variables:
    collection = {**_flat(variables[name], keep_empty_nodes=True), **leaves}
    return {**variables, name: _nested(collection)}
