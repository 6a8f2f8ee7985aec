"""How few evaluations could an inverse take?

From the Krylov space of (I + J) e = r, with J the branch's Jacobian at the solution and r the first
residual, GMRES takes the element of smallest residual: where the branch is linear, no method that
combines k evaluations does better (Saad, Schultz 1986; on Anderson's acceleration: Walker, Ni
2011). Branches are only nearly linear close to the solution, so for them the count is a yardstick,
not a bound. Double precision.
"""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from iresnet_jax import Residual
from iresnet_jax.iterations import plain

_EXACT = 1e-12
_MOST = 100


def optimal_evaluations(
    block: Residual, y: jax.Array, tolerance: float, max_steps: int
) -> np.ndarray:
    """Evaluations until the residual of the best combination is within the tolerance, [batch]."""
    with jax.enable_x64(True):
        wide = jax.tree.map(_double, block)
        images, residual = _krylov(wide.branch, _double(y), max_steps)
        return np.array([_count(*pair, tolerance) for pair in zip(images, residual, strict=True)])


def _krylov(branch: Callable, y: jax.Array, max_steps: int) -> tuple[np.ndarray, np.ndarray]:
    """(I + J)q for an orthonormal basis q [batch, products, dim], and the residual [batch, dim]."""

    def exact(y):
        def rule(_, residual):
            return residual <= _EXACT, ~jnp.isfinite(residual)

        return plain(lambda x: y - branch(x), y, rule, max_steps).x

    x = jax.jit(exact)(y)
    product = jax.jit(lambda v: v + jax.jvp(branch, (x,), (v,))[1])
    residual = np.asarray(-jax.jit(branch)(y)).reshape(len(y), -1)
    images: list[np.ndarray] = []
    for q in _directions(residual, images):
        images.append(np.asarray(product(q.reshape(y.shape))).reshape(residual.shape))
    return np.stack(images, axis=1), residual


def _directions(residual: np.ndarray, images: list[np.ndarray]) -> Iterator[np.ndarray]:
    """The basis: the residual, then each product's new direction."""
    basis: list[np.ndarray] = []
    new = residual
    for _ in range(min(residual.shape[1], _MOST)):
        for _ in range(2):  # once more, for what rounding left
            for q in basis:
                new = new - q * np.sum(q * new, axis=1, keepdims=True)
        basis.append(new / np.maximum(np.linalg.norm(new, axis=1, keepdims=True), 1e-300))
        yield basis[-1]
        new = images[-1]


def _count(images: np.ndarray, residual: np.ndarray, tolerance: float) -> int:
    """One evaluation for the residual, one for each product."""
    for k in range(len(images) + 1):
        found = np.linalg.lstsq(images[:k].T, residual, rcond=None)[0] if k else np.zeros(0)
        if np.linalg.norm(residual - found @ images[:k]) <= tolerance:
            return k + 1
    raise RuntimeError(f"No combination of {len(images)} products reaches {tolerance:g}.")


def _double(leaf):
    leaf = jnp.asarray(leaf)
    return leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
