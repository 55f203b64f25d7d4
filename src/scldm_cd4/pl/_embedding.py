"""Real and generated cells in one plane that only real cells have shaped."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from scldm_cd4._errors import DataError

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31")
"""Colours that people with any colour vision tell apart (after Okabe & Ito 2008)."""
REST = "#C8C8C8"
"""Colour of the cells in no named group."""


def embed_like(reference: np.ndarray, *others: np.ndarray, seed: int = 0) -> list[np.ndarray]:
    """Fit a UMAP on reference cells and place other cells in it.

    Parameters
    ----------
    reference
        Features of the cells that shape the plane, cells x features.
    others
        Features of the cells to place; each array by the same rule, so they may be compared.
    seed
        Of the UMAP.

    Returns
    -------
    Coordinates of each of `others`, cells x 2.

    Raises
    ------
    DataError
        There are fewer than 4 reference cells.

    Examples
    --------
    >>> places, others = pl.embed_like(z, x, y, seed=0)
    >>> places.shape == (len(x), 2)
    True
    """
    if len(reference) < 4:
        raise DataError(f"a UMAP needs at least 4 reference cells, got {len(reference)}")
    import warnings

    from threadpoolctl import threadpool_limits

    with warnings.catch_warnings(), threadpool_limits(1):  # numba would change the thread count of torch for good
        warnings.simplefilter("ignore")  # numba and umap speak of their own internals
        from umap import UMAP

        shape = {"n_neighbors": min(15, len(reference) - 1), "min_dist": 0.5, "spread": 1.5, "init": "pca"}
        fitted = UMAP(**shape, random_state=seed, n_jobs=1).fit(reference)
        return [np.asarray(fitted.transform(other)) for other in others]


def embedding(
    coordinates: np.ndarray,
    groups: Sequence[str] | np.ndarray,
    *,
    named: Sequence[str] | None = None,
    title: str = "",
    limits: np.ndarray | None = None,
    size: float | None = None,
    seed: int = 0,
    ax: Any = None,
) -> Any:
    """Draw cells in a plane, coloured by group, in shuffled order so that no group hides another.

    Parameters
    ----------
    coordinates
        Cells x 2.
    groups
        Group of each cell.
    named
        Groups with a colour of their own, at most 7; the others are grey and lie below. None: all of them.
    title
        Over the axes.
    limits
        Cells x 2: the axes show the range of these coordinates; None for those drawn.
    size
        Of a point, in points squared; None: larger for fewer cells.
    seed
        Of the order of drawing.
    ax
        Axes to draw on; None makes a figure.

    Returns
    -------
    The Axes.

    Raises
    ------
    DataError
        There is not one group per cell, or more than 7 groups are to be named.

    Examples
    --------
    >>> ax = pl.embedding(x[:, :2], real.obs["perturbation"], named=["GATA3", "NTC"], title="SIMULATED")
    """
    groups = np.asarray(groups).astype(str)
    coordinates = np.asarray(coordinates)
    named = list(dict.fromkeys(groups.tolist())) if named is None else [str(name) for name in named]
    if coordinates.shape != (len(groups), 2):
        raise DataError(f"coordinates of shape {coordinates.shape} do not fit {len(groups)} groups")
    if len(named) > len(COLOURS):
        raise DataError(f"{len(named)} groups cannot be told apart by colour; name at most {len(COLOURS)}")
    ax = _new_axes() if ax is None else ax
    size = float(np.clip(12_000 / max(len(groups), 1), 4.0, 16.0)) if size is None else size
    colour = dict(zip(named, COLOURS, strict=False))
    order = np.random.default_rng(seed).permutation(len(groups))
    known = np.isin(groups[order], named)
    for rows, alpha in ((order[~known], 0.5), (order[known], 0.7)):
        shades = [colour.get(group, REST) for group in groups[rows]]
        ax.scatter(*coordinates[rows].T, c=shades, s=size, alpha=alpha, linewidths=0, rasterized=True)
    shown = [(name, colour[name]) for name in named] + ([] if known.all() else [("others", REST)])
    _dress(ax, coordinates if limits is None else np.asarray(limits), shown, title)
    return ax


def real_vs_generated(
    real: np.ndarray,
    generated: np.ndarray,
    real_groups: Sequence[str] | np.ndarray,
    generated_groups: Sequence[str] | np.ndarray,
    *,
    named: Sequence[str],
    title: str,
    names: tuple[str, str] = ("held out", "generated"),
    group_title: str = "perturbation",
    seed: int = 0,
) -> Any:
    """Draw real and generated cells together, and each of them by group.

    Parameters
    ----------
    real, generated
        Coordinates, cells x 2 (see `embed_like`); equally many cells, or the larger set seems denser.
    real_groups, generated_groups
        Group of each cell.
    named
        Groups with a colour of their own, at most 7.
    title
        Of the figure; say here whether the cells are simulated.
    names
        Of the two kinds of cells.
    group_title
        What the groups are.
    seed
        Of the order of drawing.

    Returns
    -------
    The Figure.

    Examples
    --------
    >>> places, others = pl.embed_like(z, x, y, seed=0)
    >>> groups = real.obs["perturbation"], cells.obs["perturbation"]
    >>> figure = pl.real_vs_generated(places, others, *groups, named=["GATA3", "NTC"], title="SIMULATED")
    """
    figure = _new_figure((13.0, 4.9))
    axes = figure.subplots(1, 3)
    both = np.concatenate([real, generated])
    source = np.repeat(names, [len(real), len(generated)])
    each = f"{len(real)} cells each" if len(real) == len(generated) else f"{len(real)} and {len(generated)} cells"
    embedding(both, source, named=names, title=f"{' and '.join(names)}, {each}", seed=seed, ax=axes[0])
    for ax, cells, groups, what in (
        (axes[1], real, real_groups, names[0]),
        (axes[2], generated, generated_groups, names[1]),
    ):
        embedding(cells, groups, named=named, title=f"{what}: {group_title}", limits=both, seed=seed, ax=ax)
    figure.suptitle(title)
    return figure


def _new_figure(size: tuple[float, float]) -> Any:
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    return Figure(figsize=size, layout="constrained")


def _new_axes() -> Any:
    return _new_figure((5.0, 5.0)).subplots()


def _dress(ax: Any, limits: np.ndarray, shown: list[tuple[str, str]], title: str) -> None:
    from matplotlib.lines import Line2D

    low, high = limits.min(axis=0), limits.max(axis=0)
    margin = 0.04 * (high - low) + 1e-9
    ax.set(xlim=(low[0] - margin[0], high[0] + margin[0]), ylim=(low[1] - margin[1], high[1] + margin[1]))
    ax.set(xticks=[], yticks=[], xlabel="UMAP 1", ylabel="UMAP 2", title=title)
    ax.spines[["top", "right"]].set_visible(False)
    marks = [Line2D([], [], ls="", marker="o", ms=6, mec="none", color=shade, label=name) for name, shade in shown]
    ax.legend(handles=marks, loc="upper center", bbox_to_anchor=(0.5, -0.06), ncol=4, frameon=False, handletextpad=0.1)
