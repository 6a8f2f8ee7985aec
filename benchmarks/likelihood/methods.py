"""The methods: which module trains each, on which data, with which settings.

Every method has a documented default and a grid of four settings. Where a package documents no
number, it is said here: zuko names no batch (256, as ``ir.fit``'s); normflows has no residual flow
of images, so that its convolutions get our blocks and filters, with its defaults for all else.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.likelihood.problems import IMAGES, PLANES, TABLES

Options = Mapping[str, Any]

_VECTORS = (*PLANES, *TABLES, "digits")
_GRID = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """One way to a density.

    Attributes:
      module: of this package, whose function ``run(options, cell, problem, watch)`` trains.
      packages: that it needs.
      data: that it is run on.
      options: its own, in every setting.
      default: its documented setting.
      grid: four settings.
      ours: whether it is of this library.
    """

    module: str
    packages: tuple[str, ...] = ()
    data: tuple[str, ...] = _VECTORS
    options: Options = dataclasses.field(default_factory=dict)
    default: Options
    grid: Sequence[Options]
    ours: bool = False

    def __post_init__(self) -> None:
        if len(self.grid) != _GRID:
            raise ValueError(f"A grid has {_GRID} settings; got {len(self.grid)}.")


def _product(**values: tuple[Any, Any]) -> list[Options]:
    """Every combination of two values of two settings."""
    names = list(values)
    return [dict(zip(names, chosen, strict=True)) for chosen in itertools.product(*values.values())]


def _program(dequantization: str) -> Method:
    """``python -m train density``: configs ``digits`` and ``mnist-small``.

    ``length`` is the schedule's, as a share of the config's steps.
    """
    return Method(
        module="programs",
        data=tuple(IMAGES),
        options={"dequantization": dequantization},
        default={"rate": 1.0, "length": 1.0},
        grid=_product(rate=(1.0, 1.5), length=(0.5, 1.0)),
        ours=True,
    )


def _fit(data: tuple[str, ...], **options: Any) -> Method:
    """``ir.fit(key, None, data)``; the grid's models have the default one's layout."""
    return Method(
        module="front_door",
        data=data,
        options=options,
        default={},
        grid=_product(learning_rate=(5e-3, 1e-2), features=(32, 64)),
        ours=True,
    )


#: The notebook examples/residual.ipynb of normflows: 16 blocks 2-128-128-2 of norm 0.9, ActNorm,
#: Adam at 3e-4 with a weight decay of 1e-5, batches of 512, 50 power iterations a step.
_RESIDUAL = Method(
    module="residual_peer",
    packages=("torch", "normflows"),
    default={"learning_rate": 3e-4, "power_steps": 50},
    grid=_product(learning_rate=(1e-3, 3e-3), power_steps=(5, 50)),
)

METHODS: Mapping[str, Method] = {
    "fit": _fit(_VECTORS),  # digits as images of grey levels
    "fit-vectors": _fit(("digits",), vectors=True),
    "program-uniform": _program("uniform"),
    "program-learned": _program("variational"),
    "normflows-residual": _RESIDUAL,
    #: LipschitzCNN's own defaults, norm 0.97 and 5 power iterations.
    "normflows-residual-conv": dataclasses.replace(
        _RESIDUAL,
        module="residual_conv_peer",
        data=tuple(IMAGES),
        default={"learning_rate": 3e-4, "power_steps": 5},
        grid=_product(learning_rate=(1e-3, 3e-3), power_steps=(1, 5)),
    ),
    #: ``coupling_flow`` and ``fit_to_data``, as their signatures have it.
    "flowjax-coupling": Method(
        module="flowjax_peer",
        packages=("flowjax",),
        options={"flow": "coupling"},
        default={"learning_rate": 5e-4, "transformer": "affine"},
        grid=_product(learning_rate=(1e-3, 5e-3), transformer=("affine", "spline")),
    ),
    #: ``block_neural_autoregressive_flow``, likewise.
    "flowjax-bnaf": Method(
        module="flowjax_peer",
        packages=("flowjax",),
        options={"flow": "bnaf"},
        default={"learning_rate": 5e-4, "block_dim": 8},
        grid=_product(learning_rate=(2e-3, 1e-2), block_dim=(8, 16)),
    ),
    #: The README of zuko: 3 transforms, hidden layers 128, 128, 128, Adam at 1e-3.
    "zuko-nsf": Method(
        module="zuko_peer",
        packages=("torch", "zuko"),
        data=(*_VECTORS, "mnist-small"),
        options={"flow": "nsf"},
        default={"learning_rate": 1e-3, "hidden": [128, 128, 128]},
        grid=_product(learning_rate=(1e-3, 3e-3), hidden=([64, 64], [128, 128, 128])),
    ),
    #: CNF's own layers, 64 and 64, trained by flow matching (Lipman et al. 2023) in straight lines.
    "zuko-flow-matching": Method(
        module="zuko_peer",
        packages=("torch", "zuko"),
        options={"flow": "cnf"},
        default={"learning_rate": 1e-3, "hidden": [64, 64]},
        grid=_product(learning_rate=(1e-3, 3e-3), hidden=([64, 64], [128, 128, 128])),
    ),
}


def methods_on(data: str) -> list[str]:
    """Return the methods that are run on a data set."""
    return [name for name, method in METHODS.items() if data in method.data]
