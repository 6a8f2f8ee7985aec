"""The model of a fit: the one that is picked, or one that is given and fits the data."""

import warnings
from typing import Any

import numpy as np

from iresnet_jax.fitting_data import FittingData
from iresnet_jax.nn.conditional import ConditionalVectorFlow
from iresnet_jax.nn.models import FlowModel, ImageFlow, VectorFlow
from iresnet_jax.types import AnyArray, Shape

_MOST_NAMED = 8
#: Settings of the model that is picked for a table.
_TABULAR: dict[str, Any] = {
    "depth": 8,
    "features": (32, 32),
    "coeff": 0.97,
    "activation": "sin",
}


def model_for(source: FittingData, model: object) -> FlowModel:
    """Return the model that is given, checked against the data's conditions; for None, pick one.

    Raises:
      TypeError: for what is no model; for a conditional one without conditions, or the reverse.
      ValueError: for a model over several devices; for conditions of another kind or size.
    """
    conditions = source.train.condition
    if model is None:
        shape = source.event_shape
        model = default_model(shape) if conditions is None else _conditional(source, conditions)
    checked = _checked(model)
    if isinstance(checked, ConditionalVectorFlow):
        _check_conditions(checked, source)
    elif conditions is not None:
        raise TypeError(
            "A density at a condition is that of a ConditionalVectorFlow; got a "
            f"{type(checked).__name__}."
        )
    return checked


def default_model(shape: Shape) -> FlowModel:
    """Return the model that :func:`fit` picks for examples of this shape.

    Images get a scale for each squeeze that their sides allow, three at most.
    """
    if len(shape) == 1:
        return VectorFlow(dim=shape[0], **_TABULAR)
    height, width, _ = shape
    squeezes = min(3, *(_twos(side) for side in (height, width)))
    return ImageFlow(
        image_shape=(height, width, shape[2]),
        depths=(4,) * max(squeezes, 1),
        features=32,
        squeeze_first=squeezes > 0,
    )


def _conditional(source: FittingData, conditions: AnyArray) -> ConditionalVectorFlow:
    """The model that is picked for a table with conditions."""
    (dim,) = source.event_shape
    if conditions.ndim == 2:
        return ConditionalVectorFlow(dim=dim, condition_dim=conditions.shape[1], **_TABULAR)
    largest, rows = _largest_class(source), len(source.train.x)
    if largest >= rows:
        raise ValueError(f"Classes are numbered 0, 1, 2, …; got {largest} of {rows} rows.")
    return ConditionalVectorFlow(dim=dim, num_classes=largest + 1, **_TABULAR)


def _checked(model: object) -> FlowModel:
    if not isinstance(model, FlowModel):
        kind = getattr(model, "__name__", type(model).__name__)
        raise TypeError(
            f"fit takes a model of iresnet_jax.nn, such as VectorFlow(dim=2), or None; got {kind}."
        )
    if model.axis_name is not None:
        raise ValueError(
            f"fit runs on one device: axis_name must be None; got {model.axis_name!r}."
        )
    return model


def _check_conditions(model: ConditionalVectorFlow, source: FittingData) -> None:
    """Refuse conditions that do not fit; warn of classes that no row is of."""
    conditions = source.train.condition
    if conditions is None:
        raise TypeError("A ConditionalVectorFlow is fitted with condition=; got none.")
    if conditions.ndim == 2:
        if model.condition_dim != conditions.shape[1]:
            raise ValueError(
                f"The conditions are vectors of {conditions.shape[1]} columns; the model's "
                f"condition_dim is {model.condition_dim}."
            )
        return
    if model.num_classes is None or _largest_class(source) >= model.num_classes:
        raise ValueError(
            f"The conditions are classes 0 to {_largest_class(source)}; the model's num_classes is "
            f"{model.num_classes}."
        )
    if (absent := np.setdiff1d(np.arange(model.num_classes), conditions)).size:
        warnings.warn(
            f"No row that is trained on is of class {', '.join(map(str, absent[:_MOST_NAMED]))}: "
            "the density at it is not learned.",
            stacklevel=4,
        )


def _largest_class(source: FittingData) -> int:
    given = (source.train.condition, source.validation.condition)
    return max(int(np.max(classes)) for classes in given if classes is not None)


def _twos(side: int) -> int:
    """How often a side can be halved."""
    return (side & -side).bit_length() - 1
