"""Pictures, from NumPy arrays to PNG files.

Each public function writes one file, whose folders it makes, and returns the path. Matplotlib is
used through its objects alone; no global state is read or changed. Layouts are in pixels from the
top left corner, so that every pixel of an image covers a whole number of the picture's.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_DPI = 150
_INK, _MUTED, _GRID = "#1f2933", "#66717d", "#e4e7eb"
_TRAIN, _VALIDATION = "#2f6fb3", "#d9622b"
_COLOUR_MAP = "inferno"

_MARGIN, _TITLE_HEIGHT, _HEADING_HEIGHT, _LABEL_WIDTH = 24, 44, 34, 250
_TILE, _GAP = 64, 2
_PANEL = 420
_MAX_COLUMNS = 12


def image_grid(images: np.ndarray, columns: int, *, scale: int = 1, gap: int = _GAP) -> np.ndarray:
    """Tile images row by row on white, each pixel enlarged to a square.

    Args:
      images: floats [n, h, w, c] in [0, 1], c = 1 (grey) or 3; values outside are clipped.
      columns: tiles a row, ≥ 1.
      scale: side of an image's pixel in the result, ≥ 1.
      gap: white pixels between tiles, ≥ 0.

    Returns:
      [rows·(scale·h + gap) − gap, columns·(scale·w + gap) − gap, 3] in [0, 1], with
      rows = ⌈n / columns⌉; what is left of the last row is white.

    Raises:
      ValueError: if the images have another shape, are integers, or are not finite, or if a
        number is out of its range.
    """
    _check_images(images, "images")
    if columns < 1 or scale < 1 or gap < 0:
        raise ValueError(
            f"columns and scale must be ≥ 1 and gap ≥ 0; got {columns}, {scale} and {gap}."
        )
    tiles = np.clip(images, 0.0, 1.0).repeat(scale, axis=1).repeat(scale, axis=2)
    count, height, width, _ = tiles.shape
    rows = math.ceil(count / columns)
    grid = np.ones((rows * (height + gap) - gap, columns * (width + gap) - gap, 3))
    for index, tile in enumerate(tiles):
        row, column = divmod(index, columns)
        top, left = row * (height + gap), column * (width + gap)
        grid[top : top + height, left : left + width] = tile
    return grid


def samples_beside_data(path: str | Path, samples: np.ndarray, data: np.ndarray) -> Path:
    """Two square-ish grids: the model's samples on the left, held-out data on the right.

    Args:
      path: of the PNG file.
      samples: [n, h, w, c] floats in [0, 1], as in :func:`image_grid`.
      data: likewise. Both grids show the first images, as many as the shorter has.

    Raises:
      ValueError: as :func:`image_grid`.
    """
    count = min(len(samples), len(data))
    left, right = (_scaled_grid(x[:count], math.ceil(math.sqrt(count))) for x in (samples, data))
    height, width, _ = left.shape
    figure = _sheet(2 * width + 3 * _MARGIN, height + _TITLE_HEIGHT + _MARGIN)
    for x, title, grid in (
        (_MARGIN, "Model samples", left),
        (2 * _MARGIN + width, "Held-out data", right),
    ):
        _write(figure, x, _TITLE_HEIGHT / 2, title, size=10, weight="bold")
        _paste(figure, x, _TITLE_HEIGHT, grid)
    return _save(figure, path)


def reconstructions(
    path: str | Path, originals: np.ndarray, reconstructed: np.ndarray, max_error: float
) -> Path:
    """Originals, their reconstructions, and the magnified absolute error, one column an image.

    The error row is multiplied by the round number that it states; white is the largest error
    shown.

    Args:
      path: of the PNG file.
      originals: [n, h, w, c] floats in [0, 1], as in :func:`image_grid`; the first 12 are shown.
      reconstructed: what came back, likewise.
      max_error: largest absolute error of the whole evaluation, for the title.

    Raises:
      ValueError: as :func:`image_grid`; if the two differ in shape.
    """
    _check_same_shape(originals, reconstructed)
    originals, reconstructed = originals[:_MAX_COLUMNS], reconstructed[:_MAX_COLUMNS]
    error = np.abs(originals.astype(np.float64) - reconstructed)
    gain = _round_down(1.0 / error.max()) if error.max() > 0 else 1.0
    rows = [
        ("Original", originals),
        ("Reconstruction", reconstructed),
        (f"Error × {_plain(gain)}", gain * error),
    ]
    title = f"Forward and back through the network: max |error| = {max_error:.1e}"
    return _save(_strips(title, rows), path)


def classifier_inversion(
    path: str | Path,
    originals: np.ndarray,
    reconstructed: np.ndarray,
    predictions: Sequence[int] | np.ndarray,
    max_error: float,
) -> Path:
    """Images, and the same recovered from a classifier's features, under the predicted classes.

    Args:
      path: of the PNG file.
      originals: [n, h, w, c] floats in [0, 1], as in :func:`image_grid`; the first 12 are shown.
      reconstructed: recovered from the features, likewise.
      predictions: [n] predicted classes.
      max_error: largest absolute error of the whole evaluation, for the title.

    Raises:
      ValueError: as :func:`image_grid`; if shapes or numbers of images differ.
    """
    _check_same_shape(originals, reconstructed)
    if len(predictions) != len(originals):
        raise ValueError(
            f"one prediction an image: got {len(predictions)} predictions "
            f"for {len(originals)} images."
        )
    rows = [
        ("Input", originals[:_MAX_COLUMNS]),
        ("Recovered from features", reconstructed[:_MAX_COLUMNS]),
    ]
    headings = ("Predicted class", [str(label) for label in predictions[:_MAX_COLUMNS]])
    title = f"What the classifier's features remember: max |error| = {max_error:.1e}"
    return _save(_strips(title, rows, headings), path)


def training_curve(
    path: str | Path,
    steps: np.ndarray,
    train_bits: np.ndarray,
    validation_steps: np.ndarray,
    validation_bits: np.ndarray,
    ylabel: str = "bits per dimension",
    reference_lines: dict[str, float] | None = None,
) -> Path:
    """Training values, raw and smoothed, and validation points over steps.

    The vertical range leaves out the first descent where it would flatten all the rest.

    Args:
      path: of the PNG file.
      steps: [n] training steps, n ≥ 1, increasing.
      train_bits: [n]; NaN leaves a gap.
      validation_steps: [m], m ≥ 0.
      validation_bits: [m].
      ylabel: what the values are, with their unit.
      reference_lines: heights to mark, by their names.

    Raises:
      ValueError: if n is 0 or lengths differ.
    """
    steps, train_bits = np.asarray(steps), np.asarray(train_bits, float)
    validation_bits = np.asarray(validation_bits, float)
    _check_series(steps, train_bits, "training", at_least=1)
    _check_series(validation_steps, validation_bits, "validation", at_least=0)
    references = reference_lines or {}
    figure = _sheet(1150, 640)
    axes = figure.add_axes((0.085, 0.13, 0.735 if references else 0.885, 0.82))
    axes.plot(steps, train_bits, color=_TRAIN, alpha=0.25, linewidth=0.8)
    axes.plot(steps, _smooth(train_bits), color=_TRAIN, linewidth=1.8, label="Training")
    if len(validation_bits):
        axes.plot(
            validation_steps, validation_bits, "o-", color=_VALIDATION, markersize=4.5,
            linewidth=1.0, label="Validation",
        )  # fmt: skip
    axes.set_ylim(*_vertical_range(train_bits, validation_bits, list(references.values())))
    _style_axes(axes, "training step", ylabel)
    _mark_references(axes, references)
    axes.legend(frameon=False, fontsize=9, labelcolor=_INK, loc="upper right")
    return _save(figure, path)


def density_beside_data(
    path: str | Path,
    density: np.ndarray,
    extent: tuple[float, float, float, float],
    data: np.ndarray,
    samples: np.ndarray,
) -> Path:
    """Three square panels over the same region: the data, the learned density, model samples.

    Args:
      path: of the PNG file.
      density: [n, n] values of p(x), rows by y and columns by x, both from low to high.
      extent: (x_low, x_high, y_low, y_high) of the region.
      data: [m, 2] points; those outside the region are not shown.
      samples: [k, 2] points, likewise. The panels are alike if m = k.

    Raises:
      ValueError: if an array has another shape or is not finite, or the region is empty.
    """
    x_low, x_high, y_low, y_high = extent
    if not (x_low < x_high and y_low < y_high):
        raise ValueError(
            f"extent must be (x_low, x_high, y_low, y_high), increasing; got {extent}."
        )
    if density.ndim != 2:
        raise ValueError(f"density must be [n, n]; got {density.shape}.")
    _check_finite(density, "density")
    panels = [
        ("Data", _histogram(data, extent, "data"), "nearest"),
        ("Learned density", density, "bilinear"),
        ("Model samples", _histogram(samples, extent, "samples"), "nearest"),
    ]
    figure = _sheet(3 * _PANEL + 4 * _MARGIN, _PANEL + _TITLE_HEIGHT + _MARGIN)
    for index, (title, values, interpolation) in enumerate(panels):
        left = _MARGIN + index * (_PANEL + _MARGIN)
        _write(figure, left, _TITLE_HEIGHT / 2, title, size=10, weight="bold")
        axes = _panel(figure, left, _TITLE_HEIGHT, _PANEL)
        axes.imshow(
            values, origin="lower", extent=extent, aspect="auto", cmap=_COLOUR_MAP,
            interpolation=interpolation, vmin=0.0, vmax=_brightest(values),
        )  # fmt: skip
    return _save(figure, path)


def _sheet(width, height):
    # The half pixel keeps the size in inches from being rounded down to a pixel less.
    figure = Figure(figsize=((width + 0.5) / _DPI, (height + 0.5) / _DPI), dpi=_DPI)
    FigureCanvasAgg(figure)
    return figure


def _save(figure, path):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=_DPI, facecolor="white")
    return path


def _size(figure):
    return int(figure.bbox.width), int(figure.bbox.height)


def _write(figure, x, y, text, *, size=9, align="left", weight="normal", color=_INK):
    width, height = _size(figure)
    figure.text(
        x / width, 1 - y / height, text, fontsize=size, ha=align, va="center", weight=weight,
        color=color,
    )  # fmt: skip


def _paste(figure, left, top, pixels):
    _, height = _size(figure)
    figure.figimage(pixels, xo=left, yo=height - top - len(pixels), origin="upper")


def _panel(figure, left, top, side):
    width, height = _size(figure)
    axes = figure.add_axes((left / width, 1 - (top + side) / height, side / width, side / height))
    axes.set_axis_off()
    return axes


def _scaled_grid(images, columns):
    _check_images(images, "images")
    return image_grid(images, columns, scale=max(1, round(_TILE / max(images.shape[1:3]))))


def _strips(title, rows, headings=None):
    """Rows of images under a title, each with its label on the left; headings over the columns."""
    strips = [(label, _scaled_grid(images, len(images))) for label, images in rows]
    height, width, _ = strips[0][1].shape
    top = _TITLE_HEIGHT + (_HEADING_HEIGHT if headings else 0)
    figure = _sheet(
        2 * _MARGIN + _LABEL_WIDTH + max(width, 560),
        top + len(rows) * (height + _GAP) - _GAP + _MARGIN,
    )
    left = _MARGIN + _LABEL_WIDTH
    _write(figure, _MARGIN, _TITLE_HEIGHT / 2, title, size=10, weight="bold")
    if headings:
        _write_headings(figure, headings, left, top - _HEADING_HEIGHT / 2, width)
    for index, (label, strip) in enumerate(strips):
        strip_top = top + index * (height + _GAP)
        _write(figure, _MARGIN, strip_top + height / 2, label, color=_MUTED)
        _paste(figure, left, strip_top, strip)
    return figure


def _write_headings(figure, headings, left, y, width):
    label, texts = headings
    _write(figure, _MARGIN, y, label, color=_MUTED)
    for index, text in enumerate(texts):
        x = left + (index + 0.5) * (width + _GAP) / len(texts)
        _write(figure, x, y, text, size=10, align="center", weight="bold")


def _style_axes(axes: Axes, xlabel, ylabel):
    axes.set_xlabel(xlabel, fontsize=10, color=_INK)
    axes.set_ylabel(ylabel, fontsize=10, color=_INK)
    axes.tick_params(labelsize=9, colors=_MUTED, length=0)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.01)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_MUTED)


def _mark_references(axes: Axes, references):
    low, high = axes.get_ylim()
    label_y = -math.inf
    for name, value in sorted(references.items(), key=lambda item: item[1]):
        axes.axhline(value, color=_MUTED, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
        label_y = max(value, label_y + 0.045 * (high - low))
        axes.annotate(
            f"{name} {value:.2f}", (1.0, label_y), xycoords=axes.get_yaxis_transform(),
            xytext=(5, 0), textcoords="offset points", va="center", fontsize=8.5, color=_MUTED,
            annotation_clip=False,
        )  # fmt: skip


def _vertical_range(train, validation, references):
    """From the lowest value to where the curve is after its first twentieth, with a margin."""
    settled = train[len(train) // 20 :]
    shown = np.concatenate([settled, validation[len(validation) // 20 :], references])
    shown = shown[np.isfinite(shown)]
    if not len(shown):
        return 0.0, 1.0
    low, high = shown.min(), shown.max()
    margin = 0.06 * (high - low) or 0.5
    return low - margin, high + margin


def _smooth(values):
    """Centred moving average over a thirtieth of the run; NaN stays NaN and spreads no further."""
    window = np.ones(2 * (len(values) // 60) + 1)
    finite = np.isfinite(values)
    total = np.convolve(np.where(finite, values, 0.0), window, mode="same")
    count = np.convolve(finite.astype(float), window, mode="same")
    return np.where(finite, total / np.maximum(count, 1.0), np.nan)


def _histogram(points, extent, name):
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(f"{name} must be points [n, 2]; got {points.shape}.")
    _check_finite(points, name)
    bins = _PANEL // 3
    counts, _, _ = np.histogram2d(
        points[:, 1], points[:, 0], bins=bins, range=(extent[2:], extent[:2])
    )
    return counts


def _brightest(values):
    """The 99.5th percentile of what is not empty, so that a spike does not darken the rest."""
    positive = values[values > 0]
    return float(np.quantile(positive, 0.995)) if positive.size else 1.0


def _round_down(value):
    """To two significant digits."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return math.floor(value / unit) * unit


def _plain(number):
    return f"{number:,.0f}" if number >= 10 else f"{number:.1f}"


def _check_images(images, name):
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape:
        raise ValueError(f"{name} must be [n, h, w, c], n ≥ 1, c = 1 or 3; got {images.shape}.")
    if not np.issubdtype(images.dtype, np.floating):
        raise ValueError(
            f"{name} must be floats in [0, 1]; got {images.dtype}: "
            "divide grey levels by num_levels - 1."
        )
    _check_finite(images, name)


def _check_finite(values, name):
    bad = ~np.isfinite(values)
    if bad.any():
        index = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(f"{name} must be finite; got {values[index]} at index {index}.")


def _check_same_shape(originals, reconstructed):
    if originals.shape != reconstructed.shape:
        raise ValueError(
            "originals and reconstructed must have the same shape; "
            f"got {originals.shape} and {reconstructed.shape}."
        )


def _check_series(steps, values, name, *, at_least):
    if np.shape(steps) != np.shape(values) or np.ndim(values) != 1 or len(values) < at_least:
        raise ValueError(
            f"{name} steps and values must be two series of one length ≥ {at_least}; "
            f"got shapes {np.shape(steps)} and {np.shape(values)}."
        )
