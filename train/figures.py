"""Pictures, from NumPy arrays to PNG files.

Each function with a ``path`` writes that file, makes its folders, and returns the path. Matplotlib
is used through its objects alone; no global state is read or changed. Layouts are in pixels from
the top left, so that every pixel of an image covers a whole number of the picture's.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_DPI = 150
_INK, _MUTED, _GRID = "#1f2933", "#66717d", "#e4e7eb"
_TRAIN, _VALIDATION = "#2f6fb3", "#d9622b"
_COLOUR_MAP = "inferno"

_MARGIN, _TITLE_HEIGHT, _HEADING_HEIGHT, _LABEL_WIDTH = 24, 60, 34, 200
_TILE, _GAP, _GAP_GREY, _ROW_GAP = 64, 3, 0.25, 10
_PANEL = 420
_MAX_COLUMNS = 12


def image_grid(images: np.ndarray, columns: int, *, scale: int = 1, gap: int = _GAP) -> np.ndarray:
    """Tile images row by row with thin dark gaps, each pixel enlarged to a square.

    Args:
      images: floats [n, h, w, c] in [0, 1], c = 1 (grey) or 3; values outside are clipped.
      columns: tiles a row, ≥ 1.
      scale: side of an image's pixel in the result, ≥ 1.
      gap: pixels between tiles, ≥ 0.

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
    grid = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), _GAP_GREY)
    for index in range(rows * columns):
        row, column = divmod(index, columns)
        top, left = row * (height + gap), column * (width + gap)
        grid[top : top + height, left : left + width] = tiles[index] if index < count else 1.0
    return grid


def grid(path: str | Path, images: np.ndarray, columns: int | None = None) -> Path:
    """Images in rows, as a picture of their own.

    Args:
      path: of the PNG.
      images: [n, h, w, c] floats in [0, 1], as in :func:`image_grid`.
      columns: images a row; by default as many as make it about square.
    """
    columns = columns or math.ceil(math.sqrt(len(images)))
    pixels = _scaled_grid(images, columns)
    height, width = pixels.shape[:2]
    figure = _sheet(width + 2 * _MARGIN, height + 2 * _MARGIN)
    _paste(figure, _MARGIN, _MARGIN, pixels)
    return _save(figure, path)


def samples_beside_data(path: str | Path, samples: np.ndarray, data: np.ndarray) -> Path:
    """Two square-ish grids: the model's samples on the left, held-out data on the right.

    Args:
      samples: [n, h, w, c] floats in [0, 1], as in :func:`image_grid`.
      data: likewise. Both grids show the first images, as many as the shorter has.

    Raises:
      ValueError: as :func:`image_grid`; if the two differ in the shape of an image.
    """
    count = min(len(samples), len(data))
    samples, data = samples[:count], data[:count]
    _check_alike(samples=samples, data=data)
    columns = math.ceil(math.sqrt(count))
    left, right = (_scaled_grid(x, columns) for x in (samples, data))
    height, width, _ = left.shape
    figure = _sheet(2 * width + 3 * _MARGIN, height + _TITLE_HEIGHT + _MARGIN)
    for index, (title, grid) in enumerate([("Model samples", left), ("Held-out data", right)]):
        x = _MARGIN + index * (width + _MARGIN)
        _write_title(figure, x, title)
        _paste(figure, x, _TITLE_HEIGHT, grid)
    return _save(figure, path)


