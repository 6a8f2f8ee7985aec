"""What is asked of a layer's norm, and where power iterations stand."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, Self, TypeVar, cast, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core.meta import AxisMetadata
from jax import lax
from jaxtyping import Array, Float

from iresnet_jax.bounds import shrink_factor
from iresnet_jax.operators import STATIC, DenseOperator, LinearOperator, with_kernel
from iresnet_jax.spectral import SingularVectors, converged_sigma, power_iteration_to_tolerance
from iresnet_jax.types import Scalar

#: What a layer divides its kernel by; see :class:`iresnet_jax.nn.SpectralConv`.
Normalize = Literal["estimate", "bound"]

_T = TypeVar("_T")

_TRUSTED = 1.05


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class CopyAxes(AxisMetadata[None]):
    """Where lifted transforms stack the copies of what this is in; Flax tells it.

    Attributes:
      axes: as ``variable_axes`` gives them, those of the outermost transform first.
    """

    axes: tuple[int, ...] = ()

    def unbox(self) -> None:
        """Return what is in it: nothing."""

    def replace_boxed(self, val: object) -> Any:
        return self

    def add_axis(self, index: int, params: Mapping[str, object]) -> Self:
        return dataclasses.replace(self, axes=(index, *self.axes))

    def remove_axis(self, index: int, params: Mapping[str, object]) -> Self:
        return dataclasses.replace(self, axes=self.axes[1:])

    def check(self, collection: str, place: str) -> None:
        """Refuse any axis but the first, by a ValueError."""
        if any(self.axes):
            raise ValueError(
                f'A lifted transform (nn.scan, nn.vmap) stacks the collection "{collection}" of '
                f"{place} on axis {next(filter(None, self.axes))}; it must be the first: "
                f'variable_axes={{..., "{collection}": 0}}.'
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Constraint:
    """What is asked of a layer: that its operator have a norm of at most ``coeff``.

    Attributes:
      operator: of the raw kernel.
      vectors: where its power iteration stands.
      coeff: the norm allowed, in (0, 1); None where the layer is not constrained.
      copy_axes: where copies of this are stacked.
    """

    #: Name of the vectors among the variables.
    vectors_name: ClassVar[str] = "vectors"

    operator: LinearOperator
    vectors: SingularVectors
    coeff: float | None = dataclasses.field(metadata=STATIC)
    copy_axes: CopyAxes = dataclasses.field(default_factory=CopyAxes)

    @property
    def stacked(self) -> tuple[int, ...]:
        """Leading axes along which equal layers are stacked."""
        kernel = self.operator.kernel
        return kernel.shape[: kernel.ndim - (2 if isinstance(self.operator, DenseOperator) else 4)]

    def raw_kernels(self) -> dict[str, Float[Array, "..."]]:
        """Return the raw kernels by the names of their parameters."""
        return {"kernel": self.operator.kernel}

    def shrunk_kernels(self) -> dict[str, Float[Array, "..."]]:
        """Scale the raw kernels down to be within ``coeff``, on the host."""
        kernel = self.operator.kernel
        if self.coeff is None:
            return {"kernel": kernel}
        kernels, ones = np.asarray(kernel), (1,) * (kernel.ndim - len(self.stacked))
        factors = [
            shrink_factor(with_kernel(self.operator, jnp.asarray(kernels[place])), self.coeff)
            for place in np.ndindex(self.stacked)
        ]
        scale = np.reshape(factors, (*self.stacked, *ones)).astype(kernel.dtype)
        return {"kernel": kernel * scale}

    def converged(self) -> SingularVectors:
        """Run the power iterations to their tolerance."""
        return one_by_one(_to_tolerance, len(self.stacked))(self.operator, self.vectors)


def one_by_one(function: Callable[..., _T], depth: int) -> Callable[..., _T]:
    """Map a function over ``depth`` leading axes, one copy after another.

    A convolution by one kernel compiles faster than one by a kernel for each copy, and a copy's
    power iteration ends when it has converged.
    """
    for _ in range(depth):
        function = partial(_mapped, function)
    return function


def _mapped(function: Callable[..., _T], *arguments: Any) -> _T:
    return lax.map(lambda each: function(*each), arguments)


def _to_tolerance(operator: LinearOperator, vectors: SingularVectors) -> SingularVectors:
    return power_iteration_to_tolerance(operator, vectors)[0]


def renewed_sigma(operator: LinearOperator, vectors: SingularVectors, sigma: Scalar) -> Scalar:
    """Return σ where vectors that stand still see the norm, and what they converge to elsewhere.

    They converge by :func:`~iresnet_jax.spectral.power_iteration_to_tolerance`, which ends at once
    where they have. An estimate from below, as σ is.
    """
    return prevailing(sigma, converged_sigma(operator, vectors))


def prevailing(seen: Scalar, converged: Scalar) -> Scalar:
    """Choose between what vectors see of a norm, σ, and what they see once converged, σ′.

    σ′ ≤ 1.05σ leaves σ as it is; from σ′ ≥ 1.1σ it is σ′; between them it passes from one to the
    other.
    """
    least = 2.0 * converged - (2.0 * _TRUSTED - 1.0) * seen
    return jnp.maximum(seen, jnp.minimum(converged, least))


def singular_vectors(stored: object) -> SingularVectors:
    """Return singular vectors from any container that serialisation makes of them.

    Raises:
      TypeError: for anything but a mapping of u and v, or two arrays in a row.
    """
    if not is_pair(stored):
        found = f"keys {[*stored]}" if isinstance(stored, Mapping) else type(stored).__name__
        raise TypeError(
            f'The "vectors" of a layer in the collection "spectral" must be u and v; got {found}.'
        )
    if isinstance(stored, SingularVectors):
        return stored
    pair = [stored[key] for key in sorted(stored)] if isinstance(stored, Mapping) else stored
    return SingularVectors(*map(jnp.asarray, cast(Sequence[Array], pair)))


def is_pair(stored: object) -> bool:
    """Say whether a container may hold u and v, by these names or in this order."""
    if isinstance(stored, Mapping):
        return set(stored) in ({"u", "v"}, {"0", "1"}, {0, 1})
    return isinstance(stored, (tuple, list)) and len(stored) == 2


def check_normalize(normalize: str) -> None:
    """Refuse a way to normalise that there is not, by a ValueError."""
    if normalize not in get_args(Normalize):
        names = ", ".join(get_args(Normalize))
        raise ValueError(f"normalize must be one of {names}; got {normalize!r}.")


def sow_latest(module: nn.Module, name: str, value: object) -> None:
    """Hand out what a module is made of, where the collection "intermediates" is mutable."""
    module.sow("intermediates", name, value, init_fn=lambda: None, reduce_fn=lambda _, new: new)


def refuse_surplus(module: nn.Module, known: set[str]) -> None:
    """Refuse parameters that a module would leave unused, by a ValueError."""
    if surplus := sorted(set(module.variables.get("params", {})) - known):
        raise ValueError(
            f"The variables hold {', '.join(surplus)} in {'/'.join(module.path)}, which this model "
            "does not have: they are of another model."
        )
