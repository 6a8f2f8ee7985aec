"""Matrices made orthonormal by Björck's iteration (Björck & Bowie 1971; Anil et al. 2019).

arXiv 1811.05381.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from iresnet_jax.bounds import gram_upper_bound
from iresnet_jax.operators import DenseOperator


def orthonormalized(kernel: Float[Array, "in out"], num_steps: int = 20) -> Float[Array, "in out"]:
    """Compute W ← W(3I − WᵀW)/2, ``num_steps`` times, from W/b on, b ≥ ‖W‖₂.

    The rows or the columns, whichever are fewer, become orthonormal. Each singular value goes
    σ ← σ(3 − σ²)/2, from (0, 1] to 1: it grows by a factor of nearly 3/2 while small. So ‖W‖₂ ≤ 1,
    up to rounding, however many steps there are. Differentiable.

    Args:
      kernel: W; b is :func:`~iresnet_jax.bounds.gram_upper_bound`.
      num_steps: ≥ 0.

    Returns:
      In float32 at least; zero for a kernel of zeros, NaN for one that is not finite.

    Raises:
      ValueError: if ``num_steps`` is negative.
    """
    if num_steps < 0:
        raise ValueError(f"num_steps of Björck's iteration must be ≥ 0; got {num_steps}.")
    kernel = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
    kernel = kernel / gram_upper_bound(DenseOperator(kernel))
    tall = kernel if kernel.shape[0] >= kernel.shape[1] else kernel.T
    identity = 3.0 * jnp.eye(tall.shape[1], dtype=tall.dtype)
    with jax.default_matmul_precision("highest"):
        for _ in range(num_steps):
            tall = 0.5 * (tall @ (identity - tall.T @ tall))
    return tall if kernel.shape[0] >= kernel.shape[1] else tall.T
