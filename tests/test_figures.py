import subprocess
import sys

import matplotlib
import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from train import figures
from train.figures import (
    classifier_inversion,
    density_beside_data,
    image_grid,
    image_grids,
    reconstructions,
    samples_beside_data,
    training_curve,
)


def random_images(n, side=8, channels=1, seed=0):
    return np.random.default_rng(seed).random((n, side, side, channels)).astype(np.float32)


@pytest.fixture
def axes_of(monkeypatch, tmp_path):
    """Draw by a function; returns the panels of what it wrote, in order."""
    saved = []

    def write(figure, path, **options):
        saved.append(figure)
        original(figure, path, **options)

    original = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", write)

    def draw(function, *arguments, **options):
        path = tmp_path / "new" / "folder" / "x.png"
        assert function(path, *arguments, **options) == path
        assert matplotlib.image.imread(path)[..., :3].min() < 0.5  # something is drawn
        return saved[-1].axes

    return draw


def shown(axes):
    """The pixels of a panel's image."""
    return np.asarray(axes.images[0].get_array())


def enlarged(images, columns, scale=4):
    """The grid of small images."""
    return image_grid(images.repeat(scale, 1).repeat(scale, 2), columns)


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


def test_grid_without_gaps():
    images = random_images(2)
    np.testing.assert_array_equal(image_grid(images, 2, gap=0)[..., 0], np.hstack(images)[..., 0])


@pytest.mark.parametrize("channels", [2, 4, 5])
def test_images_of_any_number_of_channels_are_drawn_by_their_first(channels, axes_of):
    images = random_images(3, channels=channels)
    three = np.concatenate([images, np.zeros((3, 8, 8, 1))], axis=-1)[..., :3]
    np.testing.assert_array_equal(image_grid(images, 3), image_grid(three, 3))
    axes_of(samples_beside_data, images, images)
    error = axes_of(reconstructions, images, images + np.eye(channels)[-1] * 0.1, 0.1)[-1]
    assert "Error, up to 0.1" in error.get_title("left")  # of the last channel too


def test_a_grid_shows_no_more_images_than_can_be_seen(axes_of, monkeypatch):
    large = np.zeros((1, 4096, 4096, 3))
    assert figures.most_shown(np.zeros((1100, 1, 1, 1))) == 1024 and figures.most_shown(large) == 2
    monkeypatch.setattr(figures, "MOST_IMAGES", 4)
    (panel,) = axes_of(figures.grid, np.zeros((100, 1, 1, 1)))
    assert shown(panel).shape[:2] == (2 * 33 - 1, 2 * 33 - 1)


@pytest.mark.parametrize("dim", [1, 3])
def test_points_outside_the_plane_are_drawn(dim, axes_of):
    data = np.random.default_rng(0).normal(size=(30, dim))
    titles = [panel.get_title("left") for panel in axes_of(figures.points_beside_data, data, data)]
    assert titles == ["Data", "Model samples"]


def test_grid_clips():
    grid = image_grid(np.array([-0.5, 0.25, 1.5]).reshape(1, 1, 3, 1), 1)
    np.testing.assert_array_equal(grid[0, :, 0], [0.0, 0.25, 1.0])


def test_images_that_are_not_finite_are_refused(tmp_path):
    images = random_images(3)
    with pytest.raises(ValueError, match="images must be finite"):
        image_grid(images + np.inf, 1)
    with pytest.raises(ValueError, match="images must be finite"):
        reconstructions(tmp_path / "x.png", images, images * np.nan, 0.0)


# Pictures of images


@pytest.mark.parametrize("channels", [1, 3])
def test_samples_stand_left_of_the_data(axes_of, channels):
    samples, data = random_images(5, 8, channels, seed=1), random_images(9, 8, channels, seed=2)
    left, right = axes_of(samples_beside_data, samples, data)
    assert left.get_title("left") == "Model samples" and right.get_title("left") == "Held-out data"
    np.testing.assert_array_equal(shown(left), enlarged(samples, 3))
    np.testing.assert_array_equal(shown(right), enlarged(data[:5], 3))  # as many as samples
    assert left.get_position().x1 < right.get_position().x0


