"""log|det(I + J)| of y = x + g(x), J the Jacobian of g: what an estimator is, and the exact one.

The others are :class:`~iresnet_jax.series.TruncatedSeries` and
:class:`~iresnet_jax.russian_roulette.Roulette` (Behrmann et al. 2019, §4.1).
"""

import abc
import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key, UInt32

from iresnet_jax.types import Branch, PerSample, Samples, Scalar

#: One key, or one for each sample, typed or raw.
SampleKeys = Key[Array, "..."] | UInt32[Array, "..."]

#: g(x), and log|det(I + J(x))| of each sample.
Estimated = tuple[Samples, PerSample]

#: Up to this many dimensions :class:`Exact` needs no decomposition of matrices.
DETERMINANTS_BY_FORMULA = 2


class Estimator(abc.ABC):
    """An estimator of log|det(I + J)|: a frozen dataclass of its settings.

    Equal settings are equal estimators, so one may be a static argument of ``jit``, or any other:
    as a pytree it has no leaves.

    Attributes:
      needs_key: whether it draws random numbers.
    """

    needs_key: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        jax.tree_util.register_static(cls)

    @abc.abstractmethod
    def __call__(
        self,
        branch: Branch,
        x: Samples,
        key: SampleKeys | None = None,
        lipschitz: Scalar | None = None,
    ) -> Estimated:
        """Return g(x), and log|det(I + J(x))| of each sample in nats, [batch].

        Args:
          branch: g; it must treat the samples of a batch independently.
          x: [batch, ...].
          key: one key, or one for each sample: then a sample's noise does not depend on the batch
            it is in. None where :attr:`needs_key` is false.
          lipschitz: a rigorous bound L ≥ Lip(g), where one is attached to the block.
        """

    @abc.abstractmethod
    def describe(self) -> str:
        """Say in a few words what it computes."""

    def bias_bound(self, lipschitz: float, dim: int) -> float:
        """Bound |bias| of one branch in nats, given L ≥ Lip(g) on ``dim`` dimensions: 0 here."""
        return 0.0

    def _checked_key(self, key: SampleKeys | None) -> SampleKeys:
        if key is None:
            raise ValueError(f"{type(self).__name__} draws: pass a key, or one key per sample.")
        return key


@dataclasses.dataclass(frozen=True)
class Exact(Estimator):
    """log|det(I + J)| by the full Jacobian: d Jacobian-vector products and a d×d determinant.

    It has neither bias nor noise, and differentiates to any order. Use it in few dimensions.
    """

    needs_key: ClassVar[bool] = False

    def __call__(
        self,
        branch: Branch,
        x: Samples,
        key: SampleKeys | None = None,
        lipschitz: Scalar | None = None,
    ) -> Estimated:
        out, jvp = jax.linearize(branch, x)
        batch, dim = x.shape[0], math.prod(x.shape[1:])
        basis = jnp.eye(dim, dtype=x.dtype).reshape(dim, 1, *x.shape[1:])
        basis = jnp.broadcast_to(basis, (dim, *x.shape))
        # A few columns one by one keep the branch's products in their plain form, which is faster.
        columns = jnp.stack([jvp(e) for e in basis]) if dim <= 4 else jax.vmap(jvp)(basis)
        jacobian = columns.reshape(dim, batch, dim).transpose(1, 2, 0)
        return out, _log_abs_det(jnp.eye(dim, dtype=x.dtype)[None] + jacobian)

    def describe(self) -> str:
        return "exact log-determinants"


def log_det_bounds(
    lipschitz: ArrayLike, dim: int
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Bound log|det(I + J)| on both sides, in nats, given L ≥ Lip(g) on d dimensions (Lemma 2).

    d·log(1−L) ≤ log|det(I + J)| ≤ d·log(1+L), rounded outward; −∞ below for L ≥ 1.
    """
    lip = jax_float_above(lipschitz)
    lower = jnp.where(lip < 1, jnp.log1p(-jnp.where(lip < 1, lip, 0.0)), -jnp.inf)
    outward = 1.0 + 8.0 * jnp.finfo(lip.dtype).eps
    return dim * lower * outward, dim * jnp.log1p(lip) * outward


def jax_float_above(lipschitz: ArrayLike) -> Float[Array, "..."]:
    """Return a JAX float that is not below the given number ≥ 0, though it may have less precision.

    0 stays 0; what JAX would flush to 0 does not.
    """
    lip = jnp.asarray(lipschitz, float)
    traced = isinstance(lipschitz, jax.core.Tracer)
    is_zero = lip == 0 if traced else np.asarray(lipschitz) == 0
    up = jnp.nextafter(lip, jnp.full_like(lip, jnp.inf))
    return jnp.where(is_zero, 0.0, jnp.maximum(up, jnp.finfo(lip.dtype).tiny))


def _log_abs_det(matrices: Float[Array, "batch d d"]) -> PerSample:
    """Of [batch, d, d]; up to the plane by its formula."""
    if matrices.shape[-1] > DETERMINANTS_BY_FORMULA:
        log_det: Array = jnp.linalg.slogdet(matrices)[1]
        return log_det
    if matrices.shape[-1] == 1:
        return jnp.log(jnp.abs(matrices[:, 0, 0]))
    (a, b), (c, d) = jnp.moveaxis(matrices, 0, -1)
    return jnp.log(jnp.abs(a * d - b * c))
