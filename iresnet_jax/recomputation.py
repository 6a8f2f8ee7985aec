"""What a block keeps between its forward and backward pass; the rest is recomputed."""

from collections.abc import Callable

import jax
from jax import lax
from jax.extend.core import Primitive

from iresnet_jax.convolution import convolution_p
from iresnet_jax.probes import NOISE
from iresnet_jax.series import NEUMANN_VECTOR

_PRODUCTS = (lax.dot_general_p, lax.conv_general_dilated_p, convolution_p)
_named = jax.checkpoint_policies.save_only_these_names(NEUMANN_VECTOR, NOISE)


def kept_for_backward(remat: bool) -> Callable[..., bool]:
    """Choose a policy for ``jax.checkpoint``.

    Args:
      remat: keep only the series' Neumann vector and the random bits, beside the block's input.
        Otherwise also keep the results of products and convolutions, so that only elementwise work
        is repeated.
    """
    return _named if remat else _products_too


def _products_too(primitive: Primitive, *args: object, **params: object) -> bool:
    return primitive in _PRODUCTS or _named(primitive, *args, **params)