def test_a_grid_is_about_square_unless_told(axes_of):
    images = random_images(10)
    (panel,) = axes_of(figures.grid, images)
    np.testing.assert_array_equal(shown(panel), enlarged(images, 4))
    (panel,) = axes_of(figures.grid, images, columns=5)
    np.testing.assert_array_equal(shown(panel), enlarged(images, 5))


def test_large_images_keep_their_pixels(axes_of):
    images = random_images(4, 32, 3)
    (panel,) = axes_of(figures.grid, images)
    np.testing.assert_array_equal(shown(panel), image_grid(images, 2))


def test_a_table_of_grids_may_have_shorter_rows(axes_of):
    images = random_images(4)
    panels = axes_of(image_grids, [[("one", images), ("two", images)], [("three", images)]])
    titles = [panel.get_title("left") for panel in panels if panel.axison]
    assert titles == ["one", "two", "three"]


def test_the_rows_of_a_reconstruction_stand_under_each_other(axes_of):
    originals = random_images(4).astype(np.float64)
    back = originals.copy()
    back[2, 5, 3] += 1e-6
    rows = axes_of(reconstructions, originals, back, 1.5e-6)
    labels = [row.get_title("left") for row in rows]
    assert labels == ["Original", "Reconstruction", "Error, up to 1e-06"]
    np.testing.assert_array_equal(shown(rows[0]), enlarged(originals, 4))
    np.testing.assert_array_equal(shown(rows[1]), enlarged(back, 4))
    lefts, bottoms = zip(*[row.get_position().p0 for row in rows], strict=True)
    assert np.ptp(lefts) < 1e-6 and list(bottoms) == sorted(bottoms, reverse=True)
    assert rows[0].figure.get_suptitle().endswith("max |error| = 1.5e-06")
    coloured = np.argwhere(np.ptp(shown(rows[2]), axis=-1) > 0.1)  # where they differ alone
    assert len(coloured) == 4 * 4
    assert coloured.min(axis=0).tolist() == [5 * 4, 2 * 33 + 3 * 4]


def test_errors_are_in_proportion_with_the_largest_brightest(axes_of):
    originals = np.zeros((1, 8, 8, 3))
    back = originals.copy()
    back[0, 0, 0, 1], back[0, 4, 4] = 0.5e-3, 0.25e-3  # one channel, and all three
    errors = shown(axes_of(reconstructions, originals, back, 1e-3)[2])
    for row, value in ((0, 1.0), (16, 0.5)):
        colour = matplotlib.colormaps["inferno"](value)[:3]
        np.testing.assert_allclose(errors[row, row], colour, atol=0.01)


def test_a_perfect_reconstruction_has_a_picture(axes_of):
    images = random_images(3)
    rows = axes_of(reconstructions, images, images, 0.0)
    assert np.ptp(shown(rows[2]), axis=-1).max() < 0.2


def test_no_more_than_twelve_columns_are_shown(axes_of):
    images = random_images(20)
    rows = axes_of(reconstructions, images, images, 0.0)
    np.testing.assert_array_equal(shown(rows[0]), enlarged(images[:12], 12))


def test_the_classifier_picture_names_the_class_of_each_image(axes_of):
    originals, back = random_images(5, seed=1), random_images(5, seed=2)
    predictions = np.array([3, 1, 4, 1, 5])
    upper, lower = axes_of(classifier_inversion, originals, back, predictions, 1e-6)
    np.testing.assert_array_equal(shown(upper), enlarged(originals, 5))
    np.testing.assert_array_equal(shown(lower), enlarged(back, 5))
    assert [label.get_text() for label in lower.get_xticklabels()] == ["3", "1", "4", "1", "5"]
    np.testing.assert_allclose(lower.get_xticks(), np.arange(5) * 33 + 15.5, atol=0.5)


