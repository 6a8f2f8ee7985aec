"""What a run of the accelerator's benchmark is asked for, and how large its networks are."""

import dataclasses
import json
from pathlib import Path
from typing import Literal, Self

from benchmarks.specs import SPECS, Spec

Size = Literal["full", "tiny"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What one run is asked for.

    Attributes:
      out: folder of the results.
      size: "full", or "tiny", to see on a CPU that everything runs.
      minutes: of the whole run.
      mnist: an .npz file for ``train-mnist``.
      cifar10: an .npz file for ``train-cifar10``.
      golden: folder of the records of the authors' code.
      torch_batch: largest batch to try in PyTorch; None: the library's own.
    """

    out: Path
    size: Size = "full"
    minutes: float = 8.0
    mnist: Path | None = None
    cifar10: Path | None = None
    golden: Path | None = None
    torch_batch: int | None = None

    @property
    def tiny(self) -> bool:
        return self.size == "tiny"

    @property
    def density(self) -> Spec:
        """The authors' density model of CIFAR-10."""
        return SPECS["tiny" if self.tiny else "D3"]

    @property
    def classification(self) -> Spec:
        """The classifier of the authors' script, at its batch."""
        if self.tiny:
            return SPECS["tiny-C"]
        return dataclasses.replace(SPECS["C"], batch=128)

    @property
    def turns(self) -> int:
        """Turns of a timing, whose median is taken."""
        return 2 if self.tiny else 5

    @property
    def steps(self) -> int:
        """Steps in a turn."""
        return 2 if self.tiny else 4

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> Self:
        values = json.loads(text)
        paths = ("out", "mnist", "cifar10", "golden")
        found = {k: Path(values[k]) for k in paths if values[k] is not None}
        return cls(**(values | found))
