"""The data of a fit: checked, split, and turned into what a training step takes."""

import operator
import warnings
from numbers import Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PRNGKeyArray

from iresnet_jax.bijections import Bijection
from iresnet_jax.checks import check_domain, refuse_masked
from iresnet_jax.dequantization import dequantize
from iresnet_jax.fitting_conditions import (
    Conditions,
    as_conditions,
    condition_entrance,
    like,
)
from iresnet_jax.tables import (
    Table,
    as_table,
    as_weights,
    check_table,
    repeats_values,
    standardizer,
)
from iresnet_jax.types import AnyArray, Shape

_FEWEST_IMAGES = 2
_IMAGES_LOOKED_AT = 100  # for repeated values


class Examples(NamedTuple):
    """Examples of one split.

    Attributes:
      x: rows [examples, columns] or images [examples, height, width, channels]; floats, or grey
        levels.
      weights: [examples], of mean 1.
      condition: of each, vectors [examples, columns] or classes [examples]; None without.
    """

    x: AnyArray
    weights: Float[np.ndarray, " examples"]
    condition: AnyArray | None = None


class FittingData(NamedTuple):
    """What a fit trains on.

    Attributes:
      train: trained on.
      validation: held out.
      entrance: bijections that bring rows to one scale; none for images.
      num_levels: of the images' grey levels; None for floats.
      condition_entrance: bijections that bring conditions to one scale; none for classes.
    """

    train: Examples
    validation: Examples
    entrance: tuple[Bijection, ...]
    num_levels: int | None
    condition_entrance: tuple[Bijection, ...] = ()

    @property
    def event_shape(self) -> Shape:
        """Shape of one example."""
        return tuple(self.train.x.shape[1:])


def fitting_data(
    key: PRNGKeyArray,
    data: Any,
    weights: AnyArray | None,
    validation: Any,
    num_levels: int,
    standardize: bool,
    condition: object = None,
) -> FittingData:
    """Check data, hold a part of them out, and find what brings them to one scale.

    Args: as of :func:`iresnet_jax.fit`.
    """
    if np.ndim(data) == 4:
        if condition is not None:
            raise ValueError(
                f"A condition is for tables, [rows, columns]; the data are images {np.shape(data)}."
            )
        refuse_masked(data, "data")
        return _images(key, np.asarray(data), weights, validation, num_levels)
    table = as_table(data)
    given = None if condition is None else as_conditions(condition, len(table.values))
    own = as_weights(weights, len(table.values))
    rows = Examples(table.values, own, None if given is None else given.values)
    rows = _at(rows, np.flatnonzero(own > 0.0))
    if isinstance(validation, Real):
        train, held = (_at(rows, places) for places in _split(key, len(rows.x), validation))
    else:
        train, held = rows, _held_out(validation, data, table, given)
    trained = Table(np.asarray(train.x), table.names)
    check_table(trained, train.weights)
    before: tuple[Bijection, ...] = ()
    if given is not None:
        given = given._replace(values=np.asarray(train.condition))
        before = condition_entrance(given, train.weights, standardize)
    entrance = standardizer(trained, train.weights) if standardize else ()
    return FittingData(_examples(train), _examples(held), entrance, None, before)


def model_inputs(x: AnyArray, keys: PRNGKeyArray, num_levels: int | None) -> jax.Array:
    """Return examples as a flow takes them: grey levels with noise, by a key each."""
    if num_levels is None:
        return jnp.asarray(x)
    return dequantize(keys, jnp.asarray(x), num_levels)


