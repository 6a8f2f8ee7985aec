"""Invertible residual networks with a density, as pure pytrees.

A :class:`Flow` holds its constrained weights and nothing mutable. Its methods are pure functions
that jit and differentiate. The Flax models of :mod:`iresnet_jax.nn` store the parameters and hand
out flows; a flow can as well be built by hand.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from iresnet_jax.bijections import (
    MISPLACED,
    Bijection,
    Error,
    checked_bounds,
    joined,
    shares,
)
from iresnet_jax.certificates import Certificate
from iresnet_jax.checks import (
    at_least_default_precision,
    check_at_least_one,
    check_domain,
    check_latents,
    check_shape,
    typed_key,
)
from iresnet_jax.convergence import FixedPointInfo, refuse_out_of_reach, warn_unconverged
from iresnet_jax.fixed_point import check_solver
from iresnet_jax.logdet import Estimator, Exact, SampleKeys
from iresnet_jax.operators import STATIC
from iresnet_jax.priors import DiagonalGaussian
from iresnet_jax.probes import block_keys
from iresnet_jax.rounding import gamma, norm_above, unit_roundoff
from iresnet_jax.solvers import FixedPointIteration, Solver
from iresnet_jax.types import AnyArray, Batch, PerSample, Shape

Latents = tuple[Array, ...]
Tree = TypeVar("Tree")

#: Of each datum, [batch], or of one, a scalar.
PerDatum = Float[Array, "*batch"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Flow:
    """An invertible network between data and latents, with priors on the latents.

    The network is a row of levels. After each level but the last, half of the channels (rounded
    down) leave and become a latent of their own: the paper's multi-scale architecture. A network
    that nothing leaves has one level.

    Methods take a batch [batch, *event_shape], or one example [*event_shape].

    Attributes:
      levels: bijections, first to last.
      event_shape: shape of one datum, without batch axis.
      priors: one for each latent, or () where only the map is of interest.
    """

    levels: tuple[Bijection, ...]
    event_shape: Shape = dataclasses.field(metadata=STATIC)
    priors: tuple[DiagonalGaussian, ...] = ()

    @property
    def dim(self) -> int:
        """Dimensions of one datum."""
        return math.prod(self.event_shape)

    def forward(self, x: AnyArray) -> Latents:
        """Map data to latents, a tuple in the order in which they leave.

        Args:
          x: floating point data [batch, *event_shape] or [*event_shape]; in [0, 1] where the
            network begins with :class:`~iresnet_jax.transforms.Center` or
            :class:`~iresnet_jax.transforms.Logit`.

        Raises:
          ValueError, TypeError: for data of another shape, type or range, or not finite.
        """
        batch, single = self._checked(x)
        return _first_of(self.forward_unchecked(batch), single)

    def forward_unchecked(self, x: Float[AnyArray, "batch ..."]) -> Latents:
        """Map a batch to latents, whatever its values are."""
        latents: Latents = ()
        rest = at_least_default_precision(x)
        for i, level in enumerate(self.levels):
            leaving, rest = self._split(level.forward(rest), i)
            latents += leaving
        return (*latents, rest)

    def forward_and_log_det(
        self, x: AnyArray, estimator: Estimator = Exact(), *, key: SampleKeys | None = None
    ) -> tuple[Latents, PerDatum]:
        """Map data to latents, with log|det ∂z/∂x| of each sample in nats, [batch].

        Args:
          x: as of :meth:`forward`.
          estimator: of the log-determinants of the blocks.
          key: one key, or one per sample; may be None for an estimator that draws none.

        Raises:
          ValueError, TypeError: as :meth:`forward`; for a network that pads channels.
        """
        _check_estimator(estimator)
        batch, single = self._checked(x)
        latents: Latents = ()
        rest = at_least_default_precision(batch)
        log_det = jnp.zeros(rest.shape[0], rest.dtype)
        counts = [level.num_branches for level in self.levels]
        keys = block_keys(key, sum(counts), rest.shape[0])
        pairs = zip(self.levels, shares(keys, counts), strict=True)
        for i, (level, own) in enumerate(pairs):
            rest, term = level.forward_and_log_det(rest, estimator, own)
            log_det = log_det + term
            leaving, rest = self._split(rest, i)
            latents += leaving
        return _first_of(((*latents, rest), log_det), single)

    def inverse(
        self, latents: Latents, solver: Solver = FixedPointIteration()
    ) -> tuple[Float[Array, "..."], FixedPointInfo]:
        """Map latents to data, each block inverted by itself, last to first.

        Outside of ``jit`` a sample that did not converge causes an
        :class:`~iresnet_jax.convergence.UnconvergedWarning`; under ``jit``, look at the report, or
        call its ``check()``.

        Args:
          latents: as returned by :meth:`forward`, of a batch or of one example.
          solver: of the blocks' fixed-point equations; its ``error_tolerance`` is for each block,
            and needs :meth:`with_bounds`.

        Returns:
          x, and a FixedPointInfo whose fields have shape [solves, batch], in forward order; the
          batch of one example is 1.

        Raises:
          ValueError: for latents of other shapes, or a tolerance that rounding keeps out of reach.
        """
        x, report = self._inverted(latents, solver)
        warn_unconverged(report, self.solve_names())
        return x, report

    def _inverted(
        self, latents: Latents, solver: Solver
    ) -> tuple[Float[Array, "..."], FixedPointInfo]:
        check_solver(solver)
        latents, single = self._batched_latents(latents)
        remaining, x = list(latents[:-1]), latents[-1]
        infos: list[FixedPointInfo] = []
        for i, level in reversed(list(enumerate(self.levels))):
            if i < len(self.levels) - 1:
                x = jnp.concatenate([remaining.pop(), x], axis=-1)
            x, info = level.inverse(x, solver)
            infos = infos if info is None else [info, *infos]
        report = joined(infos) or _no_solves(x.shape[0])
        if solver.error_tolerance is not None:
            refuse_out_of_reach(report, solver.error_tolerance, self.solve_names())
        return (x[0] if single else x), report

    def log_prob(
        self, x: AnyArray, estimator: Estimator = Exact(), *, key: SampleKeys | None = None
    ) -> PerDatum:
        """Return the log density of each datum in nats, [batch]: log p(z) + log|det ∂z/∂x|.

        Args, raises: as of :meth:`forward_and_log_det`. One example gives a scalar.
        """
        latents, log_det = self.forward_and_log_det(x, estimator, key=key)
        return self.prior_log_prob(latents) + log_det

    def prior_log_prob(self, latents: Latents) -> PerDatum:
        """Return the log density of the latents under their priors, in nats, [batch]."""
        self._check_priors()
        parts = zip(self.priors, latents, strict=True)
        return sum((prior.log_prob(z) for prior, z in parts), start=jnp.zeros(()))

    def sample(
        self,
        key: PRNGKeyArray,
        num_samples: int,
        *,
        temperature: float = 1.0,
        solver: Solver = FixedPointIteration(),
    ) -> tuple[Float[Array, "batch ..."], FixedPointInfo]:
        """Draw data from the model: latents from the priors, then inverted as :meth:`inverse` does.

        ``temperature`` ≥ 0 scales the priors' standard deviations; ``key`` is one, typed or legacy.
        """
        check_at_least_one("num_samples", num_samples)
        self._check_priors()
        if (key := typed_key(key)).ndim:
            raise ValueError(f"Sampling takes one key; got {key.shape}.")
        keys = jax.random.split(key, len(self.priors))
        draws = zip(self.priors, keys, strict=True)
        latents = tuple(prior.sample(k, num_samples, temperature) for prior, k in draws)
        x, report = self._inverted(latents, solver)
        warn_unconverged(report, self.solve_names())
        return x, report

    def certify(self) -> Certificate:
        """Certify the network, whose weights must be concrete; see :func:`iresnet_jax.certify`."""
        steps = enumerate(zip(self.levels, self.level_shapes(), strict=True))
        *parts, whole = [level.certify(f"level {i}", shape) for i, (level, shape) in steps]
        for part in reversed(parts):
            whole = part.then(whole.beside_identity())
        late = [i for i, level in enumerate(self.levels) if i and level.takes_unit_interval]
        return whole.with_problems(f"level {i} {MISPLACED}" for i in late)

    def with_bounds(self, certificate: Certificate | None = None) -> "Flow":
        """Attach every branch's rigorous bounds: inverses then report their error bound.

        They are of these weights. Attach them to the network that is evaluated, not to one that is
        still trained.

        Args:
          certificate: of this very network; made anew by default.

        Raises:
          ValueError: for a certificate of other weights, where their values can be seen.
        """
        certificate = self.certify() if certificate is None else certificate
        count = sum(level.num_branches for level in self.levels)
        bounds = checked_bounds(certificate, count)
        return dataclasses.replace(self, levels=tuple(x.with_bounds(bounds) for x in self.levels))

    def inverse_error(self, info: FixedPointInfo, latents: Latents | None = None) -> Error:
        """Bound how far an inverse that ended so can be from the exact preimage, at the data.

        Of the latents, what was inverted, only the norms are used: where a level ends in something
        that is no block, such as ActNorm, whose rounding grows with them.
        """
        infos = shares(info, [level.num_solves for level in self.levels])
        norms = self._norms(latents, info)
        error = Error(jnp.zeros_like(norms[-1]), jnp.zeros_like(norms[-1]))
        steps = list(zip(self.levels, infos, self.level_shapes(), norms, strict=True))
        for level, own, shape, norm in reversed(steps):
            joined = (error.norm + norm) * (1.0 + 2.0 * gamma(1, unit_roundoff(norm.dtype)))
            error = level.inverse_error(error._replace(norm=joined), own, shape)
        return error

    def _norms(self, latents: Latents | None, info: FixedPointInfo) -> list[PerSample]:
        """The latents' norms, rounded up; infinite where they are not given."""
        if latents is None:
            unknown = jnp.full(info.norm.shape[1:], jnp.inf, info.norm.dtype)
            return [unknown] * len(self.levels)
        return [norm_above(latent) for latent in self._batched_latents(latents)[0]]

    @property
    def contracts(self) -> bool:
        """Whether every branch has an attached bound below 1; on the host."""
        return all(level.contracts for level in self.levels)

    def blocks(self) -> Iterator[Bijection]:
        """Go through the blocks, unstacked, first to last."""
        return itertools.chain.from_iterable(level.blocks() for level in self.levels)

    def solve_names(self) -> list[str]:
        """Name every solve of the inverse, such as "scale 0, block 1", in forward order."""
        pairs = enumerate(self.levels)
        return [name for i, level in pairs for name in level.solve_names(f"level {i}")]

    def latent_shapes(self) -> tuple[Shape, ...]:
        """Return the shape of each latent, without batch axis, in the order in which they leave."""
        shapes = self.level_shapes()
        out = [level.out_shape(s) for level, s in zip(self.levels, shapes, strict=True)]
        return (*((*shape[:-1], shape[-1] // 2) for shape in out[:-1]), out[-1])

    def level_shapes(self) -> list[Shape]:
        """Return the shape of every level's input, without batch axis."""
        shapes = [self.event_shape]
        for level in self.levels[:-1]:
            shape = level.out_shape(shapes[-1])
            shapes.append((*shape[:-1], shape[-1] - shape[-1] // 2))
        return shapes

    def _split(self, x: Batch, index: int) -> tuple[Latents, Batch]:
        """What leaves after level ``index``, and what goes on."""
        if index == len(self.levels) - 1:
            return (), x
        half = x.shape[-1] // 2
        return (x[..., :half],), x[..., half:]

    def _checked(self, x: AnyArray) -> tuple[AnyArray, bool]:
        """Data as a batch, and whether it was a single example."""
        single = getattr(x, "shape", None) == self.event_shape
        x = x[None] if single else x
        check_shape(x, self.event_shape)
        check_domain(x, unit_interval=self.levels[0].takes_unit_interval)
        return x, single

    def _batched_latents(self, latents: Latents) -> tuple[Latents, bool]:
        shapes = self.latent_shapes()
        single = isinstance(latents, tuple | list) and shapes == tuple(
            getattr(latent, "shape", None) for latent in latents
        )
        latents = tuple(latent[None] for latent in latents) if single else latents
        check_latents(latents, shapes)
        return tuple(at_least_default_precision(latent) for latent in latents), single

    def _check_priors(self) -> None:
        if not self.priors:
            raise ValueError("This flow has no prior: it maps, but has no density to evaluate.")
        shapes = tuple(tuple(prior.mean.shape) for prior in self.priors)
        if shapes != self.latent_shapes():
            raise ValueError(
                f"The priors are over shapes {shapes}; the latents have {self.latent_shapes()}."
            )


def _first_of(tree: Tree, single: bool) -> Tree:
    """Without the batch axis, where there was none."""
    if not single:
        return tree
    first: Tree = jax.tree.map(lambda leaf: leaf[0], tree)
    return first


def _no_solves(batch: int) -> FixedPointInfo:
    floats = jnp.zeros((0, batch))
    return FixedPointInfo(floats.astype(int), floats, floats > 0, floats, floats, floats)


def _check_estimator(estimator: Estimator) -> None:
    if not callable(estimator):
        raise TypeError(
            "estimator must be an Estimator, such as Exact() or TruncatedSeries(10); got "
            f"{estimator!r}."
        )
