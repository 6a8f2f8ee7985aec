"""Where the file of a model is: at a path, on the Hugging Face Hub, or in the library."""

import contextlib
import difflib
import os
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

_HUB = "hf://"
_FILE_ON_HUB = "model.safetensors"
_SUFFIX = ".safetensors"
_SHIPPED = "shipped"


def shipped_models() -> list[str]:
    """Return the names of the models that come with the library, for :func:`~iresnet_jax.load`."""
    files = (resources.files("iresnet_jax") / _SHIPPED).iterdir()
    return sorted(file.name.removesuffix(_SUFFIX) for file in files if file.name.endswith(_SUFFIX))


@contextlib.contextmanager
def model_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give the file on this machine that a path, an address or a name means, while it is read.

    A file at the path goes before a model of that name.

    Raises:
      FileNotFoundError: where there is none; it lists the names.
      ValueError: for an address that is none of the Hub's.
      ImportError: for an address, where huggingface_hub is not installed.
    """
    name = os.fspath(path)
    if name.startswith(_HUB):
        yield _from_hub(name)
    elif Path(name).is_file():
        yield Path(name)
    elif name in shipped_models():
        with resources.as_file(resources.files("iresnet_jax") / _SHIPPED / (name + _SUFFIX)) as at:
            yield at
    else:
        raise FileNotFoundError(_unknown(name))


def _unknown(name: str) -> str:
    shipped = shipped_models()
    near = difflib.get_close_matches(name.lower(), shipped, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return (
        f"There is no file {name!r}.{hint} load takes the path of a file of save, "
        f"{_HUB}org/name[@revision], or the name of a model that comes with the library: "
        f"{', '.join(shipped)}."
    )


def _from_hub(address: str) -> Path:
    repository, _, revision = address.removeprefix(_HUB).partition("@")
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise ValueError(f"An address on the Hub is hf://org/name[@revision]; got {address!r}.")
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise ImportError(
            f"load({address!r}) needs huggingface_hub: pip install huggingface_hub."
        ) from error
    return Path(hf_hub_download(repository, _FILE_ON_HUB, revision=revision or None))
