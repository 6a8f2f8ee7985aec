"""The data: the same arrays for every method, with the same noise where values repeat."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

Floats = np.ndarray

#: Data sets -> the name in ``train.data``; tables come from scikit-learn.
PLANES: Mapping[str, str] = {
    "checkerboard": "checkerboard",
    "spirals": "spirals",
    "gaussians": "8gaussians",
}
#: The bundled sets of continuous measurements with the most columns, and so the most to model:
#: 569 × 30 and 178 × 13. Columns of diabetes are binary or mostly whole numbers; iris has four.
TABLES: Mapping[str, str] = {"breast-cancer": "load_breast_cancer", "wine": "load_wine"}
#: MNIST is one data set for networks of two sizes.
IMAGES: Mapping[str, str] = {"digits": "digits", "mnist-small": "mnist", "mnist": "mnist"}
#: Those most worth having first.
DATA = (
    *("checkerboard", "digits", "breast-cancer", "mnist-small"),
    *("spirals", "gaussians", "wine", "mnist"),
)

#: Validation and test; the rest of a table is trained on.
_TABLE_SHARES = (0.15, 0.25)
#: Of the noise of images held out, where dimensions are few.
_DRAWS, _FEW_DIMENSIONS = 2, 64
#: MNIST while training runs; the last value is that of all test images.
_WATCHED, _VALIDATED = 500, 250
_SMOKE = (150, 20, 12)
_LEAST_SCALE = 0.25
_MOST_STANDARDIZED = 10_000  # examples, whose means and scales are taken


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """Examples, as they are evaluated.

    Attributes:
      points: [draws of the noise, examples, dim]; of images, (k + u)/n in [0, 1] for levels k.
      levels: grey levels [examples, height, width, channels]; None for points.
    """

    points: Floats
    levels: np.ndarray | None = None

    def first(self, count: int | None) -> "Split":
        """Return the first examples."""
        levels = None if self.levels is None else self.levels[:count]
        return Split(self.points[:, :count], levels)


#: Examples -> their bits per dimension, [draws, examples].
Bits = Callable[[Split], Floats]


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """A data set in three fixed splits.

    Attributes:
      train, validation, test: the splits.
      num_levels: of images; None for points.
    """

    train: Split
    validation: Split
    test: Split
    num_levels: int | None = None

    @classmethod
    def of(cls, splits: Sequence[Split], num_levels: int | None = None) -> Self:
        """Return the problem of training, validation and test examples."""
        train, validation, test = splits
        return cls(train, validation, test, num_levels)

    @property
    def dim(self) -> int:
        """Dimensions of an example."""
        return int(self.test.points.shape[-1])

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels); a ValueError for points."""
        if self.test.levels is None:
            raise ValueError("These are points, not images.")
        height, width, channels = self.test.levels.shape[1:]
        return height, width, channels

    def drawn(self, rng: np.random.Generator, places: Any = slice(None)) -> Floats:
        """Return training points [n, dim], images with new noise within their levels.

        Args:
          rng: of the noise.
          places: of the examples; all by default.
        """
        if self.train.levels is None or self.num_levels is None:
            return self.train.points[0][places]
        return noisy(self.train.levels[places], self.num_levels, rng)

    def bits_of(self, log_prob: Callable[[Floats], Floats]) -> Bits:
        """Return bits per dimension by a function points [n, dim] -> log p in nats [n]."""
        offset = 0.0 if self.num_levels is None else math.log2(self.num_levels)

        def bits(split: Split) -> Floats:
            nats = log_prob(split.points.reshape(-1, self.dim)).astype(np.float64)
            return offset - nats.reshape(split.points.shape[:2]) / (self.dim * math.log(2.0))

        return bits

    def judged(self, bits: Bits, *, whole: bool) -> dict[str, Any]:
        """Return the mean bits per dimension of test and validation examples, and what they are of.

        In more than 64 dimensions they are of the first examples, unless of the ``whole`` test set.
        ``stderr`` is over the noise, with the examples fixed: 0 where there is none, and of a
        single draw over the examples, which includes it.
        """
        most = None if self.dim <= _FEW_DIMENSIONS else _WATCHED
        test = bits(self.test.first(None if whole else most))
        validation = bits(self.validation.first(most and _VALIDATED))
        return {
            "test": float(test.mean()),
            "stderr": 0.0 if self.num_levels is None else stderr(test),
            "validation": float(validation.mean()),
            "whole": whole or most is None or test.shape[1] == self.test.points.shape[1],
        }

    def save(self, path: Path) -> None:
        """Write all arrays into one file."""
        arrays: dict[str, Any] = {"num_levels": self.num_levels or 0}
        for name in ("train", "validation", "test"):
            split: Split = getattr(self, name)
            arrays[f"{name}_points"] = split.points
            if split.levels is not None:
                arrays[f"{name}_levels"] = split.levels
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, **arrays)
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what :meth:`save` wrote."""
        with np.load(path) as arrays:
            splits = [
                Split(arrays[f"{name}_points"], arrays.get(f"{name}_levels"))
                for name in ("train", "validation", "test")
            ]
            return cls.of(splits, int(arrays["num_levels"]) or None)


def stderr(bits: Floats) -> float:
    """Return the standard error of the mean of ``bits`` [draws, examples].

    It is over independent draws with the examples fixed, √(Σᵢ sᵢ²/m)/n; of a single draw over the
    examples, noise included, and so larger.
    """
    draws, examples = bits.shape
    if draws > 1:
        return float(np.sqrt(bits.var(axis=0, ddof=1).sum() / draws) / examples)
    return float(bits.std(ddof=1) / math.sqrt(examples)) if examples > 1 else math.inf


def noisy(levels: np.ndarray, num_levels: int, rng: np.random.Generator) -> Floats:
    """Return (k + u)/n, u uniform in [0, 1), as float32 vectors [examples, dim]."""
    flat = levels.reshape(len(levels), -1)
    return ((flat + rng.random(flat.shape, np.float32)) / num_levels).astype(np.float32)


def read(name: str, *, smoke: bool = False) -> Problem:
    """Read a data set; every call returns the same arrays.

    Raises:
      ValueError: for an unknown name, listing the known ones; for images that cannot be read.
    """
    if name not in DATA:
        raise ValueError(f"data must be of {', '.join(DATA)}; got {name!r}.")
    counts = _SMOKE if smoke else (None, None, None)
    if name in TABLES:
        rows = zip(_table(name), counts, strict=True)
        return Problem.of([Split(part[None, :count]) for part, count in rows])
    from train.data import load_dataset

    data = load_dataset({**PLANES, **IMAGES}[name])
    arrays = [getattr(data, split) for split in ("train", "validation", "test")]
    arrays = [part[:count] for part, count in zip(arrays, counts, strict=True)]
    if data.num_levels is None:
        return Problem.of([Split(part[None]) for part in arrays])
    rng = np.random.default_rng(0)
    splits = []
    for part in arrays:
        draws = _DRAWS if data.dim <= _FEW_DIMENSIONS else 1
        points = np.stack([noisy(part, data.num_levels, rng) for _ in range(draws)])
        splits.append(Split(points, part))
    return Problem.of(splits, data.num_levels)


def _table(name: str) -> list[Floats]:
    """Training, validation and test rows, float32, with noise of each column's resolution."""
    from sklearn import datasets

    values = getattr(datasets, TABLES[name])().data
    rng = np.random.default_rng(0)
    wide = values + resolution(values) * (rng.random(values.shape) - 0.5)
    order = rng.permutation(len(values))
    held = np.cumsum([round(share * len(values)) for share in _TABLE_SHARES])
    validation, test, train = np.split(order, held)
    return [wide[part].astype(np.float32) for part in (train, validation, test)]


