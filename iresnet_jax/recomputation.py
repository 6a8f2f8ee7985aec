"""What a block keeps between its forward and its backward pass; all else is computed again."""

from collections.abc import Callable

import jax
from jax import lax

from iresnet_jax.convolution import convolution_p
from iresnet_jax.probes import NOISE
from iresnet_jax.series import NEUMANN_VECTOR

_PRODUCTS = (lax.dot_general_p, lax.conv_general_dilated_p, convolution_p)
_named = jax.checkpoint_policies.save_only_these_names(NEUMANN_VECTOR, NOISE)


def kept_for_backward(remat: bool) -> Callable[..., bool]:
    """A policy for ``jax.checkpoint``.

    Args:
      remat: keep the series' Neumann vector and the random bits alone, beside the block's input;
        otherwise also the results of products and convolutions, so that only elementwise work is
        done again.
    """
    return _named if remat else _products_too


def _products_too(primitive, *args, **params) -> bool:
    return primitive in _PRODUCTS or _named(primitive, *args, **params)
