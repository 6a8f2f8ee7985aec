"""The golden records of the authors' PyTorch code, as this library's pytrees.

A record is one ``.npz``; the README beside it describes its keys. Images and feature maps go from
NCHW to NHWC, kernels from OIHW to HWIO, flattened vectors to arrays of the operator's shape.
"""

import dataclasses
import itertools
import math
import os
from functools import cached_property
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from iresnet_jax import (
    Activation,
    ActNorm,
    Affine,
    Chain,
    DiagonalGaussian,
    Flow,
    Pad,
    Residual,
    Sequential,
    SingularVectors,
    Squeeze,
    Stack,
    conv_operator,
    sigma_estimate,
    spectral_normalize,
)

COEFF = 0.9
NUM_TERMS = 5
VARIABLE = "IRESNET_JAX_GOLDEN"


@dataclasses.dataclass(frozen=True)
class Architecture:
    depths: tuple[int, ...]
    features: tuple[int, ...]
    squeeze_first: bool = False
    factor_out: bool = False
    padding: int = 0


ARCHITECTURES = {
    "density_single": Architecture((2, 2), (16, 24)),
    "density_multiscale": Architecture((2, 2), (16, 24), squeeze_first=True, factor_out=True),
    "classifier_injective": Architecture((2, 2, 2), (8, 16, 24), padding=5),
}


def golden_dir() -> Path | None:
    """Where the records are: $IRESNET_JAX_GOLDEN, or shared/data/golden beside the checkout."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data" / "golden"
    folder = Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else beside
    return folder if folder.is_dir() else None


def channels_last(x: np.ndarray) -> jax.Array:
    return jnp.asarray(np.moveaxis(x, 1, -1))


@jax.jit
def _normalized(operator, vectors):
    return spectral_normalize(operator, sigma_estimate(operator, vectors), COEFF)


@dataclasses.dataclass(frozen=True)
class Layer:
    """One convolution of one block, as the record has it."""

    name: str
    kernel: jax.Array
    bias: jax.Array
    vectors: SingularVectors
    sigma: float
    kernel_normalized: jax.Array
    power_iteration_side: int
    """Side of the image on which the authors' power iteration ran (larger than the network's own in
    blocks with stride 2)."""

    @property
    def measured_operator(self):
        """The raw convolution on the image whose norm the authors estimated."""
        return conv_operator(self.kernel, (self.power_iteration_side,) * 2)

    def normalized_here(self):
        """The kernel after this library's normalisation, with σ from the recorded vectors."""
        normalized = _normalized(self.measured_operator, self.vectors)
        return normalized.kernel.reshape(self.kernel.shape)


@dataclasses.dataclass(frozen=True)
class Record:
    name: str

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        with np.load(golden_dir() / f"{self.name}.npz") as file:
            return dict(file)

    def __getitem__(self, key: str) -> np.ndarray:
        return self.arrays[key]

    def __contains__(self, key: str) -> bool:
        return key in self.arrays

    @property
    def architecture(self) -> Architecture:
        return ARCHITECTURES[self.name]

    @property
    def num_blocks(self) -> int:
        return sum(self.architecture.depths)

    def images(self, key: str) -> jax.Array:
        return channels_last(self[key])

    @property
    def latents(self) -> tuple[jax.Array, ...]:
        names = [name for name in ("z0", "z1") if name in self]
        return tuple(map(self.images, names))

    def layers(self, block: int) -> list[Layer]:
        return [self._layer(f"block{block}/conv{j}") for j in range(3)]

    def _layer(self, name: str) -> Layer:
        kernel = self[f"{name}/kernel"]
        out_channels, in_channels, *size = kernel.shape
        side = math.isqrt(self[f"{name}/v"].size // in_channels)

        def vector(key, channels):
            flat = self[f"{name}/{key}"]
            if size == [1, 1]:
                return jnp.asarray(flat)
            return jnp.asarray(np.moveaxis(flat.reshape(channels, side, side), 0, -1))

        return Layer(
            name=name,
            kernel=_hwio(kernel),
            bias=jnp.asarray(self[f"{name}/bias"]),
            vectors=SingularVectors(vector("u", out_channels), vector("v", in_channels)),
            sigma=float(self[f"{name}/sigma"]),
            kernel_normalized=_hwio(self[f"{name}/kernel_normalized"]),
            power_iteration_side=side,
        )

    def actnorm(self, block: int) -> ActNorm:
        prefix = f"block{block}/actnorm"
        return ActNorm(*(jnp.asarray(self[f"{prefix}/{key}"]) for key in ("log_scale", "shift")))

    def block(self, index: int, *, recorded_kernels: bool = False) -> Chain:
        """The block, with kernels normalised here or (``recorded_kernels``) by the authors."""
        side = self[f"block{index}/branch_input"].shape[-1]
        stages: list[Activation | Affine] = []
        for layer in self.layers(index):
            kernel = layer.kernel_normalized if recorded_kernels else layer.normalized_here()
            operator = conv_operator(kernel, (side, side))
            stages += [Activation("elu"), Affine(operator, layer.bias)]
        if not self[f"block{index}/input_nonlinearity"]:
            stages = stages[1:]
        return Chain((self.actnorm(index), Residual(Sequential(tuple(stages)))))

    def flow(self, *, recorded_kernels: bool = False) -> Flow:
        """The whole network, each scale's equal blocks stacked."""
        blocks = [self.block(i, recorded_kernels=recorded_kernels) for i in range(self.num_blocks)]
        levels, architecture = [], self.architecture
        for i, depth in enumerate(architecture.depths):
            own, blocks = blocks[:depth], blocks[depth:]
            parts = [own[:1], own[1:]] if i == 0 else [own]  # the first block starts linearly
            squeeze = (Squeeze(),) if i > 0 or architecture.squeeze_first else ()
            levels.append((*squeeze, *(stack(part) for part in parts if part)))
        if not architecture.factor_out:
            padding = (Pad(architecture.padding),) if architecture.padding else ()
            levels = [(*padding, *itertools.chain.from_iterable(levels))]
        flow = Flow(tuple(map(Chain, levels)), self.images("x").shape[1:])
        return dataclasses.replace(flow, priors=self._priors(flow.latent_shapes()))

    def _priors(self, shapes) -> tuple[DiagonalGaussian, ...]:
        sizes = np.cumsum([math.prod(shape) for shape in shapes])[:-1]
        parts = [np.split(self[key], sizes) for key in ("prior_mu", "prior_logstd")]

        def event(flat, shape):
            height, width, channels = shape
            return jnp.asarray(np.moveaxis(flat.reshape(channels, height, width), 0, -1))

        return tuple(
            DiagonalGaussian(event(mean, shape), event(log_std, shape))
            for mean, log_std, shape in zip(*parts, shapes, strict=True)
        )


def stack(blocks: list[Chain]) -> Stack:
    return Stack(jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks), len(blocks))


def _hwio(kernel: np.ndarray) -> jax.Array:
    return jnp.asarray(kernel.transpose(2, 3, 1, 0))
