"""State dicts of the paper's PyTorch code as variables of this library's models.

They are of ``conv_iResNet`` and ``multiscale_conv_iResNet`` of jhjacobsen/invertible-resnet. No
PyTorch is needed: ``{name: tensor.numpy() for name, tensor in torch_model.state_dict().items()}``.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from iresnet_jax.operators import DenseOperator, LinearOperator, conv_operator
from iresnet_jax.spectral import SingularVectors, check_coeff, sigma_estimate

_Path = tuple[str, ...]
_State = Mapping[str, np.ndarray]

_BLOCK = re.compile(r"(stack\.\d+\.stack\.\d+|stack\.\d+)\.")
_CONVOLUTION = re.compile(r"bottleneck_block\.(\d+)\.weight_orig$")
_READ = re.compile(
    r"prior_(mu|logstd)$|.*\.actnorm\._(log_scale|shift)$"
    r"|.*\.bottleneck_block\.\d+\.(bias|weight(_orig|_u|_v|_sigma)?)$"
)
_ADDED = 1e-5  # to the divisor of their 3×3 kernels


def variables_from_pytorch(
    variables: Mapping[str, Any], state_dict: _State, coeff: float
) -> dict[str, Any]:
    """Return the variables of an :class:`~iresnet_jax.nn.ImageFlow` with the authors' weights.

    Kernels are those that their network uses: divided by max(1, σ/coeff), σ = uᵀWv of their
    singular vectors. These lag behind in training, and so the norms may be above ``coeff``. A model
    with ``coeff=None`` is their network itself, for :func:`~iresnet_jax.certify` to judge; one with
    a ``coeff`` constrains the kernels anew, after :func:`iresnet_jax.nn.converge`.

    Args:
      variables: of the model, as init returned them: what is to be replaced, and its shapes. The
        model has their depths, widths, squeezes and activation, and ``domain="real"``.
      state_dict: names, with or without "module." in front, to arrays on the host. ActNorm must
        have been initialised.
      coeff: of their training, in (0, 1).

    Raises:
      ValueError: for a state dict of another network, a classifier's among them, or weights that
        are not finite.
    """
    check_coeff(coeff)
    state = {name.removeprefix("module."): np.asarray(x) for name, x in state_dict.items()}
    _check_names(state)
    params = flatten_dict(variables["params"])
    found = _priors(state, params) | _blocks(state, params, coeff)
    for path in params:
        _check(found.get(path), params[path], "/".join(path))
    return {**variables, "params": unflatten_dict(found)}


def _check_names(state: _State) -> None:
    if strange := sorted(name for name in state if not _READ.match(name)):
        raise ValueError(f"No density model of the paper's code holds {', '.join(strange[:4])}.")


def _check(new: Array | None, old: Array, name: str) -> None:
    if new is None or new.shape != old.shape:
        got = "nothing" if new is None else new.shape
        raise ValueError(f"The model's {name} has shape {old.shape}; the state dict has {got}.")
    if not np.isfinite(np.asarray(new)).all():
        raise ValueError(f"The state dict has values that are not finite for {name}.")


def _priors(state: _State, params: Mapping[_Path, Array]) -> dict[_Path, Array]:
    """Their one flat vector holds all latents, each in the order (channels, height, width)."""
    shapes = [params[(f"prior_mean_{i}",)].shape for i in range(_count(params, "prior_mean_"))]
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    found: dict[_Path, Array] = {}
    for own, theirs in (("mean", "prior_mu"), ("log_std", "prior_logstd")):
        if state[theirs].shape != (ends[-1],):
            raise ValueError(
                f"The latents have {ends[-1]} entries; {theirs} {state[theirs].shape}."
            )
        parts = np.split(state[theirs], ends[:-1])
        for i, (part, (height, width, channels)) in enumerate(zip(parts, shapes, strict=True)):
            image = np.moveaxis(part.reshape(channels, height, width), 0, -1)
            found[(f"prior_{own}_{i}",)] = jnp.asarray(image)
    return found


def _blocks(state: _State, params: Mapping[_Path, Array], coeff: float) -> dict[_Path, Array]:
    """Blocks in forward order, as many for each scale as the model has."""
    names = list(dict.fromkeys(match[1] for name in state if (match := _BLOCK.match(name))))
    names.sort(key=lambda name: [int(number) for number in re.findall(r"\d+", name)])
    found: dict[_Path, Array] = {}
    for scale in (f"scale{i}_blocks" for i in range(_count(params, "scale"))):
        depth = len(params[(scale, "shift")])
        own, names = names[:depth], names[depth:]
        blocks = [_block(state, name, coeff) for name in own]
        for path in blocks[0] if blocks else ():
            if {block[path].shape for block in blocks} != {blocks[0][path].shape}:
                raise ValueError(f"The blocks of {scale} differ in shape: {', '.join(own)}.")
            found[(scale, *path)] = jnp.stack([block[path] for block in blocks])
    if names:
        raise ValueError(f"The state dict has more blocks than the model: {', '.join(names)}.")
    return found


def _block(state: _State, name: str, coeff: float) -> dict[_Path, Array]:
    arrays = {key.removeprefix(f"{name}."): x for key, x in state.items() if _of(key, name)}
    places = sorted(int(match[1]) for key in arrays if (match := _CONVOLUTION.match(key)))
    found: dict[_Path, Array] = {}
    try:
        for key in ("log_scale", "shift"):
            found[(key,)] = jnp.asarray(arrays[f"actnorm._{key}"])
        for i, place in enumerate(places):
            layer = f"bottleneck_block.{place}."
            kernel, u, v = (arrays[f"{layer}weight_{key}"] for key in ("orig", "u", "v"))
            stage = "branch", f"stages_{2 * i + 1}"
            found[(*stage, "kernel")] = _kernel_as_used(kernel, u, v, coeff)
            found[(*stage, "bias")] = jnp.asarray(arrays[f"{layer}bias"])
    except KeyError as error:
        raise ValueError(f"The state dict lacks {error.args[0]} of {name}.") from None
    return found


def _of(key: str, block: str) -> bool:
    match = _BLOCK.match(key)
    return match is not None and match[1] == block


def _kernel_as_used(
    kernel: np.ndarray, u: np.ndarray, v: np.ndarray, coeff: float
) -> Float[Array, "height width in out"]:
    """W / (max(1, σ/c) + 1e-5) of a convolution, without the 1e-5 for a 1×1; [out, in, …] given."""
    out_channels, in_channels, *size = kernel.shape
    own = jnp.asarray(kernel.transpose(2, 3, 1, 0))
    if size == [1, 1]:
        matrix: LinearOperator = DenseOperator(own[0, 0])
        vectors = SingularVectors(jnp.asarray(u), jnp.asarray(v))
        return own / jnp.maximum(1.0, sigma_estimate(matrix, vectors) / coeff)
    side = math.isqrt(v.size // in_channels)
    if v.size != in_channels * side**2 or u.size != out_channels * side**2:
        raise ValueError(
            f"Singular vectors of {u.size} and {v.size} entries are of no square image."
        )
    image = lambda x, channels: jnp.moveaxis(jnp.asarray(x).reshape(channels, side, side), 0, -1)  # noqa: E731
    vectors = SingularVectors(image(u, out_channels), image(v, in_channels))
    sigma = sigma_estimate(conv_operator(own, (side, side)), vectors)
    return own / (jnp.maximum(1.0, sigma / coeff) + _ADDED)


def _count(params: Mapping[_Path, Array], prefix: str) -> int:
    return len({path[0] for path in params if path[0].startswith(prefix)})
