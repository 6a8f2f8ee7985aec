"""Flax layers with a constrained operator norm.

A layer stores its raw kernel (collection ``params``) and the singular vectors of its power
iteration (collection ``spectral``). ``apply(..., mutable=["spectral"])`` lets the vectors advance;
evaluation cannot write them, and does not let kernels be differentiated meanwhile. Where they do
not advance, a kernel whose norm they miss is divided by what they converge to instead; see
:func:`~iresnet_jax.nn.constraints.renewed_sigma`.
``layer.pure(shape)`` is the layer as a pytree of its constrained weights, an
:class:`~iresnet_jax.stages.Affine`.
"""

from collections.abc import Callable, Sequence

import flax.linen as nn
from jaxtyping import Array, Float

from iresnet_jax.bounds import gram_upper_bound
from iresnet_jax.convolution import Padding
from iresnet_jax.frozen_vectors import refuse_gradient, vectors_are_frozen
from iresnet_jax.nn.constraints import (
    Constraint,
    Normalize,
    check_normalize,
    renewed_sigma,
    singular_vectors,
    sow_latest,
)
from iresnet_jax.operators import DenseOperator, LinearOperator, conv_operator
from iresnet_jax.spectral import (
    SingularVectors,
    check_coeff,
    power_iteration_and_sigma,
    power_iteration_to_tolerance,
    sigma_estimate,
    spectral_normalize,
    unbegun_vectors,
)
from iresnet_jax.stages import Affine, Sequential
from iresnet_jax.types import Batch, Scalar

Initializer = Callable[..., Array]


class SpectralDense(nn.Module):
    """x ↦ x W̃ + b on the last axis, with ‖W̃‖₂ constrained.

    Attributes:
      features: output features.
      coeff, num_steps, normalize, use_bias: see :class:`SpectralConv`.
      kernel_init: initialiser of W [in, out].
    """

    features: int
    coeff: float | None = 0.9
    num_steps: int = 1
    normalize: Normalize = "estimate"
    use_bias: bool = True
    kernel_init: Initializer = nn.initializers.lecun_normal()

    def __call__(self, x: Batch) -> Batch:
        return Sequential((self.pure(x.shape[1:]),))(x)

    @nn.compact
    def pure(self, input_shape: Sequence[int]) -> Affine:
        """Return the layer's map for inputs of ``input_shape``, without batch axis."""
        kernel = _kernel(self, (input_shape[-1], self.features))
        return _constrained(self, DenseOperator(kernel))


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
      normalize: "estimate" divides the kernel by the power iteration's estimate of its norm, which
        approaches the norm from below, converged where the vectors stand still and miss it;
        "bound" by :func:`~iresnet_jax.bounds.gram_upper_bound`, so
        that the norm is at most ``coeff`` at every step, its own rounding included. In a branch of
        precision "bfloat16" the rounding of the weights to it comes on top. The power iteration
        goes on beside it.
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
    normalize: Normalize = "estimate"
    use_bias: bool = True
    kernel_init: Initializer = nn.initializers.lecun_normal()

    def __call__(self, x: Batch) -> Batch:
        return Sequential((self.pure(x.shape[1:]),))(x)

    @nn.compact
    def pure(self, input_shape: Sequence[int]) -> Affine:
        """Return the layer's map for images of ``input_shape``, without batch axis."""
        if len(input_shape) != 3:
            raise ValueError(
                f"SpectralConv acts on images [height, width, channels]; got shape {input_shape}."
            )
        size = self.kernel_size
        sides = (size, size) if isinstance(size, int) else size
        operator = conv_operator(
            _kernel(self, (*sides, input_shape[-1], self.features)),
            input_shape[:2],
            strides=self.strides,
            padding=self.padding,
            dilation=self.dilation,
        )
        return _constrained(self, operator)


def _constrained(module: SpectralDense | SpectralConv, operator: LinearOperator) -> Affine:
    """Normalise the raw ``operator`` of a layer in a compact method, and add its bias.

    Raises:
      ValueError: for ``coeff`` outside (0, 1), an unknown ``normalize``, or singular vectors that
        belong to another image size.
    """
    check_coeff(module.coeff)
    check_normalize(module.normalize)
    vectors, sigma = _power_iteration(module, operator)
    if module.coeff is not None and module.normalize == "bound":
        sigma = gram_upper_bound(operator)
    elif module.coeff is not None and _stands_still(module) and not vectors_are_frozen():
        sigma = renewed_sigma(operator, vectors, sigma)
    sow_latest(module, "constraint", Constraint(operator, vectors, module.coeff))
    zeros = nn.initializers.zeros
    bias = module.param("bias", zeros, (module.features,)) if module.use_bias else None
    return Affine(spectral_normalize(operator, sigma, module.coeff), bias, sigma)


def _kernel(module: SpectralDense | SpectralConv, shape: tuple[int, ...]) -> Float[Array, "..."]:
    if min(shape) < 1:
        raise ValueError(f"Every side of a kernel must be ≥ 1; got {shape}.")
    if module.has_variable("params", "kernel"):
        stored: tuple[int, ...] = module.get_variable("params", "kernel").shape
        if stored != shape:
            raise ValueError(
                f"The variables hold a kernel of shape {stored}; this layer on this input needs "
                f"{shape}."
            )
    kernel: Array = module.param("kernel", module.kernel_init, shape)
    if _stands_still(module) and module.coeff is not None and module.normalize == "estimate":
        return refuse_gradient(kernel, "/".join(module.path) or type(module).__name__)
    return kernel


def _stands_still(module: nn.Module) -> bool:
    return not module.is_mutable_collection("spectral")


def _power_iteration(module: nn.Module, operator: LinearOperator) -> tuple[SingularVectors, Scalar]:
    """The singular vectors, advanced where they are mutable, and the norm that they see."""
    advances = not _stands_still(module)
    if not advances and not module.has_variable("spectral", "vectors"):
        raise ValueError(
            'The variables lack the collection "spectral": pass all that init returned, '
            '{"params": …, "spectral": …}.'
        )
    state = module.variable("spectral", "vectors", lambda: _converged(operator))
    vectors = singular_vectors(state.value)
    if advances and not module.is_initializing():
        state.value, sigma = power_iteration_and_sigma(operator, vectors, module.num_steps)
        return state.value, sigma
    return vectors, sigma_estimate(operator, vectors)


def _converged(operator: LinearOperator) -> SingularVectors:
    return power_iteration_to_tolerance(operator, unbegun_vectors(operator))[0]