def _images(
    key: PRNGKeyArray,
    images: np.ndarray,
    weights: AnyArray | None,
    validation: Any,
    num_levels: int,
) -> FittingData:
    own = as_weights(weights, len(images))
    images, own = images[own > 0.0], own[own > 0.0]
    if len(images) < _FEWEST_IMAGES or 0 in images.shape:
        raise ValueError(
            f"A fit needs at least {_FEWEST_IMAGES} images of weight above 0; got {images.shape}."
        )
    if isinstance(validation, Real):
        kept, out = _split(key, len(images), validation)
        parts = [Examples(images[places], own[places]) for places in (kept, out)]
    else:
        refuse_masked(validation, "validation")
        others = np.asarray(validation)
        if others.shape[1:] != images.shape[1:] or not len(others):
            raise ValueError(
                f"validation must be images like the data, [examples, *{images.shape[1:]}]; got "
                f"{others.shape}."
            )
        parts = [Examples(images, own), Examples(others, np.ones(len(others)))]
    levels = num_levels if np.issubdtype(images.dtype, np.integer) else None
    for part in parts:
        if levels is None:
            check_domain(part.x, unit_interval=False)
        else:
            dequantize(jax.random.key(0), part.x, num_levels)  # refuses levels out of range
    if levels is None and repeats_values(images[:_IMAGES_LOOKED_AT].ravel()):
        warnings.warn(
            "The images repeat few values: the density of such data has no upper bound. Pass their "
            "integer grey levels, which get noise.",
            stacklevel=4,
        )
    train, held = map(_examples, parts)
    return FittingData(train, held, (), levels)


def _split(key: PRNGKeyArray, count: int, fraction: Real) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the examples to train on, and of those held out."""
    share = float(fraction)
    if not 0.0 < share < 1.0:
        raise ValueError(
            f"validation must be data, or a fraction of them in (0, 1); got {fraction}."
        )
    held = min(max(1, round(share * count)), count - 1)
    order = np.asarray(jax.random.permutation(key, count))
    return np.sort(order[held:]), np.sort(order[:held])


def _like(validation: object, data: object, table: Table) -> np.ndarray:
    """Validation data as an array; refused where they are not of the same columns as the data."""
    values, names = as_table(validation, "validation")
    frames = hasattr(validation, "columns") and hasattr(data, "columns")
    if frames and names != table.names:
        raise ValueError(
            f"validation must have the columns of the data, in their order, "
            f"{', '.join(table.names)}; got {', '.join(names)}."
        )
    if values.shape[1] != table.values.shape[1]:
        raise ValueError(
            f"validation must have the {table.values.shape[1]} columns of the data; got "
            f"{values.shape[1]}."
        )
    return values


def _held_out(validation: Any, data: object, table: Table, given: Conditions | None) -> Examples:
    """Examples of one's own to validate on, of weight 1, with their conditions."""
    if given is None:
        values = _like(validation, data, table)
        return Examples(values, np.ones(len(values)))
    others, condition = _pair(validation)
    values = _like(others, data, table)
    theirs = as_conditions(condition, len(values), "validation's condition")
    return Examples(values, np.ones(len(values)), like(given, theirs))


def _pair(validation: object) -> tuple[object, object]:
    """Data and conditions of one's own to validate on."""
    if not (isinstance(validation, tuple) and len(validation) == 2):
        raise ValueError(
            "validation must be a fraction in (0, 1), or, with a condition, a pair (data, "
            f"condition); got {type(validation).__name__}."
        )
    return validation


def _at(examples: Examples, places: np.ndarray) -> Examples:
    """The examples at these places, in their order."""
    x, weights, condition = examples
    return Examples(x[places], weights[places], None if condition is None else condition[places])


def _floats(values: AnyArray) -> np.ndarray:
    """In JAX's default precision, or integers as they are; a ValueError for what it can't hold."""
    array = np.asarray(values)
    if np.issubdtype(array.dtype, np.integer):
        return array
    check_domain(array, unit_interval=False)
    return array.astype(jax.dtypes.canonicalize_dtype(np.float64))


def _examples(examples: Examples) -> Examples:
    """In JAX's default precision, weights of mean 1."""
    x, weights, condition = examples
    if not weights.sum() > 0.0:
        raise ValueError(
            "sample_weight must be above 0 for an example held out, and one trained on."
        )
    given = None if condition is None else _floats(condition)
    return Examples(_floats(x), weights / weights.mean(), given)


def check_count(name: str, value: object, least: int) -> int:
    """Return a whole number; refuse one below ``least``."""
    try:
        count = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an integer ≥ {least}; got {value!r}.") from None
    if count < least:
        raise ValueError(f"{name} must be ≥ {least}; got {count}.")
    return count
