"""State dicts of PyTorch: read from a file, with the names and weights that loaders share."""

import math
import os
import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from iresnet_jax.operators import DenseOperator, LinearOperator, conv_operator
from iresnet_jax.spectral import SingularVectors, check_singular_vectors

#: Names to arrays on the host.
State = Mapping[str, np.ndarray]


def read_state_dict(path: str | os.PathLike[str], entry: str = "state_dict") -> dict[str, Any]:
    """Read a state dict that ``torch.save`` wrote, as NumPy arrays; this needs PyTorch.

    Only tensors and plain containers are read (``weights_only=True``): a file may not run code.

    Args:
      path: of the file: a state dict, or a dict that holds one.
      entry: under which name it holds one.

    Raises:
      ModuleNotFoundError: without PyTorch.
      ValueError: for a file that holds other objects, such as a whole pickled model, or no state
        dict.
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        message = f"read_state_dict needs torch: pip install torch. ({error})"
        raise ModuleNotFoundError(message, name=error.name) from error
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{os.fspath(path)} holds more than tensors: load it in the program that wrote it, and "
            "save model.state_dict() alone."
        ) from error
    state = loaded.get(entry, loaded) if isinstance(loaded, Mapping) else loaded
    if not isinstance(state, Mapping) or not all(map(torch.is_tensor, state.values())):
        raise ValueError(f"{os.fspath(path)} is no state dict, and holds none under {entry!r}.")
    wide = {n: x.float() if x.dtype == torch.bfloat16 else x for n, x in state.items()}
    return {name: tensor.detach().numpy() for name, tensor in wide.items()}


def plain(state_dict: Mapping[str, Any]) -> State:
    """Return the arrays under their names without the "module." of DataParallel.

    Floats are in JAX's default precision.

    Raises:
      TypeError: for anything but a mapping of names to arrays.
      ValueError: for values that are not finite in that precision; for a name with and without
        "module.".
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"A state dict maps names to arrays; got {type(state_dict).__name__}.")
    state = {}
    for name, value in state_dict.items():
        array = np.asarray(value)
        if array.dtype.kind not in "fiub":
            raise TypeError(f"{name} of the state dict is no array of numbers; got {array.dtype}.")
        if array.dtype.kind == "f":
            wide = np.promote_types(array.dtype, np.float32)
            with np.errstate(over="ignore"):
                array = array.astype(jax.dtypes.canonicalize_dtype(wide))
        if not np.isfinite(array).all():
            raise ValueError(f"The state dict has values that are not finite for {name}.")
        if (own := name.removeprefix("module.")) in state:
            raise ValueError(f"The state dict holds {own} twice, with and without 'module.'.")
        state[own] = array
    return state


def kernel_as_used(
    kernel: np.ndarray,
    u: np.ndarray,
    v: np.ndarray,
    coeff: float,
    name: str,
    image_shape: Sequence[int],
    added: float = 0.0,
) -> Float[Array, "height width in out"]:
    """Return the kernel of a convolution as the network uses it, W / (max(1, σ/c) + added).

    σ = uᵀWv, of the convolution on images; for a 1×1, of the matrix, and without ``added``.

    Args:
      kernel: [out, in, height, width].
      u, v: flattened singular vectors, in the order (channels, height, width).
      coeff: c.
      name: of the layer, for errors.
      image_shape: (height, width) of the images that the vectors are of.
      added: to the divisor.
    """
    out_channels, in_channels, *size = kernel.shape
    own = jnp.asarray(kernel.transpose(2, 3, 1, 0))
    if size == [1, 1]:
        return own / _divisor(DenseOperator(own[0, 0]), jnp.asarray(u), jnp.asarray(v), coeff, name)
    pixels = math.prod(image_shape)
    if (u.size, v.size) != (out_channels * pixels, in_channels * pixels):
        raise ValueError(
            f"The singular vectors of {name}, of {u.size} and {v.size} entries, are not of "
            f"{out_channels} and {in_channels} channels on images {tuple(image_shape)}."
        )
    image = lambda x: jnp.moveaxis(jnp.asarray(x).reshape(-1, *image_shape), 0, -1)  # noqa: E731
    divisor = _divisor(conv_operator(own, image_shape), image(u), image(v), coeff, name)
    return own / (divisor + added)


def matrix_as_used(
    weight: np.ndarray, u: np.ndarray, v: np.ndarray, coeff: float, name: str
) -> Float[Array, "in out"]:
    """Return the matrix of a dense layer, [out, in] given, as the network uses it."""
    own = jnp.asarray(weight.T)
    return own / _divisor(DenseOperator(own), jnp.asarray(u), jnp.asarray(v), coeff, name)


def _divisor(operator: LinearOperator, u: Array, v: Array, coeff: float, name: str) -> Array:
    """max(1, uᵀWv/c), of vectors as they are: those of induced norms have other lengths than 1."""
    try:
        check_singular_vectors(operator, SingularVectors(u, v))
    except ValueError as error:
        raise ValueError(f"The singular vectors of {name} do not fit its weight: {error}") from None
    with jax.default_matmul_precision("highest"):
        sigma = jnp.vdot(u, operator(v[None])[0])
    return jnp.maximum(1.0, sigma / coeff)
