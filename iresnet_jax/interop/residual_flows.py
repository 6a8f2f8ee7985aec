"""State dicts of residual flows (Chen et al. 2019, arXiv:1906.02735) as pure flows.

They are of ``ResidualFlow`` of rtqichen/residual-flows, for images, and of its ``SequentialFlow``
of residual blocks, for vectors. No PyTorch is needed; see :mod:`iresnet_jax.interop.pytorch`.
"""

import dataclasses
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from iresnet_jax.actnorm import ActNorm
from iresnet_jax.bijections import Bijection, Chain
from iresnet_jax.bounds import shrink_factor
from iresnet_jax.flows import Flow
from iresnet_jax.interop.state_dicts import State, kernel_as_used, matrix_as_used, plain
from iresnet_jax.operators import DenseOperator, LinearOperator, conv_operator, with_kernel
from iresnet_jax.priors import DiagonalGaussian
from iresnet_jax.residual import Residual
from iresnet_jax.spectral import check_coeff
from iresnet_jax.stack import Stack
from iresnet_jax.stages import Activation, Affine, Sequential
from iresnet_jax.swish import LipSwish
from iresnet_jax.transforms import Copying, Logit, squeeze, unsqueeze
from iresnet_jax.types import Batch, Shape

_SCALE = re.compile(r"transforms\.(\d+)\.")
_BIAS = re.compile(r".*\.nnet\.\d+\.bias$")
_NEEDLESS = re.compile(
    r".*\.(geom_p|lamb|last_n_samples|last_firmom|last_secmom)$"  # of their estimator
    r"|.*\.nnet\.\d+\.(scale|spatial_dims|initialized|domain|codomain)$"  # of their constraint
)


def flow_from_residual_flows(
    state_dict: Mapping[str, Any],
    event_shape: Shape,
    coeff: float,
    *,
    activation: str = "elu",
    logit_alpha: float | None = None,
    max_norm: float | None = None,
) -> Flow:
    """Return their network as a flow, with a standard normal prior on every latent.

    Kernels are those that their network uses: W/max(1, σ/coeff), σ = uᵀWv of their vectors, as they
    are, whatever norms they are of. :func:`~iresnet_jax.certify` judges by the 2-norm: a branch
    that is a contraction in another norm alone (``--vnorms``, ``--learn-p``) may not be certified.
    ``max_norm`` then makes another network of it, which is.

    How many blocks there are is read off the names: where the last ones are missing, it is another
    network, which no one can tell.

    Latents are flat, [batch, channels·height·width], in their order, after dense blocks
    (``--fc-end``), else images [batch, height, width, channels].

    Args:
      state_dict: names, with or without "module." in front, to arrays on the host.
      event_shape: of what their model sees, in our order: (height, width, channels), after
        ``--squeeze-first`` and ``--padding``; or (dim,).
      coeff: of their training, in (0, 1).
      activation: where they have one without weights, by its name here; their "swish" has weights,
        and is read.
      logit_alpha: of their ``LogitTransform``, if the network begins with one: their state dicts do
        not tell.
      max_norm: None for their network itself. Else every layer of a larger norm is scaled to this
        one, by a rigorous bound.

    Raises:
      ValueError: naming the key, for one that is missing, unknown, of a wrong shape or not finite;
        for parts that are not read: batch normalisation, coupling blocks, ``--quadratic``,
        dropout, classifiers; for layers without singular vectors (∞- and 1-norms of weights).
      TypeError: for anything but a mapping of names to arrays.
    """
    check_coeff(coeff)
    check_coeff(max_norm)
    reader = _Reader(plain(state_dict), coeff, max_norm, Activation(activation))
    images = any(map(_SCALE.match, reader.state))
    if len(event_shape) != (3 if images else 1):
        what = "images (height, width, channels)" if images else "vectors (dim,)"
        raise ValueError(f"The state dict is of {what}; got event_shape {tuple(event_shape)}.")
    first = () if logit_alpha is None else (Logit(logit_alpha),)
    if images:
        levels = _scales(reader, tuple(event_shape), first)
    else:
        levels = (Chain((*first, *_links(reader, "", tuple(event_shape), len(first))[0])),)
    reader.refuse_unread()
    flow = Flow(levels, tuple(event_shape))
    priors = (DiagonalGaussian(*[jnp.zeros(shape)] * 2) for shape in flow.latent_shapes())
    return dataclasses.replace(flow, priors=tuple(priors))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class SqueezeByChannel(Copying):
    """Space to depth, output channels in the order (channel, row in the 2×2 patch, column).

    Attributes:
      second_half_first: whether the two halves of the channels then change places, so that the
        second one leaves a :class:`~iresnet_jax.flows.Flow`.
    """

    second_half_first: bool = False

    def forward(self, x: Batch) -> Batch:
        y = squeeze(x)
        y = y.reshape(*y.shape[:-1], 4, -1).swapaxes(-1, -2).reshape(y.shape)
        return _halves_swapped(y) if self.second_half_first else y

    def backward(self, y: Batch) -> Batch:
        y = _halves_swapped(y) if self.second_half_first else y
        return unsqueeze(y.reshape(*y.shape[:-1], -1, 4).swapaxes(-1, -2).reshape(y.shape))

    def out_shape(self, shape: Shape) -> Shape:
        height, width, channels = shape
        return height // 2, width // 2, 4 * channels


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Flatten(Copying):
    """Images [batch, height, width, channels] as vectors, in the order (channel, row, column)."""

    image_shape: Shape

    def forward(self, x: Batch) -> Batch:
        return jnp.moveaxis(x, -1, 1).reshape(len(x), -1)

    def backward(self, y: Batch) -> Batch:
        height, width, channels = self.image_shape
        return jnp.moveaxis(y.reshape(len(y), channels, height, width), 1, -1)

    def out_shape(self, shape: Shape) -> Shape:
        return (math.prod(shape),)


