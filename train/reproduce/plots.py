"""The house style of the paper's figures, and the layouts that several of them share."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from train.figures import image_grid

DPI = 150
INK, MUTED, GRID = "#1f2933", "#66717d", "#e4e7eb"
#: Colours that remain apart for colour-blind readers (Okabe and Ito).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")

_TITLE, _LABEL, _SMALL = 10, 9.5, 8.5


def shades(count: int) -> np.ndarray:
    """Colours [count, 4] from dark blue to yellow, for an ordered family."""
    return colormaps["viridis"](np.linspace(0.0, 0.92, count))


def sheet(columns: int, rows: int = 1, *, size: tuple[float, float] = (4.2, 3.4)):
    """A figure and its axes [rows, columns], each panel of ``size`` inches."""
    figure = Figure(figsize=(columns * size[0], rows * size[1]), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def style(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    """Titles, units and a quiet grid."""
    axes.set_title(title, fontsize=_TITLE, color=INK, loc="left", weight="bold")
    axes.set_xlabel(xlabel, fontsize=_LABEL, color=INK)
    axes.set_ylabel(ylabel, fontsize=_LABEL, color=INK)
    axes.tick_params(labelsize=_SMALL, colors=MUTED)
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)


def legend(axes: Axes, **options) -> None:
    """A legend without a frame."""
    axes.legend(**{"frameon": False, "fontsize": _SMALL, "labelcolor": INK} | options)


def legend_below(axes: Axes, columns: int) -> None:
    """A legend under the horizontal axis, clear of the curves."""
    legend(
        axes, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=columns, borderaxespad=0.0,
        handlelength=2.6,
    )  # fmt: skip


def show(axes: Axes, pixels: np.ndarray, title: str = "", **options) -> None:
    """An image that fills its panel, without ticks."""
    axes.imshow(pixels, **options)
    axes.set_title(title, fontsize=_LABEL, color=INK)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def image_rows(path: Path, rows: Sequence[tuple[str, np.ndarray]]) -> Path:
    """Rows of images [n, height, width, channels] in [0, 1], each with its label on the left."""
    strips = [image_grid(np.clip(images, 0, 1), len(images), gap=1) for _, images in rows]
    height, width, _ = strips[0].shape
    scale = 7.4 / width
    figure, axes = sheet(1, len(rows), size=(9.0, height * scale + 0.08))
    for panel, (label, _), strip in zip(axes[:, 0], rows, strips, strict=True):
        show(panel, strip, interpolation="nearest")
        panel.set_ylabel(label, fontsize=_LABEL, color=INK, rotation=0, ha="right", va="center")
        panel.set_anchor("E")
    return save(figure, path)


def image_grids(path: Path, grids: Sequence[Sequence[tuple[str, np.ndarray]]]) -> Path:
    """A table of square-ish grids of images, each under its title."""
    columns = max(len(row) for row in grids)
    figure, axes = sheet(columns, len(grids), size=(2.6, 2.85))
    for panels, row in zip(axes, grids, strict=True):
        for panel, (title, images) in zip(panels, row, strict=False):
            side = math.ceil(math.sqrt(len(images)))
            show(panel, image_grid(images, side, gap=1), title, interpolation="nearest")
        for panel in panels[len(row) :]:
            panel.set_axis_off()
    return save(figure, path)


def save(figure: Figure, path: Path) -> Path:
    """Write the PNG."""
    figure.savefig(path, dpi=DPI, facecolor="white")
    return path
