"""Flax layers with a constrained operator norm.

A layer stores its raw kernel (collection ``params``) and the singular vectors of its power
iteration (collection ``spectral``), and hands out an :class:`~iresnet_jax.branches.Affine`: the
constrained weights, as a pure function. Whoever passes ``mutable=["spectral"]`` to ``apply`` lets
the vectors advance; evaluation cannot write them.

Whoever passes ``mutable=["intermediates"]`` receives from each constrained layer a
:class:`Constraint`: the raw operator, and the norm allowed to it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from iresnet_jax.bounds import gram_upper_bound, shrink_factor
from iresnet_jax.branches import Affine, Normalize, Sequential
from iresnet_jax.convolution import Padding
from iresnet_jax.operators import STATIC, DenseOperator, LinearOperator, conv_operator, with_kernel
from iresnet_jax.spectral import (
    check_coeff,
    init_singular_vectors,
    power_iteration_and_sigma,
    power_iteration_to_tolerance,
    sigma_estimate,
    spectral_normalize,
)

Initializer = Callable[..., jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Constraint:
    """What is asked of a layer: that its operator have a norm of at most ``coeff``.

    Attributes:
      operator: of the raw kernel.
      coeff: the norm allowed, in (0, 1).
    """

    operator: LinearOperator
    coeff: float = dataclasses.field(metadata=STATIC)

    def shrink_factors(self) -> np.ndarray:
        """By what the raw kernels are to be multiplied to be within ``coeff``, [*stacked]."""
        kernels = np.asarray(self.operator.kernel)
        stacked = kernels.shape[
            : kernels.ndim - (2 if isinstance(self.operator, DenseOperator) else 4)
        ]
        factors = [
            shrink_factor(with_kernel(self.operator, jnp.asarray(kernels[place])), self.coeff)
            for place in np.ndindex(stacked)
        ]
        return np.reshape(factors, stacked)


class SpectralDense(nn.Module):
    """x ↦ x W̃ + b on the last axis, with ‖W̃‖₂ ≤ coeff as far as power iteration can tell, or
    for certain.

    Attributes:
      features: output features.
      coeff: norm to allow, in (0, 1); None leaves the layer unconstrained.
      num_steps: power-iteration steps each time the ``spectral`` collection is mutable.
      normalize: "power" divides the kernel by the power iteration's estimate of its norm, which
        approaches the norm from below; "certified" by :func:`~iresnet_jax.bounds.gram_upper_bound`,
        so that the norm is at most ``coeff`` at every step. The power iteration goes on beside it.
      use_bias: whether to add b.
      kernel_init: initialiser of W [in, out].
    """

    features: int
    coeff: float | None = 0.9
    num_steps: int = 1
    normalize: Normalize = "power"
    use_bias: bool = True
    kernel_init: Initializer = nn.initializers.lecun_normal()

    def __call__(self, x: jax.Array) -> jax.Array:
        return Sequential((self.constrained(x.shape[1:]),))(x)

    @nn.compact
    def constrained(self, input_shape: Sequence[int], *, converge: bool = False) -> Affine:
        """The layer's map for inputs of ``input_shape``; see :func:`constrained_affine`."""
        kernel = _kernel(self, (input_shape[-1], self.features))
        return constrained_affine(self, DenseOperator(kernel), converge=converge)


