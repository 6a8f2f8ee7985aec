import subprocess
import sys

import matplotlib
import matplotlib.image
import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.colors import to_rgb

from train import figures
from train.figures import (
    classifier_inversion,
    density_beside_data,
    image_grid,
    reconstructions,
    samples_beside_data,
    training_curve,
)

BIT = 1.01 / 255


def random_images(n, side=8, channels=1, seed=0):
    return np.random.default_rng(seed).random((n, side, side, channels)).astype(np.float32)


def decode(path):
    return matplotlib.image.imread(path)[..., :3]


def find(picture, part, times=1):
    """(top, left) of the first of so many places where ``part`` shows, pixel for pixel."""
    height, width, _ = part.shape
    corners = picture[: len(picture) - height + 1, : picture.shape[1] - width + 1]
    places = [
        (int(top), int(left))
        for top, left in np.argwhere(np.all(np.abs(corners - part[0, 0]) < BIT, axis=-1))
        if np.all(np.abs(picture[top : top + height, left : left + width] - part) < BIT)
    ]
    assert len(places) == times, f"shown {len(places)} times, not {times}"
    return places[0]


def enlarged(image, scale=8):
    return np.broadcast_to(image, (*image.shape[:2], 3)).repeat(scale, 0).repeat(scale, 1)


def centre(picture, colour, tolerance=0.1):
    """Mean (row, column) of the pixels of one colour."""
    near = np.all(np.abs(picture - to_rgb(colour)) < tolerance, axis=-1)
    assert near.any(), f"no pixel of {colour}"
    return np.argwhere(near).mean(axis=0)


# Grids


def test_grid_puts_each_tile_in_its_place():
    images = random_images(5, side=4, channels=3)
    grid = image_grid(images, columns=3, gap=2)
    assert grid.shape == (2 * 4 + 2, 3 * 4 + 2 * 2, 3)
    np.testing.assert_array_equal(grid[:4, :4], images[0])
    np.testing.assert_array_equal(grid[:4, 12:], images[2])
    np.testing.assert_array_equal(grid[6:, 6:10], images[4])


def test_grid_has_dark_gaps_and_a_white_rest():
    grid = image_grid(np.ones((5, 4, 4, 1)), columns=3, gap=2)
    assert np.all(grid[:, 4:6] < 0.5) and np.all(grid[4:6] < 0.5)
    assert np.all(grid[6:, 12:] == 1.0)


def test_grid_enlarges_pixels_to_squares():
    image = random_images(1, side=3)
    np.testing.assert_array_equal(image_grid(image, 1, scale=5), enlarged(image[0], 5))


def test_grid_clips():
    grid = image_grid(np.array([-0.5, 0.25, 1.5]).reshape(1, 1, 3, 1), 1)
    np.testing.assert_array_equal(grid[0, :, 0], [0.0, 0.25, 1.0])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((8, 8, 1)), r"\[n, h, w, c\].* got \(8, 8, 1\)"),
        (np.zeros((2, 8, 8, 2)), r"c = 1 or 3; got \(2, 8, 8, 2\)"),
        (np.zeros((0, 8, 8, 1)), "n ≥ 1"),
        (np.zeros((2, 8, 8, 1), np.uint8), r"floats in \[0, 1\]; got uint8"),
        (np.full((2, 1, 1, 1), np.nan), r"finite; got nan at index \(0, 0, 0, 0\)"),
    ],
)
def test_grid_refuses_what_is_no_image(images, message):
    with pytest.raises(ValueError, match=message):
        image_grid(images, 1)


@pytest.mark.parametrize("arguments", [{"columns": 0}, {"scale": 0}, {"gap": -1}])
def test_grid_refuses_numbers_out_of_range(arguments):
    with pytest.raises(ValueError, match="columns and scale must be ≥ 1 and gap ≥ 0"):
        image_grid(random_images(1), **({"columns": 1} | arguments))


# Pictures of images


@pytest.mark.parametrize("channels", [1, 3])
def test_samples_stand_left_of_the_data(tmp_path, channels):
    samples, data = random_images(5, 8, channels, seed=1), random_images(9, 8, channels, seed=2)
    path = samples_beside_data(tmp_path / "new" / "folder" / "x.png", samples, data)
    picture = decode(path)
    left = find(picture, image_grid(samples, 3, scale=8))
    right = find(picture, image_grid(data[:5], 3, scale=8))  # no more than there are samples
    assert left[0] == right[0] and right[1] > left[1]
    height, width, _ = picture.shape
    margins = width - right[1] - (3 * 64 + 2 * 3), height - right[0] - (2 * 64 + 3)
    assert margins == (left[1], left[1])


def test_samples_unlike_the_data_are_refused(tmp_path):
    with pytest.raises(ValueError, match="samples and data must have one shape"):
        samples_beside_data(tmp_path / "x.png", random_images(4, 8), random_images(4, 16))


def test_reconstructions_stand_under_their_originals(tmp_path):
    originals, back = random_images(4, seed=1), random_images(4, seed=2)
    picture = decode(reconstructions(tmp_path / "x.png", originals, back, 1.0))
    for index in range(4):
        upper = find(picture, enlarged(originals[index]))
        lower = find(picture, enlarged(back[index]))
        assert upper[1] == lower[1] and upper[0] < lower[0]


