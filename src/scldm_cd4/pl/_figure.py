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
    ax: Any,
    x: np.ndarray,
    y: np.ndarray,
    names: Sequence[str],
    limits: tuple[float, float],
    *,
    low: float | None = None,
    colours: Sequence[str] | None = None,
) -> None:
    """Write names beside points, outward where there is room, none above another.

    Parameters
    ----------
    ax
        With points from ``-limits[0]`` to ``limits[0]``, and up to ``limits[1]``.
    x, y, names
        Of the points.
    limits
        Of x (both sides) and y.
    low
        Lower limit of y; by default ``-limits[1]``.
    colours
        Of the names.
    """
    from matplotlib.patheffects import withStroke

    width, high = limits
    low = -high if low is None else low
    for side in (1.0, -1.0):
        own = np.flatnonzero(x > 0 if side > 0 else x <= 0)
        own = own[np.argsort(y[own], kind="stable")]
        for i, height in zip(own.tolist(), _apart(y[own], 0.05 * (high - low), high), strict=True):
            outward = side if abs(x[i]) < 0.5 * width else -side
            ax.annotate(
                names[i],
                (x[i], y[i]),
                (x[i] + 0.09 * width * outward, height),
                ha="left" if outward > 0 else "right",
                va="center",
                fontsize=7.5,
                color=INK if colours is None else colours[i],
                path_effects=[withStroke(linewidth=2.0, foreground="white")],
                arrowprops={"arrowstyle": "-", "color": GREY, "lw": 0.5, "shrinkA": 0, "shrinkB": 2},
            )


def _apart(heights: np.ndarray, gap: float, limit: float) -> np.ndarray:
    """Move sorted heights apart by a gap at least, within the limits."""
    from sklearn.isotonic import isotonic_regression

    if len(heights) == 0:
        return heights
    steps = gap * np.arange(len(heights))
    out = np.asarray(isotonic_regression(heights.astype(np.float64) - steps)) + steps  # as near as the gap allows
    over = out[-1] - 0.95 * limit
    if over > 0:
        out[-1] -= over
        for i in range(len(out) - 2, -1, -1):
            out[i] = min(out[i], out[i + 1] - gap)
    return out


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
