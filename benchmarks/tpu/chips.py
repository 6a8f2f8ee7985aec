"""Published figures of TPU chips, and the lower bound on a time that they imply."""

import dataclasses
from typing import Any

from benchmarks.tpu.counting import Costs


@dataclasses.dataclass(frozen=True)
class Chip:
    """What the maker states of a chip.

    Attributes:
      source: where it is stated.
      matrix_flops: of the matrix units in bfloat16, per second.
      hbm_bytes: of the main memory, per second.
      link_bytes: sent to other chips, per second, over all links.
      memory: bytes of main memory.
    """

    source: str
    matrix_flops: float
    hbm_bytes: float
    link_bytes: float
    memory: float


#: By the name that stands first in a topology's.
CHIPS = {
    "v5e": Chip(
        source="https://cloud.google.com/tpu/docs/v5e",
        matrix_flops=197e12,
        hbm_bytes=819e9,
        link_bytes=1600e9 / 8,
        memory=16e9,
    )
}


def roofline(chip: Chip, counted: Costs, chips: int) -> dict[str, Any]:
    """Seconds that one execution takes at least: on paper, nothing is run.

    The matrix units at their peak (a float32 product in as many bfloat16 passes as it asks for),
    the main memory at its bandwidth, and the collectives, of which every byte is sent 2·(n − 1)/n
    times by each of n chips in an all-reduce (other kinds are not counted), each work at
    the same time as the others; the longest is the bound.
    """
    sent = 2.0 * (chips - 1) / chips * counted.collectives.get("all-reduce", 0.0)
    parts = {
        "matrix": counted.matrix_passes / chip.matrix_flops,
        "memory": counted.hbm_bytes / chip.hbm_bytes,
        "links": sent / chip.link_bytes,
    }
    longest = max(parts, key=lambda name: parts[name])
    return {
        **{f"{name}_seconds": seconds for name, seconds in parts.items()},
        "bound_seconds": parts[longest],
        "bound_by": longest,
    }
