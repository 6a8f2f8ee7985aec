"""Estimators of log|det(I + J)| for y = x + g(x), J the Jacobian of g (Behrmann et al. 2019, §4.1).

An estimator is a plain function ``(g, x, key) -> (g(x), log_det)`` with ``x`` of shape
[batch, ...] and ``log_det`` of shape [batch], in nats, made by :func:`exact`,
:func:`truncated_series` or :func:`~iresnet_jax.russian_roulette.russian_roulette`. ``g`` must treat
the samples of a batch independently. ``key`` is one key, or one key per sample: then a sample's
noise does not depend on the batch it is in.
"""

import math
import operator
from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

Branch = Callable[[jax.Array], jax.Array]
Estimator = Callable[[Branch, jax.Array, jax.Array | None], tuple[jax.Array, jax.Array]]
Probe = Literal["rademacher", "gaussian"]

#: Names in rematerialisation policies: what the series leaves, and the random bits of its signs.
#: Saving them spares a block's backward pass both.
NEUMANN_VECTOR, NOISE = "neumann_vector", "noise"


def exact() -> Estimator:
    """log|det(I + J)| by the full Jacobian: d Jacobian-vector products and a d×d determinant.

    Without bias or noise; meant for few dimensions. Differentiable to any order.
    """

    def estimate(branch: Branch, x: jax.Array, key: jax.Array | None = None):
        del key
        out, jvp = jax.linearize(branch, x)
        batch, dim = x.shape[0], math.prod(x.shape[1:])
        basis = jnp.eye(dim, dtype=x.dtype).reshape(dim, 1, *x.shape[1:])
        basis = jnp.broadcast_to(basis, (dim, *x.shape))
        # A few columns one by one keep the branch's products in their plain form, which is faster.
        columns = jnp.stack([jvp(e) for e in basis]) if dim <= 4 else jax.vmap(jvp)(basis)
        jacobian = columns.reshape(dim, batch, dim).transpose(1, 2, 0)
        return out, _log_abs_det(jnp.eye(dim, dtype=x.dtype)[None] + jacobian)

    return estimate


#: Up to this many dimensions :func:`exact` needs no decomposition of matrices.
DETERMINANTS_BY_FORMULA = 2


def _log_abs_det(matrices):
    """Of [batch, d, d]; up to the plane by its formula."""
    if matrices.shape[-1] > DETERMINANTS_BY_FORMULA:
        return jnp.linalg.slogdet(matrices)[1]
    if matrices.shape[-1] == 1:
        return jnp.log(jnp.abs(matrices[:, 0, 0]))
    (a, b), (c, d) = jnp.moveaxis(matrices, 0, -1)
    return jnp.log(jnp.abs(a * d - b * c))


def truncated_series(num_terms: int, num_probes: int = 1, probe: Probe = "rademacher") -> Estimator:
    """The first terms of the trace series, by Hutchinson's estimator (Algorithm 2).

    log|det(I + J)| ≈ 1/m Σ_i Σ_{k=1}^{n} (−1)^{k+1}/k · v_iᵀ Jᵏ v_i, with E[v vᵀ] = I; the
    bias is at most :func:`truncation_error_bound`.

    The gradient is the Neumann gradient (Chen et al. 2019, Theorem 2): with
    w = Σ_{k=0}^{n−1} (−1)ᵏ Jᵏ v held constant, that of vᵀ J w. Over the probes its mean is the
    gradient of the n-term trace series; its memory does not grow with n. Second derivatives of
    this estimator are not those of the series: use :func:`exact` for them.

    Args:
      num_terms: n ≥ 1.
      num_probes: m ≥ 1, averaged.
      probe: distribution of v, "rademacher" (smaller variance) or "gaussian" (the paper's code).

    Raises:
      ValueError: for a number below 1 or an unknown probe.
    """
    check_series(num_terms, num_probes, probe)

    def estimate(branch: Branch, x: jax.Array, key: jax.Array | None = None):
        if key is None:
            raise ValueError("truncated_series draws probes: pass a key, or one key per sample.")
        keys = per_sample_keys(key, x.shape[0])
        log_det = jnp.zeros(x.shape[0], x.dtype)
        for draw in draw_probes(probe, keys, x, num_probes):
            v = draw()
            out, term = series_along_probe(branch, x, v, num_terms)
            log_det = log_det + term / num_probes
        return out, log_det

    return estimate