class SpectralConv(nn.Module):
    """Convolution whose norm *as an operator on the zero-padded image* is constrained.

    Not the norm of the kernel reshaped to a matrix, which is smaller. The norm depends on the
    image's size, so the layer serves the size that it was initialised for.

    Attributes:
      features: output channels.
      kernel_size: (height, width), or one number for both.
      strides: (vertical, horizontal), or one number for both.
      padding: "SAME", "VALID" or ((top, bottom), (left, right)).
      dilation: pixels between the kernel's taps, (vertical, horizontal), or one number for both.
      coeff: norm to allow, in (0, 1); None leaves the layer unconstrained.
      num_steps: power-iteration steps each time the ``spectral`` collection is mutable.
      normalize: "power" divides the kernel by the power iteration's estimate of its norm, which
        approaches the norm from below; "certified" by :func:`~iresnet_jax.bounds.gram_upper_bound`,
        so that the norm is at most ``coeff`` at every step. The power iteration goes on beside it.
      use_bias: whether to add a bias for each channel.
      kernel_init: initialiser of the kernel [height, width, in, out].
    """

    features: int
    kernel_size: int | tuple[int, int] = (3, 3)
    strides: int | tuple[int, int] = (1, 1)
    padding: str | Padding = "SAME"
    dilation: int | tuple[int, int] = (1, 1)
    coeff: float | None = 0.9
    num_steps: int = 1
    normalize: Normalize = "power"
    use_bias: bool = True
    kernel_init: Initializer = nn.initializers.lecun_normal()

    def __call__(self, x: jax.Array) -> jax.Array:
        return Sequential((self.constrained(x.shape[1:]),))(x)

    @nn.compact
    def constrained(self, input_shape: Sequence[int], *, converge: bool = False) -> Affine:
        """The layer's map for images of ``input_shape``; see :func:`constrained_affine`."""
        if len(input_shape) != 3:
            raise ValueError(
                f"SpectralConv acts on images [height, width, channels]; got shape {input_shape}."
            )
        size = self.kernel_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (height, width, input_shape[-1], self.features)
        kernel = _kernel(self, shape)
        operator = conv_operator(
            kernel,
            input_shape[:2],
            strides=self.strides,
            padding=self.padding,
            dilation=self.dilation,
        )
        return constrained_affine(self, operator, converge=converge)


def constrained_affine(module: Any, operator: LinearOperator, *, converge: bool) -> Affine:
    """Normalise ``operator`` by the norm that ``module`` goes by, and add its bias.

    Args:
      module: a layer in a compact method: ``features``, ``coeff``, ``num_steps``, ``normalize``,
        ``use_bias``.
      operator: the raw operator.
      converge: advance the power iteration to its tolerance instead of by ``num_steps``.

    Raises:
      ValueError: for ``coeff`` outside (0, 1), an unknown ``normalize``, or singular vectors that
        belong to another image size.
    """
    check_coeff(module.coeff)
    check_normalize(module.normalize)
    sigma = _sigma_by_power_iteration(module, operator, converge)
    if module.normalize == "certified" and module.coeff is not None:
        sigma = gram_upper_bound(operator)
    if module.coeff is not None:
        constraint = Constraint(operator, module.coeff)
        module.sow("intermediates", "constraint", constraint, init_fn=_nothing, reduce_fn=_latest)
    bias = None
    if module.use_bias:
        bias = module.param("bias", nn.initializers.zeros, (module.features,))
    return Affine(spectral_normalize(operator, sigma, module.coeff), bias, sigma)


def check_normalize(normalize: str) -> None:
    """Refuse a way to normalise that there is not.

    Raises:
      ValueError: naming the value and those there are.
    """
    if normalize not in get_args(Normalize):
        names = ", ".join(get_args(Normalize))
        raise ValueError(f"normalize must be one of {names}; got {normalize!r}.")


def _nothing() -> None:
    return None


def _latest(_: None, constraint: Constraint) -> Constraint:
    return constraint


def _kernel(module: Any, shape: tuple[int, ...]) -> jax.Array:
    if min(shape) < 1:
        raise ValueError(f"Every side of a kernel must be ≥ 1; got {shape}.")
    if module.has_variable("params", "kernel"):
        stored = module.get_variable("params", "kernel").shape
        if stored != shape:
            raise ValueError(
                f"The variables hold a kernel of shape {stored}; this layer on this input needs "
                f"{shape}."
            )
    return module.param("kernel", module.kernel_init, shape)


def _sigma_by_power_iteration(module, operator, converge) -> jax.Array:
    """The norm as the layer's power iteration sees it, advanced where its state is mutable."""
    known = module.has_variable("spectral", "vectors")
    if not known and not module.is_mutable_collection("spectral"):
        raise ValueError(
            'The variables lack the collection "spectral": pass all that init returned, '
            '{"params": …, "spectral": …}.'
        )
    state = module.variable("spectral", "vectors", lambda: init_singular_vectors(operator))
    if module.is_mutable_collection("spectral"):
        if not (converge or module.is_initializing()):
            steps = module.num_steps
            state.value, sigma = power_iteration_and_sigma(operator, state.value, steps)
            return sigma
        state.value, _ = power_iteration_to_tolerance(operator, state.value)
    return sigma_estimate(operator, state.value)
