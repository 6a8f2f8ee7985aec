"""Dequantisation by noise that is learned: a small conditional flow within each grey level."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray

from iresnet_jax.convolution import convolve
from iresnet_jax.dequantization import check_levels, within_level
from iresnet_jax.probes import per_sample_keys
from iresnet_jax.types import PerSample

_SAME = ((1, 1), (1, 1))
_LARGEST_LOG_SCALE = 2.0


class VariationalDequantization(nn.Module):
    """Noise u ~ q(u | k) within the grey levels k of an image (Ho et al. 2019, arXiv 1902.00275).

    log P(k) ≥ E_q[log p((k + u)/n) − log q(u | k)], where p is a density on the levels' scale. So
    the bound on the likelihood of the discrete image tightens as q approaches the flow's posterior.

    u = sigmoid(ε′), where affine couplings on a chequerboard, which see the image, map logistic ε
    to ε′. They begin as the identity: u is uniform, and the bound is that of
    :func:`~iresnet_jax.dequantize`. The density of q is exact whatever the weights, as that of a
    real u; what p sees is rounded to float32, so a q narrower than its spacing (n·2⁻²³ of a level
    at most) bounds nothing about a p that is as narrow.

    Attributes:
      num_levels: number of grey levels n, in [2, 2²⁴].
      features: channels of the convolutions, ≥ 1.
      couplings: number of couplings, ≥ 1; two see every pixel.
    """

    num_levels: int
    features: int = 32
    couplings: int = 4

    def __call__(
        self, levels: Int[Array, "batch height width channels"], key: PRNGKeyArray | Key[Array, "b"]
    ) -> tuple[Float[Array, "batch height width channels"], PerSample]:
        """Draw (k + u)/n, float32, and log q(u | k) of each image in nats, [batch].

        Args:
          levels: integers in [0, num_levels).
          key: one key, or one per image.

        Raises:
          TypeError, ValueError: for settings out of range, what are no images of grey levels, or
            another number of keys.
        """
        self._check(levels)
        keys = per_sample_keys(key, len(levels))
        noise = jax.vmap(lambda k: jax.random.logistic(k, levels.shape[1:]))(keys)
        u, log_q = self.place(levels, noise)
        return within_level(levels, u, self.num_levels), log_q

    @nn.compact
    def place(self, levels: Array, noise: Array) -> tuple[Array, PerSample]:
        """Map logistic noise ε, [batch, ...], to u in [0, 1]; with log q(u | k), [batch]."""
        log_q = _log_slope(noise)
        context = self._context(levels)
        for i in range(self.couplings):
            noise, log_scale = self._coupled(i, noise, context)
            log_q -= log_scale
        log_q -= _log_slope(noise)
        return jax.nn.sigmoid(noise), jnp.sum(log_q, axis=(1, 2, 3))

    def _check(self, levels: Array) -> None:
        for name in ("features", "couplings"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} of a dequantisation must be ≥ 1; got {value}.")
        if jnp.ndim(levels) != 4:
            raise ValueError(
                f"Images are [batch, height, width, channels]; got shape {jnp.shape(levels)}."
            )
        check_levels(levels, self.num_levels)

    def _context(self, levels: Array) -> Array:
        image = jnp.asarray(levels, jnp.float32) / self.num_levels - 0.5
        hidden = jax.nn.silu(self._convolution("context_0", image, self.features))
        return jax.nn.silu(self._convolution("context_1", hidden, self.features))

    def _coupled(self, index: int, noise: Array, context: Array) -> tuple[Array, Array]:
        """ε with every other pixel scaled and shifted, and the log of the scale, per entry."""
        kept = _chequerboard(noise.shape[1:3], index)
        seen = jnp.concatenate([kept * (jax.nn.sigmoid(noise) - 0.5), context], axis=-1)
        hidden = jax.nn.silu(self._convolution(f"coupling_{index}_in", seen, self.features))
        zeros = nn.initializers.zeros
        width = 2 * noise.shape[-1]
        out = self._convolution(f"coupling_{index}_out", hidden, width, zeros)
        shift, raw = jnp.split((1.0 - kept) * out, 2, axis=-1)
        log_scale = _LARGEST_LOG_SCALE * jnp.tanh(raw / _LARGEST_LOG_SCALE)
        return noise * jnp.exp(log_scale) + shift, log_scale

    def _convolution(
        self, name: str, x: Array, width: int, init: nn.initializers.Initializer | None = None
    ) -> Array:
        init = init or nn.initializers.lecun_normal()
        kernel = self.param(f"{name}_kernel", init, (3, 3, x.shape[-1], width))
        bias = self.param(f"{name}_bias", nn.initializers.zeros, (width,))
        out: Array = convolve(x, kernel, strides=(1, 1), padding=_SAME) + bias
        return out


def _chequerboard(size: tuple[int, ...], index: int) -> np.ndarray:
    """Ones on the black fields, on the white ones where ``index`` is odd, [height, width, 1]."""
    rows, columns = np.indices(size)
    return np.asarray((rows + columns + index) % 2 == 0, np.float32)[..., None]


def _log_slope(z: Array) -> Array:
    """log of the sigmoid's slope, the logistic log density."""
    return jax.nn.log_sigmoid(z) + jax.nn.log_sigmoid(-z)
