"""What is done to the variables of a model that holds layers of this library, whoever wrote it."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
from flax import errors
from flax.traverse_util import flatten_dict, unflatten_dict

from iresnet_jax.module_calls import recorded_calls
from iresnet_jax.nn.constraints import Constraint
from iresnet_jax.nn.stack import PlacedStack

Variables = Mapping[str, Any]
Path = tuple[str, ...]

_flat: Callable[..., dict[Path, Any]] = flatten_dict
_nested: Callable[[Mapping[Path, object]], dict[str, object]] = unflatten_dict

_MISFITS = (
    errors.ApplyScopeInvalidVariablesStructureError,
    errors.ApplyScopeInvalidVariablesTypeError,
    errors.ScopeParamNotFoundError,
    errors.ScopeParamShapeError,
)


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
      ValueError: for variables that do not fit; where a layer is not reached: see
        :func:`parts_of`.
    """
    constraints = parts_of(model, variables, *inputs, **options).constraints
    vectors = {(*path, "vectors"): layer.converged() for path, layer in constraints.items()}
    return _replaced(variables, "spectral", vectors)


def shrink(model: nn.Module, variables: Variables, *inputs: object, **options: object) -> Variables:
    """Return the variables with every constrained kernel of a norm above its coeff scaled to it.

    The layers are then proved to be within coeff, whatever the singular vectors: the raw kernels
    themselves have :func:`~iresnet_jax.bounds.layer_upper_bound` ≤ coeff, which leaves nothing to
    the power iteration. A branch of k layers and 1-Lipschitz activations has Lip(g) ≤ coeff^k.
    Weights that are not finite stay as they are. On the host, not under ``jit``; in bfloat16 the
    rounding of the weights comes on top. A head with BatchNorm is to be recalibrated afterwards:
    its statistics are of the features before.

    Args, raises: as of :func:`converge`.
    """
    constraints = parts_of(model, variables, *inputs, **options).constraints
    if not constraints:
        return variables
    stored = _flat(variables["params"])
    kernels = {(*path, "kernel"): layer.shrunk_kernel() for path, layer in constraints.items()}
    # A 1×1 convolution is stored as one, and acts as a matrix.
    fitting = {path: kernel.reshape(stored[path].shape) for path, kernel in kernels.items()}
    return _replaced(variables, "params", fitting)


def parts_of(model: nn.Module, variables: Variables, *inputs: object, **options: object) -> Parts:
    """Find the constrained layers and the stacks of a model by applying it.

    Args: as of :func:`converge`.

    Raises:
      ValueError: where a layer or a stack is not found though it is there: the inputs do not reach
        it, or a lifted transform, such as ``nn.scan``, does not list "intermediates" in
        ``variable_axes``.
    """
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
    if getattr(model, "describes_itself", False) and not inputs:
        options = {"method": "pure", **options}
    run: Callable[..., object] = model.apply
    try:
        return run(variables, *inputs, **options)
    except _MISFITS as error:
        raise ValueError(f"The variables do not fit this model: {error}") from error


def _replaced(variables: Variables, name: str, leaves: Mapping[Path, object]) -> Variables:
    """With other leaves, by their paths, in one collection."""
    if not leaves:
        return variables
    collection = {**_flat(variables[name], keep_empty_nodes=True), **leaves}
    return {**variables, name: _nested(collection)}
