"""Batches by Grain: shuffled by a seed, split over processes, prefetched, resumed exactly.

Where Grain is not installed, NumPy shuffles: other permutations, and nothing is read ahead.
"""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from train.data import Dataset, check_batch_size, check_seed

_AHEAD = 16
_NUMPY_STATE = "numpy_batches"


class Batches(Protocol):
    """An endless iterator over batches, whose state can be taken and set again."""

    def __next__(self) -> Any:
        """Return the next batch."""

    def get_state(self) -> dict[str, Any]:
        """Return where it stands, for JSON."""

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from such a state."""


def batch_iterator(
    dataset: Dataset,
    batch_size: int,
    seed: int,
    *,
    with_labels: bool,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Iterate over the training set for ever: a new permutation each epoch, the remainder dropped.

    Indices are shuffled; images are gathered a batch at a time, ahead of use, in the background.
    The iterator's ``get_state()`` and ``set_state()`` resume it exactly.

    A batch is (examples, labels) ``with_labels``, else examples alone. Each process makes an equal,
    contiguous part of every global batch of ``batch_size`` examples.

    Raises:
      ValueError: for a batch that the data cannot fill or the processes cannot share; for labels
        that the data set does not have.
    """
    check_batch_size(len(dataset.train), batch_size)
    if batch_size % process_count:
        raise ValueError(
            f"batch_size must be a multiple of the number of processes, {process_count}; "
            f"got {batch_size}."
        )
    if not 0 <= process_index < process_count:
        raise ValueError(
            f"process_index must lie in [0, {process_count - 1}], by the number of processes; "
            f"got {process_index}."
        )
    check_seed(seed)
    share = batch_size // process_count
    mine = slice(process_index * share, (process_index + 1) * share)

    labels = dataset.labels("train") if with_labels else None

    def gather(indices: np.ndarray):
        chosen = indices[mine]
        examples = dataset.train[chosen]
        return examples if labels is None else (examples, labels[chosen])

    try:
        import grain
    except ImportError:
        print("grain is not installed: NumPy shuffles the batches, and reads none ahead.")
        return _NumPyBatches(len(dataset.train), batch_size, seed, gather)
    indices = grain.MapDataset.range(len(dataset.train)).seed(seed).shuffle()
    batches = indices.batch(batch_size, drop_remainder=True).repeat(None).map(gather)
    ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_AHEAD)
    return _GrainBatches(iter(batches.to_iter_dataset(ahead)))


class _GrainBatches:
    """Grain's iterator, which refuses the state of another kind of batches."""

    def __init__(self, batches: Any):
        self._batches = batches

    def __next__(self) -> Any:
        return next(self._batches)

    def get_state(self) -> dict[str, Any]:
        state: dict[str, Any] = self._batches.get_state()
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        if _NUMPY_STATE in state:
            raise ValueError(
                "The batches of this run were shuffled without Grain, which is installed now: "
                "resume it where Grain is not, or pass --restart."
            )
        self._batches.set_state(state)


class _NumPyBatches:
    """Batches of indices, a new permutation each epoch, given to ``gather`` one by one."""

    def __init__(
        self, num_examples: int, batch_size: int, seed: int, gather: Callable[[np.ndarray], Any]
    ):
        self._sizes, self._seed, self._gather = (num_examples, batch_size), seed, gather
        self._taken, self._epoch = 0, -1
        self._order = np.zeros(0, np.int64)

    def __next__(self) -> Any:
        num_examples, batch_size = self._sizes
        epoch, place = divmod(self._taken, num_examples // batch_size)
        if epoch != self._epoch:
            rng = np.random.default_rng((self._seed, epoch))
            self._epoch, self._order = epoch, rng.permutation(num_examples)
        self._taken += 1
        return self._gather(self._order[place * batch_size : (place + 1) * batch_size])

    def get_state(self) -> dict[str, Any]:
        return {_NUMPY_STATE: self._taken}

    def set_state(self, state: dict[str, Any]) -> None:
        if _NUMPY_STATE not in state:
            raise ValueError(
                "The batches of this run were shuffled by Grain, which is not installed: install "
                "it to resume (pip install grain), or pass --restart."
            )
        self._taken = state[_NUMPY_STATE]
