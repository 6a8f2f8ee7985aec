"""A type checker for jaxtyping's import hook that looks at arrays alone.

What else a caller hands in, the library checks by itself, with messages of its own, which tests
read; and a pytree holds whatever JAX puts in place of its leaves.
"""

import inspect
from typing import Any, get_args

from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray

_CONF = BeartypeConf(is_pep484_tower=True)  # an int is a float, to mypy as well


def of_arrays(function):
    """``function``, its arguments and results checked where they are annotated as arrays."""
    hints = function.__annotations__
    arrays = {name: hint for name, hint in hints.items() if _has_array(hint)}
    if function.__name__ == "__init__" or not arrays:
        return function
    function.__annotations__ = {name: arrays.get(name, Any) for name in hints}
    return beartype(conf=_CONF)(function)


def _has_array(hint):
    is_array = inspect.isclass(hint) and issubclass(hint, AbstractArray)
    return is_array or any(map(_has_array, get_args(hint)))
