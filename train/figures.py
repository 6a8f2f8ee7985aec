"""Pictures: NumPy arrays in, PNG files out, in one style.

A function with a ``path`` writes that file, creates its folders, and returns the path. Images are
floats [n, height, width, channels] in [0, 1]: one channel is grey, two are red and green, and of
more than three the first three are shown.

matplotlib, which takes half a second to import, is imported where something is drawn.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from train.output import whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MUTED = "#66717d"
DASHED = (0, (4, 3))
#: Images in a grid, at most; see :func:`most_shown`.
MOST_IMAGES = 1024

_STYLE = Path(__file__).with_name("figures.mplstyle")
_GAP_GREY = 0.25
_TILE = 0.66  # inches that an image takes, or more where that leaves no room for labels
_NARROWEST = 1.8
_MAX_COLUMNS = 12
_MOST_PIXELS = 2**25

#: A row of images with its label, or a grid with its title.
Labelled = tuple[str, np.ndarray]


@contextlib.contextmanager
def sheet(
    path: Path | str,
    rows: int = 1,
    columns: int = 1,
    *,
    size: tuple[float, float] = (4.6, 3.6),
    layout: Any = "constrained",
) -> Iterator[np.ndarray]:
    """Yield the axes [rows, columns] of a figure, each of ``size`` inches; then write the file.

    It is written whole or not at all.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(fname=_STYLE):
        figure = Figure(figsize=(columns * size[0], rows * size[1]), layout=layout)
        yield figure.subplots(rows, columns, squeeze=False)
        with whole(Path(path)) as partial:
            figure.savefig(partial)


def show(axes: "Axes", pixels: np.ndarray, **options: Any) -> None:
    """Show an image in a panel, without ticks."""
    axes.imshow(pixels, **options)
    axes.set(xticks=[], yticks=[])
    axes.tick_params(length=0, grid_alpha=0.0)
    axes.spines[:].set_visible(False)


def legend_below(axes: "Axes", columns: int) -> None:
    """Put the legend below the horizontal axis, clear of the curves."""
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=columns, borderaxespad=0.0,
        handlelength=2.6,
    )  # fmt: skip


def in_colours(images: np.ndarray) -> np.ndarray:
    """Return images [..., channels] with the channels that are shown, [..., 1 or 3].

    Two become red and green, without blue; of more than three, the first three are kept.
    """
    channels = images.shape[-1]
    if channels != 2:
        return images if channels == 1 else images[..., :3]
    return np.concatenate([images, np.zeros_like(images[..., :1])], axis=-1)


