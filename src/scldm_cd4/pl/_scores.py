"""Scores of generated cells, and their quality."""

import statistics
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
    finish,
    histograms,
    new_axes,
    new_figure,
    open_sides,
    plain,
)

MARKS = ("o", "s", "D", "^", "v", "P", "X", "*")
BEYOND = (-1.5, 1.5)
"""Scores beyond this are drawn at the edge, those of the cells with an arrow and their number."""
EDGE = "score (marks at the edge lie beyond it)"


def metric_bars(
    table: Any,
    metrics: Sequence[str] | None = None,
    *,
    baseline: str = "control",
    others: Sequence[str] | None = None,
    intervals: bool = True,
    seed: int = 0,
    title: str = "",
    ax: Any = None,
    save: str | Path | None = None,
) -> Any:
    """Draw scores of generated cells between a baseline (0) and a repeat of the experiment (1), one bar per metric.

    The scores are those of `scldm_cd4.metrics.score`: all values are at the number of cells of the repeat. A metric
    whose repeat does not beat the baseline clearly is hatched: its score means nothing.

    Parameters
    ----------
    table
        Of `scldm_cd4.metrics.evaluate` or `scldm_cd4.CD4Model.evaluate`, with training cells and ceilings.
    metrics
        Those to draw, in this order; by default those of the table that are ranked and have a score.
    baseline
        The one at 0.
    others
        Baselines to mark beside the bars; by default all in the table, at most 7.
    intervals
        Whether to draw 95 % intervals over perturbations and contexts.
    seed
        Of the intervals.
    title
        Of the plot; say here whether the cells are simulated.
    ax
        Axes to draw in; a new figure by default.
    save
        File to write the figure to.

    Returns
    -------
    The Axes. Each metric's own value and best direction stand beside its name.

    Raises
    ------
    DataError
        The table has no such baseline, no ceilings, or none of the metrics.

    Examples
    --------
    >>> ax = pl.metric_bars(table, ["pearson_delta"], intervals=False, title="SIMULATED")
    """
    from scldm_cd4.metrics import score

    scores = score(table, baseline, intervals=intervals, n_boot=200, seed=seed)
    names = _names(scores, metrics, table)
    marks = _others(table, baseline, others)
    ax = new_axes((7.6, 1.5 + 0.34 * len(names))) if ax is None else ax
    y = np.arange(len(names))
    rows = scores.loc[names]
    value, resolved = rows["score"].to_numpy(dtype=np.float64), rows["is_resolved"].to_numpy(dtype=bool)
    for chosen, style, label in (
        (resolved, {"color": GENERATED, "alpha": 0.85}, "generated cells"),
        (~resolved, {"color": "white", "edgecolor": GREY, "hatch": "////"}, "generated cells, no clear scale"),
    ):
        if chosen.any():
            ax.barh(y[chosen], np.clip(value[chosen], *BEYOND), height=0.62, label=label, zorder=2, **style)
    if intervals and rows["score_low"].notna().any():
        low, high = (np.clip(rows[f"score_{side}"].to_numpy(dtype=np.float64), *BEYOND) for side in ("low", "high"))
        ax.hlines(y, low, high, color=INK, lw=1.2, zorder=4)
    for i in np.flatnonzero((value < BEYOND[0]) | (value > BEYOND[1])):
        end, side = (BEYOND[0] + 0.06, "left") if value[i] < 0 else (BEYOND[1] - 0.06, "right")
        text = f"← {value[i]:.1f}" if side == "left" else f"{value[i]:.1f} →"
        ax.text(end, y[i] - 0.17, text, ha=side, va="center", fontsize=7, color=INK, zorder=5)  # above the interval
    places = {name: place.reindex(names)["score"].to_numpy(dtype=np.float64) for name, place in marks.items()}
    _mark(ax, places, y)
    beyond = any((np.abs(at) > BEYOND[1]).any() for at in places.values())
    _frame(ax, rows, names, baseline, EDGE if beyond else "score")
    ax.set_title(title)
    return finish(ax, save)


def _names(scores: Any, metrics: Sequence[str] | None, table: Any) -> list[str]:
    from scldm_cd4.metrics.registry import METRICS, RANKED

    if metrics is not None:
        names = [metrics] if isinstance(metrics, str) else list(metrics)
        if absent := [name for name in names if name not in scores.index]:
            raise DataError(f"the table has no metric {absent[0]!r}; it has {', '.join(map(str, scores.index))}")
        return names
    known = scores["score"].notna()
    ranked = [n for n in scores.index if METRICS[n].ranked and METRICS[n].family in RANKED]
    if names := [n for n in ranked if known[n]]:
        return names
    notes = [note for note in table.get("note", ()) if note]
    why = f" The table notes: {statistics.mode(notes)}" if notes else ""
    raise DataError(
        "no metric of the table has a score: it takes ceilings=True, and train= with control cells of the contexts "
        f"that are scored.{why}"
    )


def _others(table: Any, baseline: str, others: Sequence[str] | None) -> dict[str, Any]:
    """Return the scores of other baselines, each in the place of the prediction."""
    from scldm_cd4.metrics import score

    there = [c.removeprefix("matched_baseline_") for c in table.columns if c.startswith("matched_baseline_")]
    if others is None:
        names = [name for name in there if name != baseline and table[f"matched_baseline_{name}"].notna().any()]
    else:
        names = list(others)
        if absent := [name for name in names if name not in there]:
            raise DataError(f"the table has no baseline {absent[0]!r}; it has {', '.join(there)}")
    return {
        name: score(
            table.assign(value=table[f"baseline_{name}"], matched_value=table[f"matched_baseline_{name}"]), baseline
        )
        for name in names[:7]
    }


