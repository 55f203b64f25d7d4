"""Real and generated cells in one plane that is fitted to real cells only."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scldm_cd4._errors import DataError
from scldm_cd4.pl._figure import COLOURS, REST, finish, new_axes, new_figure, open_sides, plain

METHODS = {"umap": "UMAP", "pca": "PC"}
"""Ways to a plane, and what its axes are called."""


def embed_like(reference: np.ndarray, *others: np.ndarray, method: str = "umap", seed: int = 0) -> list[np.ndarray]:
    """Fit a plane on reference cells and place other cells in it.

    Parameters
    ----------
    reference
        Features of the cells that the plane is fitted to, cells x features.
    others
        Features of the cells to place; each array by the same rule, so they may be compared.
    method
        ``umap``, or ``pca`` for the first two principal components, which show distances as they are.
    seed
        Of the UMAP.

    Returns
    -------
    Coordinates of each of `others`, float array, cells x 2.

    Raises
    ------
    DataError
        There are fewer than 4 reference cells, or the method is unknown.

    Examples
    --------
    >>> places, others = pl.embed_like(z, x, y, seed=0)
    >>> places.shape == (len(x), 2)
    True
    """
    if method not in METHODS:
        raise DataError(f"method must be one of {tuple(METHODS)}, got {method!r}")
    if len(reference) < 4:
        raise DataError(f"a plane needs at least 4 reference cells, got {len(reference)}")
    if method == "pca":
        from scldm_cd4.metrics import fit_projection

        axes = fit_projection(np.asarray(reference), 2)
        return [axes.apply(np.asarray(other)) for other in others]
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
    axis: str = "UMAP",
    seed: int = 0,
    ax: Any = None,
    save: str | Path | None = None,
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
        Of the plot; say here whether the cells are simulated.
    limits
        Cells x 2: the axes show the range of these coordinates; None for those drawn.
    size
        Of a point, in points squared; None: larger for fewer cells.
    axis
        What the axes are called, with a number each.
    seed
        Of the order of drawing.
    ax
        Axes to draw in; a new figure by default.
    save
        File to write the figure to.

    Returns
    -------
    The Axes.

    Raises
    ------
    DataError
        There is not one group per cell, more than 7 groups are to be named, or the file cannot be written.

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
    ax = new_axes((5.0, 5.0)) if ax is None else ax
    size = float(np.clip(12_000 / max(len(groups), 1), 4.0, 16.0)) if size is None else size
    colour = dict(zip(named, COLOURS, strict=False))
    order = np.random.default_rng(seed).permutation(len(groups))
    known = np.isin(groups[order], named)
    for rows, alpha in ((order[~known], 0.5), (order[known], 0.7)):
        shades = [colour.get(group, REST) for group in groups[rows]]
        ax.scatter(*coordinates[rows].T, c=shades, s=size, alpha=alpha, linewidths=0, rasterized=True)
    shown = [(name, colour[name]) for name in named] + ([] if known.all() else [("others", REST)])
    _dress(ax, coordinates if limits is None else np.asarray(limits), shown, title, axis)
    return finish(ax, save)


def real_vs_generated(
    real: np.ndarray,
    generated: np.ndarray,
    real_groups: Sequence[str] | np.ndarray,
    generated_groups: Sequence[str] | np.ndarray,
    *,
    named: Sequence[str],
    title: str,
    other_real: np.ndarray | None = None,
    names: tuple[str, str] = ("held out", "generated"),
    group_title: str = "perturbation",
    axis: str = "UMAP",
    seed: int = 0,
    save: str | Path | None = None,
) -> Any:
    """Draw real and generated cells together, and each of them by group; see `overlay`, which finds the coordinates.

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
    other_real
        Coordinates of other real cells, cells x 2. A further panel draws them over the first ones, to show what two
        samples of one distribution look like.
    names
        Of the two kinds of cells.
    group_title
        What the groups are.
    axis
        What the axes are called, with a number each.
    seed
        Of the order of drawing.
    save
        File to write the figure to.

    Returns
    -------
    The Figure.

    Raises
    ------
    DataError
        There is not one group per cell, more than 7 groups are to be named, or the file cannot be written.

    Examples
    --------
    >>> places, others = pl.embed_like(z, x, y, seed=0)
    >>> groups = real.obs["perturbation"], cells.obs["perturbation"]
    >>> figure = pl.real_vs_generated(places, others, *groups, named=["GATA3", "NTC"], title="SIMULATED")
    """
    more = [] if other_real is None else [(other_real, f"other {names[0]}")]
    figure = new_figure((13.0, 4.9) if other_real is None else (9.6, 10.0))
    axes = figure.subplots(1, 3).ravel() if other_real is None else figure.subplots(2, 2).ravel()
    limits = np.concatenate([real, generated, *(cells for cells, _ in more)])
    for ax, (cells, what) in zip(axes, [(generated, names[1]), *more], strict=False):
        both, source = np.concatenate([real, cells]), np.repeat([names[0], what], [len(real), len(cells)])
        each = f"{len(real)} cells each" if len(real) == len(cells) else f"{len(real)} and {len(cells)} cells"
        name = f"{names[0]} and {what}, {each}"
        embedding(both, source, named=[names[0], what], title=name, limits=limits, axis=axis, seed=seed, ax=ax)
    kinds = ((real, real_groups, names[0]), (generated, generated_groups, names[1]))
    for ax, (cells, groups, what) in zip(axes[-2:], kinds, strict=True):
        name = f"{what}: {group_title}"
        embedding(cells, groups, named=named, title=name, limits=limits, axis=axis, seed=seed, ax=ax)
    figure.suptitle(title)
    return finish(figure, save)


def _dress(ax: Any, limits: np.ndarray, shown: list[tuple[str, str]], title: str, axis: str) -> None:
    from matplotlib.lines import Line2D

    low, high = limits.min(axis=0), limits.max(axis=0)
    margin = 0.04 * (high - low) + 1e-9
    ax.set(xlim=(low[0] - margin[0], high[0] + margin[0]), ylim=(low[1] - margin[1], high[1] + margin[1]))
    ax.set(xticks=[], yticks=[], xlabel=f"{axis} 1", ylabel=f"{axis} 2", title=title)
    open_sides(ax)
    marks = [
        Line2D([], [], ls="", marker="o", ms=6, mec="none", color=shade, label=plain(name)) for name, shade in shown
    ]
    ax.legend(handles=marks, loc="upper center", bbox_to_anchor=(0.5, -0.06), ncol=4, frameon=False, handletextpad=0.1)