def per_sample_keys(key: jax.Array, batch: int) -> jax.Array:
    """One key for each sample: those given, or one key folded with the samples' indices.

    Args:
      key: one key, typed or legacy, or typed keys of shape [batch].
      batch: number of samples.

    Raises:
      ValueError: for another number of keys.
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if key.ndim == 0:
        return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
    if key.shape != (batch,):
        raise ValueError(f"Need one key, or one for each of {batch} samples; got {key.shape}.")
    return key


def keys_of_blocks(key: jax.Array, depth: int, batch: int) -> jax.Array:
    """A key for each block and sample, [depth, batch], made at once: a step compiles faster.

    Args:
      key: as of :func:`per_sample_keys`.
      depth: number of blocks.
      batch: number of samples.
    """
    of_samples = jax.vmap(jax.random.fold_in, (0, None))
    of_blocks = jax.vmap(of_samples, (None, 0))
    return of_blocks(per_sample_keys(key, batch), jnp.arange(depth))


def series_along_probe(
    branch: Branch, x: jax.Array, v: jax.Array, num_terms: int
) -> tuple[jax.Array, jax.Array]:
    """g(x) and Σ_{k=1}^{n} (−1)^{k+1}/k · vᵀJᵏv for given probes, with the Neumann gradient.

    Args:
      branch: g, on batches.
      x: [batch, ...].
      v: probes of the shape of x; constants.
      num_terms: n ≥ 1.

    Returns:
      g(x), and the n-term sum per sample, [batch], in nats.
    """
    v = lax.stop_gradient(v)
    out, jvp = jax.linearize(branch, x)
    value, total, w = _series_and_neumann_vector(lax.stop_gradient(jvp), v, num_terms)
    surrogate = sample_dot(v, jvp(w))  # vᵀJ Σ (−1)ᵏJᵏv: all n terms, not divided by k
    last = lax.stop_gradient(surrogate) - total
    return out, with_gradient_of(surrogate, value + last / num_terms)


def with_gradient_of(surrogate: jax.Array, value: jax.Array) -> jax.Array:
    """``value``, a constant, with the gradient of ``surrogate``."""
    return value + surrogate - lax.stop_gradient(surrogate)


def truncation_error_bound(lipschitz: float | jax.Array, dim: int, num_terms: int) -> jax.Array:
    """|log|det(I+J)| − E[n-term series]| ≤ d · L^{n+1} / ((n+1)(1−L)), in nats.

    From |tr Jᵏ| ≤ d·Lᵏ; within a factor 1/(1−L) of the paper's −d(log(1−L) + Σ Lᵏ/k), from which it
    differs in not cancelling.

    Args:
      lipschitz: an upper bound L on Lip(g).
      dim: d, dimensions of one sample.
      num_terms: n ≥ 1.

    Returns:
      The bound; infinite for L ≥ 1.

    Raises:
      TypeError: if ``num_terms`` is not an integer.
      ValueError: if it is below 1.
    """
    _check_at_least_one("num_terms", num_terms)
    lip = _rounded_up(lipschitz)
    gap = jnp.where(lip < 1, 1.0 - lip, 1.0)
    n = num_terms + 1
    eps, tiny = jnp.finfo(lip.dtype).eps, jnp.finfo(lip.dtype).tiny
    positive = (lip > 0) & (lip < 1)
    exponent = n * jnp.log(jnp.where(positive, lip, 0.5))
    power = jnp.exp(exponent) * (1.0 + 8.0 * eps * (1.0 - exponent))
    power = jnp.where(positive, jnp.maximum(power, tiny), 0.0)  # outward, never below what rounds
    bound = dim * power / (n * gap) * (1.0 + 8.0 * eps)
    bound = jnp.where(positive, jnp.maximum(bound, tiny), bound)
    return jnp.where(lip < 1, bound, jnp.where(jnp.isnan(lip), jnp.nan, jnp.inf))


def log_det_bounds(lipschitz: float | jax.Array, dim: int) -> tuple[jax.Array, jax.Array]:
    """d·log(1−L) ≤ log|det(I+J)| ≤ d·log(1+L), in nats (Lemma 2); −∞ below for L ≥ 1.

    Args:
      lipschitz: an upper bound L on Lip(g).
      dim: d, dimensions of one sample.

    Returns:
      Lower and upper bound, rounded outward.
    """
    lip = _rounded_up(lipschitz)
    lower = jnp.where(lip < 1, jnp.log1p(-jnp.where(lip < 1, lip, 0.0)), -jnp.inf)
    outward = 1.0 + 8.0 * jnp.finfo(lip.dtype).eps
    return dim * lower * outward, dim * jnp.log1p(lip) * outward


def _rounded_up(lipschitz):
    """As a JAX float, above the given number: rounding to float32 must not lower it."""
    lip = jnp.asarray(lipschitz, float)
    up = jnp.nextafter(lip, jnp.full_like(lip, jnp.inf))
    return jnp.where(lip == 0, 0.0, up)


def _series_and_neumann_vector(jvp, v, num_terms):
    """Σ (−1)^{k+1}/k vᵀJᵏv and Σ (−1)^{k+1} vᵀJᵏv for k < n, and w = Σ (−1)ᵏJᵏv for k < n."""

    def add_term(carry, k):
        value, total, w, power = carry
        power = -jvp(power)
        term = -sample_dot(v, power)
        return (value + term / k, total + term, w + power, power), None

    zeros = jnp.zeros(v.shape[0], v.dtype)
    ks = jnp.arange(1, num_terms, dtype=v.dtype)
    (value, total, w, _), _ = lax.scan(add_term, (zeros, zeros, v, v), ks)
    return value, total, checkpoint_name(w, NEUMANN_VECTOR)


def draw_probes(
    probe: Probe, keys: jax.Array, x: jax.Array, num_probes: int
) -> list[Callable[[], jax.Array]]:
    """Functions that return probes of the shape and type of x, each sample's from its own key.

    Signs are kept as bits until they are asked for, and through a block's backward pass.
    """
    if probe == "gaussian":
        return [partial(_normal, keys, i, x.shape[1:], x.dtype) for i in range(num_probes)]
    size = (num_probes, -(-math.prod(x.shape[1:]) // 32))
    words = jax.vmap(lambda key: jax.random.bits(key, size, jnp.uint32))(keys)
    words = checkpoint_name(words, NOISE)
    signs = jax.vmap(partial(_signs, shape=x.shape[1:], dtype=x.dtype))
    return [partial(signs, words[:, i]) for i in range(num_probes)]


def _normal(keys, index, shape, dtype):
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, index)
    return jax.vmap(lambda key: jax.random.normal(key, shape, dtype))(keys)


def _signs(words, shape, dtype):
    """±1, one bit each: ``jax.random.rademacher`` spends 32, a visible part of a step."""
    size = math.prod(shape)
    bits = (words[:, None] >> jnp.arange(32, dtype=jnp.uint32)[None]) & 1
    return (2 * bits.ravel()[:size].astype(dtype) - 1).reshape(shape)


def sample_dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """⟨a, b⟩ of each sample, [batch]."""
    return jnp.sum(a * b, axis=tuple(range(1, a.ndim)))


def check_series(num_terms: int, num_probes: int, probe: Probe, *, name: str = "num_terms") -> None:
    """Refuse settings out of range; ``name`` is what the number of terms is called."""
    _check_at_least_one(name, num_terms)
    _check_at_least_one("num_probes", num_probes)
    if probe not in ("rademacher", "gaussian"):
        raise ValueError(f'probe must be "rademacher" or "gaussian"; got {probe!r}.')


def _check_at_least_one(name, value):
    try:
        operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer ≥ 1; got {value!r}.") from None
    if value < 1:
        raise ValueError(f"{name} must be ≥ 1; got {value}.")
