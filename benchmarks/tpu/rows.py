"""The rows of the table: which program, of which network, for which slice."""

import dataclasses
from collections.abc import Mapping

from benchmarks.specs import SPECS, Spec

#: The file in the output folder that takes the rows' figures.
RECORD = "rows.json"

SIZES = ("full", "tiny")

#: Four chips, four hosts of four, and a whole pod of 64 hosts.
HOST, SLICE, POD = "v5e:2x2", "v5e:4x4", "v5e:16x16"


@dataclasses.dataclass(frozen=True)
class Row:
    """One compilation.

    Attributes:
      program: a key of :data:`benchmarks.tpu.programs.PROGRAMS`.
      spec: the network, and the global batch.
      topology: chip and shape of the slice, as JAX names it.
      num_terms: of the log-determinant's series.
    """

    program: str
    spec: Spec
    topology: str
    num_terms: int = 5

    @property
    def chip(self) -> str:
        return self.topology.partition(":")[0]


def rows(size: str) -> Mapping[str, Row]:
    """Rows by name, most important first.

    Raises:
      ValueError: for a size that there is not.
    """
    if size not in SIZES:
        raise ValueError(f"size must be one of {SIZES}; got {size!r}.")
    return _tiny() if size == "tiny" else _full()


def _tiny() -> dict[str, Row]:
    density, classification = SPECS["tiny"], SPECS["tiny-C"]
    return {
        "density, 4 chips": Row("density", density, HOST),
        "classification, 4 chips": Row("classification", classification, HOST),
        "density, 16 chips": Row("density", _batch(density, 16), SLICE),
        "sampling": Row("sampling", density, HOST),
        "there and back": Row("there and back", density, HOST),
        "evaluation": Row("evaluation", density, HOST),
        "power iterations": Row("power iterations", density, HOST),
        "bounds": Row("bounds", density, HOST),
    }


def _full() -> dict[str, Row]:
    d3, c, d2 = SPECS["D3"], _batch(SPECS["C"], 128), _batch(SPECS["D2"], 64)
    return {
        "D3, 4 chips": Row("density", d3, HOST),
        **_growing(),
        "D2, 4 chips": Row("density", d2, HOST),
        "D2 sampling": Row("sampling", d2, HOST),
        "D2 there and back": Row("there and back", d2, HOST),
        "D2 evaluation": Row("evaluation", d2, HOST),
        "D2 power iterations": Row("power iterations", d2, HOST),
        "D2 bounds": Row("bounds", d2, HOST),
        "C, 4 chips": Row("classification", c, HOST),
        "D3, 16 chips, 512 images": Row("density", _batch(d3, 512), SLICE),
        "D3, 256 chips, 8,192 images": Row("density", _batch(d3, 8192), POD),
        "C, 256 chips, 8,192 images": Row("classification", _batch(c, 8192), POD),
    }


def _growing() -> dict[str, Row]:
    """D2's first scale alone: with chips at 16 images each, at 256 in all, with depth and batch."""
    scale = Spec(image_shape=(32, 32, 3), depths=(8,), features=(64,), batch=64)
    sizes = [("8 blocks", scale, 64, HOST)]
    sizes += [("8 blocks", scale, 16 * chips, place) for chips, place in ((16, SLICE), (256, POD))]
    sizes += [("8 blocks", scale, 256, place) for place in (HOST, SLICE, POD)]
    sizes += [("32 blocks", scale.deeper(4), 64, HOST)]
    return {
        f"{depth}, {images:,} images, {place}": Row("density", _batch(spec, images), place)
        for depth, spec, images, place in sizes
    }


def _batch(spec: Spec, images: int) -> Spec:
    return dataclasses.replace(spec, batch=images)