def _mark(ax: Any, scores: dict[str, np.ndarray], y: np.ndarray) -> None:
    """Mark scores of baselines; those at the edge stand one below the other."""
    steps = 0.16 * (np.arange(len(scores)) - (len(scores) - 1) / 2)
    for (name, at), step, mark, colour in zip(scores.items(), steps, MARKS, (REAL, *COLOURS[2:], GREY), strict=False):
        place, beside = np.clip(at, *BEYOND), np.where(np.abs(at) > BEYOND[1], step, 0.0)
        style = {"ms": 5, "mfc": "white", "mec": colour, "mew": 1.3, "ls": "", "zorder": 3, "clip_on": False}
        ax.plot(place, y + beside, mark, label=plain(name.replace("_", " ")), **style)


def _frame(ax: Any, rows: Any, names: Sequence[str], baseline: str, xlabel: str) -> None:
    from scldm_cd4.metrics.registry import METRICS

    def better(name: str) -> str:
        known = METRICS[name]
        return f"→ {known.best:g}" if known.direction == "target" else {"higher": "↑", "lower": "↓"}[known.direction]

    low, high = ax.get_xlim()
    ax.axvline(0, color=INK, lw=0.9, zorder=1)
    ax.axvline(1, color=REAL, lw=1.2, ls="--", zorder=1)
    ax.set_yticks(
        range(len(names)), [f"{name} {better(name)}  {rows['value'][name]:.3g}" for name in names], fontsize=8
    )
    ax.set(ylim=(len(names) - 0.4, -0.6), xlim=(min(low, -0.15), max(high, 1.15)), xlabel=xlabel)
    upper = ax.secondary_xaxis("top")
    upper.set_xticks(
        [0, 1], [f"baseline:\n{plain(baseline.replace('_', ' '))}", "repeat of the\nexperiment"], fontsize=8
    )
    for label, side in zip(upper.get_xticklabels(), ("right", "left"), strict=True):
        label.set_horizontalalignment(side)  # away from each other, however near 0 and 1 are on the paper
    upper.tick_params(length=0)
    upper.spines["top"].set_visible(False)
    ax.tick_params(axis="y", length=0)
    open_sides(ax)
    ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def qc(
    real: Any,
    generated: Any,
    *,
    layer: str | None = None,
    title: str = "",
    seed: int = 0,
    save: str | Path | None = None,
) -> Any:
    """Draw counts and genes per cell and the share of zeros of each gene, of equally many real and generated cells.

    Parameters
    ----------
    real
        AnnData of raw counts of the conditions that were generated.
    generated
        Generated cells with ``output="counts"`` and the same genes in any order.
    layer
        Layer with the counts of the cells that have it; by default as ``setup_anndata`` declared, else ``X``.
    title
        Of the figure; say here whether the cells are simulated.
    seed
        Of the choice of cells where one side has more.
    save
        File to write the figure to.

    Returns
    -------
    The Figure, of three panels.

    Raises
    ------
    DataError
        Values are no counts, or there are no cells.
    GeneMismatchError
        The genes differ.

    Examples
    --------
    >>> figure = pl.qc(real, cells, title="SIMULATED")
    """
    from scldm_cd4.metrics.cells.genes import common_genes
    from scldm_cd4.metrics.cells.places import layers_of

    cells = {"real": real, "generated": generated}
    genes, layers = common_genes(cells), layers_of(cells, layer)
    n = min(real.n_obs, generated.n_obs)
    if n < 1:
        raise DataError("there are no cells to draw")
    rng = np.random.default_rng([seed, 5])
    sides = [
        _counts(adata, genes, np.sort(rng.permutation(adata.n_obs)[:n]), layers[what], what)
        for what, adata in cells.items()
    ]
    figure = new_figure((12.0, 3.7))
    library, expressed, zeros = figure.subplots(1, 3)
    totals, genes_seen = ([np.asarray(x.sum(axis=1)).ravel() for x in part] for part in (sides, [x > 0 for x in sides]))
    histograms(library, totals[0], totals[1], "counts per cell", log=True)
    histograms(expressed, genes_seen[0], genes_seen[1], "genes per cell", log=False)
    shares = [1.0 - np.asarray((x > 0).sum(axis=0)).ravel() / n for x in sides]
    zeros.axline((0, 0), slope=1, color=GREY, lw=0.9, ls="--", zorder=0)
    zeros.scatter(*shares, s=12, c=REAL, alpha=0.5, linewidths=0, rasterized=True)
    zeros.set(
        xlim=(-0.03, 1.03),
        ylim=(-0.03, 1.03),
        aspect="equal",
        xlabel="share of zeros, real",
        ylabel="share of zeros, generated",
    )
    zeros.set_title(
        f"zeros of each gene, mean {shares[0].mean():.1%} real,\n{shares[1].mean():.1%} generated", fontsize=9.5
    )
    for ax in (library, expressed, zeros):
        open_sides(ax)
    figure.suptitle(f"{title}, {n} cells each" if title else f"{n} cells each")
    return finish(figure, save)


def _counts(adata: Any, genes: np.ndarray, rows: np.ndarray, layer: str | None, what: str) -> Any:
    """Return the counts of some cells, CSR, genes in the order of the names."""
    from scldm_cd4.data.matrix import RowReader, check_block, counts_hint
    from scldm_cd4.metrics.cells.genes import gene_names

    names = gene_names(adata, what)
    position = {name: i for i, name in enumerate(names)}
    reader = RowReader(adata, layer)
    block, where = reader.read(rows), f"{reader.where} of the {what} cells"
    try:
        check_block(block, 0, where, adata.obs_names[rows], names)
    except DataError as error:
        raise DataError(f"{error}{counts_hint(adata, layer)}") from None
    return block[:, [position[name] for name in genes]]
