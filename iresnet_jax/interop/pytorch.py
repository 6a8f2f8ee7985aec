"""State dicts of the paper's PyTorch code as variables of this library's models.

They are of ``conv_iResNet`` and ``multiscale_conv_iResNet`` of jhjacobsen/invertible-resnet:
density models and classifiers. No PyTorch is needed:
``{name: tensor.numpy() for name, tensor in torch_model.state_dict().items()}``;
:func:`~iresnet_jax.interop.state_dicts.read_state_dict` reads a file.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array

from iresnet_jax.interop.state_dicts import State, kernel_as_used, plain
from iresnet_jax.spectral import check_coeff

_Path = tuple[str, ...]

_BLOCK = re.compile(r"(stack\.\d+\.stack\.\d+|stack\.\d+)\.")
_CONVOLUTION = re.compile(r"bottleneck_block\.(\d+)\.weight_orig$")
_READ = re.compile(
    r"prior_(mu|logstd)$|.*\.actnorm\._(log_scale|shift)$"
    r"|.*\.bottleneck_block\.\d+\.(bias|weight(_orig|_u|_v|_sigma)?)$"
)
_HEAD = re.compile(
    r"bn1\.(weight|bias|running_mean|running_var|num_batches_tracked)$|logits\.(weight|bias)$"
)
_ADDED = 1e-5  # to the divisor of their 3×3 kernels


def variables_from_pytorch(
    model: Any, variables: Mapping[str, Any], state_dict: Mapping[str, Any], coeff: float
) -> dict[str, Any]:
    """Return the variables of an image model with the authors' weights.

    Kernels are those that their network uses: divided by max(1, σ/coeff), σ = uᵀWv of their
    singular vectors. These lag behind in training, and so the norms may be above ``coeff``. A model
    with ``coeff=None`` is their network itself, for :func:`~iresnet_jax.certify` to judge; one with
    a ``coeff`` constrains the kernels anew, after :func:`iresnet_jax.nn.converge` and
    :func:`iresnet_jax.nn.shrink`.

    Args:
      model: an :class:`~iresnet_jax.nn.ImageFlow` for a density model, an
        :class:`~iresnet_jax.nn.InvertibleClassifier` for a classifier, with their depths, widths,
        squeezes, padding and activation.
      variables: of the model, as init returned them: what is to be replaced, and its shapes.
      state_dict: names, with or without "module." in front, to arrays on the host. ActNorm must
        have been initialised.
      coeff: of their training, in (0, 1).

    Raises:
      ValueError: for a state dict of another network, or weights that are not finite; for a model
        that pads channels before a squeeze, where theirs pads after it.
      TypeError: for anything but a mapping of names to arrays.
    """
    check_coeff(coeff)
    state = plain(state_dict)
    classifies = hasattr(model, "num_classes")
    if getattr(model, "padding", 0) and model.squeeze_first:
        raise ValueError(
            f"Their network squeezes before it pads; a model with padding={model.padding} and "
            "squeeze_first=True pads first. Give it images that are squeezed, ir.squeeze(x), and "
            "squeeze_first=False."
        )
    _check_names(state, classifies)
    params = flatten_dict(variables["params"])
    stats = flatten_dict(variables.get("batch_stats", {}))
    found = _blocks(state, params, coeff)
    found |= _head(state) if classifies else _priors(state, params)
    new_stats = _statistics(state) if classifies else {}
    for old, new in ((params, found), (stats, new_stats)):
        for path in old:
            _check(new.get(path), old[path], "/".join(path))
    loaded = {**variables, "params": unflatten_dict(found)}
    return loaded | ({"batch_stats": unflatten_dict(new_stats)} if classifies else {})


def _check_names(state: State, classifies: bool) -> None:
    known = lambda name: _READ.match(name) or (classifies and _HEAD.match(name))  # noqa: E731
    if strange := sorted(name for name in state if not known(name)):
        kind = "classifier" if classifies else "density model"
        raise ValueError(f"No {kind} of the paper's code holds {', '.join(strange[:4])}.")


def _get(state: State, name: str) -> np.ndarray:
    if name not in state:
        raise ValueError(f"The state dict lacks {name}.")
    return state[name]


def _head(state: State) -> dict[_Path, Array]:
    """BatchNorm's scale and bias, and the linear layer."""
    names = {
        ("norm", "scale"): "bn1.weight",
        ("norm", "bias"): "bn1.bias",
        ("linear", "kernel"): "logits.weight",
        ("linear", "bias"): "logits.bias",
    }
    return {("head", *path): jnp.asarray(_get(state, name).T) for path, name in names.items()}


