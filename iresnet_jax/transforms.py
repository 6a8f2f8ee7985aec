"""Parameter-free transforms between data and what residual blocks work on.

Each is a plain function with its inverse beside it, and a :class:`Transform`, a link of a chain.
"""

import abc
import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from iresnet_jax.bijections import Bijection, Error, Mapped
from iresnet_jax.certificates import Certificate, rounded_down, rounded_up
from iresnet_jax.convergence import FixedPointInfo
from iresnet_jax.logdet import Estimator
from iresnet_jax.residual import OPERATIONS
from iresnet_jax.rounding import unit_roundoff
from iresnet_jax.solvers import FixedPointIteration, Solver
from iresnet_jax.types import AnyArray, Batch, Keys, PerSample, Samples, Shape

Image = Shaped[Array, "*batch height width channels"]

#: How far :func:`logit` keeps the ends of [0, 1] from 0 and 1.
LOGIT_ALPHA = 0.01


def squeeze(x: Shaped[AnyArray, "..."]) -> Image:
    """Space to depth: [..., H, W, C] -> [..., H/2, W/2, 4C].

    Output channels are ordered (row in the 2×2 patch, column, channel). A permutation: its
    log-determinant is 0 and its norm 1.

    Raises:
      ValueError: if a side is odd.
    """
    if x.ndim < 3:
        raise ValueError(f"squeeze needs an image [..., height, width, channels]; got {x.shape}.")
    *batch, height, width, channels = x.shape
    if height % 2 or width % 2:
        raise ValueError(f"squeeze needs even image sides; got height {height}, width {width}.")
    patches = x.reshape(*batch, height // 2, 2, width // 2, 2, channels)
    return jnp.moveaxis(patches, -4, -3).reshape(*batch, height // 2, width // 2, 4 * channels)


def unsqueeze(x: Shaped[AnyArray, "..."]) -> Image:
    """Invert :func:`squeeze`: [..., H, W, 4C] -> [..., 2H, 2W, C].

    Raises:
      ValueError: if the number of channels is not a multiple of 4.
    """
    if x.ndim < 3 or x.shape[-1] % 4:
        raise ValueError(
            f"unsqueeze needs [..., height, width, channels], channels a multiple of 4; "
            f"got {x.shape}."
        )
    *batch, height, width, channels = x.shape
    patches = x.reshape(*batch, height, width, 2, 2, channels // 4)
    return jnp.moveaxis(patches, -3, -4).reshape(*batch, 2 * height, 2 * width, channels // 4)


def injective_pad(
    x: Shaped[Array, "*shape channels"], num_channels: int
) -> Shaped[Array, "*shape padded"]:
    """Append ``num_channels`` zero channels (i-RevNet's injective padding).

    Raises:
      ValueError: if ``num_channels`` is negative.
    """
    if num_channels < 0:
        raise ValueError(f"num_channels to append must be ≥ 0; got {num_channels}.")
    return jnp.concatenate([x, jnp.zeros((*x.shape[:-1], num_channels), x.dtype)], axis=-1)


def injective_unpad(
    x: Shaped[Array, "*shape padded"], num_channels: int
) -> Shaped[Array, "*shape channels"]:
    """Drop the last ``num_channels`` channels: the left inverse of :func:`injective_pad`.

    Raises:
      ValueError: unless 0 ≤ ``num_channels`` < the number of channels.
    """
    if not 0 <= num_channels < x.shape[-1]:
        raise ValueError(f"Channels to drop must lie in [0, {x.shape[-1]}); got {num_channels}.")
    return x[..., : x.shape[-1] - num_channels]


def logit(x: Samples, alpha: float = LOGIT_ALPHA) -> tuple[Samples, PerSample]:
    """Compute log(p/(1−p)) of p = α + (1−2α)x, and its log-determinant per sample.

    Args:
      x: [batch, ...], values in [0, 1]; others give NaN or a meaningless result.
      alpha: how far the ends are kept from 0 and 1, in (0, 0.5).

    Raises:
      ValueError: if ``alpha`` is outside (0, 0.5).
    """
    _check_alpha(alpha)
    p = alpha + (1.0 - 2.0 * alpha) * x
    log_det = jnp.log1p(-2.0 * alpha) - jnp.log(p) - jnp.log1p(-p)
    return jnp.log(p) - jnp.log1p(-p), jnp.sum(log_det, axis=tuple(range(1, x.ndim)))


def inverse_logit(y: Samples, alpha: float = LOGIT_ALPHA) -> Samples:
    """Invert :func:`logit`; values outside [0, 1] are possible and are not clipped."""
    _check_alpha(alpha)
    return (jax.nn.sigmoid(y) - alpha) / (1.0 - 2.0 * alpha)


def _check_alpha(alpha: float) -> None:
    if not 1e-6 <= alpha < 0.5:  # float32 rounds 1 − α to 1 from 6e-8 on
        raise ValueError(f"alpha of the logit must lie in [1e-6, 0.5); got {alpha}.")


class Transform(Bijection):
    """A bijection without branches: nothing is estimated, and nothing is solved."""

    @abc.abstractmethod
    def backward(self, y: Batch) -> Batch:
        """Invert a batch in closed form."""

    def inverse(self, y: Batch, solver: Solver = FixedPointIteration()) -> tuple[Batch, None]:
        return self.backward(y), None


class Copying(Transform):
    """Outputs are copies of the entries, or zeros: log|det|, norms and errors stay."""

    @property
    def keeps_values(self) -> bool:
        return True

    def forward_and_log_det(self, x: Batch, estimator: Estimator, keys: Keys = None) -> Mapped:
        return self.forward(x), jnp.zeros(x.shape[0], x.dtype)

    def certify(self, name: str, shape: Shape) -> Certificate:
        return Certificate()

    def inverse_error(self, error: Error, info: FixedPointInfo | None, shape: Shape) -> Error:
        return error


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Squeeze(Copying):
    """Space to depth, [..., H, W, C] -> [..., H/2, W/2, 4C]; see :func:`squeeze`."""

    def forward(self, x: Batch) -> Batch:
        return squeeze(x)

    def backward(self, y: Batch) -> Batch:
        return unsqueeze(y)

    def out_shape(self, shape: Shape) -> Shape:
        height, width, channels = shape
        return height // 2, width // 2, 4 * channels


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Pad(Copying):
    """Append zero channels (i-RevNet's injective padding). It has no log-determinant.

    Attributes:
      num_channels: ≥ 0, appended.
    """

    num_channels: int

    def forward(self, x: Batch) -> Batch:
        return injective_pad(x, self.num_channels)

    def forward_and_log_det(self, x: Batch, estimator: Estimator, keys: Keys = None) -> Mapped:
        raise ValueError(
            f"A network with {self.num_channels} padded channels maps between spaces of different "
            "dimension: it has no log-determinant. Use forward()."
        )

    def backward(self, y: Batch) -> Batch:
        return injective_unpad(y, self.num_channels)

    def out_shape(self, shape: Shape) -> Shape:
        return (*shape[:-1], shape[-1] + self.num_channels)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Center(Transform):
    """x − ½, of data in [0, 1]."""

    @property
    def takes_unit_interval(self) -> bool:
        return True

    def forward(self, x: Samples) -> Samples:
        return x - 0.5

    def forward_and_log_det(self, x: Batch, estimator: Estimator, keys: Keys = None) -> Mapped:
        return x - 0.5, jnp.zeros(x.shape[0], x.dtype)

    def backward(self, y: Samples) -> Samples:
        return y + 0.5

    def certify(self, name: str, shape: Shape) -> Certificate:
        return Certificate()

    def inverse_error(self, error: Error, info: FixedPointInfo | None, shape: Shape) -> Error:
        unit, root = unit_roundoff(error.bound.dtype), math.sqrt(math.prod(shape))
        slack, norm = 1.0 + OPERATIONS * unit, error.norm + root
        return Error((error.bound + unit * norm) * slack, norm * slack)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Logit(Transform):
    """log(p/(1−p)) of p = α + (1−2α)x, of data in [0, 1].

    Attributes:
      alpha: α, how far the ends are kept from 0 and 1, in (0, 0.5).
    """

    alpha: float = LOGIT_ALPHA

    def __post_init__(self) -> None:
        _check_alpha(self.alpha)

    @property
    def takes_unit_interval(self) -> bool:
        return True

    def forward(self, x: Samples) -> Samples:
        return logit(x, self.alpha)[0]

    def forward_and_log_det(self, x: Batch, estimator: Estimator, keys: Keys = None) -> Mapped:
        return logit(x, self.alpha)

    def backward(self, y: Samples) -> Samples:
        return inverse_logit(y, self.alpha)

    def certify(self, name: str, shape: Shape) -> Certificate:
        """d/dx logit(p) = (1 − 2α)/(p(1 − p)): steepest at the ends of [0, 1], flattest at ½."""
        width = 1.0 - 2.0 * self.alpha
        steepest = width / (self.alpha * (1.0 - self.alpha))
        return Certificate((), rounded_up(steepest), rounded_up(1.0 / rounded_down(4.0 * width)))

    def inverse_error(self, error: Error, info: FixedPointInfo | None, shape: Shape) -> Error:
        unit, root = unit_roundoff(error.bound.dtype), math.sqrt(math.prod(shape))
        width, slack = 1.0 - 2.0 * self.alpha, 1.0 + OPERATIONS * unit
        bound = (0.25 * error.bound + OPERATIONS * unit * root) / width * slack
        return Error(bound, jnp.full_like(error.norm, root * (1.0 - self.alpha) / width * slack))
