"""GroupSort, of which MaxMin is the case of pairs: channels sorted in groups (Anil et al. 2019).

arXiv 1811.05381.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from iresnet_jax.checks import check_at_least_one
from iresnet_jax.operators import STATIC
from iresnet_jax.rounding import Arithmetic
from iresnet_jax.types import PerSample, Samples


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class GroupSort:
    """Sort each group of neighbouring channels, largest first; pairs by default: (max, min).

    Almost everywhere it permutes the channels, so it keeps norms, and gradients pass through it
    at full length; as a map it is 1-Lipschitz. It is not elementwise:
    :mod:`~iresnet_jax.lipsdp` takes it as a factor of 1.

    Attributes:
      group_size: channels of one group, ≥ 1; the number of channels is a multiple of it.
    """

    group_size: int = dataclasses.field(default=2, metadata=STATIC)

    def __post_init__(self) -> None:
        check_at_least_one("group_size", self.group_size)

    def __call__(self, x: Samples) -> Samples:
        if x.ndim < 2 or x.shape[-1] % self.group_size:
            raise ValueError(
                f"GroupSort in groups of {self.group_size} needs a batch [batch, ..., channels], "
                f"channels a multiple of {self.group_size}; got an array of shape {x.shape}."
            )
        groups = x.reshape(*x.shape[:-1], -1, self.group_size)
        return _sorted(groups).reshape(x.shape)

    def lipschitz_bound(self) -> float:
        """Return 1: sorting moves no two vectors apart."""
        return 1.0

    def rounding(self, x: Samples, error: PerSample, arithmetic: Arithmetic) -> PerSample:
        """Pass the error on: nothing is rounded, but numbers may be flushed to zero."""
        tiny = float(jnp.finfo(x.dtype).tiny)
        return error + 2.0 * tiny * math.sqrt(math.prod(x.shape[1:]))


def _sorted(groups: Samples) -> Samples:
    """Along the last axis, largest first; a pair without a sort, which is slow on CPU."""
    if groups.shape[-1] != 2:
        return jnp.sort(groups, axis=-1, descending=True)
    first, second = groups[..., 0], groups[..., 1]
    return jnp.stack([jnp.maximum(first, second), jnp.minimum(first, second)], axis=-1)
