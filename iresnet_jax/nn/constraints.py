"""What is asked of a layer's norm, and where power iterations stand."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from iresnet_jax.bounds import shrink_factor
from iresnet_jax.operators import STATIC, DenseOperator, LinearOperator, with_kernel
from iresnet_jax.spectral import SingularVectors, power_iteration_to_tolerance

#: What a layer divides its kernel by; see :class:`iresnet_jax.nn.SpectralConv`.
Normalize = Literal["estimate", "bound"]

_frozen_vectors = contextvars.ContextVar("frozen_vectors", default=False)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Constraint:
    """What is asked of a layer: that its operator have a norm of at most ``coeff``.

    Attributes:
      operator: of the raw kernel.
      vectors: where its power iteration stands.
      coeff: the norm allowed, in (0, 1); None where the layer is not constrained.
    """

    operator: LinearOperator
    vectors: SingularVectors
    coeff: float | None = dataclasses.field(metadata=STATIC)

    @property
    def stacked(self) -> tuple[int, ...]:
        """Leading axes along which equal layers are stacked."""
        kernel = self.operator.kernel
        return kernel.shape[: kernel.ndim - (2 if isinstance(self.operator, DenseOperator) else 4)]

    def shrink_factors(self) -> np.ndarray:
        """By what the raw kernels are to be multiplied to be within ``coeff``, [*stacked]."""
        if self.coeff is None:
            return np.ones(self.stacked)
        kernels = np.asarray(self.operator.kernel)
        factors = [
            shrink_factor(with_kernel(self.operator, jnp.asarray(kernels[place])), self.coeff)
            for place in np.ndindex(self.stacked)
        ]
        return np.reshape(factors, self.stacked)

    def converged(self) -> SingularVectors:
        """Run the power iterations to their tolerance."""
        advance = lambda operator, vectors: power_iteration_to_tolerance(operator, vectors)[0]  # noqa: E731
        for _ in self.stacked:
            advance = jax.vmap(advance)
        return advance(self.operator, self.vectors)


def check_normalize(normalize: str) -> None:
    """Refuse a way to normalise that there is not.

    Raises:
      ValueError: naming the value and those there are.
    """
    if normalize not in get_args(Normalize):
        names = ", ".join(get_args(Normalize))
        raise ValueError(f"normalize must be one of {names}; got {normalize!r}.")


@contextlib.contextmanager
def frozen_vectors() -> Iterator[None]:
    """Within it, kernels may be differentiated while their singular vectors stand still.

    For derivatives of a network at one place, such as a Hessian. A training step must not do so:
    norms grow past ``coeff`` unseen.
    """
    token = _frozen_vectors.set(True)
    try:
        yield
    finally:
        _frozen_vectors.reset(token)


def refuse_gradient(kernel: Array, layer: str) -> Array:
    """Return the kernel; differentiating it raises, unless within :func:`frozen_vectors`."""
    return kernel if _frozen_vectors.get() else _without_gradient(kernel, layer)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _without_gradient(kernel: Array, layer: str) -> Array:
    del layer
    return kernel


@_without_gradient.defjvp
def _refuse(layer, primals, tangents):
    raise ValueError(
        f"The kernel of {layer} is differentiated while its power iteration stands still: its norm "
        "would grow past coeff unseen. In a training step let it advance, by "
        'flow, state = model.advance(variables), or apply(..., mutable=["spectral"]), and keep '
        'the state; or set normalize="bound". For derivatives of a network as it is, differentiate '
        "within iresnet_jax.nn.frozen_vectors()."
    )
