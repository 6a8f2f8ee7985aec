"""A model in one file: its weights, its settings and its certificate, by safetensors.

No code is in the file, and none of it is run: a model is one of :mod:`iresnet_jax.nn`, found by its
name, with settings of plain values.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as flax_nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax.serialization import from_state_dict, to_state_dict
from flax.traverse_util import flatten_dict, unflatten_dict

from iresnet_jax.actnorm import ActNorm
from iresnet_jax.asinh import Asinh
from iresnet_jax.bijections import Bijection
from iresnet_jax.fitted import Dequantizer, Fitted
from iresnet_jax.model_files import model_file
from iresnet_jax.nn.branches import bottleneck_branch, dense_branch
from iresnet_jax.nn.dequantizer import VariationalDequantization
from iresnet_jax.nn.models import FlowModel, ImageFlow, VectorFlow
from iresnet_jax.nn.monlip import monlip_branch
from iresnet_jax.nn.variables import Variables
from iresnet_jax.saved_claims import check_claims, claims
from iresnet_jax.types import Shape

_FORMAT = "1"
_NOISE = "dequantizer"
_MODELS: dict[str, type[VectorFlow] | type[ImageFlow]] = {
    kind.__name__: kind for kind in (VectorFlow, ImageFlow)
}
_BRANCHES: dict[str, Callable[..., flax_nn.Module]] = {
    make.__name__: make for make in (dense_branch, bottleneck_branch, monlip_branch)
}

Tensors = dict[str, np.ndarray]


def save(path: str | os.PathLike[str], fitted: Fitted) -> None:
    """Write a model to one file, from which :func:`load` makes it again bit for bit.

    A model that you trained by a loop of your own is ``Fitted(model, variables)``.

    Args:
      path: of the file; one that is there is replaced. Its name should end in ".safetensors".
      fitted: of a model of :mod:`iresnet_jax.nn`.

    Raises:
      ValueError: for a model, or a setting of one, that a file does not hold; for variables that
        are not the model's.
      TypeError: for anything but a :class:`~iresnet_jax.fitted.Fitted`; for an ``about`` that JSON
        does not hold.
      FileNotFoundError: for a folder that is not there.
    """
    if not isinstance(fitted, Fitted):
        kind = type(fitted).__name__
        raise TypeError(f"save takes what fit returned, or Fitted(model, variables); got {kind}.")
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {target.parent} to save a model in.")
    described = _described(fitted.model)
    tensors = _stored("variables", fitted.variables)
    _check_fit("The variables", tensors, _template(fitted.model))  # type: ignore[arg-type]
    for i, link in enumerate(fitted.entrance):
        tensors |= _stored(f"entrance/{i}", _weights_of(link))
    if fitted.dequantizer is not None:
        noise = _stored(_NOISE, fitted.dequantizer.variables)
        template = _noise_template(fitted.dequantizer.module, fitted.model)
        _check_fit("The dequantizer's variables", noise, template, _NOISE)
        tensors |= noise
    metadata = {
        "format": _FORMAT,
        "model": _json(described),
        "entrance": _json([_link_settings(link) for link in fitted.entrance]),
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
        fitted = _described_by(metadata, tensors)
        stated = claims(json.loads(metadata["certificate"]))
    except (KeyError, TypeError, ValueError) as error:
        told = str(error).rstrip(".")
        raise ValueError(f"{path} describes no model of this version: {told}.") from error
    check_claims(path, stated, fitted.certificate)
    return fitted


def _described_by(metadata: Mapping[str, str], tensors: Tensors) -> Fitted:
    model = _built(json.loads(metadata["model"]))
    template, links = _template(model), json.loads(metadata["entrance"])
    beside = ("entrance/", f"{_NOISE}/")
    held = {n: value for n, value in tensors.items() if not n.startswith(beside)}
    _check_fit("Its tensors", held, template)
    levels, about = json.loads(metadata["num_levels"]), json.loads(metadata["about"])
    if not (levels is None or (type(levels) is int and levels > 0)) or not isinstance(about, dict):
        raise ValueError(f"num_levels = {levels!r}, about = {about!r}.")
    return Fitted(
        model,
        from_state_dict(template, _loaded("variables", tensors)),
        tuple(
            _link(settings, _loaded(f"entrance/{i}", tensors), _event_shape(model)[-1])
            for i, settings in enumerate(links)
        ),
        levels,
        about,
        _dequantizer(metadata, tensors, model),
    )


def _noise_settings(dequantizer: Dequantizer | None) -> dict[str, str]:
    """The entry of a learned dequantisation; none where noise is uniform."""
    if dequantizer is None:
        return {}
    module = dequantizer.module
    if type(module) is not VariationalDequantization:
        kind = type(module).__name__
        raise ValueError(f"save knows the dequantisation VariationalDequantization; got {kind}.")
    settings = {name: getattr(module, name) for name in ("num_levels", "features", "couplings")}
    return {_NOISE: _json({name: _plain(name, value) for name, value in settings.items()})}


def _dequantizer(
    metadata: Mapping[str, str], tensors: Tensors, model: FlowModel
) -> Dequantizer | None:
    held = {name: value for name, value in tensors.items() if name.startswith(f"{_NOISE}/")}
    if _NOISE not in metadata:
        if held:
            raise ValueError("Its tensors hold a dequantizer, which its settings lack.")
        return None
    module = VariationalDequantization(**json.loads(metadata[_NOISE]))
    template = _noise_template(module, model)
    _check_fit("Its tensors", held, template, _NOISE)
    return Dequantizer(module, from_state_dict(template, _loaded(_NOISE, tensors)))


def _noise_template(module: VariationalDequantization, model: FlowModel) -> Variables:
    """The variables of a learned dequantisation of a model's images, as shapes."""
    if not isinstance(model, ImageFlow):
        raise ValueError(f"A dequantizer is of an ImageFlow; got {type(model).__name__}.")
    levels = jax.ShapeDtypeStruct((1, *_event_shape(model)), jnp.int32)
    key = jax.random.key(0)
    variables: Variables = jax.eval_shape(module.init, key, levels, key)
    return variables


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


