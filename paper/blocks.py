"""Blocks of trained networks, on data small enough for full Jacobians."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from iresnet_jax import (
    Chain,
    ConvOperator,
    Flow,
    Residual,
    Stack,
    conv_operator,
    stated_lipschitz,
)

_CROP = 8


class Site(NamedTuple):
    """A block, and its inputs.

    Attributes:
      name: its place.
      block: acts on crops, after ActNorm; its branch is in float64.
      inputs: of the branch, [n, ...], float64, after ActNorm.
      lipschitz: L ≥ Lip(g), on crops.
    """

    name: str
    block: Residual
    inputs: np.ndarray
    lipschitz: float

    @property
    def dim(self) -> int:
        """Dimensions of one input."""
        return math.prod(self.inputs.shape[1:])


def first_scale_sites(flow: Any, x: np.ndarray) -> list[Site]:
    """Return the blocks of a trained flow's first scale, on points, or on 8×8 crops of images.

    A convolution acts on images of any size, so the trained kernels also act on crops, with zero
    padding at the crop's edge. The operator on a crop is a part of the one on the image, so its
    norm is no larger.
    """
    with jax.enable_x64(True):
        flow = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), flow)
        h = _crop(jnp.asarray(x, jnp.float64)) if np.ndim(x) == 4 else jnp.asarray(x, jnp.float64)
        sites: list[Site] = []
        for link in _links_of_first_scale(flow):
            if not isinstance(link, Stack):
                h = link.forward(h)
                continue
            is_image = h.ndim == 4
            for block in link.unstacked():
                actnorm, residual = cast(Any, block).links
                residual = _on_images_of(residual, h.shape[1:3]) if is_image else residual
                seen = actnorm.forward(h)
                name, bound = f"block {len(sites)}", stated_lipschitz(residual.branch)
                sites.append(Site(name, residual, np.asarray(seen), bound))
                h = residual.forward(seen)
        return sites


def _links_of_first_scale(flow: Flow) -> Iterator[Any]:
    """Yield the links up to the first stack."""
    links = flow.levels[0].links if isinstance(flow.levels[0], Chain) else flow.levels
    for link in links:
        yield link
        if isinstance(link, Stack):
            return


def strongest(flow: Any, x: np.ndarray) -> Site:
    """Return the block of the first scale with the largest L."""
    return max(first_scale_sites(flow, x), key=lambda site: site.lipschitz)


def jacobians(site: Site) -> np.ndarray:
    """Compute the Jacobian of the branch at every input, [n, dim, dim], float64."""

    def flat(sample):
        return site.block.branch(sample.reshape(1, *site.inputs.shape[1:])).reshape(-1)

    with jax.enable_x64(True):
        inputs = jnp.asarray(site.inputs).reshape(-1, site.dim)
        return np.asarray(jax.jit(jax.vmap(jax.jacfwd(flat)))(inputs))


def largest_norm(jacobian: np.ndarray) -> float:
    """Return the largest ‖J‖₂ of Jacobians [n, dim, dim]: the best possible L at these inputs."""
    return float(np.linalg.norm(jacobian, 2, axis=(1, 2)).max())


def _crop(images: jax.Array) -> jax.Array:
    top, left = (images.shape[1] - _CROP) // 2, (images.shape[2] - _CROP) // 2
    return images[:, top : top + _CROP, left : left + _CROP]


def _on_images_of(block: Any, image_shape: tuple[int, ...]) -> Residual:
    def placed(part: Any) -> Any:
        is_convolution = isinstance(part, ConvOperator)
        return conv_operator(part.kernel, image_shape) if is_convolution else part

    branch = jax.tree.map(placed, block.branch, is_leaf=lambda p: isinstance(p, ConvOperator))
    return dataclasses.replace(block, branch=branch)