def most_shown(images: np.ndarray) -> int:
    """Return how many images of this size a grid shows at most, 1024 where they are small."""
    height, width = images.shape[1:3]
    return min(MOST_IMAGES, max(1, _MOST_PIXELS // (height * width)))


def image_grid(images: np.ndarray, columns: int, *, gap: int = 1) -> np.ndarray:
    """Tile images row by row, with dark gaps of ``gap`` pixels; values are clipped to [0, 1].

    Returns [rows·(h + gap) − gap, columns·(w + gap) − gap, 3] with rows = ⌈n / columns⌉. The rest
    of the last row is white. Values that are not finite raise a ValueError.
    """
    if not np.isfinite(images).all():
        raise ValueError("images must be finite.")
    count, height, width, _ = images.shape
    rows = math.ceil(count / columns)
    tiles = np.full((rows * columns, height + gap, width + gap, 3), _GAP_GREY)
    tiles[:, :height, :width] = 1.0
    tiles[:count, :height, :width] = np.clip(in_colours(images), 0.0, 1.0)
    grid = tiles.reshape(rows, columns, *tiles.shape[1:]).swapaxes(1, 2)
    grid = grid.reshape(rows * (height + gap), columns * (width + gap), 3)
    return grid[: len(grid) - gap, : grid.shape[1] - gap]


def grid(path: Path | str, images: np.ndarray, columns: int | None = None) -> Path:
    """Draw images in a grid of ``columns``, by default about square; see :func:`image_grids`."""
    return image_grids(path, [[("", images)]], columns)


def image_grids(
    path: Path | str,
    table: Sequence[Sequence[Labelled]],
    columns: int | None = None,
    *,
    title: str = "",
    classes: Any = (),
) -> Path:
    """Draw a table of image grids, each below its label; by default about square.

    A grid shows the first :func:`most_shown` images. Predicted ``classes`` label the columns of the
    last grid.
    """
    table = [[(label, images[: most_shown(images)]) for label, images in row] for row in table]
    most = max(len(images) for row in table for _, images in row)
    columns = columns or math.ceil(math.sqrt(most))
    tile = max(_TILE, _NARROWEST / columns)
    spare = 0.3 + 0.9 / len(table)  # for text; what is left over is cut off
    size = tile * columns, tile * math.ceil(most / columns) + spare
    across = max(len(row) for row in table)
    with sheet(path, len(table), across, size=size, layout="compressed") as axes:
        for panels, row in zip(axes, table, strict=True):
            for panel, (label, images) in zip(panels, row, strict=False):
                _show_images(panel, images, columns)
                panel.set_title(label)
            for panel in panels[len(row) :]:
                panel.set_axis_off()
        if title:
            axes[0, 0].figure.suptitle(title, x=0.0, ha="left")
        if len(classes):
            left, right = panel.get_xlim()
            edges = np.linspace(left, right, 2 * len(classes) + 1)
            panel.set_xticks(edges[1::2], [str(label) for label in classes])
            panel.set_xlabel("predicted class")
    return Path(path)


def image_rows(
    path: Path | str, rows: Sequence[Labelled], title: str = "", classes: Any = ()
) -> Path:
    """Draw the first images of every row, 12 at most, one row below another."""
    count = min(_MAX_COLUMNS, *(len(images) for _, images in rows))
    table = [[(label, images[:count])] for label, images in rows]
    return image_grids(path, table, count, title=title, classes=classes[:count])


def _show_images(axes: "Axes", images: np.ndarray, columns: int) -> None:
    """Show a grid; small images keep sharp pixels, with gaps thinner than a pixel."""
    scale = max(1, 32 // max(images.shape[1:3]))
    grid = image_grid(images.repeat(scale, 1).repeat(scale, 2), columns)
    show(axes, grid, interpolation="nearest" if scale > 1 else "auto")


def samples_beside_data(path: Path | str, samples: np.ndarray, data: np.ndarray) -> Path:
    """Draw samples on the left, and as many held-out images on the right."""
    count = min(len(samples), len(data))
    titled = [("Model samples", samples[:count]), ("Held-out data", data[:count])]
    return image_grids(path, [titled])


def reconstructions(
    path: Path | str, originals: np.ndarray, reconstructed: np.ndarray, max_error: float
) -> Path:
    """Draw originals, their reconstructions, and the absolute error.

    The error is the largest over channels, from black (none) to pale yellow (the largest shown).
    The title states ``max_error``, the largest error of the whole evaluation.
    """
    from matplotlib import colormaps

    originals, reconstructed = originals[:_MAX_COLUMNS], reconstructed[:_MAX_COLUMNS]
    error = np.abs(originals.astype(np.float64) - reconstructed).max(axis=-1)
    largest = error.max()
    rows = [
        ("Original", originals),
        ("Reconstruction", reconstructed),
        (f"Error, up to {largest:.2g}", colormaps["inferno"](error / (largest or 1.0))[..., :3]),
    ]
    title = f"Forward and back through the network: max |error| = {max_error:.2g}"
    return image_rows(path, rows, title)


def classifier_inversion(
    path: Path | str,
    originals: np.ndarray,
    reconstructed: np.ndarray,
    predictions: Any,
    max_error: float,
) -> Path:
    """Draw images above those recovered from a classifier's features, with predicted classes.

    The title states ``max_error``, the largest error of the whole evaluation.
    """
    title = f"Images recovered from a classifier's features: max |error| = {max_error:.2g}"
    rows = [("Input", originals), ("Recovered", reconstructed)]
    return image_rows(path, rows, title, predictions)


def training_curve(
    path: Path | str,
    steps: np.ndarray,
    train_bits: np.ndarray,
    validation_steps: np.ndarray,
    validation_bits: np.ndarray,
    ylabel: str = "bits per dimension",
    reference_lines: Mapping[str, float] | None = None,
    *,
    size: tuple[float, float] = (7.4, 4.1),
) -> Path:
    """Draw training values, raw and smoothed, and validation points over steps.

    The vertical range cuts off the first descent and rare spikes, which would flatten the rest. NaN
    leaves a gap. Validation may be empty. Reference lines map names to heights.
    """
    references = reference_lines or {}
    train, validation = np.asarray(train_bits, float), np.asarray(validation_bits, float)
    with sheet(path, size=size) as axes:
        panel = axes[0, 0]
        panel.plot(steps, train, color="C0", alpha=0.25, linewidth=0.8)
        panel.plot(steps, _smooth(train), color="C0", linewidth=1.8, label="Training")
        if len(validation):
            panel.plot(
                validation_steps, validation, "o-", color="C1", markersize=4.5, linewidth=1.0,
                label="Validation",
            )  # fmt: skip
        for name, value in references.items():
            panel.axhline(
                value,
                color=MUTED,
                linestyle=DASHED,
                label=f"{name} {value:.2f}" if abs(value) < 1e6 else f"{name} {value:.3g}",
            )
        panel.set(
            xlabel="training step",
            ylabel=ylabel,
            ylim=_vertical_range(train, validation, list(references.values())),
        )
        panel.margins(x=0.01)
        panel.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        panel.xaxis.set_major_formatter("{x:,.0f}")
        panel.legend(ncols=4, loc="lower left", bbox_to_anchor=(0.0, 1.0), borderaxespad=0.3)
    return Path(path)


def density_beside_data(
    path: Path | str,
    density: np.ndarray,
    extent: tuple[float, float, float, float],
    data: np.ndarray,
    samples: np.ndarray,
) -> Path:
    """Draw data, learned density and model samples in three square panels over one region.

    The density is p(x) on a grid [n, n], rows by y and columns by x, both ascending; the extent is
    (x_low, x_high, y_low, y_high). Data and samples are points [m, 2]; 10,000 look good.
    """
    dot = min(4.0, 16_000 / max(len(data), len(samples)))
    titles, blank = ("Data", "Learned density", "Model samples"), np.zeros_like(density)
    with sheet(path, 1, 3, size=(2.9, 3.1), layout="compressed") as axes:
        for panel, title, values in zip(axes[0], titles, (blank, density, blank), strict=True):
            show_density(panel, values, extent)
            panel.set_title(title)
        for panel, points in zip(axes[0, ::2], (data, samples), strict=True):
            panel.scatter(*points.T, s=dot, alpha=0.5, color="#fb9b06", linewidths=0)
            panel.set(xlim=extent[:2], ylim=extent[2:])
    return Path(path)


def points_beside_data(path: Path | str, data: np.ndarray, samples: np.ndarray) -> Path:
    """Draw data and model samples that do not lie in the plane, [m, d].

    Of d > 2 coordinates the first two are drawn; of one, histograms.
    """
    with sheet(path, 1, 2, size=(2.9, 3.1), layout="compressed") as axes:
        titled = zip(axes[0], ("Data", "Model samples"), (data, samples), strict=True)
        for panel, title, points in titled:
            panel.set_title(title)
            if points.shape[1] == 1:
                panel.hist(points[:, 0], bins=50, range=(data.min(), data.max()), color="#fb9b06")
                continue
            dot = min(4.0, 16_000 / len(points))
            panel.scatter(*points.T[:2], s=dot, alpha=0.5, color="#fb9b06", linewidths=0)
        axes[0, 1].sharex(axes[0, 0])
    return Path(path)


def show_density(
    axes: "Axes",
    density: np.ndarray,
    extent: tuple[float, float, float, float],
    brightest: float | None = None,
) -> None:
    """Show a density in a panel; by default its 99.5th percentile is brightest."""
    high = brightest or float(np.quantile(density, 0.995)) or float(density.max()) or 1.0
    show(
        axes, density, origin="lower", extent=extent, interpolation="bilinear", vmin=0.0, vmax=high
    )


def _vertical_range(train, validation, references):
    """Fit all but the run's first twentieth and the outer fiftieths of training, with a margin."""
    settled = train[len(train) // 20 :]
    settled = settled[np.isfinite(settled)]
    ends = np.quantile(settled, (0.02, 0.98)) if len(settled) else settled
    shown = np.concatenate([ends, validation[len(validation) // 20 :], references])
    shown = shown[np.isfinite(shown)]
    low, high = (shown.min(), shown.max()) if len(shown) else (0.0, 1.0)
    margin = 0.06 * (high - low) or 0.5
    return low - margin, high + margin


def _smooth(values):
    """Average over a centred thirtieth of the run; NaN stays NaN, and does not spread."""
    window = np.ones(2 * (len(values) // 60) + 1)
    finite = np.isfinite(values)
    total = np.convolve(np.where(finite, values, 0.0), window, mode="same")
    count = np.convolve(finite.astype(float), window, mode="same")
    return np.where(finite, total / np.maximum(count, 1.0), np.nan)
