"""Data sets small enough to carry along, and the order in which training visits them.

NumPy only: nothing here touches a device. The two-dimensional sets are drawn, not stored; what
``load_dataset`` returns depends on the name alone, never on a training seed.
"""

import difflib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

Sampler = Callable[[np.random.Generator, int], np.ndarray]

_SPLITS = ("train", "validation", "test")
_POINT_COUNTS = (50_000, 2_000, 10_000)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set in memory, in three fixed splits.

    Attributes:
      name: as ``load_dataset`` knows it.
      train: [n, height, width, channels] grey levels (integers), or [n, dim] points (floats).
      validation: likewise; for choosing and stopping.
      test: likewise; for the final report alone.
      train_labels: [n] class indices, or None; the other splits' labels likewise.
      validation_labels: see ``train_labels``.
      test_labels: see ``train_labels``.
      num_levels: grey levels are the integers 0 … num_levels − 1; None for points.
    """

    name: str
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    train_labels: np.ndarray | None = None
    validation_labels: np.ndarray | None = None
    test_labels: np.ndarray | None = None
    num_levels: int | None = None

    @property
    def example_shape(self) -> tuple[int, ...]:
        """The shape of one example: (height, width, channels), or (dim,)."""
        return self.train.shape[1:]

    @property
    def dim(self) -> int:
        """How many numbers an example has: the divisor of bits per dimension."""
        return math.prod(self.example_shape)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of an image.

        Raises:
          ValueError: for points.
        """
        if not self.is_image:
            raise ValueError(f"data set {self.name!r} holds points, not images.")
        height, width, channels = self.example_shape
        return height, width, channels

    def labels(self, split: str) -> np.ndarray:
        """The labels of "train", "validation" or "test".

        Raises:
          ValueError: where the data set has none.
        """
        labels = getattr(self, f"{split}_labels")
        if labels is None:
            raise ValueError(f"data set {self.name!r} has no labels.")
        return labels

    @property
    def is_image(self) -> bool:
        """Whether examples are images [height, width, channels] of grey levels."""
        return self.num_levels is not None


def dataset_names() -> tuple[str, ...]:
    """The names that :func:`load_dataset` takes."""
    return ("digits", *_SAMPLERS)


def load_dataset(name: str) -> Dataset:
    """The data set of that name, checked; the same arrays at every call.

    "digits" is scikit-learn's 1,797 images, uint8 [n, 8, 8, 1] of 17 grey levels, with labels,
    split 1,257 / 180 / 360. The others are float32 points [n, 2], 50,000 / 2,000 / 10,000.

    Raises:
      ValueError: if there is no such data set, naming those there are.
    """
    if name == "digits":
        dataset = _load_digits()
    elif name in _SAMPLERS:
        dataset = _draw_points(name)
    else:
        raise ValueError(unknown_dataset(name, dataset_names()))
    check_dataset(dataset)
    return dataset


def check_dataset(dataset: Dataset) -> None:
    """Refuse data that training could not survive.

    Raises:
      ValueError: if a split is empty or its examples have another shape than the training
        examples; if labels are not one an example; if an example has a NaN or infinite value;
        if images are not integers in [0, num_levels − 1]. Names the split and the first
        offending example.
    """
    for split in _SPLITS:
        examples = getattr(dataset, split)
        place = f"data set {dataset.name!r}, split {split!r}"
        _check_shape(examples, dataset.example_shape, place)
        _check_labels(examples, getattr(dataset, f"{split}_labels"), place)
        _check_finite(examples, place)
        if dataset.num_levels is not None:
            _check_levels(examples, dataset.num_levels, place)


def epoch_batches(
    num_examples: int, batch_size: int, seed: int, *, start_step: int = 0
) -> Iterator[np.ndarray]:
    """Endless batches of example indices: a fresh permutation each epoch, the remainder dropped.

    The batch at a step is a function of (seed, step) alone, so an interrupted run that starts
    again at ``start_step`` sees exactly what it would have seen.

    Args:
      num_examples: indices lie in [0, num_examples).
      batch_size: in [1, num_examples].
      seed: of the permutations, ≥ 0.
      start_step: the step whose batch comes first, ≥ 0.

    Returns:
      An iterator of int64 arrays [batch_size]. Within an epoch no index occurs twice.

    Raises:
      ValueError: at the call, if an argument is outside its range.
    """
    check_batch_size(num_examples, batch_size)
    if seed < 0 or start_step < 0:
        raise ValueError(f"seed and start_step must be ≥ 0; got {seed} and {start_step}.")
    return _batches(num_examples, batch_size, seed, start_step)


def check_batch_size(num_examples: int, batch_size: int) -> None:
    """Refuse a batch that the data set cannot fill.

    Raises:
      ValueError: unless 1 ≤ ``batch_size`` ≤ ``num_examples``.
    """
    if not 1 <= batch_size <= num_examples:
        raise ValueError(
            f"batch_size must lie in [1, {num_examples}], the number of training examples "
            f"(num_examples); got batch_size {batch_size}."
        )


def _batches(num_examples, batch_size, seed, start_step):
    batches_per_epoch = num_examples // batch_size
    epoch, first = divmod(start_step, batches_per_epoch)
    while True:
        order = np.random.default_rng((seed, epoch)).permutation(num_examples)
        for index in range(first, batches_per_epoch):
            yield order[index * batch_size : (index + 1) * batch_size]
        epoch, first = epoch + 1, 0


