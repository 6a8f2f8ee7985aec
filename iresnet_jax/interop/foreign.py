"""What the adapters share: bijections of others, and ours without reports."""

import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from iresnet_jax.bijections import Bijection, Error, Mapped
from iresnet_jax.certificates import Certificate
from iresnet_jax.convergence import FixedPointInfo
from iresnet_jax.logdet import Estimator
from iresnet_jax.probes import block_keys
from iresnet_jax.solvers import Solver
from iresnet_jax.transforms import Transform
from iresnet_jax.types import Batch, Shape


class Foreign(Transform):
    """A bijection of another package, invertible by that package's word.

    A network that holds one is not certified: no bound on its slopes is known, and so an inverse
    through it has no bound on its error.
    """

    @property
    def origin(self) -> str:
        """Whose it is, such as "flowjax's Coupling"."""
        raise NotImplementedError

    def certify(self, name: str, shape: Shape) -> Certificate:
        return Certificate().with_problems([f"{self.origin} states no Lipschitz bound"])

    def inverse_error(self, error: Error, info: FixedPointInfo | None, shape: Shape) -> Error:
        unknown = jnp.full_like(error.bound, jnp.inf)
        return Error(unknown, unknown)


def mapped(
    bijection: Bijection, x: Batch, estimator: Estimator, key: PRNGKeyArray | None
) -> Mapped:
    """Map a batch, with log|det ∂y/∂x| in nats, every row by the same probes."""
    count = x.shape[0]
    rows = None if key is None else jnp.broadcast_to(key, (count,))
    keys = block_keys(rows, bijection.num_branches, count)
    return bijection.forward_and_log_det(x, estimator, keys)


def inverted(bijection: Bijection, y: Batch, solver: Solver) -> Batch:
    """Invert a batch; rows that missed the solver's tolerance are NaN, since no report is kept."""
    x, info = bijection.inverse(y, solver)
    return x if info is None else nan_unless_converged(x, info)


def nan_unless_converged(x: Batch, info: FixedPointInfo) -> Batch:
    """Replace the rows whose inverse missed its tolerance by NaN: under ``jit`` nothing warns."""
    converged = jnp.all(info.converged, axis=0).reshape(-1, *(1,) * (x.ndim - 1))
    return jnp.where(converged, x, jnp.nan)
