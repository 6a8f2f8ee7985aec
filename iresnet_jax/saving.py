"""A model in one file: its weights, its settings and its certificate, by safetensors.

No code is in the file, and none of it is run: a model is one of :mod:`iresnet_jax.nn`, found by its
name, with settings of plain values.
"""

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax.serialization import from_state_dict, to_state_dict
from flax.traverse_util import flatten_dict, unflatten_dict

from iresnet_jax.bijections import Bijection
from iresnet_jax.fitted import Dequantizer, Fitted, evaluated_at_once
from iresnet_jax.model_files import model_file
from iresnet_jax.nn.dequantizer import VariationalDequantization
from iresnet_jax.nn.variables import Variables
from iresnet_jax.saved_claims import check_claims, claims
from iresnet_jax.saved_models import (
    SavedModel,
    dequantizer_settings,
    dequantizer_template,
    described_link,
    described_model,
    description_of,
    entrance_channels,
    entrances_of,
    fitted_class,
    link_settings,
    link_weights,
    saved_model,
    template_of,
)

_FORMAT = "1"
_NOISE = "dequantizer"

Tensors = dict[str, np.ndarray]


def save(path: str | os.PathLike[str], fitted: Fitted) -> None:
    """Write a model to one file, from which :func:`load` makes it again bit for bit.

    A model that you trained by a loop of your own is ``Fitted(model, variables)``, one of p(y | x)
    ``FittedConditional(model, variables)``.

    Args:
      path: of the file; one that is there is replaced. Its name should end in ".safetensors".
      fitted: of a model of :mod:`iresnet_jax.nn`.

    Raises:
      ValueError: for a model, or a setting of one, that a file does not hold; for variables that
        are not the model's.
      TypeError: for anything but a :class:`~iresnet_jax.Fitted` or
        :class:`~iresnet_jax.FittedConditional`; for an ``about`` that JSON does not hold.
      FileNotFoundError: for a folder that is not there.
    """
    if not isinstance(fitted, Fitted):
        kind = type(fitted).__name__
        raise TypeError(f"save takes what fit returned, or Fitted(model, variables); got {kind}.")
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {target.parent} to save a model in.")
    model = saved_model(fitted.model)
    described = description_of(model)
    tensors = _stored("variables", fitted.variables)
    _check_fit("The variables", tensors, template_of(model))
    entrances = entrances_of(fitted)
    for name, links in entrances.items():
        for i, link in enumerate(links):
            tensors |= _stored(f"{name}/{i}", link_weights(link))
    if fitted.dequantizer is not None:
        noise = _stored(_NOISE, fitted.dequantizer.variables)
        template = dequantizer_template(fitted.dequantizer.module, model)
        _check_fit("The dequantizer's variables", noise, template, _NOISE)
        tensors |= noise
    metadata = {
        "format": _FORMAT,
        "model": _json(described),
        **{name: _json(list(map(link_settings, links))) for name, links in entrances.items()},
        "num_levels": _json(fitted.num_levels),
        **_noise_settings(fitted.dequantizer),
        "about": _about(fitted.about),
        "certificate": _json(fitted.certificate.as_dict()),
        "iresnet_jax": _version(),
    }
    metadata["digest"] = _digest(tensors, metadata)
    partial = target.with_name(f"{target.name}.part")
    try:
        partial.write_bytes(safetensors.numpy.save(tensors, metadata))
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def load(path: str | os.PathLike[str]) -> Fitted:
    """Load a model that :func:`save` wrote, and prove its certificate anew.

    Args:
      path: of the file; ``"hf://org/name"`` for the file model.safetensors of a repository of the
        Hugging Face Hub, or ``"hf://org/name@revision"``; or the name of a model that comes with
        the library, such as ``"digits"``, see :func:`~iresnet_jax.shipped_models`.

    Returns:
      The model; its ``certificate`` is of the weights as loaded.

    Raises:
      ValueError: for a file that is damaged, was edited, or is of another format; for weights in
        float64 where JAX runs without; where the certificate that it states is not proved of its
        weights.
      FileNotFoundError: for a file that is not there.
      ImportError: for the Hub, where huggingface_hub is not installed.
    """
    with model_file(path) as file:
        try:
            with safetensors.safe_open(file, framework="numpy") as stored:
                metadata = stored.metadata() or {}
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is damaged, or no file of safetensors: {error}.") from error
    _check_metadata(path, tensors, metadata)
    _check_precision(path, tensors)
    try:
        with evaluated_at_once():
            fitted = _described_by(metadata, tensors)
        stated = claims(json.loads(metadata["certificate"]))
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        told = str(error).rstrip(".")
        raise ValueError(f"{path} describes no model of this version: {told}.") from error
    check_claims(path, stated, fitted.certificate)
    return fitted


