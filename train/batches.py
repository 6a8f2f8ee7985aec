"""Batches by Grain: shuffled by a seed, split over processes, prefetched, resumed exactly."""

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
    if seed < 0:
        raise ValueError(f"seed must be ≥ 0; got {seed}.")
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