def test_the_error_row_shows_where_and_only_where_they_differ(tmp_path):
    originals = random_images(4).astype(np.float64)
    back = originals.copy()
    back[2, 5, 3] += 1e-6
    picture = decode(reconstructions(tmp_path / "x.png", originals, back, 1e-6))
    coloured = np.argwhere(np.ptp(picture, axis=-1) > 0.2)
    top, left = find(picture, enlarged(originals[2]), times=2)  # and the reconstruction
    assert len(coloured) == 64  # one pixel, enlarged
    np.testing.assert_array_equal(coloured[:, 1].min(), left + 3 * 8)
    assert coloured[:, 0].min() > top + 2 * 64


def test_errors_are_in_proportion_with_the_largest_brightest(tmp_path):
    originals = np.zeros((1, 8, 8, 3))
    back = originals.copy()
    back[0, 0, 0, 1], back[0, 4, 4] = 0.5e-3, 0.25e-3  # one channel, and all three
    picture = decode(reconstructions(tmp_path / "x.png", originals, back, 1e-3))
    for value in (1.0, 0.5):
        colour = colormaps["inferno"](value)[:3]
        assert np.sum(np.all(np.abs(picture - colour) < BIT, axis=-1)) == 64


def test_a_perfect_reconstruction_has_a_picture(tmp_path):
    images = random_images(3)
    picture = decode(reconstructions(tmp_path / "x.png", images, images, 0.0))
    assert not np.any(np.ptp(picture, axis=-1) > 0.2)


def test_no_more_than_twelve_columns_are_shown(tmp_path):
    images = random_images(20)
    pictures = [
        decode(reconstructions(tmp_path / "x.png", images[:n], images[:n], 0.0)) for n in (12, 20)
    ]
    np.testing.assert_array_equal(*pictures)


def test_the_classifier_picture_heads_each_image_with_its_class(tmp_path):
    originals, back = random_images(5, seed=1), random_images(5, seed=2)

    def picture(predictions):
        path = classifier_inversion(tmp_path / "x.png", originals, back, predictions, 1e-6)
        return decode(path)

    first, second = picture([3, 1, 4, 1, 5]), picture(np.array([3, 1, 7, 1, 5]))
    top, left = find(first, enlarged(originals[2]))
    assert find(first, enlarged(back[2]))[0] > top
    changed = np.argwhere(np.any(first != second, axis=-1))
    assert changed[:, 0].max() < top
    assert left <= changed[:, 1].min() and changed[:, 1].max() < left + 64


def test_the_title_states_the_error(tmp_path):
    images = random_images(2)
    pictures = [decode(reconstructions(tmp_path / "x.png", images, images, e)) for e in (0.1, 0.2)]
    top, _ = find(pictures[0], enlarged(images[0]), times=2)  # and the reconstruction
    changed = np.argwhere(np.any(pictures[0] != pictures[1], axis=-1))
    assert len(changed) and changed[:, 0].max() < top


def test_pairs_that_do_not_match_are_refused(tmp_path):
    images = random_images(3)
    with pytest.raises(ValueError, match=r"one shape; got \[\(3, 8, 8, 1\), \(2, 8, 8, 1\)\]"):
        reconstructions(tmp_path / "x.png", images, images[:2], 0.0)
    with pytest.raises(ValueError, match="got 2 predictions for 3 images"):
        classifier_inversion(tmp_path / "x.png", images, images, [1, 2], 0.0)
    with pytest.raises(ValueError, match="reconstructed must be finite; got inf"):
        reconstructions(tmp_path / "x.png", images, images + np.inf, 0.0)


# Curves


def curve(tmp_path, train, validation, references):
    steps = np.arange(len(train)) * 10
    points = np.linspace(0, steps[-1], len(validation))
    path = training_curve(
        tmp_path / "x.png", steps, train, points, validation, "bits/dim", references
    )
    return decode(path)


def validation_row(picture):
    legend = 60  # the legend, above the axes, shows the colour too
    return centre(picture[legend:], figures._VALIDATION)[0]


def test_the_curve_is_drawn_to_scale(tmp_path):
    frame = {"low": 0.0, "high": 10.0}
    rows = [
        validation_row(curve(tmp_path, np.full(100, 5.0), np.full(9, height), frame))
        for height in (2.0, 5.0, 8.0)
    ]
    assert rows[0] > rows[1] > rows[2]
    assert rows[0] - rows[1] == pytest.approx(rows[1] - rows[2], abs=2)


def test_training_is_drawn_raw_and_smoothed(tmp_path):
    noise = np.random.default_rng(0).standard_normal(600)
    picture = curve(tmp_path, 5 + noise, [5.0], {"low": 0.0, "high": 10.0})[60:]
    bold = np.argwhere(np.all(np.abs(picture - to_rgb(figures._TRAIN)) < 0.1, axis=-1))[:, 0]
    faint = np.argwhere(picture[..., 2] - picture[..., 0] > 0.08)[:, 0]
    assert np.ptp(bold) < 0.5 * np.ptp(faint)