def _statistics(state: State) -> dict[_Path, Array]:
    names = {"mean": "bn1.running_mean", "var": "bn1.running_var"}
    return {("head", "norm", own): jnp.asarray(_get(state, name)) for own, name in names.items()}


def _check(new: Array | None, old: Array, name: str) -> None:
    if new is None or new.shape != old.shape:
        got = "nothing" if new is None else new.shape
        raise ValueError(f"The model's {name} has shape {old.shape}; the state dict has {got}.")


def _priors(state: State, params: Mapping[_Path, Array]) -> dict[_Path, Array]:
    """Their one flat vector holds all latents, each in the order (channels, height, width)."""
    shapes = [params[(f"prior_mean_{i}",)].shape for i in range(_count(params, "prior_mean_"))]
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    found: dict[_Path, Array] = {}
    for own, theirs in (("mean", "prior_mu"), ("log_std", "prior_logstd")):
        values = _get(state, theirs)
        if values.shape != (ends[-1],):
            raise ValueError(f"The latents have {ends[-1]} entries; {theirs} {values.shape}.")
        parts = np.split(values, ends[:-1])
        for i, (part, (height, width, channels)) in enumerate(zip(parts, shapes, strict=True)):
            image = np.moveaxis(part.reshape(channels, height, width), 0, -1)
            found[(f"prior_{own}_{i}",)] = jnp.asarray(image)
    return found


def _blocks(state: State, params: Mapping[_Path, Array], coeff: float) -> dict[_Path, Array]:
    """Blocks in forward order, as many for each scale as the model has."""
    names = list(dict.fromkeys(match[1] for name in state if (match := _BLOCK.match(name))))
    names.sort(key=lambda name: [int(number) for number in re.findall(r"\d+", name)])
    first = names[0] if names else ""
    found: dict[_Path, Array] = {}
    for scale in (f"scale{i}_blocks" for i in range(_count(params, "scale"))):
        depth = len(params[(scale, "shift")])
        own, names = names[:depth], names[depth:]
        blocks = [_block(state, name, coeff, activated=name != first) for name in own]
        for path in blocks[0] if blocks else ():
            if {block[path].shape for block in blocks} != {blocks[0][path].shape}:
                raise ValueError(f"The blocks of {scale} differ in shape: {', '.join(own)}.")
            found[(scale, *path)] = jnp.stack([block[path] for block in blocks])
    if names:
        raise ValueError(f"The state dict has more blocks than the model: {', '.join(names)}.")
    return found


def _block(state: State, name: str, coeff: float, *, activated: bool) -> dict[_Path, Array]:
    """One block; ``activated``: whether its branch begins with an activation."""
    arrays = {key.removeprefix(f"{name}."): x for key, x in state.items() if _of(key, name)}
    places = sorted(int(match[1]) for key in arrays if (match := _CONVOLUTION.match(key)))
    if places != (expected := [2 * i + activated for i in range(len(places))]):
        raise ValueError(
            f"The convolutions of {name} are its modules {places}, where they are {expected} in "
            "the paper's code: an activation between any two, and first but in the first block."
        )
    found: dict[_Path, Array] = {}
    try:
        for key in ("log_scale", "shift"):
            found[(key,)] = jnp.asarray(arrays[f"actnorm._{key}"])
        for i, place in enumerate(places):
            layer = f"bottleneck_block.{place}."
            kernel, u, v = (arrays[f"{layer}weight_{key}"] for key in ("orig", "u", "v"))
            stage = "branch", f"stages_{2 * i + 1}"
            side = math.isqrt(v.size // kernel.shape[1])
            where = f"{name}.{layer.rstrip('.')}"
            found[(*stage, "kernel")] = kernel_as_used(
                kernel, u, v, coeff, where, (side, side), _ADDED
            )
            found[(*stage, "bias")] = jnp.asarray(arrays[f"{layer}bias"])
    except KeyError as error:
        raise ValueError(f"The state dict lacks {error.args[0]} of {name}.") from None
    return found


def _of(key: str, block: str) -> bool:
    match = _BLOCK.match(key)
    return match is not None and match[1] == block


def _count(params: Mapping[_Path, Array], prefix: str) -> int:
    return len({path[0] for path in params if path[0].startswith(prefix)})