# Curves


def curve(axes_of, train, validation, references=None):
    steps = np.arange(len(train)) * 10
    points = np.linspace(0, steps[-1], len(validation))
    (panel,) = axes_of(training_curve, steps, train, points, validation, "bits/dim", references)
    return panel


def test_the_curve_shows_training_validation_and_references(axes_of):
    noise = np.random.default_rng(0).standard_normal(600)
    panel = curve(axes_of, 5 + noise, [5.0, 4.0], {"test": 4.5, "other": 4.501})
    raw, smooth, validation, *references = panel.lines
    np.testing.assert_array_equal(raw.get_ydata(), 5 + noise)
    assert np.ptp(smooth.get_ydata()) < 0.5 * np.ptp(noise)
    np.testing.assert_array_equal(validation.get_ydata(), [5.0, 4.0])
    assert [line.get_ydata()[0] for line in references] == [4.5, 4.501]
    labels = [text.get_text() for text in panel.get_legend().get_texts()]
    assert labels == ["Training", "Validation", "test 4.50", "other 4.50"]


@pytest.mark.parametrize("spike", [-1e6, 1e6])
@pytest.mark.parametrize("length", [60, 1000])
def test_one_spike_and_the_first_descent_do_not_flatten_the_curve(axes_of, length, spike):
    train = np.linspace(5, 4, length)
    wild = train.copy()
    wild[: length // 20], wild[length // 2] = 1e3, spike
    calm, spiked = (curve(axes_of, x, [4.5, 4.2]).get_ylim() for x in (train, wild))
    np.testing.assert_allclose(spiked, calm, atol=0.1)


def test_nan_leaves_a_gap_and_no_more(axes_of):
    train = np.full(100, 5.0)
    train[50] = np.nan
    smooth = figures._smooth(train)
    np.testing.assert_array_equal(np.isnan(smooth), np.isnan(train))
    np.testing.assert_allclose(smooth[np.isfinite(smooth)], 5.0)
    curve(axes_of, train, [5.0])
    curve(axes_of, np.full(3, np.nan), [])


def test_smoothing_keeps_a_line_straight():
    np.testing.assert_allclose(figures._smooth(np.arange(300.0))[10:-10], np.arange(10.0, 290.0))


# Densities


def test_density_and_points_share_their_axes(axes_of):
    x, y = np.meshgrid(*[np.linspace(-4, 4, 161)] * 2)
    density = np.exp(-((x - 2) ** 2 + (y + 3) ** 2) / 0.02)
    data, samples = np.full((500, 2), (-2.0, 3.0)), np.full((500, 2), (1.0, 2.0))
    panels = axes_of(density_beside_data, density, (-4, 4, -4, 4), data, samples)
    titles = [panel.get_title("left") for panel in panels]
    assert titles == ["Data", "Learned density", "Model samples"]
    for panel in panels:
        assert panel.get_xlim() == panel.get_ylim() == (-4.0, 4.0)
    for panel, points in zip(panels[::2], (data, samples), strict=True):
        np.testing.assert_array_equal(panel.collections[0].get_offsets(), points)
    image = panels[1].images[0]
    assert image.origin == "lower" and image.get_extent() == [-4, 4, -4, 4]
    np.testing.assert_array_equal(image.get_array(), density)


def test_a_density_of_zero_has_a_picture(axes_of):
    points = np.zeros((4, 2))
    assert len(axes_of(density_beside_data, np.zeros((5, 5)), (-1, 1, -1, 1), points, points)) == 3


# Global state


def test_nothing_global_is_left_changed(axes_of):
    before = dict(matplotlib.rcParams)
    axes_of(samples_beside_data, random_images(4), random_images(4))
    curve(axes_of, np.ones(5), [1.0])
    assert dict(matplotlib.rcParams) == before
    code = "import sys, train.figures; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
