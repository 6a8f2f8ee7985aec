"""A user's own files: levels of any type, labels, points, and archives that claim too much."""

import io
import re
import struct
import zipfile

import numpy as np
import pytest

from train import archives, data, images
from train.__main__ import main
from train.archives import DataError
from train.data import Dataset, load_dataset

RNG = np.random.default_rng(0)


def load(path, **arrays):
    np.savez(path / "own.npz", **arrays)
    return load_dataset(str(path / "own.npz"))


def table(path, text):
    (path / "own.csv").write_text(text, encoding="utf-8")
    return load_dataset(str(path / "own.csv"))


def together(dataset):
    return np.concatenate([dataset.train, dataset.validation, dataset.test])


def assert_same_rows(got, expected):
    np.testing.assert_array_equal(
        got[np.lexsort(got.T)], np.float32(expected)[np.lexsort(np.float32(expected).T)]
    )


# Images


@pytest.mark.parametrize("channels", [1, 2, 5])
@pytest.mark.parametrize(
    ("kind", "stated", "top", "stored"),
    [
        ("uint8", None, 256, "uint8"),
        ("uint8", 17, 17, "uint8"),
        ("uint16", None, 65_536, "uint16"),
        ("uint16", 4_096, 4_096, "uint16"),
        ("bool", None, 2, "uint8"),
        ("float32", 256, 256, "uint8"),
        ("float64", 2**24, 2**24, "int32"),
        ("int64", 1_000, 1_000, "uint16"),
    ],
)
def test_levels_of_every_type_are_kept_exactly(kind, stated, top, stored, channels, tmp_path):
    pixels = RNG.integers(0, top, (10, 3, 5, channels)).astype(kind)
    pixels[0, 0, 0], pixels[0, 0, 1] = 0, top - 1
    dataset = load(tmp_path, images=pixels, **({} if stated is None else {"num_levels": stated}))
    assert dataset.num_levels == top and dataset.train.dtype == stored and dataset.is_image
    got = together(dataset).reshape(10, -1)
    assert {row.tobytes() for row in got} == {
        row.tobytes() for row in pixels.reshape(10, -1).astype(stored)
    }


PIXELS = RNG.random((9, 2, 2, 1))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": PIXELS}, "'images' must be uint8, .* 'num_levels'; got float64"),
        ({"images": PIXELS, "num_levels": 256}, r"whole numbers, .*np\.rint"),
        ({"images": np.full((9, 2, 2), 17), "num_levels": 17}, "from 0 to 16, .*got 17 to 17"),
        ({"images": np.full((9, 2, 2), np.nan), "num_levels": 17}, "got nan to nan"),
        ({"images": np.uint8(PIXELS), "num_levels": 2**24 + 1}, r"2, 16777216\]; got 16777217"),
        ({"images": np.uint8(PIXELS), "num_levels": 2.0}, "one integer; got 2"),
        ({"images": RNG.normal(size=(9, 3))}, r"got \(9, 3\)\. A table .* is named 'points'"),
        ({"images": PIXELS * 1j}, "numbers; got complex128"),
        ({"images": np.uint8(PIXELS), "points": PIXELS[:, 0, :, 0]}, "both 'points' and 'images'"),
    ],
)
def test_images_that_are_no_levels_are_refused(arrays, message, tmp_path):
    with pytest.raises(DataError, match=message):
        load(tmp_path, **arrays)


def test_the_sides_that_the_scales_need_are_told():
    def sized(height, width):
        pixels = np.zeros((1, height, width, 1), np.uint8)
        return Dataset("sized", pixels, pixels, pixels, num_levels=256)

    data.refuse_odd_sides(sized(8, 12), 2)
    for (height, width), told in {
        (28, 28): "28×28 cannot be halved 3 times, .* of 8, such as 32×32; margin = 2 does that",
        (7, 28): "such as 8×32; --margins 0 1 2 2 does that",
        (7, 8): "such as 8×8; --margins 0 1 0 0 does that",
    }.items():
        with pytest.raises(ValueError, match=told):
            data.refuse_odd_sides(sized(height, width), 3)
    for side in range(1, 40):
        before, after = data.needed_margins(side, 3)
        assert (before + side + after) % 8 == 0 and 0 <= before <= after < 5


def test_each_side_can_have_a_margin_of_its_own(tmp_path):
    images = np.arange(1, 1 + 30 * 7 * 5, dtype=np.uint16).reshape(30, 7, 5, 1)
    np.savez(tmp_path / "own.npz", images=images)
    whole = load_dataset(str(tmp_path / "own.npz"))
    padded = load_dataset(str(tmp_path / "own.npz"), margin=(0, 1, 1, 2))
    assert padded.example_shape == (8, 8, 1)
    np.testing.assert_array_equal(padded.train[:, :7, 1:6], whole.train)
    assert padded.train.sum(dtype=np.int64) == whole.train.sum(dtype=np.int64)
    data.refuse_odd_sides(padded, 3)
    for wrong, message in {(1, 2, 3): "top, bottom, left, right", (0, 0, -1, 0): "≥ 0"}.items():
        with pytest.raises(ValueError, match=message):
            load_dataset(str(tmp_path / "own.npz"), margin=wrong)


