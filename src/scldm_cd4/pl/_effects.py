"""Effects of one perturbation: generated against real, and gene by gene."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scldm_cd4._errors import DataError
from scldm_cd4.pl._figure import (
    COLOURS,
    GENERATED,
    GREY,
    INK,
    REAL,
    agreement_lines,
    finish,
    name_points,
    new_axes,
    open_sides,
    plain,
)

VOLCANO_COLUMNS = {
    "gene": ("gene", "names"),
    "change": ("log2_fold_change", "logfoldchanges", "delta"),
    "p": ("p_adjusted", "pvals_adj"),
}
"""Columns of a table of tests: those of `scldm_cd4.metrics.de_genes`, and those of scanpy."""
CHANGES = {"delta": "difference of mean log-normalised expression"}


def delta_scatter(
    real: Any,
    generated: Any,
    perturbation: str,
    *,
    genes: Sequence[str] = (),
    n_named: int = 8,
    target_gene: str | None = None,
    perturbation_key: str | None = None,
    context_keys: str | Sequence[str] | None = None,
    control: str | None = None,
    layer: str | None = None,
    title: str | None = None,
    ax: Any = None,
    save: str | Path | None = None,
) -> Any:
    """Draw the generated against the real effect of a perturbation on every gene, the largest named.

    An effect is the difference of mean log-normalised expression (natural logarithm of counts per 10,000, plus 1) to
    the *real* control cells of the same context, averaged over the contexts that both kinds of cells have. Both effects
    share these control cells and their noise, so that some correlation comes by chance; it stands beside r.

    Parameters
    ----------
    real
        AnnData of raw counts with cells of the perturbation that the model has not seen, and control cells.
    generated
        Generated cells with ``output="counts"`` and the same genes in any order.
    perturbation
        Which.
    genes
        Genes to name in any case, in a colour of their own.
    n_named
        Others to name: those with the largest effect on either side.
    target_gene
        Gene of the perturbation, which is drawn as a cross and left out of the correlation; the label by default.
    perturbation_key, context_keys, control
        Columns of ``obs`` and the label of the control; from ``generated.uns["scldm_cd4"]`` by default.
    layer
        Layer with the counts of the cells that have it; by default as ``setup_anndata`` declared, else ``X``.
    title
        Of the plot; the perturbation by default. Say here whether the cells are simulated.
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
        A column is unknown, values are no counts, or no context has real, generated and control cells.
    GeneMismatchError
        The genes differ, or one to name is not among them.

    Examples
    --------
    >>> ax = pl.delta_scatter(real, cells, "GATA3", n_named=5, title="GATA3, SIMULATED")
    """
    from scldm_cd4.metrics import chance_level, safe_pearson
    from scldm_cd4.metrics.cells.samples import Keys, read_samples

    keys = Keys.resolve(generated, perturbation_key, context_keys, control)
    truth, guess = read_samples({"real": real, "generated": generated}, keys, layer=layer).values()
    names = truth.genes
    effects, n = _effects(truth, guess, str(perturbation), keys.control)
    keep = names.astype(str) != (target_gene or str(perturbation))
    x, y = effects
    r = safe_pearson(x[keep], y[keep])
    ax = new_axes((5.0, 5.0)) if ax is None else ax
    limit = 1.12 * max(np.abs(effects).max(), 1e-6)
    agreement_lines(ax)
    ax.scatter(x[keep], y[keep], s=12, c=REAL, alpha=0.5, linewidths=0, rasterized=True)
    if not keep.all():
        ax.scatter(x[~keep], y[~keep], s=36, c=INK, marker="x", lw=1.3, label="perturbed gene (left out of r)")
        ax.legend(frameon=False, fontsize=8, loc="lower right")
    chance = float(chance_level(n["real"], n["control"], n["generated"]))
    text = f"r = {r:.2f} (by chance {chance:.2f})\n{n['real']} real, {n['generated']} generated,\n"
    text += f"{n['control']} control cells in {n['contexts']} context{'s' if n['contexts'] > 1 else ''}"
    ax.text(0.02, 0.98, text, transform=ax.transAxes, va="top", fontsize=8, color=INK)
    ax.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xlabel="real effect", ylabel="generated effect")
    ax.set_title(plain(perturbation) if title is None else title)
    open_sides(ax)
    _name(ax, x, y, names, genes, np.where(keep, np.maximum(np.abs(x), np.abs(y)), -1.0), n_named)
    return finish(ax, save)


def _effects(real: Any, generated: Any, perturbation: str, control: str) -> tuple[np.ndarray, dict[str, int]]:
    """Return the mean effects (2, genes) of both sides against the real control, and the cells behind them."""
    contexts = [
        key[:-1]
        for key in real.groups
        if key[-1] == perturbation and len(generated.rows(key)) and len(real.rows((*key[:-1], control)))
    ]
    if not contexts:
        raise DataError(
            f"no context has real and generated cells of {perturbation!r} and real control cells ({control!r})"
        )
    found, sizes = [], np.zeros(3, dtype=int)
    for context in contexts:
        parts = [
            side.values[side.rows((*context, label))]
            for side, label in ((real, perturbation), (generated, perturbation), (real, control))
        ]
        means = [np.asarray(part.mean(axis=0)).ravel() for part in parts]
        found.append([means[0] - means[2], means[1] - means[2]])
        sizes += [part.shape[0] for part in parts]
    numbers = dict(zip(("real", "generated", "control"), sizes.tolist(), strict=True))
    return np.mean(found, axis=0), numbers | {"contexts": len(contexts)}


def de_volcano(
    tests: Any,
    *,
    perturbation: str | None = None,
    control: str | None = None,
    fdr: float = 0.05,
    min_change: float = 0.0,
    genes: Sequence[str] = (),
    n_named: int = 10,
    title: str | None = None,
    ax: Any = None,
    save: str | Path | None = None,
) -> Any:
    """Draw how sure a change of every gene is over how large it is.

    Parameters
    ----------
    tests
        A table of tests, of `scldm_cd4.metrics.de_genes` (``gene``, ``delta``, ``p_adjusted``) or scanpy
        (``sc.get.rank_genes_groups_df``: ``names``, ``logfoldchanges``, ``pvals_adj``). Or generated cells with
        ``output="counts"``: cells of `perturbation` are tested against control cells of the same contexts
        (`scldm_cd4.metrics.de_genes`). How sure a change of generated cells is grows with their number, which you
        choose: it says nothing of how sure the model is.
    perturbation
        For cells: which. For a table: only for the title.
    control
        For cells: the label of the control; from ``tests.uns["scldm_cd4"]`` by default.
    fdr
        Adjusted p at or below which a gene has a colour.
    min_change
        Least size of the change of a gene with a colour.
    genes
        Genes to name in any case, in a colour of their own.
    n_named
        Others to name: the surest of the coloured ones, then the largest.
    title
        Of the plot; the perturbation by default. Say here whether the cells are simulated.
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
        Columns are missing, or there are no cells of the perturbation or its control.
    GeneMismatchError
        A gene to name is not among those tested.

    Examples
    --------
    >>> pair = model.generate(perturbation=["GATA3", "NTC"], n_cells=40, seed=0)
    >>> ax = pl.de_volcano(pair, perturbation="GATA3", title="GATA3, SIMULATED")
    """
    note = ""
    if hasattr(tests, "var_names"):
        tests, note = _test(tests, perturbation, control)
    gene, change, p = (_column(tests, what) for what in VOLCANO_COLUMNS)
    names = tests[gene].to_numpy(dtype=str)
    x, q = tests[change].to_numpy(dtype=np.float64), tests[p].to_numpy(dtype=np.float64)
    known = np.isfinite(x) & np.isfinite(q)
    names, x, q = names[known], x[known], q[known]
    y = -np.log10(np.maximum(q, np.finfo(np.float64).tiny))
    hit = (q <= fdr) & (np.abs(x) >= min_change)
    ax = new_axes((5.6, 4.4)) if ax is None else ax
    sides = ((~hit, GREY, "not significant"), (hit & (x > 0), GENERATED, "higher"), (hit & (x <= 0), REAL, "lower"))
    for rows, colour, label in sides:
        ax.scatter(x[rows], y[rows], s=12, c=colour, alpha=0.6, lw=0, label=f"{label} ({rows.sum()})", rasterized=True)
    limit, top = 1.25 * max(np.abs(x).max(initial=0.0), 1e-6), 1.15 * max(y.max(initial=0.0), 1.5)
    ax.axhline(-np.log10(fdr), color=GREY, lw=0.8, ls=":")
    label = CHANGES.get(change, "log2 fold change")
    ax.set(xlim=(-limit, limit), ylim=(-0.02 * top, top), xlabel=label, ylabel="$-\\log_{10}$ adjusted p")
    ax.set_title(plain(perturbation or "") if title is None else title)
    if note:
        ax.text(0.01, 0.99, note, transform=ax.transAxes, va="top", fontsize=7.5, color=INK)
    open_sides(ax)
    ax.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncol=3, handletextpad=0.1)
    _name(ax, x, y, names, genes, np.where(hit, y + np.abs(x) / limit, -1.0), n_named)
    return finish(ax, save)


def _test(cells: Any, perturbation: str | None, control: str | None) -> tuple[Any, str]:
    """Test the cells of a perturbation against their controls, and say how many cells there were."""
    from scldm_cd4.metrics import de_genes
    from scldm_cd4.metrics.cells.samples import Keys, read_samples

    if perturbation is None:
        raise DataError("say which perturbation to test: de_volcano(cells, perturbation=...)")
    keys = Keys.resolve(cells, control=control)
    sample = read_samples({"cells": cells}, keys)["cells"]
    contexts = [key[:-1] for key in sample.groups if key[-1] == perturbation]
    contexts = [context for context in contexts if len(sample.rows((*context, keys.control)))]
    if not contexts:
        raise DataError(
            f"no context has cells of {perturbation!r} and of the control {keys.control!r}; generate both: "
            f"model.generate(perturbation=[{perturbation!r}, {keys.control!r}], ...)"
        )
    sides, places = [], []
    for label in (perturbation, keys.control):
        rows = [sample.rows((*context, label)) for context in contexts]
        places.append(np.repeat(np.arange(len(rows)), [len(r) for r in rows]))
        sides.append(sample.values[np.concatenate(rows)])
    table = de_genes(*sides, genes=sample.genes, contexts=(places[0], places[1]))
    return table, f"{len(places[0])} generated cells,\n{len(places[1])} generated controls"


def _column(table: Any, what: str) -> str:
    choices = VOLCANO_COLUMNS[what]
    for name in choices:
        if name in getattr(table, "columns", ()):
            return name
    raise DataError(f"the table of tests has none of the columns {', '.join(choices)}")


def _name(
    ax: Any,
    x: np.ndarray,
    y: np.ndarray,
    names: np.ndarray,
    wanted: Sequence[str],
    weight: np.ndarray,
    n: int,
) -> None:
    """Name the genes that are wanted, and those of the largest weight of at least 0."""
    from scldm_cd4._errors import GeneMismatchError
    from scldm_cd4.registry import suggestion

    position = {str(name): i for i, name in enumerate(names)}
    wanted = [wanted] if isinstance(wanted, str) else [str(name) for name in wanted]
    if absent := [name for name in wanted if name not in position]:
        raise GeneMismatchError(f"{absent[0]!r} is not drawn.{suggestion(absent[0], position, 'genes are')}")
    first = [position[name] for name in wanted]
    rest = [int(i) for i in np.argsort(-weight, kind="stable")[: max(n, 0)] if weight[i] >= 0 and i not in first]
    shown = np.array([*first, *rest], dtype=np.int64)
    colours = [COLOURS[1]] * len(first) + [INK] * len(rest)
    name_points(ax, x[shown], y[shown], [plain(names[i], 16) for i in shown], colours=colours)