def _halves_swapped(x: Batch) -> Batch:
    return jnp.roll(x, x.shape[-1] // 2, axis=-1)


class _Reader:
    """A state dict of which is known what has been read."""

    def __init__(
        self, state: State, coeff: float, max_norm: float | None, activation: Activation
    ) -> None:
        self.state, self.activation = state, activation
        self._coeff, self._max_norm = coeff, max_norm
        self._has_biases = any(map(_BIAS.match, state))  # of all layers, or of none
        self._read: set[str] = set()

    def take(self, name: str, shape: Shape | None = None) -> np.ndarray:
        if name not in self.state:
            raise ValueError(f"The state dict lacks {name}.")
        self._read.add(name)
        array = self.state[name]
        if shape is not None and array.shape != shape:
            raise ValueError(f"{name} must have shape {shape}; the state dict has {array.shape}.")
        return array

    def refuse_unread(self) -> None:
        rest = self.state.keys() - self._read
        if strange := sorted(name for name in rest if not _NEEDLESS.match(name)):
            told = ", ".join(strange[:4]) + (", …" if len(strange) > 4 else "")
            raise ValueError(f"The state dict holds what is not read here: {told}.")

    def modules(self, prefix: str) -> dict[int, set[str]]:
        """Names below ``prefix`` and the number after it, by that number."""
        found: dict[int, set[str]] = defaultdict(set)
        for name in self.state:
            number, dot, rest = name.removeprefix(prefix).partition(".")
            if name.startswith(prefix) and dot and number.isdecimal():
                found[int(number)].add(rest)
        return found

    def layer(self, name: str, shape: Shape) -> Affine:
        """A convolution of images, or a dense layer of vectors, [*, in] of ``shape``."""
        weight, u, v = (self.take(f"{name}.{key}") for key in ("weight", "u", "v"))
        if weight.ndim != (4 if len(shape) == 3 else 2) or weight.shape[1] != shape[-1]:
            raise ValueError(f"{name}.weight {weight.shape} does not fit an input of {shape}.")
        operator: LinearOperator
        if len(shape) == 3:
            kernel = kernel_as_used(weight, u, v, self._coeff, name, image_shape=shape[:2])
            operator = conv_operator(kernel, shape[:2])
        else:
            operator = DenseOperator(matrix_as_used(weight, u, v, self._coeff, name))
        if self._max_norm is not None:
            factor = shrink_factor(operator, self._max_norm)
            operator = with_kernel(operator, operator.kernel * np.float32(factor))
        bias = self.take(f"{name}.bias", weight.shape[:1]) if self._has_biases else None
        return Affine(operator, None if bias is None else jnp.asarray(bias))


def _scales(reader: _Reader, shape: Shape, first: tuple[Bijection, ...]) -> tuple[Chain, ...]:
    """The levels: one a scale where half of the channels leave in between, else one in all."""
    count = 1 + max(int(match[1]) for name in reader.state if (match := _SCALE.match(name)))
    scales: list[tuple[Bijection, ...]] = []
    leaves = None
    for i in range(count):
        before = first if i == 0 else ()
        links, shape = _links(reader, f"transforms.{i}.", shape, len(before))
        if i < count - 1:
            if len(shape) != 3:
                raise ValueError(f"transforms.{i} has dense blocks before a squeeze: not read.")
            height, width, channels = shape
            after = _channels_of(reader, i + 1)
            if after not in (2 * channels, 4 * channels) or height % 2 or width % 2:
                raise ValueError(
                    f"transforms.{i + 1} acts on {after} channels, which is neither twice nor four "
                    f"times those of the image {shape} before it, or that has odd sides."
                )
            if leaves not in (None, after == 2 * channels):
                raise ValueError("Half of the channels leave after every scale, or after none.")
            leaves = after == 2 * channels
            links = (*links, SqueezeByChannel(second_half_first=leaves))
            shape = (height // 2, width // 2, after)
        scales.append((*before, *links))
    if leaves:
        return tuple(map(Chain, scales))
    return (Chain(tuple(itertools.chain.from_iterable(scales))),)


def _channels_of(reader: _Reader, scale: int) -> int:
    """By the first convolution."""
    name = re.compile(rf"transforms\.{scale}\.chain\.\d+\.nnet\.\d+\.weight$")
    weights = (x for key, x in reader.state.items() if name.match(key) and x.ndim == 4)
    if (weight := next(weights, None)) is None:
        raise ValueError(f"The state dict has no convolution in transforms.{scale}.")
    return int(weight.shape[1])


def _links(
    reader: _Reader, prefix: str, shape: Shape, start: int
) -> tuple[tuple[Bijection, ...], Shape]:
    """What a chain does, equal blocks in a row stacked, and the shape after it."""
    modules = reader.modules(f"{prefix}chain.")
    if not modules:
        raise ValueError(f"The state dict has nothing under {prefix}chain.")
    links: list[Bijection] = []
    for index in range(start, 1 + max(modules)):
        name, own = f"{prefix}chain.{index}", modules.get(index, set())
        if not own:
            raise ValueError(
                f"The state dict has nothing for {name}. If that is their LogitTransform, pass its "
                "logit_alpha."
            )
        inner = {key.split(".")[0] for key in own}
        flat = "fc_module" in inner or any(key.startswith("nnet.nnet.") for key in own)
        if flat and len(shape) == 3:
            links.append(Flatten(shape))
            shape = (math.prod(shape),)
        if "nnet" in inner:
            nested = ".nnet" if any(key.startswith("nnet.nnet.") for key in own) else ""
            links.append(Residual(_branch(reader, f"{name}.nnet{nested}.", shape)))
        elif "std" in inner:
            links.append(_normalize(reader, name, shape))
        else:
            links.append(_actnorm(reader, name + ".fc_module" * ("fc_module" in inner), shape))
    return _stacked(links), shape


def _branch(reader: _Reader, prefix: str, shape: Shape) -> Sequential:
    modules = reader.modules(prefix)
    if not modules:
        raise ValueError(f"The state dict has no layers under {prefix}")
    stages: list[Any] = []
    inside, last_acts = shape, False
    for index in range(1 + max(modules)):
        own = modules.get(index, set())
        acts = not own or "beta" in own
        if acts and last_acts:
            raise ValueError(
                f"Two modules in a row before {prefix}{index + 1} are no layers: dropout, or "
                "another that is not read here."
            )
        last_acts = acts
        if "beta" in own:
            beta = reader.take(f"{prefix}{index}.beta", (1,))
            stages.append(LipSwish(jnp.float32(np.logaddexp(0.0, np.float64(beta[0])))))
        elif acts:
            stages.append(reader.activation)
        else:
            stages.append(reader.layer(f"{prefix}{index}", inside))
            inside = (*inside[:-1], reader.state[f"{prefix}{index}.weight"].shape[0])
    if inside != shape:
        raise ValueError(f"{prefix} maps {shape} to {inside}, where it is to keep the shape.")
    return Sequential(tuple(stages))


def _actnorm(reader: _Reader, name: str, shape: Shape) -> ActNorm:
    """(x + b)·exp(w)."""
    log_scale, bias = (reader.take(f"{name}.{key}", shape[-1:]) for key in ("weight", "bias"))
    if not reader.take(f"{name}.initialized", ()):
        raise ValueError(f"{name} was not initialised: it has seen no data.")
    shift = np.asarray(bias, np.float64) * np.exp(np.asarray(log_scale, np.float64))
    return ActNorm(jnp.asarray(log_scale), jnp.asarray(shift, jnp.float32))


def _normalize(reader: _Reader, name: str, shape: Shape) -> ActNorm:
    """(x − mean)/std."""
    mean, std = (reader.take(f"{name}.{key}", shape[-1:]) for key in ("mean", "std"))
    if not std.min() > 0.0:
        raise ValueError(f"{name}.std must be > 0; got {std.min()}.")
    wide = np.asarray(std, np.float64)
    return ActNorm(*(jnp.asarray(x, jnp.float32) for x in (-np.log(wide), -mean / wide)))


def _stacked(links: list[Bijection]) -> tuple[Bijection, ...]:
    """Each residual block with the ActNorm after it; equal ones in a row as one stack."""
    blocks: list[list[Bijection]] = []
    for link in links:
        if blocks and isinstance(link, ActNorm) and isinstance(blocks[-1][0], Residual):
            blocks[-1].append(link)
        else:
            blocks.append([link])
    found: list[Bijection] = []
    for _, equal in itertools.groupby(blocks, key=_kind):
        rows = [Chain(tuple(block)) for block in equal]
        if len(rows) > 1:
            found.append(Stack(jax.tree.map(lambda *x: jnp.stack(x), *rows), len(rows)))
        else:
            found.extend(rows[0].links)
    return tuple(found)


def _kind(block: list[Bijection]) -> tuple[Any, ...]:
    leaves, structure = jax.tree.flatten(block)
    return structure, *(leaf.shape for leaf in leaves)