def reconstructions(
    path: str | Path, originals: np.ndarray, reconstructed: np.ndarray, max_error: float
) -> Path:
    """Originals, their reconstructions, and the magnified absolute error, one column an image.

    Errors are the largest over an image's channels, multiplied by the round number that the
    picture states, and coloured: black is none, pale yellow the largest shown.

    Args:
      originals: [n, h, w, c] floats in [0, 1], as in :func:`image_grid`; the first 12 are shown.
      reconstructed: what came back, likewise.
      max_error: largest absolute error of the whole evaluation, for the title.

    Raises:
      ValueError: as :func:`image_grid`; if the two differ in shape.
    """
    _check_alike(originals=originals, reconstructed=reconstructed)
    originals, reconstructed = originals[:_MAX_COLUMNS], reconstructed[:_MAX_COLUMNS]
    error = np.abs(originals.astype(np.float64) - reconstructed).max(axis=-1)
    gain = _round_down(1.0 / max(error.max(), np.finfo(float).tiny)) if error.any() else 1.0
    rows = [
        ("Original", originals),
        ("Reconstruction", reconstructed),
        (f"Error × {_plain(gain)}", colormaps[_COLOUR_MAP](gain * error)[..., :3]),
    ]
    title = f"Forward and back through the network: max |error| = {max_error:.2g}"
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
      originals: [n, h, w, c] floats in [0, 1], as in :func:`image_grid`; the first 12 are shown.
      reconstructed: recovered from the features, likewise.
      predictions: [n] predicted classes.
      max_error: largest absolute error of the whole evaluation, for the title.

    Raises:
      ValueError: as :func:`image_grid`; if shapes or numbers of images differ.
    """
    _check_alike(originals=originals, reconstructed=reconstructed)
    if len(predictions) != len(originals):
        raise ValueError(f"got {len(predictions)} predictions for {len(originals)} images.")
    rows = [("Input", originals[:_MAX_COLUMNS]), ("Recovered", reconstructed[:_MAX_COLUMNS])]
    headings = ("Predicted class", [str(label) for label in predictions[:_MAX_COLUMNS]])
    title = f"Images recovered from a classifier's features: max |error| = {max_error:.2g}"
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

    The vertical range leaves out the first descent and rare spikes, which would flatten the rest.

    Args:
      steps: [n] training steps, n ≥ 1, increasing.
      train_bits: [n]; NaN leaves a gap.
      validation_steps: [m], m ≥ 0.
      validation_bits: [m].
      ylabel: what the values are, with their unit.
      reference_lines: heights to mark, by their names.

    Raises:
      ValueError: if n is 0 or lengths differ.
    """
    train_bits, validation_bits = np.asarray(train_bits, float), np.asarray(validation_bits, float)
    _check_series(steps, train_bits, "training", at_least=1)
    _check_series(validation_steps, validation_bits, "validation", at_least=0)
    references = reference_lines or {}
    figure = _sheet(1150, 640)
    figure.set_layout_engine("constrained", w_pad=0.15, h_pad=0.12)  # inches
    axes = figure.add_subplot()
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
    axes.legend(
        frameon=False, fontsize=9, labelcolor=_INK, ncols=2, loc="lower left",
        bbox_to_anchor=(0.0, 1.0), borderaxespad=0.3, borderpad=0.0,
    )  # fmt: skip
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
      density: [n, n] values of p(x), rows by y and columns by x, both from low to high.
      extent: (x_low, x_high, y_low, y_high) of the region.
      data: [m, 2] points; those outside the region are not shown.
      samples: [k, 2] points, likewise; m and k should be alike, 10,000 look well.

    Raises:
      ValueError: if an array has another shape or is not finite, or the region is empty.
    """
    x_low, x_high, y_low, y_high = extent
    if not (x_low < x_high and y_low < y_high):
        raise ValueError(f"extent must be (x_low, x_high, y_low, y_high); got {extent}.")
    if density.ndim != 2:
        raise ValueError(f"density must be [n, n]; got {density.shape}.")
    _check_finite(density, "density")
    _check_points(data, "data")
    _check_points(samples, "samples")
    figure = _sheet(3 * _PANEL + 4 * _MARGIN, _PANEL + _TITLE_HEIGHT + _MARGIN)
    titles = ("Data", "Learned density", "Model samples")
    left, middle, right = (_panel(figure, i, title, extent) for i, title in enumerate(titles))
    dot = min(4.0, 16_000 / max(len(data), len(samples)))
    for axes, points in ((left, data), (right, samples)):
        axes.scatter(*points.T, s=dot, alpha=0.5, color=colormaps[_COLOUR_MAP](0.8), linewidths=0)
    middle.imshow(
        density, origin="lower", extent=extent, aspect="auto", cmap=_COLOUR_MAP,
        interpolation="bilinear", vmin=0.0, vmax=_brightest(density),
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


def _write(figure, x, y, text, **style):
    width, height = _size(figure)
    style = {"fontsize": 9, "color": _INK, "va": "center"} | style
    figure.text(x / width, 1 - y / height, text, **style)


def _write_title(figure, x, text):
    _write(figure, x, _TITLE_HEIGHT / 2 + 2, text, fontsize=10, weight="bold")


def _paste(figure, left, top, pixels):
    _, height = _size(figure)
    figure.figimage(pixels, xo=left, yo=height - top - len(pixels), origin="upper")


def _panel(figure, index, title, extent):
    """The index-th square from the left: a dark field without ticks, under its title."""
    width, height = _size(figure)
    left = _MARGIN + index * (_PANEL + _MARGIN)
    _write_title(figure, left, title)
    bottom = height - _TITLE_HEIGHT - _PANEL
    axes = figure.add_axes((left / width, bottom / height, _PANEL / width, _PANEL / height))
    axes.set(xlim=extent[:2], ylim=extent[2:], xticks=[], yticks=[])
    axes.set_facecolor(colormaps[_COLOUR_MAP](0))
    axes.spines[:].set_visible(False)
    return axes


def _scaled_grid(images, columns):
    return image_grid(images, columns, scale=max(1, round(_TILE / max(images.shape[1:3]))))


def _strips(title, rows, headings=None):
    """Rows of images under a title, each with its label on the left; headings over the columns."""
    strips = [(label, _scaled_grid(images, len(images))) for label, images in rows]
    height, width, _ = strips[0][1].shape
    top = _TITLE_HEIGHT + (_HEADING_HEIGHT if headings else 0)
    left, bottom = _MARGIN + _LABEL_WIDTH, top + len(rows) * (height + _ROW_GAP) - _ROW_GAP
    figure = _sheet(left + max(width, 600) + _MARGIN, bottom + _MARGIN)
    _write_title(figure, _MARGIN, title)
    if headings:
        _write_headings(figure, headings, left, top - _HEADING_HEIGHT / 2, width)
    for index, (label, strip) in enumerate(strips):
        strip_top = top + index * (height + _ROW_GAP)
        _write(figure, _MARGIN, strip_top + height / 2, label, color=_MUTED)
        _paste(figure, left, strip_top, strip)
    return figure


def _write_headings(figure, headings, left, y, width):
    label, texts = headings
    _write(figure, _MARGIN, y, label, color=_MUTED)
    for index, text in enumerate(texts):
        x = left + (index + 0.5) * (width + _GAP) / len(texts)
        _write(figure, x, y, text, fontsize=10, ha="center", weight="bold")


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
    """Room for all but the run's first twentieth and the fiftieth at either end, with a margin."""
    settled = train[len(train) // 20 :]
    settled = np.sort(settled[np.isfinite(settled)])
    settled = settled[len(settled) // 50 : len(settled) - len(settled) // 50]
    shown = np.concatenate([settled, validation[len(validation) // 20 :], references])
    shown = shown[np.isfinite(shown)]
    low, high = (shown.min(), shown.max()) if len(shown) else (0.0, 1.0)
    margin = 0.06 * (high - low) or 0.5
    return low - margin, high + margin


def _smooth(values):
    """Centred moving average over a thirtieth of the run; NaN stays NaN and spreads no further."""
    window = np.ones(2 * (len(values) // 60) + 1)
    finite = np.isfinite(values)
    total = np.convolve(np.where(finite, values, 0.0), window, mode="same")
    count = np.convolve(finite.astype(float), window, mode="same")
    return np.where(finite, total / np.maximum(count, 1.0), np.nan)


def _brightest(values):
    """The 99.5th percentile, so that a spike does not darken the rest."""
    return float(np.quantile(values, 0.995)) or float(values.max()) or 1.0


def _round_down(value):
    """To two significant digits."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return math.floor(value / unit) * unit


def _plain(number):
    return f"{number:,.0f}" if 10 <= number < 1e7 else f"{number:.2g}"


def _check_images(images, name):
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape:
        raise ValueError(f"{name} must be [n, h, w, c], n ≥ 1, c = 1 or 3; got {images.shape}.")
    if not np.issubdtype(images.dtype, np.floating):
        raise ValueError(f"{name} must be floats in [0, 1]; got {images.dtype}.")
    _check_finite(images, name)


def _check_points(points, name):
    if points.ndim != 2 or points.shape[1] != 2 or not len(points):
        raise ValueError(f"{name} must be points [n, 2], n ≥ 1; got {points.shape}.")
    _check_finite(points, name)


def _check_finite(values, name):
    bad = ~np.isfinite(values)
    if bad.any():
        index = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(f"{name} must be finite; got {values[index]} at index {index}.")


def _check_alike(**batches):
    for name, images in batches.items():
        _check_images(images, name)
    shapes = [images.shape for images in batches.values()]
    if len(set(shapes)) > 1:
        raise ValueError(f"{' and '.join(batches)} must have one shape; got {shapes}.")


def _check_series(steps, values, name, *, at_least):
    shapes = np.shape(steps), np.shape(values)
    if shapes[0] != shapes[1] or len(shapes[0]) != 1 or shapes[0][0] < at_least:
        raise ValueError(
            f"{name}: steps and values must be [n], n ≥ {at_least}; got {shapes[0]}, {shapes[1]}."
        )
