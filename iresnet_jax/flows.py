"""Invertible residual networks as pure pytrees.

A :class:`Flow` holds its constrained weights and nothing mutable. Its methods are pure functions
that jit and differentiate. The Flax models of :mod:`iresnet_jax.models` store
the parameters and hand out flows; a flow can as well be built by hand from operators.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from iresnet_jax.branches import layer_bounds_of, rounded_up, with_layer_bounds
from iresnet_jax.checks import (
    at_least_default_precision,
    check_at_least_one,
    check_domain,
    check_latents,
    check_shape,
)
from iresnet_jax.fixed_point import FixedPointInfo, refuse_out_of_reach
from iresnet_jax.logdet import Estimator, keys_of_blocks
from iresnet_jax.operators import STATIC
from iresnet_jax.priors import DiagonalGaussian
from iresnet_jax.residual import BlockStack, ResidualBlock, Scale, shares_of_keys
from iresnet_jax.transforms import (
    injective_pad,
    injective_unpad,
    inverse_logit,
    logit,
)

Latents = tuple[jax.Array, ...]
Domain = Literal["real", "centered", "logit"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Flow:
    """An invertible residual network between data and latents.

    Data may first be moved from [0, 1] to where the network works (``domain``) and padded with zero
    channels (``padding``). With ``factor_out``, half of the channels leave after every scale but
    the last: the latents are a tuple in the order in which they leave; else a tuple of one array.

    Attributes:
      scales: the resolutions, first to last.
      input_shape: shape of one datum, without batch axis.
      priors: one for each latent, or () where only the map is of interest.
      factor_out: whether half of the channels leave between scales.
      domain: "real" (as it is), "centered" (x − 0.5) or "logit" for data in [0, 1].
      padding: number of zero channels appended.
    """

    scales: tuple[Scale, ...]
    input_shape: tuple[int, ...] = dataclasses.field(metadata=STATIC)
    priors: tuple[DiagonalGaussian, ...] = ()
    factor_out: bool = dataclasses.field(default=False, metadata=STATIC)
    domain: Domain = dataclasses.field(default="real", metadata=STATIC)
    padding: int = dataclasses.field(default=0, metadata=STATIC)

    def __post_init__(self):
        if self.domain not in get_args(Domain):
            names = ", ".join(get_args(Domain))
            raise ValueError(f"domain must be one of {names}; got {self.domain!r}.")

    @property
    def dim(self) -> int:
        """Dimensions of one datum."""
        return math.prod(self.input_shape)

    def forward(self, x: jax.Array) -> Latents:
        """Latents of a batch ``x`` [batch, *input_shape], without the log-determinant."""
        return self.forward_in_network(self.to_network(x)[0])

    def forward_in_network(self, x: jax.Array) -> Latents:
        """Latents of data that :meth:`to_network` has moved."""
        latents: Latents = ()
        for i, scale in enumerate(self.scales):
            leaving, x = self.split(scale.forward(x), i)
            latents = (*latents, *leaving)
        return (*latents, x)

    def forward_and_log_det(
        self, x: jax.Array, estimator: Estimator, key: jax.Array | None = None
    ) -> tuple[Latents, jax.Array]:
        """Latents and log|det ∂z/∂x| per sample, in nats, [batch].

        Args:
          x: floating point data [batch, *input_shape]; in [0, 1] unless the domain is "real".
          estimator: from :mod:`iresnet_jax.logdet`.
          key: one key, or one per sample; may be None for an estimator without noise.

        Raises:
          ValueError, TypeError: for data of another shape, type or range, or not finite.
        """
        if self.padding:
            raise ValueError(
                f"A network with {self.padding} padded channels maps between spaces of different "
                "dimension: it has no log-determinant. Use forward()."
            )
        x, log_det = self.to_network(x)
        depth, batch = sum(self._depths()), x.shape[0]
        keys = None if key is None else keys_of_blocks(key, depth, batch)
        latents: list[jax.Array] = []
        shares = shares_of_keys(keys, self.scales)
        for i, (scale, own) in enumerate(zip(self.scales, shares, strict=True)):
            x, scale_log_det = scale.forward_and_log_det(x, estimator, own)
            log_det = log_det + scale_log_det
            leaving, x = self.split(x, i)
            latents.extend(leaving)
        return (*latents, x), log_det

    def inverse(
        self, latents: Latents, *, error_tolerance: float | None = None, **options
    ) -> tuple[jax.Array, FixedPointInfo]:
        """Data from latents, each block inverted by itself, last to first.

        Args:
          latents: as returned by :meth:`forward`.
          error_tolerance: of each block's branch; needs :meth:`with_lipschitz_bounds`.
          **options: rtol, atol, max_steps, solver: see
            :func:`~iresnet_jax.fixed_point.fixed_point_inverse`.

        Returns:
          x [batch, *input_shape], and a FixedPointInfo whose fields have shape [blocks, batch], the
          blocks in forward order.

        Raises:
          ValueError: for latents of other shapes, or a tolerance that rounding keeps out of reach.
        """
        check_latents(latents, self.latent_shapes())
        latents = tuple(at_least_default_precision(latent) for latent in latents)
        remaining, x = list(latents[:-1]), latents[-1]
        infos: list[FixedPointInfo] = []
        for i, scale in reversed(list(enumerate(self.scales))):
            if self._splits_after(i):
                x = jnp.concatenate([remaining.pop(), x], axis=-1)
            x, scale_infos = scale.inverse(x, error_tolerance=error_tolerance, **options)
            infos = scale_infos + infos
        info = jax.tree.map(lambda *parts: jnp.concatenate(parts), *infos)
        if error_tolerance is not None:
            refuse_out_of_reach(info, error_tolerance, self.block_names())
        return self._from_network(x), info

    def log_prob(
        self, x: jax.Array, estimator: Estimator, key: jax.Array | None = None
    ) -> jax.Array:
        """Log density of each datum in nats, [batch]: log p(z) + log|det ∂z/∂x|."""
        latents, log_det = self.forward_and_log_det(x, estimator, key)
        return self.prior_log_prob(latents) + log_det

    def prior_log_prob(self, latents: Latents) -> jax.Array:
        """Log density of the latents under their priors, in nats, [batch]."""
        self._check_priors()
        parts = zip(self.priors, latents, strict=True)
        return sum((prior.log_prob(z) for prior, z in parts), start=jnp.zeros(()))

    def sample(
        self, key: jax.Array, num_samples: int, *, temperature: float = 1.0, **options
    ) -> tuple[jax.Array, FixedPointInfo]:
        """Data from the model: latents drawn from the priors, then inverted.

        Args:
          key: a random key.
          num_samples: ≥ 1.
          temperature: scales the priors' standard deviations.
          **options: of :meth:`inverse`.
        """
        check_at_least_one("num_samples", num_samples)
        self._check_priors()
        keys = jax.random.split(key, len(self.priors))
        draws = zip(self.priors, keys, strict=True)
        latents = tuple(prior.sample(k, num_samples, temperature) for prior, k in draws)
        return self.inverse(latents, **options)

    def blocks(self) -> Iterator[ResidualBlock]:
        """All blocks, first to last, unstacked."""
        for scale in self.scales:
            for stack in scale.stacks:
                yield from stack.unstacked()

    def block_names(self) -> list[str]:
        """ "scale i, block j", in the order of :meth:`blocks`."""
        return [f"scale {i}, block {j}" for i, n in enumerate(self._depths()) for j in range(n)]

    def block_dims(self) -> list[int]:
        """Dimensions that each block acts on, in the order of :meth:`blocks`."""
        pairs = zip(self._depths(), map(math.prod, self.scale_shapes()), strict=True)
        return [size for depth, size in pairs for _ in range(depth)]

    def _depths(self) -> list[int]:
        return [scale.depth for scale in self.scales]

    def lipschitz_bounds(self) -> list[float]:
        """For each block a rigorous L ≥ Lip(g), from the layers' upper bounds; on the host."""
        return [block.branch.lipschitz_bound() for block in self.blocks()]  # type: ignore[attr-defined]

    def with_lipschitz_bounds(
        self,
        bounds: Sequence[float] | None = None,
        layer_bounds: Sequence[Sequence[float]] | None = None,
    ) -> "Flow":
        """The flow with every block's bound attached: inverses then report their error bound.

        Args:
          bounds: rigorous bounds of the blocks; :meth:`lipschitz_bounds` by default.
          layer_bounds: of each block's affine layers, which tighten the bound on rounding.
        """
        if bounds is None:
            bounds = self.lipschitz_bounds()
            layer_bounds = [layer_bounds_of(block.branch) for block in self.blocks()]
        remaining, layers = iter(bounds), iter(layer_bounds or ())

        def attach(stack: BlockStack) -> BlockStack:
            lipschitz = rounded_up([next(remaining) for _ in range(stack.depth)])
            layers_of = [next(layers, ()) for _ in range(stack.depth)]
            branch = with_layer_bounds(stack.block.branch, layers_of)
            block = dataclasses.replace(stack.block, branch=branch, lipschitz=lipschitz)
            return dataclasses.replace(stack, block=block)

        stacks = [tuple(map(attach, scale.stacks)) for scale in self.scales]
        pairs = zip(self.scales, stacks, strict=True)
        scales = tuple(dataclasses.replace(scale, stacks=new) for scale, new in pairs)
        return dataclasses.replace(self, scales=scales)

    def latent_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape of every latent, without batch axis, in the order in which they leave."""
        *inner, last = self.scale_shapes()
        leaving = inner if self.factor_out else []
        return (*((*shape[:-1], shape[-1] // 2) for shape in leaving), last)

    def scale_shapes(self) -> list[tuple[int, ...]]:
        """The shape in which each scale's blocks see their input, without batch axis."""
        shape = (*self.input_shape[:-1], self.input_shape[-1] + self.padding)
        shapes = []
        for i, scale in enumerate(self.scales):
            if scale.squeeze:
                shape = (shape[0] // 2, shape[1] // 2, 4 * shape[2])
            shapes.append(shape)
            if self._splits_after(i):
                shape = (*shape[:-1], shape[-1] - shape[-1] // 2)
        return shapes

    def _splits_after(self, index: int) -> bool:
        return self.factor_out and index < len(self.scales) - 1

    def split(self, x: jax.Array, index: int) -> tuple[Latents, jax.Array]:
        """What leaves after scale ``index``, and what goes on."""
        if not self._splits_after(index):
            return (), x
        half = x.shape[-1] // 2
        return (x[..., :half],), x[..., half:]

    def to_network(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Checked data where the network works, and the log-determinant of that step."""
        check_shape(x, self.input_shape)
        check_domain(x, unit_interval=self.domain != "real")
        return self.to_network_unchecked(x)

    def to_network_unchecked(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """:meth:`to_network` of data that may leave [0, 1], as what an inverse returns."""
        x = at_least_default_precision(x)
        log_det = jnp.zeros(x.shape[0], x.dtype)
        if self.domain == "logit":
            x, log_det = logit(x)
        elif self.domain == "centered":
            x = x - 0.5
        return (injective_pad(x, self.padding) if self.padding else x), log_det

    def _from_network(self, x: jax.Array) -> jax.Array:
        x = injective_unpad(x, self.padding) if self.padding else x
        if self.domain == "logit":
            return inverse_logit(x)
        return x + 0.5 if self.domain == "centered" else x

    def _check_priors(self):
        if not self.priors:
            raise ValueError("This flow has no prior: it maps, but has no density to evaluate.")
