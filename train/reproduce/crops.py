"""The blocks of trained networks on data so small that Jacobians can be written out."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from iresnet_jax.branches import Sequential

from iresnet_jax import Affine, ConvOperator, Flow, ResidualBlock, conv_operator
from iresnet_jax.residual import Scale

CROP = 8


class Site(NamedTuple):
    """A block, and what it sees.

    Attributes:
      name: scale and place.
      block: acts on crops; its branch is in float64.
      inputs: [n, ...] of the branch, float64, after ActNorm.
      lipschitz: L ≥ Lip(g), on crops.
    """

    name: str
    block: ResidualBlock
    inputs: np.ndarray
    lipschitz: float

    @property
    def dim(self) -> int:
        """Dimensions of one input."""
        return math.prod(self.inputs.shape[1:])


def crop_images(images: np.ndarray) -> np.ndarray:
    """The central 8×8 pixels of images [n, height, width, channels]."""
    top, left = (images.shape[1] - CROP) // 2, (images.shape[2] - CROP) // 2
    return images[:, top : top + CROP, left : left + CROP]


def first_scale_sites(flow: Flow, x: np.ndarray) -> list[Site]:
    """The blocks of a flow's first scale, on points, or on 8×8 crops of images.

    A convolution acts on images of any size, so the trained kernels act on crops as well; their
    zero padding then begins at the crop's edge. A crop's operator is a part of the image's, so its
    norm is no larger.

    Args:
      flow: trained.
      x: [n, ...] data as the flow takes them.
    """
    with jax.enable_x64(True):
        flow = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), flow)
        x = x.astype(np.float64)
        h = flow.to_network(jnp.asarray(x))[0]
        scale: Scale = flow.scales[0]
        h = scale.enter(jnp.asarray(crop_images(np.asarray(h))) if h.ndim == 4 else h)
        sites: list[Site] = []
        for stack in scale.stacks:
            for block in stack.unstacked():
                block = _on_images_of(block, h.shape[1:3]) if h.ndim == 4 else block
                seen = h if block.actnorm is None else block.actnorm.forward_and_log_det(h)[0]
                name, lipschitz = f"block {len(sites)}", _branch(block).lipschitz_bound()
                sites.append(Site(name, block, np.asarray(seen), lipschitz))
                h = block.forward(h)
        return sites


def jacobians(site: Site) -> np.ndarray:
    """The Jacobian of the branch at every input, [n, dim, dim], float64."""
    dim = site.dim

    def flat(sample):
        return site.block.branch(sample.reshape(1, *site.inputs.shape[1:])).reshape(-1)

    with jax.enable_x64(True):
        inputs = jnp.asarray(site.inputs).reshape(-1, dim)
        return np.asarray(jax.jit(jax.vmap(jax.jacfwd(flat)))(inputs))


def _branch(block: ResidualBlock) -> Sequential:
    assert isinstance(block.branch, Sequential)
    return block.branch


def _on_images_of(block: ResidualBlock, image_shape: tuple[int, ...]) -> ResidualBlock:
    stages = []
    for stage in _branch(block).stages:
        if isinstance(stage, Affine) and isinstance(stage.operator, ConvOperator):
            operator = conv_operator(stage.operator.kernel, image_shape)
            stage = dataclasses.replace(stage, operator=operator)
        stages.append(stage)
    return dataclasses.replace(block, branch=Sequential(tuple(stages)))