def eight_gaussians(rng: np.random.Generator, n: int) -> np.ndarray:
    """Eight equal Gaussians, standard deviation 0.3, evenly on the circle of radius 3."""
    angle = rng.integers(8, size=n) * (np.pi / 4)
    return _points(3 * _on_circle(angle) + 0.3 * rng.standard_normal((n, 2)))


def moons(rng: np.random.Generator, n: int) -> np.ndarray:
    """Two interleaved half circles of radius 2, with Gaussian noise of 0.2.

    Angles are uniform; scikit-learn's ``make_moons`` spaces them evenly, which is no i.i.d. sample.
    """
    side = rng.choice((-1.0, 1.0), size=(n, 1))
    half_circle = 2 * _on_circle(rng.uniform(0, np.pi, n)) - (1.0, 0.5)
    return _points(side * half_circle + 0.2 * rng.standard_normal((n, 2)))


def checkerboard(rng: np.random.Generator, n: int) -> np.ndarray:
    """Uniform on the 8 squares of a 4×4 board over [−4, 4]² whose row + column is even.

    The density there is 1/32: the entropy is exactly 5 bits, 2.5 bits per dimension.
    """
    column = rng.integers(4, size=n)
    row = 2 * rng.integers(2, size=n) + column % 2
    corner = np.stack([column, row], axis=1)
    return _points(2 * (corner + rng.random((n, 2))) - 4)


def spirals(rng: np.random.Generator, n: int) -> np.ndarray:
    """Two arms of one and a half turns out to radius 3.6, with Gaussian noise of 0.1."""
    side = rng.choice((-1.0, 1.0), size=(n, 1))
    way = np.sqrt(rng.random(n))  # the root keeps the density along the arm nearly even
    arm = 3.6 * way[:, None] * _on_circle(3 * np.pi * way)
    return _points(side * arm + 0.1 * rng.standard_normal((n, 2)))


def rings(rng: np.random.Generator, n: int) -> np.ndarray:
    """Four concentric rings of equal weight: radii 0.9, 1.8, 2.7, 3.6, radial noise of 0.08."""
    radius = 0.9 * rng.integers(1, 5, size=n) + 0.08 * rng.standard_normal(n)
    return _points(radius[:, None] * _on_circle(rng.uniform(0, 2 * np.pi, n)))


def pinwheel(rng: np.random.Generator, n: int) -> np.ndarray:
    """Five Gaussian blades, sheared by an angle that grows with the radius."""
    radius = 2 + 0.6 * rng.standard_normal(n)
    across = 0.2 * rng.standard_normal(n)
    angle = rng.integers(5, size=n) * (2 * np.pi / 5) + 0.25 * np.exp(radius / 2)
    return _points(
        radius[:, None] * _on_circle(angle) + across[:, None] * _on_circle(angle + np.pi / 2)
    )


_SAMPLERS: dict[str, Sampler] = {
    "8gaussians": eight_gaussians,
    "moons": moons,
    "checkerboard": checkerboard,
    "spirals": spirals,
    "rings": rings,
    "pinwheel": pinwheel,
}


def _on_circle(angle):
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _points(x):
    return x.astype(np.float32)


def _draw_points(name):
    streams = np.random.default_rng(0).spawn(len(_SPLITS))
    splits = [_SAMPLERS[name](rng, n) for rng, n in zip(streams, _POINT_COUNTS, strict=True)]
    train, validation, test = splits
    return Dataset(name, train, validation, test)


def _load_digits():
    from sklearn.datasets import load_digits  # takes a second to import

    bunch = load_digits()
    images, labels = bunch.images[..., None].astype(np.uint8), bunch.target
    order = np.random.default_rng(0).permutation(len(images))
    train, validation, test = np.split(order, [len(order) - 540, len(order) - 360])
    return Dataset(
        "digits",
        *(images[train], images[validation], images[test]),
        *(labels[train], labels[validation], labels[test]),
        num_levels=17,
    )


def unknown_dataset(name: str, known: Iterable[str]) -> str:
    """What to say of a data set that is none of the ``known`` ones."""
    known = tuple(known)
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"There is no data set {name!r}.{hint} Known: {', '.join(known)}."


def _check_shape(examples, example_shape, place):
    if len(examples) == 0:
        raise ValueError(f"{place}: there are no examples.")
    if examples.shape[1:] != example_shape:
        raise ValueError(
            f"{place}: examples have shape {examples.shape[1:]}, those of 'train' {example_shape}."
        )


def _check_labels(examples, labels, place):
    if labels is not None and labels.shape != (len(examples),):
        raise ValueError(
            f"{place}: labels have shape {labels.shape}, but there are {len(examples)} examples."
        )


def _check_finite(examples, place):
    bad = _first_example(~np.isfinite(examples))
    if bad is not None:
        value = examples[bad][~np.isfinite(examples[bad])][0]
        raise ValueError(f"{place}: example {bad} has the value {value}; all must be finite.")


def _check_levels(examples, num_levels, place):
    if not np.issubdtype(examples.dtype, np.integer):
        raise ValueError(
            f"{place}: images must be integer grey levels (uint8); got {examples.dtype}."
        )
    outside = (examples < 0) | (examples >= num_levels)
    bad = _first_example(outside)
    if bad is not None:
        value = examples[bad][outside[bad]][0]
        raise ValueError(
            f"{place}: example {bad} has the grey level {value}, outside [0, {num_levels - 1}]."
        )


def _first_example(mask):
    """Index of the first example with a True anywhere, or None."""
    hits = mask.reshape(len(mask), -1).any(axis=1)
    return int(np.argmax(hits)) if hits.any() else None
