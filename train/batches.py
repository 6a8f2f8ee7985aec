"""Batches by Grain: shuffled by a seed, shared by processes, made ahead, resumed exactly."""

import grain
import numpy as np

from train.data import Dataset, check_batch_size

_AHEAD = 16


def batch_iterator(
    dataset: Dataset,
    batch_size: int,
    seed: int,
    *,
    with_labels: bool,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """Make endless batches: a fresh permutation each epoch, its remainder dropped.

    Indices are shuffled; examples are gathered a batch at a time, ahead of use, in the background.
    The iterator's ``get_state()`` and ``set_state()`` resume it exactly.

    Args:
      dataset: in memory.
      batch_size: of the global batch.
      seed: of the permutations, ≥ 0.
      with_labels: whether a batch is (examples, labels), or examples alone.
      process_index: whose part of each global batch is made.
      process_count: processes that share a batch in equal, contiguous parts.

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
    share = batch_size // process_count
    mine = slice(process_index * share, (process_index + 1) * share)
    labels = dataset.labels("train") if with_labels else None

    def gather(indices: np.ndarray):
        chosen = indices[mine]
        examples = dataset.train[chosen]
        return examples if labels is None else (examples, labels[chosen])

    indices = grain.MapDataset.range(len(dataset.train)).seed(seed).shuffle()
    batches = indices.batch(batch_size, drop_remainder=True).repeat(None).map(gather)
    ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_AHEAD)
    return iter(batches.to_iter_dataset(ahead))
