"""A branch that is L-Lipschitz as a whole, by one normalisation of all its layers.

    z_1 = φ(2 P_1 x + b_1),   z_k = φ(V_k z_{k−1} + 2 P_k x + b_k),   g(x) = −ℓx + Σ_k P_kᵀ z_k

with an elementwise φ of slopes in [0, 1], or for every hidden channel a length τ > 0 and the
activation τφ(·/τ), whose slopes are φ's (MonLip; Wang, Dvijotham, Manchester 2024, arXiv
2402.01344, whose layers are dense and parameterised by Cayley transforms).

**Theorem.** Let P stack all P_k, V hold V_k from z_{k−1} to z_k, and c² ≥ ℓ > 0. If

    V + Vᵀ + (2/c²) P Pᵀ ⪯ 2I

on the hidden space, then Lip(g) ≤ 2c² − ℓ; so c² = ℓ gives Lip(g) ≤ ℓ.

*Proof.* Slopes in [0, 1] give ⟨Δz, VΔz + 2PΔx − Δz⟩ ≥ 0. With h = PᵀΔz this is
2⟨h, Δx⟩ ≥ ⟨Δz, (I − (V + Vᵀ)/2)Δz⟩ ≥ ‖h‖²/c². Hence ‖Δg‖² = ‖h‖² − 2ℓ⟨h, Δx⟩ + ℓ²‖Δx‖² ≤
(1 − ℓ/c²)‖h‖² + ℓ²‖Δx‖², and ‖h‖ ≤ 2c²‖Δx‖. So ‖Δg‖² ≤ (4c⁴ − 4c²ℓ + ℓ²)‖Δx‖². ∎

One hidden layer makes g a gradient map: its Jacobian is symmetric.

The condition is proved in :mod:`iresnet_jax.monlip_proofs`.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from iresnet_jax.activations import ACTIVATIONS
from iresnet_jax.monlip_proofs import proved_square
from iresnet_jax.operators import STATIC, ConvOperator, DenseOperator, LinearOperator
from iresnet_jax.rounding import Arithmetic, affine_error, gamma, norm_above, unit_roundoff
from iresnet_jax.scaled_activation import ScaledActivation
from iresnet_jax.stages import Activation
from iresnet_jax.symbols import Known
from iresnet_jax.types import Batch, PerSample, Scalar

Hidden = tuple[Array, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class MonLip:
    """x ↦ −ℓx + Σ_k P_kᵀ z_k, a stage: see the module's docstring.

    Attributes:
      inputs: P_1 … P_K, from the data to each hidden layer; without strides.
      hidden: V_2 … V_K, from each hidden layer to the next.
      biases: b_1 … b_K, [channels].
      shift: ℓ > 0, which Lip(g) is where the weights are normalised.
      activation: name of φ, with slopes in [0, 1].
      lengths: τ of each hidden layer, [channels]; none: 1. See
        :class:`~iresnet_jax.ScaledActivation`.

    Raises:
      ValueError: for another activation, or numbers of layers that do not belong together.
    """

    inputs: tuple[LinearOperator, ...]
    hidden: tuple[LinearOperator, ...]
    biases: tuple[Float[Array, "*stack channels"], ...]
    shift: Float[Array, "*stack"]
    activation: str = dataclasses.field(default="elu", metadata=STATIC)
    lengths: tuple[Float[Array, "*stack channels"], ...] = ()

    def __post_init__(self) -> None:
        check_monotone(self.activation)
        counts = len(self.inputs), len(self.hidden) + 1, len(self.biases)
        if not counts[0] or len(set(counts)) > 1:
            raise ValueError(
                "A MonLip branch of K ≥ 1 hidden layers has K inputs, K − 1 hidden and K biases; "
                f"got {counts[0]}, {counts[1] - 1} and {counts[2]}."
            )
        if self.lengths and len(self.lengths) != counts[0]:
            raise ValueError(
                f"A MonLip branch of {counts[0]} hidden layers has as many lengths, or none; got "
                f"{len(self.lengths)}."
            )

    def __call__(self, x: Batch) -> Batch:
        x = jnp.asarray(x)
        out = -jnp.asarray(self.shift, x.dtype) * x
        for operator, z in zip(self.inputs, _hidden_values(self, x), strict=True):
            out = out + transposed(operator)(z)
        return out

    def lipschitz_bound(self) -> float:
        """Return 2c² − ℓ for the least c² that is proved; infinite where none is."""
        if any(math.isinf(phi.lipschitz_bound()) for phi in self.activations()):
            return math.inf
        return proved_square(self.inputs, self.hidden, self.shift)

    def activations(self) -> tuple[Activation | ScaledActivation, ...]:
        """Return the activation of each hidden layer."""
        if not self.lengths:
            return (Activation(self.activation),) * len(self.inputs)
        return tuple(ScaledActivation(length, self.activation) for length in self.lengths)

    def rounding(self, x: Batch, error: PerSample, arithmetic: Arithmetic) -> PerSample:
        """Bound the error of the output, [batch]: of every layer, and of the sums."""

        def norm(a: Batch) -> PerSample:
            return norm_above(a.astype(error.dtype))

        unit = arithmetic.unit
        slack = 1.0 + gamma(16, unit_roundoff(error.dtype))
        shift = jnp.abs(jnp.asarray(self.shift, error.dtype))
        size = shift * (norm(x) + 2.0 * error)
        total = shift * error + 2.0 * unit * size
        below: tuple[Batch, PerSample] | None = None
        stages = zip(self.inputs, self.activations(), strict=True)
        for k, (operator, activation) in enumerate(stages):
            off = 2.0 * affine_error(operator, None, None, x, error, arithmetic)
            pre = 2.0 * operator(x)
            if below is not None:
                off = off + affine_error(self.hidden[k - 1], None, None, *below, arithmetic)
                pre = pre + self.hidden[k - 1](below[0])
            bias = jnp.broadcast_to(self.biases[k], pre.shape).astype(pre.dtype)
            off = (off + 4.0 * unit * (norm(pre) + 3.0 * off + norm(bias))) * slack
            pre = pre + bias
            below = activation(pre), activation.rounding(pre, off, arithmetic)
            back = transposed(operator)
            found = affine_error(back, None, None, *below, arithmetic)
            total, size = total + found, size + norm(back(below[0])) + 2.0 * found
        return (total + 2.0 * (len(self.inputs) + 2) * unit * size) * slack

    def silent_about_rounding(self) -> list[str]:
        """Name the activation, if its rounding is not known."""
        return [self.activation] if ACTIVATIONS[self.activation].ulps is None else []


def _hidden_values(branch: MonLip, x: Batch) -> Hidden:
    """z_1 … z_K."""
    found: list[Array] = []
    layers = zip(branch.inputs, branch.biases, branch.activations(), strict=True)
    for k, (operator, bias, activation) in enumerate(layers):
        pre = 2.0 * operator(x)
        pre = pre + branch.hidden[k - 1](found[-1]) if k else pre
        found.append(activation(pre + bias.astype(pre.dtype)))
    return tuple(found)


def check_monotone(activation: str) -> None:
    """Refuse an activation whose slopes are not known to lie in [0, 1], by a ValueError."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"Unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}.")
    low, high = ACTIVATIONS[activation].slopes
    if not 0.0 <= low <= high <= 1.0:
        fitting = [n for n, a in ACTIVATIONS.items() if 0.0 <= a.slopes[0] <= a.slopes[1] <= 1.0]
        raise ValueError(
            f"A MonLip branch needs an activation with slopes in [0, 1]; {activation!r} has slopes "
            f"in [{low:g}, {high:g}]. Known with such slopes: {', '.join(fitting)}."
        )


