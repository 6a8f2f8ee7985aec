"""The table of bounds of a page, from a certificate as JSON holds it."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from train.legend import BLOCKS, LAYERS, TARGETS
from train.page_parts import Child, Html, details, element, joined, legend, table
from train.progress import format_bound

#: More blocks than these are folded away.
_FEW = 12
_DIGITS = 4


class _Layer(NamedTuple):
    name: str
    estimate: float
    bound: float

    def used(self, target: float) -> float:
        """The share of what its norm may be that its norm is, by the estimate from below.

        Infinite where the estimate is not a number.
        """
        return math.inf if math.isnan(self.estimate) else self.estimate / target


def bounds(certificate: Mapping[str, Any], target: float | None) -> Html:
    """Show the bounds of blocks and layers; ``target`` is what a layer's norm may be, if stated."""
    blocks = certificate["blocks"]
    if not blocks:
        return Html()
    whole = f"The network and its {len(blocks)} block{'s' * (len(blocks) > 1)}"
    layers = list(_layers(certificate))
    parts: list[Html] = [
        element("p", _extremes(blocks, layers, target)),
        details(whole, _blocks(certificate), opened=len(blocks) <= _FEW),
        legend(term.entry for term in BLOCKS),
    ]
    if layers:
        parts += [
            details(f"The {len(layers)} layers", _table(layers, target), opened=len(layers) <= _FEW)
        ]
        terms = LAYERS if target is None else LAYERS + TARGETS
        parts += [legend(term.entry for term in terms)]
    return joined(parts)


def _extremes(
    blocks: Sequence[Mapping[str, Any]], layers: Sequence[_Layer], target: float | None
) -> str:
    """Say in a line which block contracts least, and which layers are loosest and tightest."""
    last = max(blocks, key=_lipschitz)
    told = [f"Largest L: {_bound(last['lipschitz'])}, of {last['name']}."]
    if target is not None and layers:
        for what, choose in {"Loosest": min, "Tightest": max}.items():
            layer = choose(layers, key=lambda layer: layer.used(target))
            told.append(f"{what} layer: {layer.name}, {layer.used(target):.1%} used.")
    return " ".join(told)


def _blocks(certificate: Mapping[str, Any]) -> Html:
    blocks = certificate["blocks"]
    largest = max(map(_lipschitz, blocks))
    rows: list[list[Child]] = []
    for block in blocks:
        mark = "largest L" if _lipschitz(block) == largest and len(blocks) > 1 else ""
        name = _marked(block["name"], "NOT certified" if block["problem"] else mark)
        numbers = (block[what] for what in ("lipschitz", "product", "forward", "inverse"))
        rows.append([name, *map(_bound, numbers)])
    ends = certificate["forward_lipschitz"], certificate["inverse_lipschitz"]
    rows.append([element("strong", "network"), "", "", *map(_bound, ends)])
    return table(["block", "L ≤", "product ≤", "Lip ≤", "inverse ≤"], rows)


def _lipschitz(block: Mapping[str, Any]) -> float:
    """L of a block; infinite where it is not a number, which nothing is below."""
    found = float(block["lipschitz"])
    return math.inf if math.isnan(found) else found


def _layers(certificate: Mapping[str, Any]) -> Iterator[_Layer]:
    for block in certificate["blocks"]:
        for layer in block["layers"]:
            yield _Layer(layer["name"], float(layer["sigma"]), float(layer["upper_bound"]))


def _table(layers: list[_Layer], target: float | None) -> Html:
    if target is None:
        rows = [[layer.name, f"{layer.estimate:.4f}", _bound(layer.bound)] for layer in layers]
        return table(["layer", "norm ≈", "norm ≤"], rows)
    used = [layer.used(target) for layer in layers]
    ends = {min(used): "loosest", max(used): "tightest"} if min(used) < max(used) else {}
    lines: list[list[Child]] = [
        [
            _marked(layer.name, ends.get(share, "")),
            f"{layer.estimate:.4f}",
            _bound(layer.bound),
            f"{target:g}",
            f"{share:.1%}",
        ]
        for layer, share in zip(layers, used, strict=True)
    ]
    return table(["layer", "norm ≈", "norm ≤", "target", "used"], lines)


def _marked(name: str, mark: str) -> Html:
    return joined([name, " ", element("mark", mark)]) if mark else joined([name])


def _bound(value: Any) -> str:
    """Format a bound, which JSON may hold as "inf", never below itself."""
    return format_bound(float(value), _DIGITS)
