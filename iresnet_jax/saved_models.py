"""How a file describes a model by plain values: class, settings, and what comes before it."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from iresnet_jax.actnorm import ActNorm
from iresnet_jax.asinh import Asinh
from iresnet_jax.bijections import Bijection
from iresnet_jax.fitted import Fitted, FittedConditional
from iresnet_jax.nn.branches import bottleneck_branch, dense_branch
from iresnet_jax.nn.concatenation import concatenation_branch
from iresnet_jax.nn.conditional import ConditionalVectorFlow
from iresnet_jax.nn.dequantizer import VariationalDequantization
from iresnet_jax.nn.models import FlowModel, ImageFlow, VectorFlow
from iresnet_jax.nn.monlip import monlip_branch, shallow_monlip_branch
from iresnet_jax.nn.variables import Variables
from iresnet_jax.types import Shape

SavedModel = VectorFlow | ImageFlow

_MODELS: dict[str, type[SavedModel]] = {
    kind.__name__: kind for kind in (VectorFlow, ImageFlow, ConditionalVectorFlow)
}
_BRANCHES: dict[str, Callable[..., nn.Module]] = {
    make.__name__: make
    for make in (
        dense_branch,
        bottleneck_branch,
        concatenation_branch,
        monlip_branch,
        shallow_monlip_branch,
    )
}


def description_of(model: FlowModel) -> dict[str, object]:
    """Return the class and the settings of a model, as JSON holds them.

    Raises:
      ValueError: for a model, or a setting of one, that a file does not hold.
    """
    checked = saved_model(model)
    names = [f.name for f in dataclasses.fields(checked) if f.name not in ("parent", "name")]
    settings = {name: _plain(name, getattr(checked, name)) for name in names}
    return {"class": type(checked).__name__, "settings": settings}


def described_model(description: Mapping[str, Any]) -> SavedModel:
    """Return the model that :func:`description_of` described.

    Raises:
      ValueError, KeyError, TypeError: for anything else.
    """
    if description["class"] not in _MODELS:
        raise ValueError(f"The file holds a {description['class']}, which this version lacks.")
    settings = {name: _tuples(value) for name, value in description["settings"].items()}
    settings["make_branch"] = _BRANCHES[settings["make_branch"]]
    return _MODELS[description["class"]](**settings)


def saved_model(model: object) -> SavedModel:
    """Return a model of a class that a file holds, refuse any other by a ValueError."""
    kind = type(model)
    if not isinstance(model, SavedModel) or _MODELS.get(kind.__name__) is not kind:
        raise ValueError(f"save knows the models {', '.join(_MODELS)}; got {kind.__name__}.")
    return model


def template_of(model: SavedModel) -> Variables:
    """Return a model's variables, as shapes in their containers."""
    example = jax.ShapeDtypeStruct((2, *event_shape_of(model)), jnp.float32)
    alone = model.clone(axis_name=None)  # no axis is mapped here
    variables: Variables = jax.eval_shape(alone.init, jax.random.key(0), example)
    return variables


def event_shape_of(model: SavedModel) -> Shape:
    """Return the shape of one example."""
    return tuple(model.image_shape) if isinstance(model, ImageFlow) else (model.dim,)


def dequantizer_settings(module: object) -> dict[str, object]:
    """Return the settings of a learned dequantisation, as JSON holds them.

    Raises:
      ValueError: for anything but VariationalDequantization.
    """
    if type(module) is not VariationalDequantization:
        kind = type(module).__name__
        raise ValueError(f"save knows the dequantisation VariationalDequantization; got {kind}.")
    names = ("num_levels", "features", "couplings")
    return {name: _plain(name, getattr(module, name)) for name in names}


def dequantizer_template(module: VariationalDequantization, model: SavedModel) -> Variables:
    """Return the variables of a learned dequantisation of a model's images, as shapes.

    Raises:
      ValueError: for a model of anything but images.
    """
    if not isinstance(model, ImageFlow):
        raise ValueError(f"A dequantizer is of an ImageFlow; got {type(model).__name__}.")
    levels, key = jax.ShapeDtypeStruct((1, *event_shape_of(model)), jnp.int32), jax.random.key(0)
    variables: Variables = jax.eval_shape(module.init, key, levels, key)
    return variables


def fitted_class(model: SavedModel) -> type[Fitted]:
    """Return the class of a model with its variables."""
    return FittedConditional if isinstance(model, ConditionalVectorFlow) else Fitted


def entrances_of(fitted: Fitted) -> dict[str, tuple[Bijection, ...]]:
    """Return what comes before a model: of the data, and of the condition if there is one."""
    names = entrance_channels(saved_model(fitted.model))
    return {name: getattr(fitted, name) for name in names}


def entrance_channels(model: SavedModel) -> dict[str, int]:
    """Return how many channels each entrance of a model is of; 0 for classes, which pass none."""
    channels = {"entrance": event_shape_of(model)[-1]}
    if isinstance(model, ConditionalVectorFlow):
        channels["condition_entrance"] = model.condition_dim or 0
    return channels


def link_settings(link: Bijection) -> dict[str, object]:
    """Return the class of a bijection before a model, and its settings, as JSON holds them.

    Raises:
      ValueError: for anything but ActNorm and Asinh.
    """
    if type(link) is ActNorm:
        return {"class": "ActNorm"}
    if type(link) is Asinh:
        return {"class": "Asinh", "columns": list(link.columns)}
    raise ValueError(f"A file holds ActNorm and Asinh before a model; got {type(link).__name__}.")


def link_weights(link: Bijection) -> dict[str, jax.Array]:
    """Return the arrays of a bijection before a model."""
    if not isinstance(link, ActNorm):
        return {}
    return {"log_scale": link.log_scale, "shift": link.shift}


def described_link(
    settings: Mapping[str, Any], weights: Mapping[str, Any], channels: int
) -> Bijection:
    """Return the bijection of these settings and weights.

    Args:
      settings, weights: as :func:`link_settings` and :func:`link_weights` returned them.
      channels: of what passes through.

    Raises:
      ValueError, KeyError, TypeError: for settings or weights of no such bijection.
    """
    if settings["class"] == "ActNorm":
        if any(value.shape != (channels,) for value in weights.values()):
            raise ValueError(f"ActNorm before a model of {channels} channels has others.")
        if not all(jnp.issubdtype(value.dtype, jnp.floating) for value in weights.values()):
            raise ValueError("ActNorm before a model has weights that are no floats.")
        return ActNorm(**weights)
    columns = settings["columns"]
    if settings["class"] != "Asinh" or weights:
        raise ValueError(f"before the model is a {settings['class']}, with {sorted(weights)}.")
    if len(columns) != channels or not all(isinstance(column, bool) for column in columns):
        raise ValueError(f"Asinh before a model of {channels} channels has columns {columns}.")
    return Asinh(tuple(columns))


def _plain(name: str, value: Any) -> object:
    """A setting as JSON holds it: a branch of the library by its name."""
    if name == "make_branch":
        known = [branch for branch, make in _BRANCHES.items() if make is value]
        if not known:
            raise ValueError(f"save knows the branches {', '.join(_BRANCHES)}; got {value!r}.")
        return known[0]
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, tuple | list):
        return [_plain(name, entry) for entry in value]
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating) and math.isfinite(value):
        return float(value)
    raise ValueError(f"A file does not hold the setting {name} = {value!r}.")


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
