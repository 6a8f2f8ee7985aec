"""The cells: what is run, for how long, in which order."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, Self

from benchmarks.likelihood.methods import METHODS, Options, methods_on
from benchmarks.likelihood.problems import PLANES, TABLES

Size = Literal["full", "smoke"]

#: Seconds of a cell's clock, on two cores.
SECONDS = {
    **dict.fromkeys((*PLANES, *TABLES), 60.0),
    "digits": 150.0,
    "mnist-small": 600.0,
    "mnist": 1200.0,
}
#: Seeds where no number is asked for.
SEEDS = {**dict.fromkeys(SECONDS, 3), "mnist-small": 1, "mnist": 1}
#: A cell of the grid has this share of the seconds, and of a program's steps.
GRID_SHARE = {**dict.fromkeys(SECONDS, 1.0), "mnist-small": 0.25, "mnist": 0.25}

DEFAULT, TUNED = "default", "tuned"
GRID = tuple(f"grid-{i}" for i in range(4))
#: Groups of settings, as the command line names them.
GROUPS = {"default": (DEFAULT,), "grid": GRID, "tuned": (TUNED,)}

_SMOKE_SECONDS, _SMOKE_STEPS = 300.0, 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One training run.

    Attributes:
      data: name of the data set.
      method: name of the method.
      setting: "default", "grid-0" to "grid-3", or "tuned".
      seed: of weights, batches and noise.
      size: "full", or "smoke": a few steps of small networks, to see that all runs.
    """

    data: str
    method: str
    setting: str = DEFAULT
    seed: int = 0
    size: Size = "full"

    @property
    def share(self) -> float:
        """Share of the full seconds that the cell has."""
        return GRID_SHARE[self.data] if self.setting in GRID else 1.0

    @property
    def smoke(self) -> bool:
        return self.size == "smoke"

    @property
    def seconds(self) -> float:
        """Seconds of the clock after which training ends."""
        return _SMOKE_SECONDS if self.smoke else self.share * SECONDS[self.data]

    @property
    def most_steps(self) -> int | None:
        """Steps after which training ends; None: as many as come."""
        return _SMOKE_STEPS if self.smoke else None

    def folder(self, out: Path) -> Path:
        """Where the cells of the data set lie."""
        return folder(out, self.data, self.size)

    def record(self, out: Path) -> Path:
        """The file of what was found."""
        return self.folder(out) / f"{self.method}-{self.setting}-{self.seed}.json"

    def data_file(self, out: Path) -> Path:
        """The file of the data set."""
        return self.folder(out) / "data.npz"

    def options(self, grid_setting: int | None = None) -> Options:
        """Return the method's options; those of a tuned cell are the grid's chosen ones."""
        method = METHODS[self.method]
        if self.setting in GRID:
            grid_setting = GRID.index(self.setting)
        chosen = method.default if grid_setting is None else method.grid[grid_setting]
        return {**method.options, **chosen}

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        return cls(**json.loads(text))

    def __str__(self) -> str:
        return f"{self.data}, {self.method}, {self.setting}, seed {self.seed}"


def folder(out: Path, data: str, size: Size) -> Path:
    """Return where the cells of a data set lie."""
    return out / data if size == "full" else out / size / data


def plan(
    data: Sequence[str],
    methods: Sequence[str],
    groups: Sequence[str],
    seeds: int | None,
    size: Size,
) -> Iterator[Cell]:
    """Yield the cells, those most worth having first: defaults, grids, what they choose, seeds.

    Args:
      data, methods: names.
      groups: of :data:`GROUPS`.
      seeds: how many; None: :data:`SEEDS`.
      size: of the cells.
    """
    for name in data:
        known = [method for method in methods if method in methods_on(name)]
        count = SEEDS[name] if seeds is None else seeds
        rounds = [(DEFAULT, 0), *((setting, 0) for setting in GRID), (TUNED, 0)]
        rounds += [(setting, seed) for seed in range(1, count) for setting in (DEFAULT, TUNED)]
        asked = {setting for group in groups for setting in GROUPS[group]}
        for setting, seed in rounds:
            for method in known if setting in asked else ():
                yield Cell(data=name, method=method, setting=setting, seed=seed, size=size)