def hidden_form(
    inputs: Sequence[LinearOperator], hidden: Sequence[LinearOperator], z: Hidden
) -> Hidden:
    """Compute (V + Vᵀ + 2PPᵀ)z, without batch axis: the symmetric map that is normalised."""
    back = sum((transposed(p)(w[None]) for p, w in zip(inputs, z, strict=True)), start=0.0)
    out = [2.0 * operator(jnp.asarray(back))[0] for operator in inputs]
    for k, operator in enumerate(hidden):
        out[k + 1] = out[k + 1] + operator(z[k][None])[0]
        out[k] = out[k] + transposed(operator)(z[k + 1][None])[0]
    return tuple(out)


def transposed(operator: LinearOperator) -> Known:
    """Return Pᵀ as an operator: of a dense one, or of a convolution without strides.

    Raises:
      TypeError: for other operators.
      ValueError: for a convolution with strides.
    """
    if type(operator) is DenseOperator:
        return DenseOperator(jnp.swapaxes(operator.kernel, -1, -2))
    if type(operator) is not ConvOperator:
        raise TypeError(f"The transpose of a {type(operator).__name__} is not known.")
    if operator.strides != (1, 1):
        raise ValueError(f"A MonLip branch has no strides; got {operator.strides}.")
    kernel = jnp.swapaxes(jnp.flip(operator.kernel, (-4, -3)), -1, -2)
    spans = zip(operator.kernel_size, operator.dilation, operator.padding, strict=True)
    padding = [((k - 1) * d - low, (k - 1) * d - high) for k, d, (low, high) in spans]
    height, width, _ = operator.codomain_shape
    return ConvOperator(
        kernel, (height, width), (1, 1), (padding[0], padding[1]), operator.dilation
    )


def scaled(
    inputs: Sequence[Known], hidden: Sequence[Known], eigenvalue: Scalar, lipschitz: float
) -> tuple[tuple[Known, ...], tuple[Known, ...]]:
    """Normalise raw (S, V): P = √L t S and t²V with t² = min(1, 2/λ), λ ≈ λ_max(V + Vᵀ + 2SSᵀ)."""
    wide = jnp.asarray(eigenvalue, jnp.promote_types(jnp.result_type(eigenvalue), jnp.float32))
    square = 2.0 / jnp.maximum(wide, 2.0)
    return _times(inputs, jnp.sqrt(lipschitz * square)), _times(hidden, square)


def _times(operators: Sequence[Known], factor: Scalar) -> tuple[Known, ...]:
    kernels = [(op.kernel * factor).astype(op.kernel.dtype) for op in operators]
    pairs = zip(operators, kernels, strict=True)
    return tuple(dataclasses.replace(op, kernel=kernel) for op, kernel in pairs)
