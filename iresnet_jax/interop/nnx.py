"""Models of this library, or with its stacks in them, inside Flax NNX.

``flax.nnx.bridge.ToNNX`` holds a Flax Linen module and its variables. In training, a call with
``mutable=["spectral"]`` lets the power iterations advance, and the bridge keeps where they are; see
docs/INTEROP.md.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

_Path = tuple[Any, ...]


def linen_variables(bridge: nnx.bridge.ToNNX) -> dict[str, Any]:
    """Return the variables that a bridge holds as Linen has them: ``{"params": …, "spectral": …}``.

    They are what :func:`iresnet_jax.nn.converge`, :func:`iresnet_jax.nn.shrink`, ``model.flow`` and
    :func:`iresnet_jax.certify` take; :func:`update` puts them back.

    Raises:
      TypeError: for what is no ``ToNNX``.
      ValueError: for one without variables, which is to be initialised first.
    """
    flat = {path: held.get_value() for path, held in _held(bridge).items()}
    nested: dict[str, Any] = unflatten_dict(flat)
    return nested


def update(bridge: nnx.bridge.ToNNX, variables: Mapping[str, Any]) -> None:
    """Replace the variables that a bridge holds by Linen's, in place.

    Raises:
      TypeError: for what is no ``ToNNX``.
      ValueError: for variables of other names, shapes or types.
    """
    held, new = _held(bridge), flatten_dict(variables)
    if held.keys() != new.keys():
        names = ", ".join(sorted("/".join(map(str, path)) for path in held.keys() ^ new.keys()))
        raise ValueError(f"The variables are of another model; they differ in {names}.")
    for path, value in new.items():
        _check_like(held[path].get_value(), value, "/".join(map(str, path)))
    for path, value in new.items():
        held[path].set_value(value)


def _held(bridge: nnx.bridge.ToNNX) -> dict[_Path, nnx.Variable[Any]]:
    """The variables themselves, by collection and path."""
    if not isinstance(bridge, nnx.bridge.ToNNX):
        raise TypeError(f"A flax.nnx.bridge.ToNNX is needed; got {type(bridge).__name__}.")
    found = {
        (nnx.variable_name_from_type(type(part)), *path): part
        for path, part in nnx.iter_graph(bridge)
        if isinstance(part, nnx.Variable) and not isinstance(part, nnx.RngState)
    }
    if not found:
        raise ValueError("This bridge has no variables: call its lazy_init(x) first.")
    return found


def _check_like(old: Any, new: Any, name: str) -> None:
    """Require the same structure, shapes and types, whatever holds them."""
    kinds = [[(np.shape(x), jnp.result_type(x)) for x in jax.tree.leaves(t)] for t in (old, new)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"{name} holds {kinds[0]}, of shape and type; got {kinds[1]}.")
