"""Proved bounds, remembered by weights and geometry, bit for bit.

A bound is proved once, however often it is asked for, and inside of whatever stage.
"""

import dataclasses
import hashlib
from collections import OrderedDict
from collections.abc import Callable

import jax
import numpy as np

from iresnet_jax.bounds import known, layer_upper_bound
from iresnet_jax.operators import LinearOperator
from iresnet_jax.symbols import Known

_MOST = 20_000
_proved: OrderedDict[str, float] = OrderedDict()


def proved_norm(operator: LinearOperator) -> float:
    """Bound the operator's norm by :func:`~iresnet_jax.bounds.layer_upper_bound`, from memory."""
    return remembered(operator_digest(known(operator)), lambda: layer_upper_bound(operator))


def remembered(key: str, prove: Callable[[], float]) -> float:
    """Return the bound proved for a key; prove it where it was not yet, or has been forgotten."""
    if key not in _proved:
        _proved[key] = prove()
        if len(_proved) > _MOST:
            _proved.popitem(last=False)
    _proved.move_to_end(key)
    return _proved[key]


def operator_digest(operator: Known) -> str:
    """Hash an operator's kernel, bit for bit, and its geometry. Its values must be concrete."""
    kernel = np.asarray(operator.kernel)
    fields = dataclasses.fields(operator)
    geometry = {f.name: getattr(operator, f.name) for f in fields if f.name != "kernel"}
    digest = hashlib.sha256(f"{type(operator).__name__} {geometry}".encode())
    _add(digest, kernel)
    return digest.hexdigest()


def tree_digest(tree: object) -> str:
    """Hash a pytree's structure and its concrete leaves, bit for bit."""
    leaves, structure = jax.tree.flatten(tree)
    digest = hashlib.sha256(str(structure).encode())
    for leaf in leaves:
        _add(digest, np.asarray(leaf))
    return digest.hexdigest()


def _add(digest: "hashlib._Hash", array: np.ndarray) -> None:
    digest.update(f"{array.shape} {array.dtype}".encode())
    digest.update(np.ascontiguousarray(array).tobytes())