def _described(model: FlowModel) -> dict[str, object]:
    kind = type(model).__name__
    if _MODELS.get(kind) is not type(model):
        raise ValueError(f"save knows the models {', '.join(_MODELS)}; got {kind}.")
    names = [f.name for f in dataclasses.fields(model) if f.name not in ("parent", "name")]
    return {"class": kind, "settings": {n: _plain(n, getattr(model, n)) for n in names}}


def _built(described: Mapping[str, Any]) -> VectorFlow | ImageFlow:
    if described["class"] not in _MODELS:
        raise ValueError(f"The file holds a {described['class']}, which this version lacks.")
    settings = {name: _tuples(value) for name, value in described["settings"].items()}
    settings["make_branch"] = _BRANCHES[settings["make_branch"]]
    return _MODELS[described["class"]](**settings)


def _template(model: VectorFlow | ImageFlow) -> Variables:
    """The model's variables, as shapes in their containers."""
    example = jax.ShapeDtypeStruct((2, *_event_shape(model)), jnp.float32)
    variables: Variables = jax.eval_shape(model.init, jax.random.key(0), example)
    return variables


def _event_shape(model: VectorFlow | ImageFlow) -> Shape:
    return tuple(model.image_shape) if isinstance(model, ImageFlow) else (model.dim,)


def _plain(name: str, value: Any) -> object:
    """A setting as JSON holds it: a branch of the library by its name."""
    if name == "make_branch":
        known = [branch for branch, make in _BRANCHES.items() if make is value]
        if not known:
            raise ValueError(f"save knows the branches {', '.join(_BRANCHES)}; got {value!r}.")
        return known[0]
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, tuple | list):
        return [_plain(name, entry) for entry in value]
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating) and math.isfinite(value):
        return float(value)
    raise ValueError(f"A file does not hold the setting {name} = {value!r}.")


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _link_settings(link: Bijection) -> dict[str, object]:
    if type(link) is ActNorm:
        return {"class": "ActNorm"}
    if type(link) is Asinh:
        return {"class": "Asinh", "columns": list(link.columns)}
    raise ValueError(f"A file holds ActNorm and Asinh before a model; got {type(link).__name__}.")


def _weights_of(link: Bijection) -> dict[str, jax.Array]:
    if not isinstance(link, ActNorm):
        return {}
    return {"log_scale": link.log_scale, "shift": link.shift}


def _link(settings: Mapping[str, Any], weights: Mapping[str, Any], channels: int) -> Bijection:
    if settings["class"] == "ActNorm":
        if any(value.shape != (channels,) for value in weights.values()):
            raise ValueError(f"ActNorm before a model of {channels} channels has others.")
        return ActNorm(**weights)
    columns = settings["columns"]
    if settings["class"] != "Asinh" or weights:
        raise ValueError(f"before the model is a {settings['class']}, with {sorted(weights)}.")
    if len(columns) != channels or not all(isinstance(column, bool) for column in columns):
        raise ValueError(f"Asinh before a model of {channels} channels has columns {columns}.")
    return Asinh(tuple(columns))


def _stored(prefix: str, tree: object) -> Tensors:
    flat = flatten_dict(to_state_dict(tree), sep="/")
    return {f"{prefix}/{name}": np.asarray(leaf, order="C") for name, leaf in flat.items()}


def _loaded(prefix: str, tensors: Tensors) -> dict[str, Any]:
    start = f"{prefix}/"
    flat = {
        name.removeprefix(start): jnp.asarray(value)
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
