"""Image data sets against TFDS's own decoder, and what is refused of a user's files."""

import importlib.util
import shutil

import numpy as np
import pytest
from tfds_data import tfds_dir

from train import images
from train.data import load_dataset
from train.images import DataError, prepared_folder, read_npz

SHAPES = {"mnist": (28, 28, 1), "cifar10": (32, 32, 3)}


@pytest.mark.parametrize("name", SHAPES)
def test_images_and_labels_are_those_that_tfds_decodes(name):
    import tensorflow_datasets as tfds

    folder = tfds_dir(name)
    dataset = load_dataset(name, data_dir=folder, max_examples=20)
    builder = tfds.builder_from_directory(str(prepared_folder(name, folder)))
    total = builder.info.splits["train"].num_examples
    starts = {"train": ("train", 0), "validation": ("train", total - 2000), "test": ("test", 0)}
    for split, (source, start) in starts.items():
        records = builder.as_data_source(split=source).__getitems__(range(start, start + 20))
        got = getattr(dataset, split)
        assert got.dtype == np.uint8 and got.shape == (20, *SHAPES[name])
        np.testing.assert_array_equal(got, np.stack([r["image"] for r in records]))
        np.testing.assert_array_equal(dataset.labels(split), [r["label"] for r in records])
    assert dataset.num_levels == 256 and dataset.num_classes == 10


def test_splits_have_the_stated_sizes(monkeypatch):
    decoded = []

    def count(tfds, builder, split, indices):
        decoded.append((split, indices))
        return np.zeros((1, 28, 28, 1), np.uint8), np.zeros(1, np.int32)

    monkeypatch.setattr(images, "_decode", count)
    load_dataset("mnist", data_dir=tfds_dir("mnist"))
    assert decoded == [
        ("train", range(58_000)),
        ("train", range(58_000, 60_000)),
        ("test", range(10_000)),
    ]


def test_the_newest_version_is_taken(tmp_path):
    for version in ("3.0.1", "3.10.0", "3.9.0"):
        (tmp_path / "mnist" / version).mkdir(parents=True)
        (tmp_path / "mnist" / version / "dataset_info.json").write_text("{}")
    assert prepared_folder("mnist", tmp_path).name == "3.10.0"
    assert prepared_folder("cifar10", tmp_path) is None


@pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is not None,
    reason="TensorFlow is here: it would be prepared",
)
def test_what_is_not_prepared_is_refused_with_the_commands(tmp_path, monkeypatch):
    with pytest.raises(DataError) as error:
        load_dataset("cifar100", data_dir=tmp_path)
    message = str(error.value)
    assert f"'cifar100' is not prepared in {tmp_path}" in message
    assert "pip install -e '.[prepare]'" in message
    assert f"python -m train prepare --dataset cifar100 --data-dir {tmp_path}" in message
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "elsewhere"))
    with pytest.raises(DataError, match="elsewhere"):
        load_dataset("cifar100")


@pytest.mark.parametrize("content", [None, b"no records"])
def test_damaged_data_are_refused_with_their_folder(content, tmp_path):
    prepared = prepared_folder("mnist", tfds_dir("mnist"))
    folder = tmp_path / "mnist" / prepared.name
    folder.mkdir(parents=True)
    for path in prepared.iterdir():
        if path.suffix == ".json":
            shutil.copyfile(path, folder / path.name)
        elif content is not None:
            (folder / path.name).write_bytes(content)
    with pytest.raises(DataError, match="'mnist' cannot be read from") as error:
        load_dataset("mnist", data_dir=tmp_path, max_examples=2)
    assert str(folder) in str(error.value)


def save(path, **arrays):
    np.savez(path, **arrays)
    return path


def some_images(count, channels=()):
    return np.random.default_rng(0).integers(256, size=(count, 4, 6, *channels), dtype=np.uint8)