@pytest.mark.parametrize("spike", [-1e6, 1e6])
@pytest.mark.parametrize("length", [60, 1000])
def test_one_spike_and_the_first_descent_do_not_flatten_the_curve(tmp_path, length, spike):
    train = np.linspace(5, 4, length)
    wild = train.copy()
    wild[: length // 20], wild[length // 2] = 1e3, spike
    calm, spiked = (curve(tmp_path, x, [4.5, 4.2], None) for x in (train, wild))
    assert validation_row(spiked) == pytest.approx(validation_row(calm), abs=20)


def test_nan_leaves_a_gap_and_no_more(tmp_path):
    train = np.full(100, 5.0)
    train[50] = np.nan
    smooth = figures._smooth(train)
    np.testing.assert_array_equal(np.isnan(smooth), np.isnan(train))
    np.testing.assert_allclose(smooth[np.isfinite(smooth)], 5.0)
    curve(tmp_path, train, [5.0], None)
    curve(tmp_path, np.full(3, np.nan), [], None)


def test_smoothing_keeps_a_line_straight():
    np.testing.assert_allclose(figures._smooth(np.arange(300.0))[10:-10], np.arange(10.0, 290.0))


def test_references_close_together_get_labels_apart(tmp_path):
    lines = {"one": 2.0, "two": 2.001, "three": 8.0}
    picture = curve(tmp_path, np.full(100, 5.0), [5.0], lines)
    labels = picture[60:-60, -90:]
    rows = np.flatnonzero((labels < 0.7).any(axis=(1, 2)))
    assert np.count_nonzero(np.diff(rows) > 1) == 2  # three blocks of text


def test_series_that_do_not_match_are_refused(tmp_path):
    path, three, two = tmp_path / "x.png", np.zeros(3), np.zeros(2)
    with pytest.raises(ValueError, match=r"training: .* got \(3,\), \(2,\)"):
        training_curve(path, three, two, three, three)
    with pytest.raises(ValueError, match="validation: steps"):
        training_curve(path, three, three, two, three)
    with pytest.raises(ValueError, match=r"training: .* n ≥ 1"):
        training_curve(path, [], [], [], [])


# Densities


def test_density_and_points_share_their_axes(tmp_path):
    axis = np.linspace(-4, 4, 161)
    x, y = np.meshgrid(axis, axis)
    density = np.exp(-((x - 2) ** 2 + (y + 3) ** 2) / 0.02)
    data, samples = np.full((500, 2), (-2.0, 3.0)), np.full((500, 2), (1.0, 2.0))
    path = density_beside_data(tmp_path / "x.png", density, (-4, 4, -4, 4), data, samples)
    picture = decode(path)
    dark = np.all(picture < 0.06, axis=-1)
    columns = np.flatnonzero(dark.mean(axis=0) > 0.5)
    panels = np.split(columns, np.flatnonzero(np.diff(columns) > 5) + 1)
    rows = np.flatnonzero(dark.mean(axis=1) > 0.5)
    assert len(panels) == 3
    for panel, (px, py) in zip(panels, [(-2, 3), (2, -3), (1, 2)], strict=True):
        shown = picture[rows[0] : rows[-1] + 1, panel[0] : panel[-1] + 1].max(axis=-1)
        height, width = shown.shape
        assert abs(height - width) <= 2
        row, column = np.argwhere(shown > 0.5).mean(axis=0)
        assert column / width == pytest.approx((px + 4) / 8, abs=0.01)
        assert row / height == pytest.approx((4 - py) / 8, abs=0.01)


def test_impossible_densities_are_refused(tmp_path):
    path, ones, points = tmp_path / "x.png", np.ones((5, 5)), np.zeros((4, 2))
    region = (-1.0, 1.0, -1.0, 1.0)
    with pytest.raises(ValueError, match=r"extent must be .* got \(1, -1, 0, 1\)"):
        density_beside_data(path, ones, (1, -1, 0, 1), points, points)
    with pytest.raises(ValueError, match=r"density must be \[n, n\]; got \(5,\)"):
        density_beside_data(path, ones[0], region, points, points)
    with pytest.raises(ValueError, match=r"density must be finite; got nan at index \(0, 0\)"):
        density_beside_data(path, ones * np.nan, region, points, points)
    with pytest.raises(ValueError, match=r"samples must be points .* got \(4, 3\)"):
        density_beside_data(path, ones, region, points, np.zeros((4, 3)))


def test_a_density_of_zero_has_a_picture(tmp_path):
    path, points = tmp_path / "x.png", np.zeros((4, 2))
    assert density_beside_data(path, np.zeros((5, 5)), (-1, 1, -1, 1), points, points).exists()


# Global state


def test_nothing_global_is_touched(tmp_path):
    before = dict(matplotlib.rcParams)
    samples_beside_data(tmp_path / "x.png", random_images(4), random_images(4))
    curve(tmp_path, np.ones(5), [1.0], None)
    assert dict(matplotlib.rcParams) == before
    code = "import sys, train.figures; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
