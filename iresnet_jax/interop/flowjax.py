"""Adapters to flowjax's bijections, both ways.

flowjax maps one example, without a batch axis, and its ``Transformed`` maps the base distribution
to the data; a flow of this library maps data to latents, so it goes into ``Invert``.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PRNGKeyArray

from iresnet_jax.bijections import Bijection, Mapped
from iresnet_jax.interop.densities import checked_key
from iresnet_jax.interop.foreign import Foreign, inverted, mapped
from iresnet_jax.interop.optional import missing
from iresnet_jax.logdet import Estimator, Exact
from iresnet_jax.operators import STATIC
from iresnet_jax.solvers import FixedPointIteration, Solver
from iresnet_jax.types import Batch, Keys, Scalar, Shape

try:
    import equinox as eqx
    import paramax
    from flowjax.bijections import AbstractBijection
except ModuleNotFoundError as error:
    raise missing("flowjax", error) from error


class ToFlowjax(AbstractBijection):
    """A bijection of this library as one of flowjax's, its weights frozen.

    Gradients of flowjax's training do not reach the weights, which a step of an optimiser would
    move out of their constraint; :meth:`trainable` is for training. An inverse that misses the
    solver's tolerance is NaN.

    Args:
      bijection: that keeps the shape, such as ``flow.levels[0]``, or a block.
      shape: of one example.
      estimator: of the log-determinants.
      key: draws the probes of a series, once: every call and example has the same.
      solver: of the inverse.

    Raises:
      ValueError: for a bijection that changes the shape; for a series without a key.
    """

    shape: tuple[int, ...]
    bijection: Any
    estimator: Estimator = eqx.field(static=True)
    key: PRNGKeyArray | None
    solver: Solver = eqx.field(static=True)
    cond_shape: tuple[int, ...] | None

    def __init__(
        self,
        bijection: Bijection,
        shape: Shape,
        estimator: Estimator = Exact(),
        *,
        key: PRNGKeyArray | None = None,
        solver: Solver = FixedPointIteration(),
    ) -> None:
        shape = tuple(shape)
        if (after := bijection.out_shape(shape)) != shape:
            raise ValueError(
                f"A bijection of flowjax keeps the shape; this one maps {shape} to {after}."
            )
        self.cond_shape = None
        self.shape, self.bijection = shape, paramax.NonTrainable(bijection)
        self.estimator, self.solver = estimator, solver
        self.key = checked_key(estimator, key)

    @classmethod
    def trainable(
        cls, build: Callable[[Any], Bijection], params: Any, shape: Shape, **options: Any
    ) -> Self:
        """Return the bijection ``build(params)``, made anew from ``params`` at every use.

        ``params`` are what an optimiser moves. Where they are those of a Flax model, it needs
        ``normalize="bound"``, which constrains them without a state that flowjax would have to
        carry: ``build = lambda params: model.flow({**state, "params": params}).levels[0]``.

        Args:
          build: from parameters to a bijection.
          params: a pytree.
          shape, options: as of the class.
        """
        new = cls(build(params), shape, **options)
        return eqx.tree_at(lambda own: own.bijection, new, paramax.Parameterize(build, params))

    def transform_and_log_det(
        self, x: ArrayLike, condition: ArrayLike | None = None
    ) -> tuple[Float[Array, "*event"], Scalar]:
        """Return y, and log|det ∂y/∂x| in nats."""
        y, log_det = mapped(self.bijection, jnp.asarray(x)[None], self.estimator, self.key)
        return y[0], log_det[0]

    def inverse_and_log_det(
        self, y: ArrayLike, condition: ArrayLike | None = None
    ) -> tuple[Float[Array, "*event"], Scalar]:
        """Return x, and log|det ∂x/∂y| in nats."""
        x = inverted(self.bijection, jnp.asarray(y)[None], self.solver)
        return x[0], -mapped(self.bijection, x, self.estimator, self.key)[1][0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class FromFlowjax(Foreign):
    """A bijection of flowjax as one of this library, for a chain or a flow.

    Make it by :meth:`of`. A network that holds one is not certified.

    Attributes:
      arrays: the foreign bijection with what is no array left out.
      rest: it with its arrays left out.
    """

    arrays: Any
    rest: Any = dataclasses.field(metadata=STATIC)

    @classmethod
    def of(cls, bijection: AbstractBijection) -> Self:
        """Adapt a bijection.

        Raises:
          TypeError: for what is no bijection of flowjax.
          ValueError: for a conditional one.
        """
        if not isinstance(bijection, AbstractBijection):
            raise TypeError(f"A bijection of flowjax is needed; got {type(bijection).__name__}.")
        if bijection.cond_shape is not None:
            raise ValueError(
                "Bijections of this library take no condition; this one needs one of shape "
                f"{bijection.cond_shape}."
            )
        return cls(*eqx.partition(bijection, eqx.is_array))

    @property
    def bijection(self) -> AbstractBijection:
        """The foreign bijection."""
        whole: AbstractBijection = eqx.combine(self.arrays, self.rest)
        return whole

    @property
    def origin(self) -> str:
        return f"flowjax's {type(self.rest).__name__}"

    def forward(self, x: Batch) -> Batch:
        return jax.vmap(self.bijection.transform)(x)

    def forward_and_log_det(self, x: Batch, estimator: Estimator, keys: Keys = None) -> Mapped:
        return jax.vmap(self.bijection.transform_and_log_det)(x)

    def backward(self, y: Batch) -> Batch:
        return jax.vmap(self.bijection.inverse)(y)
