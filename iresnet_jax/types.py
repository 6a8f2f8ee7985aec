"""Types that many files share."""

from collections.abc import Callable

from jax import Array

#: A residual branch g: batches [batch, ...] to batches of the same shape, each sample for itself.
Branch = Callable[[Array], Array]
