"""The blocks of trained networks on data so small that Jacobians can be written out."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from iresnet_jax import Affine, ConvOperator, Residual, Sequential, conv_operator

_CROP = 8


class Site(NamedTuple):
    """A block, and what it sees.

    Attributes:
      name: its place.
      block: acts on crops; its branch is in float64.
      inputs: [n, ...] of the branch, float64, after ActNorm.
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
    """Find the blocks of a trained flow's first scale, on points, or on 8×8 crops of images.

    A convolution acts on images of any size, so the trained kernels act on crops as well; their
    zero padding then begins at the crop's edge. A crop's operator is a part of the image's, so its
    norm is no larger.
    """
    with jax.enable_x64(True):
        flow = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), flow)
        h = flow.to_network(jnp.asarray(x, jnp.float64))[0]
        scale, is_image = flow.scales[0], h.ndim == 4
        h = scale.enter(_crop(h) if is_image else h)
        sites: list[Site] = []
        for stack in scale.stacks:
            for block in stack.unstacked():
                block = _on_images_of(block, h.shape[1:3]) if is_image else block
                seen = h if block.actnorm is None else block.actnorm.forward_and_log_det(h)[0]
                branch: Any = block.branch
                name, bound = f"block {len(sites)}", branch.lipschitz_bound()
                sites.append(Site(name, block, np.asarray(seen), bound))
                h = block.forward(h)
        return sites


def strongest(flow: Any, x: np.ndarray) -> Site:
    """The block of the first scale with the largest L."""
    return max(first_scale_sites(flow, x), key=lambda site: site.lipschitz)


def jacobians(site: Site) -> np.ndarray:
    """Write out the Jacobian of the branch at every input, [n, dim, dim], float64."""

    def flat(sample):
        return site.block.branch(sample.reshape(1, *site.inputs.shape[1:])).reshape(-1)

    with jax.enable_x64(True):
        inputs = jnp.asarray(site.inputs).reshape(-1, site.dim)
        return np.asarray(jax.jit(jax.vmap(jax.jacfwd(flat)))(inputs))


def largest_norm(jacobian: np.ndarray) -> float:
    """The largest ‖J‖₂ of Jacobians [n, dim, dim]: what L is at these inputs."""
    return float(np.linalg.norm(jacobian, 2, axis=(1, 2)).max())


def _crop(images: jax.Array) -> jax.Array:
    top, left = (images.shape[1] - _CROP) // 2, (images.shape[2] - _CROP) // 2
    return images[:, top : top + _CROP, left : left + _CROP]


def _on_images_of(block: Any, image_shape: tuple[int, ...]) -> Residual:
    stages = [
        dataclasses.replace(stage, operator=conv_operator(stage.operator.kernel, image_shape))
        if isinstance(stage, Affine) and isinstance(stage.operator, ConvOperator)
        else stage
        for stage in block.branch.stages
    ]
    return dataclasses.replace(block, branch=Sequential(tuple(stages)))
