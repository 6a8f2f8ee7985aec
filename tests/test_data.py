import dataclasses
import hashlib
import itertools

import numpy as np
import pytest

from train import data
from train import points as points_module
from train.data import Dataset, load_dataset
from train.data import dataset_names as all_names
from train.images import TFDS


def dataset_names():
    """The sets that come along."""
    return [name for name in all_names() if name not in TFDS]


POINT_SETS = [name for name in dataset_names() if name != "digits"]


def draw(name, n=4000):
    return load_dataset(name).train[:n].astype(np.float64)


def distance_to_curve(points, curve):
    return np.sqrt(((points[:, None] - curve[None]) ** 2).sum(-1)).min(axis=1)


def circle(angle):
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


# Splits


def test_digits_are_split_by_the_stated_permutation():
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(1797)
    digits = load_dataset("digits")
    for split, part in {
        "train": order[:1257],
        "validation": order[1257:1437],
        "test": order[1437:],
    }.items():
        examples = getattr(digits, split)
        assert examples.dtype == np.uint8 and examples.shape == (len(part), 8, 8, 1)
        np.testing.assert_array_equal(examples.reshape(-1, 64), images[part])
        np.testing.assert_array_equal(getattr(digits, f"{split}_labels"), labels[part])


def test_digits_describe_themselves():
    digits = load_dataset("digits")
    assert digits.num_levels == 17 and digits.train.min() == 0 and digits.train.max() == 16
    assert digits.example_shape == (8, 8, 1) and digits.dim == 64 and digits.is_image


@pytest.mark.parametrize("name", dataset_names())
def test_splits_share_no_example(name):
    dataset = load_dataset(name)
    splits = [{x.tobytes() for x in getattr(dataset, split)} for split in data._SPLITS]
    for one, other in itertools.combinations(splits, 2):
        assert not one & other


@pytest.mark.parametrize("name", POINT_SETS)
def test_points_describe_themselves(name):
    points = load_dataset(name)
    sizes = [len(getattr(points, split)) for split in data._SPLITS]
    assert sizes == [50_000, 2_000, 10_000]
    assert points.train.dtype == np.float32 and points.example_shape == (2,) and points.dim == 2
    assert not points.is_image and points.num_levels is None and points.train_labels is None
    assert np.mean(np.abs(points.train) <= 4) > 0.999  # on [-4, 4]², but for stray tails
    assert np.abs(points.train).max() > 3  # and filling it


@pytest.mark.parametrize("name", POINT_SETS)
def test_points_are_drawn_from_the_stated_streams(name):
    points, sampler = load_dataset(name), points_module.SAMPLERS[name]
    for split, rng in zip(data._SPLITS, np.random.default_rng(0).spawn(3), strict=True):
        examples = getattr(points, split)
        np.testing.assert_array_equal(examples, sampler(rng, len(examples)))


@pytest.mark.parametrize("name", dataset_names())
def test_loading_ignores_and_leaves_global_randomness(name):
    np.random.seed(1)
    before = np.random.get_state()[1].copy()
    first = load_dataset(name)
    np.testing.assert_array_equal(np.random.get_state()[1], before)
    np.random.seed(2)
    np.testing.assert_array_equal(load_dataset(name).train, first.train)


# Geometry


def test_checkerboard_lies_on_the_dark_squares_evenly():
    points = draw("checkerboard", 40_000)
    assert np.abs(points).max() <= 4
    cell = np.clip(np.floor((points + 4) / 2), 0, 3).astype(int)
    assert np.all(cell.sum(axis=1) % 2 == 0)
    counts = np.bincount(cell[:, 0] * 4 + cell[:, 1], minlength=16)
    assert np.count_nonzero(counts) == 8
    assert np.abs(counts[counts > 0] - 5000).max() < 5 * np.sqrt(5000)
    within = (points + 4) / 2 - cell
    quarters, _, _ = np.histogram2d(*within.T, bins=4, range=((0, 1), (0, 1)))
    assert np.abs(quarters - 2500).max() < 5 * np.sqrt(2500)


def test_eight_gaussians_have_their_centres_and_width():
    points = draw("8gaussians", 40_000)
    centres = 3 * circle(np.arange(8) * np.pi / 4)
    offsets = points[:, None] - centres
    nearest = np.argmin((offsets**2).sum(-1), axis=1)
    residual = offsets[np.arange(len(points)), nearest]
    np.testing.assert_allclose(residual.std(axis=0), 0.3, rtol=0.02)
    assert np.abs(np.bincount(nearest) - 5000).max() < 5 * np.sqrt(5000)
    for k in range(8):
        np.testing.assert_allclose(residual[nearest == k].mean(axis=0), 0, atol=0.02)


def test_rings_have_four_radii_of_equal_weight_all_round():
    points = draw("rings", 40_000)
    radius = np.linalg.norm(points, axis=1)
    ring = np.rint(radius / 0.9).astype(int)
    assert set(ring) == {1, 2, 3, 4}
    np.testing.assert_allclose((radius - 0.9 * ring).std(), 0.08, rtol=0.03)
    assert np.abs(np.bincount(ring)[1:] - 10_000).max() < 5 * np.sqrt(10_000)
    angles, _ = np.histogram(np.arctan2(*points.T), bins=8, range=(-np.pi, np.pi))
    assert np.abs(angles - 5000).max() < 5 * np.sqrt(5000)


def test_moons_follow_two_interleaved_half_circles():
    angle = np.linspace(0, np.pi, 400)
    upper = 2 * circle(angle) - (1, 0.5)
    points = draw("moons")
    distance = distance_to_curve(points, np.concatenate([upper, -upper]))
    assert np.sqrt(np.mean(distance**2)) == pytest.approx(0.2, rel=0.03)
    assert distance_to_curve(np.concatenate([upper, -upper]), points).max() < 0.25  # none bare
    assert abs(np.mean(distance_to_curve(points, upper) < 0.4) - 0.5) < 0.1


