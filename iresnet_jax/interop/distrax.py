"""Adapters to distrax's bijectors, both ways."""

import dataclasses
import math
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from iresnet_jax.bijections import Bijection, Mapped
from iresnet_jax.interop.densities import checked_key
from iresnet_jax.interop.foreign import Foreign, inverted, mapped
from iresnet_jax.interop.optional import missing
from iresnet_jax.logdet import Estimator, Exact
from iresnet_jax.solvers import FixedPointIteration, Solver
from iresnet_jax.types import Batch, Keys, Shape

try:
    import distrax
except ModuleNotFoundError as error:
    raise missing("distrax", error) from error

Events = Float[Array, "..."]


class ToDistrax(distrax.Bijector):
    """A bijection of this library as a bijector of distrax.

    It maps events of ``shape`` to events of ``bijection.out_shape(shape)``, with any batch axes in
    front. An inverse that misses the solver's tolerance is NaN.

    Args:
      bijection: such as ``flow.levels[0]``, or a block.
      shape: of one event of the input.
      estimator: of the log-determinants.
      key: draws the probes of a series, once: every call and event has the same.
      solver: of the inverse.

    Raises:
      ValueError: for a series without a key.
    """

    def __init__(
        self,
        bijection: Bijection,
        shape: Shape,
        estimator: Estimator = Exact(),
        *,
        key: PRNGKeyArray | None = None,
        solver: Solver = FixedPointIteration(),
    ) -> None:
        self.bijection, self.shape = bijection, tuple(shape)
        self.out_shape = tuple(bijection.out_shape(self.shape))
        self.estimator, self.solver = estimator, solver
        self.key = checked_key(estimator, key)
        super().__init__(len(self.shape), len(self.out_shape))

    def forward(self, x: Events) -> Events:
        """Map events [..., *shape]."""
        rows, batch = _rows(x, self.shape)
        return self.bijection.forward(rows).reshape(*batch, *self.out_shape)

    def forward_and_log_det(self, x: Events) -> tuple[Events, Events]:
        """Map events [..., *shape], with log|det ∂y/∂x| in nats, [...]."""
        rows, batch = _rows(x, self.shape)
        y, log_det = mapped(self.bijection, rows, self.estimator, self.key)
        return y.reshape(*batch, *self.out_shape), log_det.reshape(batch)

    def inverse_and_log_det(self, y: Events) -> tuple[Events, Events]:
        """Invert events [..., *out_shape], with log|det ∂x/∂y| in nats, [...]."""
        rows, batch = _rows(y, self.out_shape)
        x = inverted(self.bijection, rows, self.solver)
        log_det = mapped(self.bijection, x, self.estimator, self.key)[1]
        return x.reshape(*batch, *self.shape), -log_det.reshape(batch)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class FromDistrax(Foreign):
    """A bijector of distrax that keeps shapes as a bijection of this library.

    Make it by :meth:`of`. A bijector of single numbers acts on each entry. A network that holds one
    is not certified.

    Attributes:
      bijector: the foreign bijector, a pytree.
    """

    bijector: Any

    @classmethod
    def of(cls, bijector: distrax.Bijector) -> Self:
        """Adapt a bijector.

        Raises:
          TypeError: for what is no bijector of distrax.
          ValueError: for one that changes the number of event axes.
        """
        if not isinstance(bijector, distrax.Bijector):
            raise TypeError(f"A bijector of distrax is needed; got {type(bijector).__name__}.")
        if bijector.event_ndims_in != bijector.event_ndims_out:
            raise ValueError(
                f"The bijector must keep the shape of an event; {bijector.name} maps "
                f"{bijector.event_ndims_in} axes to {bijector.event_ndims_out}."
            )
        return cls(bijector)

    @property
    def origin(self) -> str:
        return f"distrax's {type(self.bijector).__name__}"

    def forward(self, x: Batch) -> Batch:
        return self._same_shape(self.bijector.forward(x), x)

    def forward_and_log_det(self, x: Batch, estimator: Estimator, keys: Keys = None) -> Mapped:
        y, log_det = self.bijector.forward_and_log_det(x)
        each = x.shape[: x.ndim - self.bijector.event_ndims_in]
        total = jnp.broadcast_to(log_det, each).reshape(x.shape[0], -1).sum(axis=1)
        return self._same_shape(y, x), total

    def backward(self, y: Batch) -> Batch:
        return self._same_shape(self.bijector.inverse(y), y)

    def _same_shape(self, after: Batch, before: Batch) -> Batch:
        if after.shape != before.shape:
            raise ValueError(
                f"The bijector must keep the shape of a batch; {self.origin} maps {before.shape} "
                f"to {after.shape}."
            )
        return after


def _rows(x: Events, shape: Shape) -> tuple[Batch, Shape]:
    """Events as one batch, and the shape of what was in front of them."""
    x = jnp.asarray(x)
    batch = x.shape[: x.ndim - len(shape)]
    if x.shape != (*batch, *shape):
        raise ValueError(f"Events must have shape [..., {shape}]; got {x.shape}.")
    return x.reshape(math.prod(batch), *shape), batch