def test_a_margin_beyond_memory_is_refused_with_what_it_would_take(tmp_path):
    np.savez(tmp_path / "own.npz", images=np.zeros((1000, 2, 2, 3), np.uint8))
    size = 3000 * 200_002**2 / 2**40
    with pytest.raises(DataError, match=f"margin = 100000: the images would take {size:.4g} TiB"):
        load_dataset(str(tmp_path / "own.npz"), margin=100_000)


# Labels


@pytest.mark.parametrize("largest", [750_116, 2**31 - 1])
def test_identifiers_are_no_labels(largest, tmp_path):
    labels = np.arange(30) % 7
    labels[4] = largest
    message = re.escape(f"the largest is {largest}, and only 8 distinct ones occur")
    with pytest.raises(DataError, match=message):
        load(tmp_path, images=np.zeros((30, 2, 2), np.uint8), labels=labels)
    parts = [np.zeros((30, 2), np.uint8)] * 3
    with pytest.raises(DataError, match=message):
        _ = Dataset("own", *parts, *[labels] * 3).num_classes


@pytest.mark.parametrize("labels", [np.arange(2_000), np.array([1, 2, 3, 500])])
def test_many_classes_and_gaps_are_fine(labels):
    assert images.count_classes("own", [labels, labels[:1]]) == labels.max() + 1


# Points


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.int64])
def test_points_of_an_archive_are_split_by_a_fixed_permutation(kind, tmp_path):
    rows = (100 * RNG.normal(size=(40, 3))).astype(kind)
    dataset = load(tmp_path, points=rows)
    assert not dataset.is_image and dataset.num_levels is None and dataset.dim == 3
    assert [len(x) for x in (dataset.train, dataset.validation, dataset.test)] == [32, 4, 4]
    assert dataset.train.dtype == np.float32 and dataset.name == "own.npz"
    assert_same_rows(together(dataset), rows)


def test_points_may_bring_their_own_splits(tmp_path):
    parts = {f"{split}_points": RNG.normal(size=(4 + i, 2)) for i, split in enumerate(data._SPLITS)}
    dataset = load(tmp_path, **parts)
    for split in data._SPLITS:
        np.testing.assert_array_equal(
            getattr(dataset, split), parts[f"{split}_points"].astype(np.float32)
        )


@pytest.mark.parametrize("header", ["", "x,y,z\n", "\ufeff", '"a, b",c,d\n\n'])
def test_a_table_is_read_with_or_without_header(header, tmp_path):
    rows = RNG.normal(size=(12, 3))
    text = "".join(", ".join(map(repr, row)) + "\r\n" for row in rows.tolist())
    dataset = table(tmp_path, header + text)
    assert_same_rows(together(dataset), rows)
    same = load(tmp_path, points=rows)
    np.testing.assert_array_equal(dataset.test, same.test)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x,y\n1,2\n3\n4,5", r"line 3: rows must have 2 numbers; got 1"),
        ("1,2\n3,4,5\n", r"line 2: rows must have 2 numbers; got 3"),
        ("x,y\n1,2\n\n3,nan\n", r"line 4, column 2: .* got nan"),
        ("1,2\n3,1e39\n", r"line 2, column 2: a number that float32 holds .*; got 1e39"),
        ("1,2\nx,3\n", r"line 2, column 1: a number is needed; got 'x'"),
        ("1,x\n2,3\n", r"line 1, column 2: a number is needed; got 'x'"),
        ("1,2\n3,4\n", "three points are the fewest.*got 2"),
        ("x,y\n", "holds no row of numbers"),
        ("", "holds no row of numbers"),
    ],
)
def test_a_table_that_is_none_is_refused_by_its_line(text, message, tmp_path):
    with pytest.raises(DataError, match=rf"own\.csv.*{message}"):
        table(tmp_path, text)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"points": np.zeros(5)}, r"'points' must have shape \[n, d\].*got \(5,\)"),
        ({"points": np.array([["a"]])}, "numbers; got <U1"),
        ({"points": np.array([[1.0], [np.nan], [2.0]])}, "finite .*got nan at row 1, column 0"),
        ({"points": np.array([[1.0], [2.0], [1e39]])}, r"got 1e\+39 at row 2"),
        ({"train_points": np.zeros((3, 2))}, "no validation_points and no test_points"),
        (
            {f"{s}_points": np.zeros((3, 2 + (s == "test"))) for s in data._SPLITS},
            "'test_points' has 3 columns, 'train_points' 2",
        ),
    ],
)
def test_points_that_are_none_are_refused(arrays, message, tmp_path):
    with pytest.raises(DataError, match=message):
        load(tmp_path, **arrays)