def test_spirals_follow_two_arms_from_end_to_end():
    way = np.linspace(0, 1, 800)
    arm = 3.6 * way[:, None] * circle(3 * np.pi * way)
    points = draw("spirals")
    assert distance_to_curve(points, np.concatenate([arm, -arm])).max() < 0.5
    assert distance_to_curve(np.concatenate([arm, -arm]), points).max() < 0.25
    assert abs(np.mean(distance_to_curve(points, arm) < 0.3) - 0.5) < 0.1


def test_pinwheel_has_five_sheared_blades():
    points = draw("pinwheel", 40_000)
    radius, angle = np.linalg.norm(points, axis=1), np.arctan2(points[:, 1], points[:, 0])

    def mean_wave(k, shear):
        return abs(np.mean(np.exp(1j * k * (angle - shear * np.exp(radius / 2)))))

    assert mean_wave(5, 0.25) > 0.8  # five blades, once the shear is undone
    assert mean_wave(5, 0.25) > max(mean_wave(5, 0.24), mean_wave(5, 0.26))
    assert max(mean_wave(k, 0.25) for k in range(1, 5)) < 0.03  # of equal weight


# Names


def test_unknown_name_lists_the_known_and_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"'checkboard'.*Did you mean 'checkerboard'\?") as error:
        load_dataset("checkboard")
    assert all(name in str(error.value) for name in all_names())


def test_a_far_off_name_gets_no_suggestion():
    with pytest.raises(ValueError, match=r"no data set 'zzz'\. Known: digits, 8gaussians"):
        load_dataset("zzz")


# Settings of any data set


def test_max_examples_keeps_the_start_of_every_split():
    whole, part = load_dataset("digits"), load_dataset("digits", max_examples=200)
    assert [len(part.train), len(part.validation), len(part.test)] == [200, 180, 200]
    np.testing.assert_array_equal(part.test, whole.test[:200])
    np.testing.assert_array_equal(part.test_labels, whole.test_labels[:200])
    assert part.num_classes == 10


def test_a_margin_is_black_and_leaves_the_image_inside():
    whole, padded = load_dataset("digits"), load_dataset("digits", margin=2)
    assert padded.example_shape == (12, 12, 1)
    np.testing.assert_array_equal(padded.test[:, 2:-2, 2:-2], whole.test)
    assert padded.test.sum() == whole.test.sum()


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("digits", {"max_examples": 0}, "max_examples must be ≥ 1; got 0"),
        ("digits", {"margin": -1}, "margin must be ≥ 0, .*got -1"),
        ("moons", {"margin": 1}, "0 for points; got 1 for 'moons'"),
    ],
)
def test_settings_out_of_range_are_refused(name, settings, message):
    with pytest.raises(ValueError, match=message):
        load_dataset(name, **settings)


def test_classes_are_those_of_all_splits_unless_they_are_told():
    images, labels = np.zeros((5, 2, 2, 1), np.uint8), np.arange(5)
    dataset = Dataset("mine", *[images] * 3, labels, labels + 2, labels + 1, num_levels=256)
    assert dataset.num_classes == 7
    assert dataclasses.replace(dataset, classes=10).num_classes == 10


def test_points_have_no_classes():
    with pytest.raises(ValueError, match="'moons' has no labels"):
        _ = load_dataset("moons").num_classes


# Fingerprints


def pixels(**changes):
    images = np.arange(24, dtype=np.uint8).reshape(6, 2, 2, 1)
    labels = np.arange(6, dtype=np.int32) % 2
    parts = {"train": images[:2], "validation": images[2:4], "test": images[4:]}
    named = {f"{split}_labels": labels[:2] for split in data._SPLITS}
    return Dataset(**{"name": "pixels", "num_levels": 256, **parts, **named, **changes})


def test_a_fingerprint_is_of_the_data_whatever_their_name_or_layout():
    images = pixels().train
    strided = np.asfortranarray(images)
    same = {"name": "renamed"}, {"train": images.copy()}, {"train": strided}
    assert {pixels(**change).fingerprint for change in same} == {pixels().fingerprint}
    swapped, little = (np.arange(4.0).astype(kind).reshape(2, 2) for kind in (">f4", "<f4"))
    points = (Dataset("points", x, x, x).fingerprint for x in (swapped, little))
    assert len(set(points)) == 1


@pytest.mark.parametrize("split", data._SPLITS)
def test_a_fingerprint_changes_with_every_part(split):
    one = getattr(pixels(), split).copy()
    one[-1, -1, -1, -1] += 1
    label = pixels().labels(split).copy()
    label[-1] += 1
    changed = [
        pixels(**{split: one}),
        pixels(**{f"{split}_labels": label}),
        pixels(**{f"{split}_labels": None}),
        pixels(**{split: getattr(pixels(), split).astype(np.uint16)}),
        pixels(**{split: getattr(pixels(), split).reshape(2, 4, 1, 1)}),
        pixels(num_levels=255),
        pixels(),
    ]
    assert len({dataset.fingerprint for dataset in changed}) == len(changed)


def test_a_fingerprint_is_stable_over_versions():
    """Stored in saved runs: this is their format, computed by ``hashlib`` alone."""
    described = b"None" + 3 * (b"((2, 1), 'float32')" + b"\0\0\0\0\0\0\x80?" + b"None")
    points = np.array([[0.0], [1.0]], np.float32)
    expected = hashlib.sha256(described).hexdigest()
    assert Dataset("points", points, points, points).fingerprint == expected
