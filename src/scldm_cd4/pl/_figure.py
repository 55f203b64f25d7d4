"""What all plots share: new figures, colours, names that are drawn as they stand, and files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scldm_cd4._console import in_notebook
from scldm_cd4._errors import DataError

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31")
"""Colours that people with any colour vision tell apart (after Okabe & Ito 2008)."""
REST = "#C8C8C8"
"""Colour of what is in no named group."""
REAL, GENERATED, SIGNIFICANT = COLOURS[:3]
GREY, INK = "#8A94A0", "#1D2733"
DPI = 200


def new_figure(size: tuple[float, float]) -> Any:
    """Return a figure without a window; a notebook shows it where it is the last value of a cell."""
    from matplotlib.figure import Figure

    if in_notebook():
        import matplotlib.pyplot as plt

        plt.switch_backend(plt.get_backend())  # loads the notebook's own, which teaches it to show figures
    return Figure(figsize=size, layout="constrained")


def new_axes(size: tuple[float, float]) -> Any:
    """Return Axes of their own; a notebook shows them at the end of the cell, elsewhere pyplot is left alone."""
    if in_notebook():
        import matplotlib.pyplot as plt

        return plt.subplots(figsize=size, layout="constrained")[1]
    return new_figure(size).subplots()


def finish(drawn: Any, save: str | Path | None) -> Any:
    """Write Axes or a Figure to a file if asked, and return them.

    Raises
    ------
    DataError
        The file cannot be written, or its ending is none that matplotlib knows.
    """
    if save is not None:
        figure = drawn if hasattr(drawn, "savefig") else drawn.get_figure()
        try:
            figure.savefig(Path(save).expanduser(), dpi=DPI, bbox_inches="tight")
        except (OSError, ValueError) as error:
            raise DataError(f"the plot cannot be written to {str(save)!r}: {error}") from error
    return drawn


def plain(label: str, length: int = 26) -> str:
    """Give a label that matplotlib draws as it stands, shortened: no formula, no new line, not hidden by a ``_``."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(label)).split())
    text = text if len(text) <= length else f"{text[: length - 1]}…"
    return (f" {text}" if text.startswith("_") else text).replace("$", r"\$")


def open_sides(ax: Any) -> None:
    """Leave out the upper and the right line of the frame."""
    ax.spines[["top", "right"]].set_visible(False)


def agreement_lines(ax: Any) -> None:
    """Draw the line of equal values, and those of no change."""
    ax.axline((0, 0), slope=1, color=GREY, lw=0.9, ls="--", zorder=0)
    ax.axhline(0, color=REST, lw=0.7, zorder=0)
    ax.axvline(0, color=REST, lw=0.7, zorder=0)


def name_points(
    ax: Any, x: np.ndarray, y: np.ndarray, names: Sequence[str], *, colours: Sequence[str] | None = None
) -> None:
    """Write names beside points, near them where there is room, none above another.

    A greedy search, the first name first: of places around the point at growing distances, it takes the one that
    hides least and is nearest.

    Parameters
    ----------
    ax
        With its limits, labels and title, and all that names should not hide: points, texts and a legend.
    x, y, names
        Of the points.
    colours
        Of the names.
    """
    from matplotlib.patheffects import withStroke

    figure = ax.get_figure()
    figure.draw_without_rendering()  # gives everything its place
    pixels = figure.dpi / 72.0
    frame = np.array(ax.get_window_extent().extents)
    spots = ax.transData.transform(np.column_stack([x, y]))
    ink = np.concatenate([ax.transData.transform(np.asarray(drawn.get_offsets())) for drawn in ax.collections])
    others = [*ax.texts, *([ax.get_legend()] if ax.get_legend() else [])]
    extents = [other.get_window_extent().extents for other in others]
    taken = np.vstack([np.hstack([spots - 3 * pixels, spots + 3 * pixels]), *extents])
    for i, (spot, name) in enumerate(zip(spots, names, strict=True)):
        text = ax.annotate(
            name,
            (x[i], y[i]),
            (0.0, 0.0),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=7.5,
            color=INK if colours is None else colours[i],
            path_effects=[withStroke(linewidth=2.0, foreground="white")],
            arrowprops={"arrowstyle": "-", "color": GREY, "lw": 0.5, "shrinkA": 0, "shrinkB": 2},
        )
        size = np.asarray(text.get_window_extent().size)
        place, line = _free_place(spot, size, frame, np.delete(taken, i, axis=0), ink, pixels)
        text.set_position((place - spot) / pixels)
        taken = np.vstack([taken, np.concatenate([place - size / 2, place + size / 2])])
        ink = np.concatenate([ink, line])


def _free_place(
    spot: np.ndarray, size: np.ndarray, frame: np.ndarray, taken: np.ndarray, ink: np.ndarray, pixels: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the middle of a box beside a spot, and points on the line to it; boxes are left, bottom, right, top."""
    angles = np.linspace(0.0, 2.0 * np.pi, 16, endpoint=False)
    ways = np.column_stack([np.cos(angles), np.sin(angles)])
    steps = np.repeat(np.array([7.0, 13.0, 21.0, 31.0, 43.0, 57.0, 80.0, 110.0]) * pixels, len(ways))
    ends = spot + steps[:, None] * np.tile(ways, (8, 1))
    middles = ends + np.tile(ways, (8, 1)) * size / 2
    boxes = np.hstack([middles - size / 2, middles + size / 2]) + np.array([-1, -1, 1, 1]) * pixels
    lines = spot + np.linspace(0.2, 1.0, 12)[:, None] * (ends - spot)[:, None, :]
    outside = ((boxes[:, :2] < frame[:2]) | (boxes[:, 2:] > frame[2:])).any(axis=1)
    meets = (boxes[:, None, :2] < taken[:, 2:]) & (boxes[:, None, 2:] > taken[:, :2])
    above = (ink > boxes[:, None, :2]) & (ink < boxes[:, None, 2:])
    crossed = (lines[:, :, None] > taken[:, :2]) & (lines[:, :, None] < taken[:, 2:])
    cost = steps / (8.0 * pixels) + 0.5 * np.minimum(above.all(axis=2).sum(axis=1), 40)
    cost += 1e4 * outside + 1e3 * meets.all(axis=2).sum(axis=1) + 100.0 * crossed.all(axis=3).any(axis=(1, 2))
    best = int(np.argmin(cost))
    return middles[best], lines[best]


def histograms(ax: Any, real: np.ndarray, generated: np.ndarray, title: str, *, log: bool) -> None:
    """Draw two histograms over the same bins, one filled and one an outline."""
    both = np.concatenate([real, generated])
    low, high = max(both.min(), 1.0) if log else both.min(), both.max()
    bins = np.geomspace(low, max(high, low * 1.01), 41) if log else np.linspace(low, max(high, low + 1.0), 41)
    filled, outline = {"color": REAL, "alpha": 0.35}, {"histtype": "step", "color": GENERATED, "lw": 1.8}
    for values, style, what in ((real, filled, "real"), (generated, outline, "generated")):
        label = f"{what}, median {np.median(values):.0f}"
        ax.hist(np.clip(values, low, None), bins=bins, label=label, **style)
    ax.set(xlabel=title, ylabel="cells", xscale="log" if log else "linear")
    ax.legend(frameon=False, fontsize=8.5, loc="lower left", bbox_to_anchor=(0.0, 1.0), borderaxespad=0.1)
