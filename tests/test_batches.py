"""Batches: every epoch a permutation, shared by processes, resumed exactly."""

import jax
import numpy as np
import pytest
from helpers import rest_slow

from train import data
from train.batches import batch_iterator
from train.data import Dataset


def numbered(count):
    """Images whose only pixel is their number, which is also their label."""
    images = np.arange(count, dtype=np.uint8).reshape(count, 1, 1, 1)
    labels = np.arange(count)
    return Dataset("numbered", *[images] * 3, *[labels] * 3, num_levels=256, classes=count)


def iterate(count, batch_size, seed=0, **options):
    return batch_iterator(numbered(count), batch_size, seed, with_labels=True, **options)


def take(iterator, count):
    """The numbers of the next batches, [count, batch]."""
    batches = [next(iterator) for _ in range(count)]
    for images, labels in batches:
        np.testing.assert_array_equal(images.ravel(), labels)
    return np.stack([labels for _, labels in batches])


def test_every_epoch_is_another_permutation():
    epochs = take(iterate(20, 4), 15).reshape(3, 20)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(20))
    assert len({epoch.tobytes() for epoch in epochs}) == 3


def test_the_remainder_of_an_epoch_is_dropped():
    batches = take(iterate(11, 5), 4)
    for epoch in (batches[:2].ravel(), batches[2:].ravel()):
        assert len(set(epoch)) == 10


#: Of 20 examples: dividing, not dividing, one batch an epoch.
SIZES = [4, 7, 20]


@pytest.mark.parametrize("batch_size", rest_slow(SIZES, 7))
@pytest.mark.parametrize("done", [0, 1, 5, 13])
def test_a_restored_iterator_goes_on_where_the_saved_one_stood(batch_size, done):
    saved, fresh = iterate(20, batch_size, seed=3), iterate(20, batch_size, seed=3)
    for _ in range(done):
        next(saved)
    fresh.set_state(saved.get_state())
    np.testing.assert_array_equal(take(fresh, 9), take(saved, 9))


def test_the_seed_decides():
    one, same, other = (take(iterate(50, 10, seed), 5) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert np.any(one != other)


def test_processes_share_each_batch_in_order():
    whole = take(iterate(30, 6), 8)
    parts = [take(iterate(30, 6, process_index=i, process_count=3), 8) for i in range(3)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


def test_examples_alone():
    batch = next(batch_iterator(numbered(9), 3, 0, with_labels=False))
    assert batch.shape == (3, 1, 1, 1) and batch.dtype == np.uint8


@pytest.mark.parametrize("batch_size", [0, -3, 21])
def test_an_impossible_batch_size_is_refused_at_the_call(batch_size):
    with pytest.raises(ValueError, match=rf"\[1, 20\].*got batch_size {batch_size}\."):
        iterate(20, batch_size)


def test_labels_that_are_not_there_are_refused_at_the_call():
    images = np.zeros((9, 1, 1, 1), np.uint8)
    dataset = Dataset("bare", images, images, images, num_levels=256)
    with pytest.raises(ValueError, match="'bare' has no labels"):
        batch_iterator(dataset, 3, 0, with_labels=True)


def test_what_cannot_be_shared_is_refused():
    with pytest.raises(ValueError, match="multiple of the number of processes, 2; got 5"):
        iterate(20, 5, process_count=2)


@pytest.mark.parametrize("seed", [-1, data.MAX_SEED + 1, 2**32, 2**63, 2**70])
def test_a_seed_that_would_be_another_is_refused(seed):
    """Keys have 32 bits: 2³² would train as 0."""
    with pytest.raises(ValueError, match=rf"\[0, {data.MAX_SEED}\]; got {seed}"):
        data.check_seed(seed)
    top = [jax.random.key_data(jax.random.key(data.MAX_SEED + i)) for i in range(4)]
    assert len({tuple(map(int, words)) for words in top}) == 4