def test_a_file_of_images_is_split_by_a_fixed_permutation(tmp_path):
    pixels, labels = some_images(50), np.arange(50) % 3
    path = save(tmp_path / "mine.npz", images=pixels, labels=labels)
    dataset, again = load_dataset(str(path)), load_dataset(str(path))
    assert dataset.name == "mine.npz" and dataset.example_shape == (4, 6, 1)
    assert [len(x) for x in (dataset.train, dataset.validation, dataset.test)] == [40, 5, 5]
    assert dataset.num_classes == 3
    together = np.concatenate([dataset.train, dataset.validation, dataset.test])[..., 0]
    assert {x.tobytes() for x in together} == {x.tobytes() for x in pixels}
    place = {x.tobytes(): label for x, label in zip(pixels, labels, strict=True)}
    assert [place[x[..., 0].tobytes()] for x in dataset.test] == list(dataset.labels("test"))
    np.testing.assert_array_equal(dataset.train, again.train)


def test_a_file_may_bring_its_own_splits_and_no_labels(tmp_path):
    splits = {f"{s}_images": some_images(3 + i, (3,)) for i, s in enumerate(images._SPLITS)}
    dataset = load_dataset(str(save(tmp_path / "mine.npz", **splits)))
    for split in images._SPLITS:
        np.testing.assert_array_equal(getattr(dataset, split), splits[f"{split}_images"])
    with pytest.raises(ValueError, match=r"'mine\.npz' has no labels"):
        dataset.labels("train")


BAD_FILES = [
    ({}, "no array 'train_images'; it has none"),
    ({"pictures": some_images(3)}, "no array 'train_images'; it has pictures"),
    ({"images": some_images(3).astype(float)}, "'images' must be uint8.*got float64"),
    ({"images": some_images(3)[0]}, r"shape \[n, height, width\].*got \(4, 6\)"),
    ({"images": some_images(2)}, "three images are the fewest.*got 2"),
    ({"images": some_images(4), "labels": np.arange(3)}, r"shape \(4,\); got \(3,\)"),
    ({"images": some_images(4), "labels": np.arange(4) - 1}, r"integers in \[0, .*got -1 to 2"),
    ({"images": some_images(4), "labels": np.full(4, 2**31)}, "2147483647.; got 2147483648 to"),
    ({"images": some_images(4), "labels": np.array(list("abcd"))}, "integers ≥ 0; got <U1"),
    ({"images": some_images(4), "labels": np.zeros(4)}, "integers ≥ 0; got float64"),
    (
        {f"{s}_images": some_images(3) for s in images._SPLITS} | {"train_labels": np.arange(3)},
        "no validation_labels and no test_labels",
    ),
    (
        {f"{s}_images": some_images(3) for s in images._SPLITS[:2]}
        | {"test_images": some_images(3, (3,))},
        r"'test': examples have shape \(4, 6, 3\), those of 'train' \(4, 6, 1\)",
    ),
]


@pytest.mark.parametrize(("arrays", "message"), BAD_FILES)
def test_files_of_another_kind_are_refused(arrays, message, tmp_path):
    path = save(tmp_path / "bad.npz", **arrays)
    with pytest.raises(DataError, match=message) as error:
        read_npz(path)
    assert str(path) in str(error.value)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    whole = save(tmp_path / "whole.npz", images=some_images(40)).read_bytes()
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "text.npz").write_text("no zip")
    (tmp_path / "cut.npz").write_bytes(whole[:400])
    (tmp_path / "flipped.npz").write_bytes(whole[:400] + bytes([whole[400] ^ 1]) + whole[401:])
    with (tmp_path / "array.npz").open("wb") as file:
        np.save(file, some_images(40))
    for name in ("missing", "empty", "text", "cut", "flipped", "array"):
        with pytest.raises(DataError, match=rf"{name}\.npz cannot be read as an \.npz file"):
            read_npz(tmp_path / f"{name}.npz")