def _described_by(metadata: Mapping[str, str], tensors: Tensors) -> Fitted:
    model = described_model(json.loads(metadata["model"]))
    template, channels = template_of(model), entrance_channels(model)
    beside = tuple(f"{name}/" for name in (*channels, _NOISE))
    held = {name: value for name, value in tensors.items() if not name.startswith(beside)}
    _check_fit("Its tensors", held, template)
    levels, about = json.loads(metadata["num_levels"]), json.loads(metadata["about"])
    if not (levels is None or (type(levels) is int and levels > 0)) or not isinstance(about, dict):
        raise ValueError(f"num_levels = {levels!r}, about = {about!r}.")
    variables = from_state_dict(template, _loaded("variables", tensors))
    entrances = {
        name: _entrance(name, count, json.loads(metadata[name]), tensors)
        for name, count in channels.items()
    }
    return fitted_class(model)(
        model,
        variables,
        num_levels=levels,
        about=about,
        dequantizer=_dequantizer(metadata, tensors, model),
        **entrances,
    )


def _entrance(
    name: str, channels: int, links: list[Mapping[str, Any]], tensors: Tensors
) -> tuple[Bijection, ...]:
    """The bijections of these settings; each tensor of the entrance is of one of them."""
    places = tuple(f"{name}/{i}/" for i in range(len(links)))
    held = [tensor for tensor in tensors if tensor.startswith(f"{name}/")]
    if stray := [tensor for tensor in held if not tensor.startswith(places)]:
        raise ValueError(f"Its tensors hold {min(stray)}, which is of nothing that it describes.")
    return tuple(
        described_link(settings, _loaded(f"{name}/{i}", tensors), channels)
        for i, settings in enumerate(links)
    )


def _noise_settings(dequantizer: Dequantizer | None) -> dict[str, str]:
    """The entry of a learned dequantisation; none where noise is uniform."""
    return {} if dequantizer is None else {_NOISE: _json(dequantizer_settings(dequantizer.module))}


def _dequantizer(
    metadata: Mapping[str, str], tensors: Tensors, model: SavedModel
) -> Dequantizer | None:
    held = {name: value for name, value in tensors.items() if name.startswith(f"{_NOISE}/")}
    if _NOISE not in metadata:
        if held:
            raise ValueError("Its tensors hold a dequantizer, which its settings lack.")
        return None
    module = VariationalDequantization(**json.loads(metadata[_NOISE]))
    template = dequantizer_template(module, model)
    _check_fit("Its tensors", held, template, _NOISE)
    return Dequantizer(module, from_state_dict(template, _loaded(_NOISE, tensors)))


def _check_metadata(path: object, tensors: Tensors, metadata: Mapping[str, str]) -> None:
    if "digest" not in metadata or "format" not in metadata:
        raise ValueError(f"{path} is no file of iresnet_jax.save: it states no format and digest.")
    if metadata["format"] != _FORMAT:
        raise ValueError(f"{path} has format {metadata['format']}; this version reads {_FORMAT}.")
    stated = {name: value for name, value in metadata.items() if name != "digest"}
    if _digest(tensors, stated) != metadata["digest"]:
        raise ValueError(f"{path} is damaged or was edited: its contents are not those saved.")


def _check_precision(path: object, tensors: Tensors) -> None:
    """Refuse weights that JAX would round as it is set."""
    for value in tensors.values():
        if jax.dtypes.canonicalize_dtype(value.dtype) != value.dtype:
            raise ValueError(
                f"{path} holds weights in {value.dtype}: load it with jax_enable_x64, or JAX "
                "would round them."
            )


def _check_fit(what: str, tensors: Tensors, template: Variables, prefix: str = "variables") -> None:
    """Refuse tensors that are not a module's variables, one for one, by name and shape."""
    wanted = flatten_dict(to_state_dict({prefix: template}), sep="/")
    if odd := sorted(wanted.keys() ^ tensors.keys()):
        told = "lack" if odd[0] in wanted else "hold"
        raise ValueError(f"{what} are not those of the model: they {told} {odd[0]}.")
    for name, value in tensors.items():
        shape = tuple(wanted[name].shape)
        if value.shape != shape or not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(
                f"{what} are not those of the model: {name} must be floats {shape}; got "
                f"{value.dtype} {value.shape}."
            )


def _stored(prefix: str, tree: object) -> Tensors:
    flat = flatten_dict(to_state_dict(tree), sep="/")
    return {f"{prefix}/{name}": np.asarray(leaf, order="C") for name, leaf in flat.items()}


def _loaded(prefix: str, tensors: Tensors) -> dict[str, Any]:
    start = f"{prefix}/"
    flat = {
        name.removeprefix(start): jax.device_put(value)
        for name, value in tensors.items()
        if name.startswith(start)
    }
    nested: dict[str, Any] = unflatten_dict(flat, sep="/")
    return nested


def _digest(tensors: Tensors, metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(_json(dict(metadata)).encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.shape} {value.dtype}".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()


def _about(about: Mapping[str, object]) -> str:
    try:
        return json.dumps(dict(about))  # in its own order, in which a card tells it
    except TypeError as error:
        raise TypeError(f"about must be what JSON holds; got {about!r}: {error}.") from None


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True)


def _version() -> str:
    try:
        return importlib.metadata.version("iresnet_jax")
    except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
        return ""
