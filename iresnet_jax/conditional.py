"""Conditional flows p(y | x): every block sees the condition, and is invertible in y for all.

The condition enters by shifts inside the branches, g(y; x) = W₂ φ(W₁ y + b + V c(x)) + …, with any
network c. A shift changes no difference of two values at one condition, so Lip(g(·; x)) is that of
the branch without it: one certificate holds for every condition.
"""

import dataclasses
import math
from typing import Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from iresnet_jax.bijections import Bijection, Chain
from iresnet_jax.certificates import Certificate
from iresnet_jax.checks import (
    at_least_default_precision,
    check_at_least_one,
    check_domain,
    refuse_masked,
    typed_key,
)
from iresnet_jax.convergence import FixedPointInfo
from iresnet_jax.flows import Flow, Latents, PerDatum
from iresnet_jax.logdet import Estimator, Exact, SampleKeys
from iresnet_jax.operators import STATIC
from iresnet_jax.priors import DiagonalGaussian
from iresnet_jax.rounding import Arithmetic, norm_above
from iresnet_jax.solvers import FixedPointIteration, Solver
from iresnet_jax.types import AnyArray, PerSample, Samples

Tree = TypeVar("Tree")
Context = Float[Array, "batch context"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ConditionalShift:
    """h ↦ h + V c, a stage: c the context of each sample, constant in h.

    Attributes:
      kernel: V, of a stack along leading axes.
      shift: V c of each sample; None before a condition is given, when the stage is the identity.
    """

    kernel: Float[Array, "*stack context channels"]
    shift: Float[Array, "*stack batch channels"] | None = None

    def __call__(self, x: Samples) -> Samples:
        return x if self.shift is None else x + self.shift

    def lipschitz_bound(self) -> float:
        """Return 1: a shift keeps distances."""
        return 1.0

    def slopes(self) -> tuple[float, float]:
        """Return (1, 1)."""
        return 1.0, 1.0

    def rounding(self, x: Samples, error: PerSample, arithmetic: Arithmetic) -> PerSample:
        """Bound the error of the output by e + u‖h + V c‖, [batch]."""
        if self.shift is None:
            return error
        unit, tiny = arithmetic.unit, float(jnp.finfo(x.dtype).tiny)
        flushed = 4.0 * tiny * math.sqrt(math.prod(x.shape[1:]))
        return error * (1.0 + 8.0 * unit) + 2.0 * unit * norm_above(self(x)) + flushed

    def given(self, context: Context) -> Self:
        """Return the stage at the context of each sample."""
        with jax.default_matmul_precision("highest"):
            shift = jnp.einsum("bk,...kc->...bc", context, self.kernel)
        return dataclasses.replace(self, shift=shift)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ContextNetwork:
    """c(x): of a class its one-hot vector; of a vector x, itself beside a network of it.

    Attributes:
      layers: (weights [in, out], biases [out]) of tanh layers; () for classes.
      dim: of x, or the number of classes.
      classes: whether conditions are classes.
      entrance: bijections that a vector x passes first, such as those that bring its entries to one
        scale.
    """

    layers: tuple[tuple[Array, Array], ...]
    dim: int = dataclasses.field(metadata=STATIC)
    classes: bool = dataclasses.field(metadata=STATIC)
    entrance: tuple[Bijection, ...] = ()

    def __call__(self, condition: Shaped[AnyArray, "batch ..."]) -> Context:
        """Map conditions, classes [batch] or vectors [batch, dim], to contexts.

        A number that is no class gives NaN: under ``jit`` it cannot be refused.
        """
        if self.classes:
            one_hot = jax.nn.one_hot(condition, self.dim)
            return jnp.where(one_hot.any(axis=-1, keepdims=True), one_hot, jnp.nan)
        h = x = Chain(self.entrance).forward(at_least_default_precision(condition))
        with jax.default_matmul_precision("highest"):
            for weights, biases in self.layers:
                h = jnp.tanh(h @ weights + biases[None])
        return jnp.concatenate([x, h], axis=-1) if self.layers else x

    def batched(self, condition: AnyArray) -> tuple[AnyArray, bool]:
        """Return conditions as a batch, and whether it was a single one.

        A vector of integers is one of numbers.

        Raises:
          TypeError, ValueError: for another type or shape; for values that are not finite, masked,
            or no class.
        """
        refuse_masked(condition, "Conditions")
        if not isinstance(condition, jax.Array | np.ndarray):  # a number, a data frame or a column
            condition = np.asarray(condition)
        event: tuple[int, ...] = () if self.classes else (self.dim,)
        if condition.shape[condition.ndim - len(event) :] != event or (
            condition.ndim not in (len(event), len(event) + 1)
        ):
            told = "classes [batch]" if self.classes else f"vectors [batch, {self.dim}]"
            raise ValueError(f"Conditions must be {told}, or one of them; got {condition.shape}.")
        if not self.classes:
            condition = _as_floats(condition)
            check_domain(condition, unit_interval=False)
        elif not jnp.issubdtype(condition.dtype, jnp.integer):
            raise TypeError(f"Classes must be integers; got {condition.dtype}.")
        elif not isinstance(condition, jax.core.Tracer):
            _check_classes(np.asarray(condition), self.dim)
        single = condition.ndim == len(event)
        return (condition[None] if single else condition), single


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ConditionalFlow:
    """A flow over y at every condition x, with a prior that depends on x.

    log p(y | x) = log N(z; m + M c(x), exp(s + S c(x))) + log|det ∂z/∂y|, z = F(y; x).

    Methods take a batch of data [batch, *event_shape] and as many conditions, or one condition for
    all; conditions are vectors [dim], or classes, integers. Under ``jit``, where values cannot be
    refused, a condition that is not finite or no class gives NaN, and inverses that say they did
    not converge.

    Contexts of vectors grow with them. Far beyond what was trained on, shifts of size s round what
    they are added to by s·2⁻²⁴ in float32: certificates hold, error bounds of inverses count it,
    and log-likelihoods lose these digits.

    Attributes:
      flow: of y, before a condition is given: its priors have m and s.
      network: c.
      prior_kernels: (M, S) of each latent, [context, *latent].
    """

    flow: Flow
    network: ContextNetwork
    prior_kernels: tuple[tuple[Array, Array], ...]

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one y."""
        return self.flow.event_shape

    def given(self, condition: AnyArray) -> Flow:
        """Return the flow of y at one condition: p(y | x) as any other flow.

        Raises:
          ValueError, TypeError: for anything but one condition.
        """
        batch, single = self.network.batched(condition)
        if not single:
            raise ValueError(f"given takes one condition; got {batch.shape[0]} of them.")
        context = self.network(batch)
        mean, log_std = zip(*self._priors(context), strict=True)
        priors = tuple(DiagonalGaussian(m[0], s[0]) for m, s in zip(mean, log_std, strict=True))
        return dataclasses.replace(self._at(context), priors=priors)

    def log_prob(
        self,
        y: AnyArray,
        condition: AnyArray,
        estimator: Estimator = Exact(),
        *,
        key: SampleKeys | None = None,
    ) -> PerDatum:
        """Return log p(y | x) of each datum in nats, [batch]; of one y at one x, a scalar.

        Args:
          y: floating point data [batch, *event_shape], or one.
          condition: one for each, or one for all.
          estimator, key: as of :meth:`~iresnet_jax.flows.Flow.forward_and_log_det`.

        Raises:
          ValueError, TypeError: for data or conditions of another shape, type or range.
        """
        context, single = self._contexts(y, condition)
        if single:
            return self.given(condition).log_prob(y, estimator, key=key)
        latents, log_det = self._at(context).forward_and_log_det(y, estimator, key=key)
        pairs = zip(self._priors(context), latents, strict=True)
        return log_det + sum(_log_prob(*prior, z) for prior, z in pairs)

    def forward(self, y: AnyArray, condition: AnyArray) -> Latents:
        """Map data to latents at their conditions; see :meth:`~iresnet_jax.flows.Flow.forward`."""
        return self._at(self._contexts(y, condition)[0]).forward(y)

    def inverse(
        self, latents: Latents, condition: AnyArray, solver: Solver = FixedPointIteration()
    ) -> tuple[Float[Array, "..."], FixedPointInfo]:
        """Map latents to data at their conditions; see :meth:`~iresnet_jax.flows.Flow.inverse`."""
        batch, single = self.network.batched(condition)
        first = latents[0]
        if not single and first.shape[: first.ndim - len(self.flow.latent_shapes()[0])] != (
            len(batch),
        ):
            raise ValueError(f"{len(batch)} conditions do not fit latents of {first.shape}.")
        return self._at(self.network(batch)).inverse(latents, solver)

    def sample(
        self,
        key: PRNGKeyArray,
        num_samples: int,
        condition: AnyArray,
        *,
        temperature: float = 1.0,
        solver: Solver = FixedPointIteration(),
    ) -> tuple[Float[Array, "..."], FixedPointInfo]:
        """Draw y: [num_samples, *event_shape] at one condition.

        At conditions [batch, …], so many for each: [num_samples, batch, *event_shape]. The second
        result is how the inverses went, fields [solves, num_samples · batch].
        """
        batch, single = self.network.batched(condition)
        if single:
            flow = self.given(condition)
            return flow.sample(key, num_samples, temperature=temperature, solver=solver)
        check_at_least_one("num_samples", num_samples)
        if (key := typed_key(key)).ndim:
            raise ValueError(f"Sampling takes one key; got {key.shape}.")
        count = num_samples * len(batch)
        repeated = jnp.concatenate([jnp.asarray(batch)] * num_samples)
        context = self.network(repeated)
        keys = jax.random.split(key, len(self.prior_kernels))
        latents = []
        for own, (mean, log_std) in zip(keys, self._priors(context), strict=True):
            unit = DiagonalGaussian(jnp.zeros(mean.shape[1:]), jnp.zeros(mean.shape[1:]))
            latents.append(mean + jnp.exp(log_std) * unit.sample(own, count, temperature))
        y, info = self._at(context).inverse(tuple(latents), solver)
        return y.reshape(num_samples, len(batch), *self.event_shape), info

    def certify(self) -> Certificate:
        """Bound the map of y and its inverse, at every condition.

        A condition so large that its shifts overflow is not one: they are not finite then.
        """
        parts = {"network": self.network, "prior": (self.flow.priors, self.prior_kernels)}
        shifts = _shifts_of(self.flow)
        parts["shifts"] = [shift.kernel for shift in shifts]
        broken = [name for name, tree in parts.items() if not _finite(tree)]
        return self.flow.certify().with_problems(f"not finite: the condition's {n}" for n in broken)

    def with_bounds(self, certificate: Certificate | None = None) -> "ConditionalFlow":
        """Attach every branch's bounds, as :meth:`~iresnet_jax.flows.Flow.with_bounds` does."""
        certificate = self.certify() if certificate is None else certificate
        return dataclasses.replace(self, flow=self.flow.with_bounds(certificate))

    def _contexts(self, y: AnyArray, condition: AnyArray) -> tuple[Context, bool]:
        """Contexts that fit the data, and whether the condition was a single one."""
        batch, single = self.network.batched(condition)
        shape = np.shape(y)
        rows = shape[: len(shape) - len(self.event_shape)]
        if not single and rows != (len(batch),):
            raise ValueError(
                f"There must be a condition for each datum, or one for all; got {len(batch)} "
                f"conditions for data of {shape}."
            )
        return self.network(batch), single

    def _at(self, context: Context) -> Flow:
        """The flow of y at contexts, without a prior."""

        def given(node: object) -> object:
            return node.given(context) if isinstance(node, ConditionalShift) else node

        bare = dataclasses.replace(self.flow, priors=())
        at: Flow = jax.tree.map(given, bare, is_leaf=_is_shift)
        return at

    def _priors(self, context: Context) -> list[tuple[Array, Array]]:
        """Means and log standard deviations of each latent, [batch, *latent]."""
        with jax.default_matmul_precision("highest"):
            return [
                (
                    prior.mean[None] + jnp.tensordot(context, mean, 1),
                    prior.log_std[None] + jnp.tensordot(context, log_std, 1),
                )
                for prior, (mean, log_std) in zip(self.flow.priors, self.prior_kernels, strict=True)
            ]


@jax.vmap
def _log_prob(mean: Array, log_std: Array, z: Array) -> Array:
    return DiagonalGaussian(mean, log_std).log_prob(z)


def _shifts_of(tree: object) -> list[ConditionalShift]:
    nodes = jax.tree.leaves(tree, is_leaf=_is_shift)
    return [node for node in nodes if isinstance(node, ConditionalShift)]


def _is_shift(node: object) -> bool:
    return isinstance(node, ConditionalShift)


def _finite(tree: object) -> bool:
    return all(bool(np.isfinite(np.asarray(leaf)).all()) for leaf in jax.tree.leaves(tree))


def _as_floats(condition: AnyArray) -> AnyArray:
    kinds = jnp.floating, jnp.integer, jnp.bool_
    if not any(jnp.issubdtype(condition.dtype, kind) for kind in kinds):
        raise TypeError(f"Conditions must be numbers; got an array of {condition.dtype}.")
    if jnp.issubdtype(condition.dtype, jnp.floating):
        return condition
    return condition.astype(jax.dtypes.canonicalize_dtype(np.float64))


def _check_classes(classes: np.ndarray, count: int) -> None:
    if classes.size and not 0 <= classes.min() <= classes.max() < count:
        raise ValueError(
            f"Classes must lie in [0, {count - 1}]; got {classes.min()} to {classes.max()}."
        )