def resolution(values: Floats) -> Floats:
    """Return the finest decimal step in which each column of a table [rows, columns] is given."""

    def decimals(value: float) -> int:
        fraction = np.format_float_positional(value, trim="-").partition(".")[2]
        return len(fraction)

    return np.array([10.0 ** -max(map(decimals, column)) for column in values.T])


@dataclasses.dataclass(frozen=True, eq=False)
class Entrance:
    """What points pass before a peer's network: (y − mean)/scale with y = logit(α + (1 − 2α)x).

    Attributes:
      mean, scale: [dim].
      alpha: of the logit; None: y = x.
    """

    mean: Floats
    scale: Floats
    alpha: float | None = None

    @classmethod
    def of(cls, problem: Problem, *, standardize: bool = True) -> Self:
        """Return that of a problem: a logit for images, α = 0.05; training data standardised.

        A pixel's scale is at least a quarter of that of all: ink is rare at the margin, and would
        be many standard deviations away.
        """
        alpha = None if problem.num_levels is None else 0.05
        none = cls(np.zeros(problem.dim), np.ones(problem.dim), alpha)
        if not standardize:
            return none
        y = none(problem.train.points[0][:_MOST_STANDARDIZED])
        scale = y.std(axis=0, dtype=np.float64)
        if alpha is not None:
            scale = np.maximum(scale, _LEAST_SCALE * y.std(dtype=np.float64))
        return cls(y.mean(axis=0, dtype=np.float64), scale, alpha)

    def __call__(self, points: Floats) -> Floats:
        """Return what the network sees, float32 [n, dim]."""
        y = np.asarray(points, np.float64)
        if self.alpha is not None:
            inner = self.alpha + (1.0 - 2.0 * self.alpha) * y
            y = np.log(inner) - np.log1p(-inner)
        return ((y - self.mean) / self.scale).astype(np.float32)

    def log_det(self, points: Floats) -> Floats:
        """Return the log-determinants in nats, float64 [n]."""
        total = np.full(len(points), -np.log(self.scale).sum())
        if self.alpha is None:
            return total
        slope = 1.0 - 2.0 * self.alpha
        inner = self.alpha + slope * np.asarray(points, np.float64)
        return total + (math.log(slope) - np.log(inner) - np.log1p(-inner)).sum(axis=1)


def in_parts(function: Callable[[Floats], Floats], x: Floats, size: int) -> Floats:
    """Return ``function`` of parts of equal size, joined; the last is filled with its last row."""
    parts = []
    for start in range(0, len(x), size):
        rows = np.minimum(np.arange(start, start + min(size, len(x))), len(x) - 1)
        parts.append(np.asarray(function(x[rows]), np.float64))
    return np.concatenate(parts)[: len(x)]
