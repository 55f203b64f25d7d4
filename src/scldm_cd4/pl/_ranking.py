"""Plots of a table of `CD4Model.rank_perturbations`."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from scldm_cd4._errors import DataError
from scldm_cd4.pl._figure import COLOURS, finish, new_axes, new_figure, open_sides, plain

DARK, MARK = COLOURS[:2]
LIGHT = "#C9DCE8"


def waterfall(
    table: Any,
    *,
    known: Iterable[str] = (),
    n_named: int = 5,
    title: str = "",
    ax: Any = None,
    save: str | Path | None = None,
) -> Any:
    """Draw the scores of all perturbations, best first, with intervals and the chance level.

    Parameters
    ----------
    table
        Of one group of contexts.
    known
        Perturbations to mark and name, such as known regulators.
    n_named
        Others to name at either end.
    title
        Of the plot; say here whether the cells are simulated.
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
        The table has several groups of contexts, or none of `known`.

    Examples
    --------
    >>> ax = pl.waterfall(ranked, known=["GATA3"], title="SIMULATED")
    >>> ax.get_xlabel()
    'rank'
    """
    rows = _one_group(table)
    known = set(known)
    if known and not rows["perturbation"].isin(known).any():
        raise DataError(f"none of the known, such as {min(known)!r}, is in the table")
    ax = new_axes((max(5.0, min(14.0, 0.12 * len(rows))), 4.2)) if ax is None else ax
    place, score = np.arange(1, len(rows) + 1), rows["score"].to_numpy()
    marked = rows["perturbation"].isin(known).to_numpy()
    ends = rows[["score_lo", "score_hi"]].to_numpy()
    ax.fill_between(place, rows["chance_lo"], rows["chance_hi"], color="0.9", lw=0, label="chance, 90 %")
    for chosen, colour, label in ((~marked, DARK, "score, 90 %"), (marked, MARK, "known")):
        if chosen.any():
            error = np.abs(ends[chosen] - score[chosen, None]).T
            ax.errorbar(
                place[chosen], score[chosen], error, fmt="o", ms=3, lw=0.8, color=colour, ecolor=colour, label=label
            )
    named = marked | (place <= n_named) | (place > len(rows) - n_named)
    for i in np.flatnonzero(named):
        above = 2 * i < len(rows)  # where the curve leaves room
        ax.annotate(
            plain(rows["perturbation"].iloc[i], 20),
            (place[i], ends[i, 1 if above else 0]),
            xytext=(0, 3 if above else -3),
            textcoords="offset points",
            rotation=90,
            ha="center",
            va="bottom" if above else "top",
            fontsize=7,
            color=MARK if marked[i] else "0.2",
        )
    ax.axhline(0, color="0.6", lw=0.6)
    ax.set(xlabel="rank", ylabel="score", title=title)
    ax.margins(y=0.2)
    open_sides(ax)
    ax.legend(frameon=False, fontsize=8)
    return finish(ax, save)


def ranking_heatmap(table: Any, *, n: int = 30, title: str = "", ax: Any = None, save: str | Path | None = None) -> Any:
    """Draw the scores of perturbations in every donor and time point.

    Parameters
    ----------
    table
        Ranked with ``donor="each"`` and ``timepoint="each"``, or one of them.
    n
        Perturbations with the highest mean score.
    title
        Of the plot.
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
        The table has a single group of contexts.

    Examples
    --------
    >>> table = model.rank_perturbations(signature, donor="each", timepoint="each", n_cells=20, seed=0)
    >>> ax = pl.ranking_heatmap(table, title="SIMULATED")
    """
    values = table.pivot_table("score", "perturbation", ["timepoint", "donor"], sort=False, observed=True)
    if values.shape[1] < 2:
        raise DataError("the table has one group of contexts; rank with donor='each' and timepoint='each'")
    values = values.loc[values.mean(axis=1).sort_values(ascending=False).index[:n]]
    values = values[sorted(values.columns, key=lambda context: [_by_number(level) for level in context])]
    ax = new_axes((1.8 + 0.35 * values.shape[1], 1.5 + 0.2 * len(values))) if ax is None else ax
    limit = float(np.nanmax(np.abs(values.to_numpy()))) or 1.0
    image = ax.imshow(values.to_numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    ax.set_facecolor("0.85")  # no score
    ends = np.flatnonzero([a[0] != b[0] for a, b in zip(values.columns[:-1], values.columns[1:], strict=True)])
    for end in ends:
        ax.axvline(end + 0.5, color="white", lw=2.5)
    ax.set_yticks(range(len(values)), [plain(name, 20) for name in values.index], fontsize=7)
    ax.set_xticks(
        range(values.shape[1]), [plain(", ".join(map(str, c))) for c in values.columns], rotation=90, fontsize=7
    )
    ax.set_title(title)
    ax.figure.colorbar(image, ax=ax, label="score", shrink=0.6)
    return finish(ax, save)


def _by_number(level: Any) -> list[Any]:
    """Return what sorts 8 hours before 48 hours."""
    return [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", str(level))]


def candidate_card(table: Any, perturbation: str, *, title: str | None = None, save: str | Path | None = None) -> Any:
    """Draw the evidence for one perturbation: its score by donor, the genes that drive it, and its numbers in words.

    Parameters
    ----------
    table
        Of one group of contexts.
    perturbation
        Which.
    title
        Of the figure; the perturbation by default.
    save
        File to write the figure to.

    Returns
    -------
    The Figure.

    Raises
    ------
    DataError
        The table has several groups of contexts, or not this perturbation.

    Examples
    --------
    >>> figure = pl.candidate_card(ranked, "GATA3", title="GATA3, SIMULATED")
    """
    rows = _one_group(table).set_index("perturbation")
    if perturbation not in rows.index:
        raise DataError(f"{perturbation!r} has no score in the table")
    row = rows.loc[perturbation]
    figure = new_figure((10.5, 3.6))
    left, middle, right = figure.subplots(1, 3, width_ratios=[1, 1.2, 1.1])
    # per-donor scores are the columns that follow the smallest of them
    donors = [
        c for c in table.columns if c.startswith("score_") and c not in ("score_lo", "score_hi", "score_min_donor")
    ]
    names = ["all", *(c.removeprefix("score_") for c in donors)]
    values = np.array([row["score"], *(row[c] for c in donors)], dtype=float)
    left.axhspan(row["chance_lo"], row["chance_hi"], color="0.9", lw=0)
    left.errorbar([0], values[:1], [[values[0] - row["score_lo"]], [row["score_hi"] - values[0]]], fmt="o", color=DARK)
    left.plot(range(1, len(names)), values[1:], "o", color=MARK)
    left.set_xticks(range(len(names)), names, rotation=90)
    left.set(ylabel="score (grey: chance, 90 %)", title="by donor")
    genes = [entry.rsplit(":", 1) for entry in row["top_genes"].split("; ") if entry]
    middle.barh([g for g, _ in genes][::-1], [float(x) for _, x in genes][::-1], color=LIGHT, edgecolor=DARK)
    middle.axvline(0, color="0.6", lw=0.6)
    middle.set(xlabel="log2 fold change", title="genes that drive the score")
    right.axis("off")
    right.text(0, 1, _words(row, len(rows)), va="top", fontsize=9, transform=right.transAxes)
    for ax in (left, middle):
        open_sides(ax)
    figure.suptitle(plain(perturbation) if title is None else title)
    return finish(figure, save)


def _words(row: Any, n: int) -> str:
    lines = [
        f"rank {row['rank']:.0f} of {n}, 90 %: {row['rank_lo']:.0f} to {row['rank_hi']:.0f}",
        f"in the shortlist with probability {row['p_top_k']:.2f}",
        f"score {row['score']:.3g}, 90 %: {row['score_lo']:.3g} to {row['score_hi']:.3g}",
        f"false discovery rate {row['fdr']:.2g}",
        f"effect size {row['effect_ratio']:.1f} times its size by chance",
        f"same sign in {row['n_donors_agree']:.0f} of {row['n_donors']:.0f} donors",
    ]
    if np.isfinite(row["n_train_cells"]):
        lines.append(f"trained on {row['n_train_cells']:.0f} cells in {row['n_train_contexts']:.0f} contexts")
    if np.isfinite(row["ontarget_pred_log2fc"]):
        lines.append(f"predicted knock-down, log2: {row['ontarget_pred_log2fc']:.2f}")
    return "\n".join([*lines, *([row["warning"]] if row["warning"] else [])])


def _one_group(table: Any) -> Any:
    if len(table[["donor", "timepoint"]].drop_duplicates()) != 1:
        raise DataError("the table has several donors or time points; choose one, such as table[table.donor == 'D1']")
    return table[table["score"].notna()].sort_values("rank", kind="stable")
