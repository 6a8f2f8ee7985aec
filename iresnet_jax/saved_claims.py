"""What a saved file states of its weights, held against what is proved of them on loading."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from iresnet_jax.certificates import Certificate

_WITHIN = 1e-2  # relative: how far proofs of the same weights may be apart, by machine


class Claims(NamedTuple):
    """The numbers of a certificate.

    Attributes:
      certified: the verdict.
      whole: bounds on the network's Lipschitz constant and its inverse's.
      blocks: the same of each block.
      lipschitz: L of each block.
      layers: bounds of each block's branch by its stages, and of its layers.
    """

    certified: bool
    whole: tuple[float, ...]
    blocks: list[tuple[float, ...]]
    lipschitz: list[float]
    layers: list[list[float]]


def claims(certificate: Mapping[str, Any]) -> Claims:
    """Read a certificate that :meth:`~iresnet_jax.certificates.Certificate.as_dict` described.

    Raises:
      KeyError, TypeError, ValueError: for anything else.
    """
    blocks = certificate["blocks"]
    return Claims(
        bool(certificate["certified"]),
        (float(certificate["forward_lipschitz"]), float(certificate["inverse_lipschitz"])),
        [(float(block["forward"]), float(block["inverse"])) for block in blocks],
        [float(block["lipschitz"]) for block in blocks],
        [_layers(block) for block in blocks],
    )


def check_claims(path: object, stated: Claims, certificate: Certificate) -> None:
    """Refuse a file that states more of its weights than can be proved of them.

    Raises:
      ValueError: for the verdict, or a bound that is lower by more than machines differ.
    """
    proved = claims(certificate.as_dict())
    if stated.certified and not proved.certified:
        problems = [*certificate.problems, *(block.problem for block in certificate.failures)]
        raise ValueError(
            f"{path} states a certificate that its weights do not have: {problems[0]}."
        )
    if not _within(stated.lipschitz, proved.lipschitz, 1.0 + _WITHIN):
        raise ValueError(
            f"{path} states the bounds {stated.lipschitz} of its blocks; of its weights are proved "
            f"{proved.lipschitz}."
        )
    rooms = [_room(bound) for bound in proved.lipschitz]
    numbers = zip(stated.blocks, proved.blocks, rooms, strict=True)
    layers = zip(stated.layers, proved.layers, strict=True)
    if not (
        _within(stated.whole, proved.whole, math.prod(rooms))
        and all(_within(*block) for block in numbers)
        and all(_within(*pair, 1.0 + _WITHIN) for pair in layers)
    ):
        raise ValueError(
            f"{path} states bounds, such as {stated.whole} of the network and its inverse, that "
            f"are not proved of its weights: {proved.whole}."
        )


def _layers(block: Mapping[str, Any]) -> list[float]:
    return [float(block["product"]), *(float(layer["upper_bound"]) for layer in block["layers"])]


def _room(lipschitz: float) -> float:
    """By which factor a block's bounds can differ where L does by 1%: (1 + L)/(1 − L) at most."""
    if not lipschitz < 1.0:
        return math.inf
    lower = lipschitz / (1.0 + _WITHIN)
    return (1.0 + _WITHIN) * ((1.0 - lower) / (1.0 - lipschitz)) ** 2


def _within(stated: Iterable[float], proved: Iterable[float], room: float) -> bool:
    """Whether each stated bound is proved, up to a factor; infinity and NaN state nothing."""
    own, others = list(stated), list(proved)
    return len(own) == len(others) and all(
        not math.isfinite(a) or b <= a * room for a, b in zip(own, others, strict=True)
    )
