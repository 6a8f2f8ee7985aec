"""The Flax module of a branch that is normalised as a whole."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from iresnet_jax.activations import LEARNED
from iresnet_jax.frozen_vectors import refuse_gradient, vectors_are_frozen
from iresnet_jax.monlip import Hidden, check_monotone, scaled
from iresnet_jax.monlip import MonLip as PureMonLip
from iresnet_jax.monlip_bounds import eigenvalue_bound
from iresnet_jax.monlip_iteration import (
    advanced,
    eigenvalue_estimate,
    first_vector,
    to_tolerance,
)
from iresnet_jax.monlip_proofs import holds, largest_eigenvalue
from iresnet_jax.nn.activations import LOG_LENGTH, learned_lengths
from iresnet_jax.nn.constraints import (
    CopyAxes,
    Normalize,
    check_normalize,
    one_by_one,
    prevailing,
    refuse_surplus,
    sow_latest,
)
from iresnet_jax.nn.layers import Initializer
from iresnet_jax.operators import STATIC, DenseOperator, LinearOperator, conv_operator
from iresnet_jax.spectral import check_coeff
from iresnet_jax.stages import Precision, Sequential
from iresnet_jax.symbols import Known
from iresnet_jax.types import Batch

_HEADROOM = 1e-5  # for the rounding of later factors


class MonLip(nn.Module):
    """A residual branch that is L-Lipschitz as a whole: see :class:`iresnet_jax.MonLip`.

    Its raw weights S_k and V_k are scaled by one number, t and t² with t² = min(1, 2/λ), where λ is
    about λ_max(V + Vᵀ + 2SSᵀ). With ``normalize`` "estimate", λ estimates it by one persistent
    power iteration for the whole branch; where that stands still and misses λ_max, it is converged
    first, as in other layers. With "bound", λ bounds it rigorously from above
    (:mod:`iresnet_jax.monlip_bounds`): then Lip(g) ≤ L at every step, for products of matrices of
    all hidden channels at every frequency of an image.

    Vectors pass dense layers. Images pass convolutions: ``kernel_size`` from and to the data, 1×1
    between hidden layers.

    Attributes:
      features: channels of each hidden layer, first to last.
      lipschitz: L, in (0, 1).
      kernel_size: of the convolutions from and to images.
      num_steps: power-iteration steps each time the ``spectral`` collection is mutable.
      normalize: "estimate" or "bound".
      activation: a name, with slopes in [0, 1].
      precision: see :class:`iresnet_jax.Sequential`.
      kernel_init: initialiser of all kernels.
      length: where the learned length τ of each hidden channel's activation begins; None: all are
        1, and not learned. See :class:`iresnet_jax.ScaledActivation`.
      bias_init: initialiser of the biases, which say where activations bend.
    """

    features: int | Sequence[int]
    lipschitz: float = 0.9
    kernel_size: int | Sequence[int] = (3, 3)
    num_steps: int = 1
    normalize: Normalize = "estimate"
    activation: str = "elu"
    precision: Precision = "float32"
    kernel_init: Initializer = nn.initializers.lecun_normal()
    length: float | None = 0.1
    bias_init: Initializer = nn.initializers.normal(0.5)

    def __post_init__(self) -> None:
        self.features, self.kernel_size = self._widths, self._sides
        super().__post_init__()

    @property
    def _widths(self) -> tuple[int, ...]:
        features = self.features
        return (features,) if isinstance(features, int) else tuple(features)

    @property
    def _sides(self) -> tuple[int, ...]:
        size = self.kernel_size
        return (size, size) if isinstance(size, int) else tuple(size)

    def __call__(self, x: Batch) -> Batch:
        return self.pure(x.shape[1:])(x)

    @nn.compact
    def pure(self, input_shape: Sequence[int]) -> Sequential:
        """Return the branch for inputs of ``input_shape``, without batch axis.

        Raises:
          ValueError: for ``lipschitz`` outside (0, 1), no or empty hidden layers, or an activation
            whose slopes are not known to lie in [0, 1]; for variables of another branch, with more
            layers, or with lengths where this one has none.
        """
        self._check()
        refuse_surplus(self, self._names())
        layers = self._layers(tuple(input_shape))
        vector, eigenvalue = self._iteration(layers)
        if self.normalize == "bound":
            eigenvalue = eigenvalue_bound(*layers)
        constraint = WholeConstraint(*layers, vector, self.lipschitz)
        sow_latest(self, "constraint", constraint)
        length = _float32_below(self.lipschitz)
        inputs, hidden = scaled(*layers, eigenvalue, float(length))
        biases = [self.param(f"bias_{k}", self.bias_init, (w,)) for k, w in enumerate(self._widths)]
        lengths = () if self.length is None else learned_lengths(self, self.length, self._widths)
        stage = PureMonLip(
            inputs, hidden, tuple(biases), jnp.asarray(length), self.activation, lengths
        )
        return Sequential((stage,), self.precision)

    def _check(self) -> None:
        if self.lipschitz is None:
            raise ValueError("lipschitz of a MonLip branch must lie in (0, 1); got None.")
        check_coeff(self.lipschitz)
        check_normalize(self.normalize)
        check_monotone(self.activation)
        if not self._widths or min(self._widths) < 1:
            raise ValueError(
                f"features of a MonLip branch are one number ≥ 1 or more; got {self.features}."
            )
        if len(self._sides) != 2 or min(self._sides) < 1:
            raise ValueError(
                f"kernel_size of a MonLip branch is (height, width), ≥ 1; got {self.kernel_size}."
            )

    def _names(self) -> set[str]:
        kinds = ["input_", "hidden_", "bias_", *([] if self.length is None else [LOG_LENGTH])]
        names = {f"{kind}{k}" for kind in kinds for k in range(len(self._widths))}
        return names | {"copy_axes"}  # a guard that shrinking puts there

    def _layers(self, shape: tuple[int, ...]) -> tuple[tuple[Known, ...], tuple[Known, ...]]:
        """S_1 … S_K and V_2 … V_K, raw."""
        image, channels = len(shape) == 3, shape[-1]
        sides = self._sides if image else ()
        widths = list(self._widths)
        shapes = [(*sides, channels, width) for width in widths]
        inputs = [self._operator(f"input_{k}", s, shape) for k, s in enumerate(shapes)]
        pairs = enumerate(itertools.pairwise(widths), start=1)
        ones = (1, 1) if image else ()
        hidden = [self._operator(f"hidden_{k}", (*ones, *pair), shape) for k, pair in pairs]
        return tuple(inputs), tuple(hidden)

    def _operator(self, name: str, kernel: tuple[int, ...], shape: tuple[int, ...]) -> Known:
        weights: Array = self.param(name, self.kernel_init, kernel)
        if self.normalize == "estimate" and not self.is_mutable_collection("spectral"):
            weights = refuse_gradient(weights, "/".join(self.path) or type(self).__name__)
        if len(shape) != 3:
            return DenseOperator(weights)
        operator: LinearOperator = conv_operator(weights, shape[:2])
        return operator  # type: ignore[return-value]

    def _iteration(
        self, layers: tuple[tuple[Known, ...], tuple[Known, ...]]
    ) -> tuple[Hidden, Array]:
        """The vector, advanced where it is mutable, and the eigenvalue that it sees."""
        advances = self.is_mutable_collection("spectral")
        if not advances and not self.has_variable("spectral", "eigenvector"):
            raise ValueError(
                'The variables lack the collection "spectral": pass all that init returned, '
                '{"params": …, "spectral": …}.'
            )
        state = self.variable("spectral", "eigenvector", lambda: first_vector(layers[0]))
        vector = tuple(map(jnp.asarray, state.value))  # a list, where it was restored as one
        if self.is_initializing():
            vector = state.value = to_tolerance(layers, vector)
        elif advances:
            vector = state.value = advanced(layers, vector, self.num_steps)
        seen = eigenvalue_estimate(layers, vector)
        if advances or self.normalize == "bound" or vectors_are_frozen():
            return vector, seen
        return vector, prevailing(seen, eigenvalue_estimate(layers, to_tolerance(layers, vector)))


def monlip_branch(
    channels: int,
    features: int | Sequence[int],
    *,
    coeff: float | None = 0.9,
    num_steps: int = 1,
    normalize: Normalize = "estimate",
    activation: str = "elu",
    activate_first: bool = True,
    precision: Precision = "float32",
) -> MonLip:
    """A branch for ``make_branch=`` of a model: ``coeff`` is its Lipschitz constant L as a whole.

    Args:
      channels: of the block's input and output, which the branch finds itself.
      features: channels of each hidden layer; of one number, two hidden layers.
      coeff: L, in (0, 1).
      num_steps, normalize, precision: see :class:`MonLip`.
      activation: a name. Lengths are learned with "learned_" before it or without;
        :class:`MonLip` itself can leave them at 1.
      activate_first: has no meaning here.
    """
    del channels, activate_first
    widths = (features, features) if isinstance(features, int) else tuple(features)
    lipschitz: float = coeff  # type: ignore[assignment]  # None is refused there
    return MonLip(
        widths,
        lipschitz,
        num_steps=num_steps,
        normalize=normalize,
        activation=activation.removeprefix(LEARNED),
        precision=precision,
        parent=None,
    )


def shallow_monlip_branch(channels: int, features: int | Sequence[int], **options: Any) -> MonLip:
    """As :func:`monlip_branch`, with one hidden layer, the first of ``features``."""
    width = features if isinstance(features, int) else features[0]
    return monlip_branch(channels, (width,), **options)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class WholeConstraint:
    """What is asked of a whole branch: that V + Vᵀ + 2SSᵀ ⪯ 2I.

    Attributes:
      inputs, hidden: S and V, raw.
      vectors: where the power iteration stands.
      lipschitz: L.
      copy_axes: where copies of this are stacked.
    """

    #: Name of the vector among the variables.
    vectors_name: ClassVar[str] = "eigenvector"

    inputs: tuple[Known, ...]
    hidden: tuple[Known, ...]
    vectors: Hidden
    lipschitz: float = dataclasses.field(metadata=STATIC)
    copy_axes: CopyAxes = dataclasses.field(default_factory=CopyAxes)

    @property
    def stacked(self) -> tuple[int, ...]:
        """Leading axes along which equal branches are stacked."""
        first = self.inputs[0]
        kernel = first.kernel
        return kernel.shape[: kernel.ndim - (2 if isinstance(first, DenseOperator) else 4)]

    def raw_kernels(self) -> dict[str, Float[Array, "..."]]:
        """Return all raw kernels by the names of their parameters."""
        inputs = {f"input_{k}": op.kernel for k, op in enumerate(self.inputs)}
        return inputs | {f"hidden_{k}": op.kernel for k, op in enumerate(self.hidden, start=1)}

    def shrunk_kernels(self) -> dict[str, Float[Array, "..."]]:
        """Scale the raw kernels down until the condition is proved, on the host."""
        factors = [
            proved_factor(_at(self.inputs, place), _at(self.hidden, place))
            for place in np.ndindex(self.stacked)
        ]
        square = np.reshape(factors, self.stacked)
        roots = {f"input_{k}": np.sqrt(square) for k in range(len(self.inputs))}
        return {
            name: kernel * _beside(roots.get(name, square), kernel)
            for name, kernel in self.raw_kernels().items()
        }

    def converged(self) -> Hidden:
        """Run the power iterations to their tolerance."""
        operators = self.inputs, self.hidden
        return one_by_one(to_tolerance, len(self.stacked))(operators, self.vectors)


def proved_factor(inputs: Sequence[Known], hidden: Sequence[Known]) -> float:
    """t², such that tS and t²V, rounded, are proved to meet the condition with room to spare."""
    if not all(np.isfinite(np.asarray(op.kernel)).all() for op in (*inputs, *hidden)):
        return 1.0
    finest = float(jnp.finfo(inputs[0].kernel.dtype).eps)
    square, step = 1.0, 1.0 - max(2.0 * _HEADROOM, finest)
    while True:
        scaled_inputs = _scaled(inputs, math.sqrt(square))
        scaled_hidden = _scaled(hidden, square)
        if holds(scaled_inputs, scaled_hidden, 1.0 - _HEADROOM):
            return square
        found = largest_eigenvalue(scaled_inputs, scaled_hidden)
        square *= 2.0**-64 if found == math.inf else min(2.0 / found, 1.0) * step


def _scaled(operators: Sequence[Known], factor: float) -> list[Known]:
    kernels = [np.asarray(op.kernel) for op in operators]
    scaled = [(kernel * np.float64(factor)).astype(kernel.dtype) for kernel in kernels]
    pairs = zip(operators, scaled, strict=True)
    return [dataclasses.replace(op, kernel=jnp.asarray(kernel)) for op, kernel in pairs]


def _at(operators: Sequence[Known], place: tuple[int, ...]) -> list[Known]:
    """One of the stacked copies."""
    return [dataclasses.replace(op, kernel=jnp.asarray(op.kernel)[place]) for op in operators]


def _beside(factor: np.ndarray, kernel: Array) -> np.ndarray:
    """With as many axes as the kernels that it scales, in their type."""
    ones = (1,) * (kernel.ndim - factor.ndim)
    return np.reshape(factor, (*factor.shape, *ones)).astype(kernel.dtype)


def _float32_below(number: float) -> np.float32:
    rounded = np.float32(number)
    return rounded if float(rounded) <= number else np.nextafter(rounded, np.float32(0.0))