def test_a_margin_is_not_for_points_of_a_file(tmp_path):
    np.savez(tmp_path / "own.npz", points=np.zeros((5, 2)))
    with pytest.raises(ValueError, match="0 for points; got 1"):
        load_dataset(str(tmp_path / "own.npz"), margin=1)


def test_what_a_file_holds_is_told_by_its_list_of_contents(tmp_path):
    np.savez(tmp_path / "images.npz", images=np.zeros(3))
    for name in ("points", "train_points"):
        np.savez(tmp_path / "points.npz", **{name: np.zeros(3)})
        assert data.holds_points(str(tmp_path / "points.npz"))
    assert data.holds_points("any.csv")
    (tmp_path / "text.npz").write_text("no zip")
    for name in ("images.npz", "text.npz", "missing.npz", "digits"):
        assert not data.holds_points(str(tmp_path / name))


@pytest.mark.parametrize("name", ["missing.csv", "binary.csv"])
def test_a_table_that_cannot_be_read_is_refused(name, tmp_path):
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe1,2\n")
    with pytest.raises(DataError, match=r"cannot be read as a \.csv file"):
        load_dataset(str(tmp_path / name))


# Archives


def archive_of(path, member, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as file:
        file.writestr("images.npy", member)
    return path


def header(shape, kind="|u1"):
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        out, {"descr": kind, "fortran_order": False, "shape": shape}
    )
    return out.getvalue()


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED])
def test_an_array_that_claims_more_than_the_file_holds_is_refused(method, tmp_path):
    path = archive_of(tmp_path / "own.npz", header((10**6, 8000, 8000, 1)) + bytes(100), method)
    with pytest.raises(DataError, match=r"claims 58\.21 TiB, shape .* holds at most 100 B"):
        load_dataset(str(path))


def test_a_member_whose_size_is_a_lie_is_refused(tmp_path):
    """The directory claims 58 TiB too, where the zip64 field gives sizes."""
    path = archive_of(tmp_path / "own.npz", header((3 * 10**9,)) + bytes(64))
    content = bytearray(path.read_bytes())
    directory = content.rindex(b"PK\x01\x02")
    content[directory + 24 : directory + 28] = struct.pack("<I", 4 * 10**9)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"claims 2\.794 GiB"):
        load_dataset(str(path))


def test_what_memory_cannot_hold_is_refused_before_it_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "memory", lambda: 1000)
    np.savez(tmp_path / "own.npz", images=np.zeros((20, 10, 10), np.uint8))
    with pytest.raises(DataError, match=r"images would take 1\.953 KiB .* has 1,000 B"):
        load_dataset(str(tmp_path / "own.npz"))


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [(8, 1, "'images.npy' is encrypted"), (10, 97, "by the unknown method 97")],
)
def test_members_that_cannot_be_read_are_told(at, value, message, tmp_path):
    path = archive_of(tmp_path / "own.npz", header((4, 2, 2)) + bytes(16))
    content = bytearray(path.read_bytes())
    content[content.rindex(b"PK\x01\x02") + at] = value
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_dataset(str(path))


@pytest.mark.parametrize(
    ("size", "told"),
    [(0, "0 B"), (1023, "1,023 B"), (1024, "1 KiB"), (64 * 10**12, "58.21 TiB")],
)
def test_sizes_are_told_in_their_unit(size, told):
    assert archives.told_size(size) == told


# Settings of points for images, and the other way round


@pytest.mark.parametrize(
    ("program", "arrays", "config", "told"),
    [
        (
            "density",
            {"images": np.zeros((40, 8, 8), np.uint8)},
            "points",
            r"own\.npz holds images \[8, 8, 1\]; depths \(32,\) and features \(64, 64\) are "
            r"settings of points: pass --config npz",
        ),
        (
            "density",
            {"points": np.random.default_rng(0).normal(size=(200, 3))},
            "npz",
            r"got \(16, 16, 16\)\. \S+own\.npz holds points \[3\]: pass --config points",
        ),
        (
            "classification",
            {"points": np.random.default_rng(0).normal(size=(200, 3))},
            "digits",
            r"needs images and labels; '\S+own\.npz' holds points \[3\]",
        ),
    ],
)
def test_a_config_for_other_data_is_refused_with_the_one_to_use(
    program, arrays, config, told, tmp_path, capsys
):
    np.savez(tmp_path / "own.npz", **arrays)
    given = ["--config", config, "--dataset", str(tmp_path / "own.npz"), "--batch-size", "8"]
    given += ["--no-augment"] if config == "npz" else []
    assert main([program, *given, "--workdir", str(tmp_path / "run")]) == 2
    assert re.search(told, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()
