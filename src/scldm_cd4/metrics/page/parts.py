"""The parts of a report: tables and captions around its figures."""

from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree.ElementTree import Element

import numpy as np

from scldm_cd4._errors import DataError
from scldm_cd4.metrics.page import figures
from scldm_cd4.metrics.page.html import download, image, number, section, table, tag
from scldm_cd4.metrics.page.scored import Quality, Scored
from scldm_cd4.metrics.registry import METRICS
from scldm_cd4.metrics.scoring.aggregate import PREFIX, aggregate, score

MAX_ROWS = 3000
"""Rows of the whole table on the page; the CSV in the page has all."""
MAX_DRAWN = 9
"""Metrics with a panel of their own."""
N_BOOT = 200
SETTINGS = ("perturbation_key", "context_keys", "control", "input_type", "min_cells", "fdr", "seed")
"""What a table must have in common with the page."""
SIMULATED = "SIMULATED cells: nothing on this page says anything about real cells."


def checked(scores: Any, scored: Scored, settings: Mapping[str, Any]) -> Any:
    """Give a table of these cells with notes as text.

    Raises
    ------
    DataError
        If it is not one of :func:`scldm_cd4.metrics.evaluate`, or of other cells or settings.
    """
    needed = {"context", "perturbation", "metric", "value", "n_real", "n_pred", "n_ctrl", "floor", "ceiling", "note"}
    if not hasattr(scores, "columns") or (absent := sorted(needed - set(scores.columns))):
        raise DataError(
            f"table= must come from metrics.evaluate; it lacks {absent if hasattr(scores, 'columns') else 'columns'}"
        )
    if unknown := sorted(set(scores["metric"]) - set(METRICS)):
        raise DataError(f"table= has metrics that are not known: {unknown[:5]}")
    attrs = dict(scores.attrs)
    for name in SETTINGS:
        if name in attrs and attrs[name] != settings[name]:
            raise DataError(
                f"table= was made with {name}={attrs[name]!r}, the page has {settings[name]!r}; give both the same"
            )
    scores = scores.assign(
        note=scores["note"].fillna("").astype(str),
        context=scores["context"].astype(str),
        perturbation=scores["perturbation"].astype(str),
    )
    columns = ["context", "perturbation", "n_real", "n_pred"]
    there = {tuple(row[:2]): tuple(row[2:]) for row in scores[columns].drop_duplicates().itertuples(index=False)}
    sizes = zip(scored.truth.real.sizes().tolist(), scored.pred.sizes().tolist(), strict=True)
    here = {_names(key): size for key, size in zip(scored.conditions, sizes, strict=True)}
    wrong = [key for key, size in here.items() if there.get(key) != size]
    extra = sorted(set(there) - set(here) - {_names(key) for key in scored.not_scored})
    if wrong or extra:
        raise DataError(
            f"table= is not of these cells: {len(wrong)} conditions differ in number of cells or are missing (e.g. "
            f"{wrong[:1]}), {len(extra)} are extra (e.g. {extra[:1]}); make it with the same cells and keywords"
        )
    return scores


def _names(key: tuple[str, ...]) -> tuple[str, str]:
    return " | ".join(key[:-1]) or "all", key[-1]


def head(scored: Scored, simulated: bool) -> list[Element]:
    """Say below the title what the page is about."""
    contexts = {key[:-1] for key in scored.conditions}
    n_real, n_pred = scored.truth.real.n_cells, scored.pred.n_cells
    text = (
        f"{n_pred:,} generated beside {n_real:,} real cells of {len(scored.conditions)} conditions "
        f"({len({key[-1] for key in scored.conditions})} perturbations, {len(contexts)} contexts), "
        f"{len(scored.truth.real.genes):,} genes. Effects are against the real control cells "
        f"({scored.keys.control}) of the same context."
    )
    banner = [tag("div", SIMULATED, class_="simulated", role="note")] if simulated else []
    return [*banner, tag("p", text, class_="lead")]


def sections(table_: Any, scored: Scored, rows: Sequence[int], simulated: bool) -> list[Element]:
    """Show all but where it comes from; `rows` are the conditions with a scatter of their own."""
    return [
        *scores(table_, scored, simulated),
        deltas(scored, rows, simulated),
        plane(scored, simulated),
        recovery(scored, simulated),
        quality(scored, simulated),
    ]


def _drawn(figure: Any, simulated: bool, description: str, caption: str) -> Element:
    """Put a figure into the page; with simulated cells it says so itself, since figures travel alone."""
    if simulated:
        figure.suptitle("SIMULATED cells")
    return image(figure, description, caption)


def scores(table_: Any, scored: Scored, simulated: bool) -> list[Element]:
    """Show averages over conditions, the values of all conditions, and the whole table."""
    means = aggregate(table_, intervals=True, n_boot=N_BOOT, seed=scored.truth.options.seed)
    known = [name for name in means.index if means.loc[name, "n_valid"] > 0]
    ranked = [name for name in known if METRICS[name].ranked][:MAX_DRAWN]
    blocks = [_legend(table_), _averages(table_, means)]
    if drawn := ranked or known[:MAX_DRAWN]:
        with figures.drawing():
            figure = figures.scores(table_, drawn, scored.truth.options.seed)
            caption = "Every point is a condition, the bar is the median. Dotted line: chance level. " + _place(table_)
            blocks.append(_drawn(figure, simulated, "Values of each metric by prediction and baselines", caption))
    return [section("scores", "Scores", *blocks), section("conditions", "Every condition", *_whole(table_))]


def _place(scores: Any) -> str:
    if "matched_value" in scores:
        return "All values are at the number of cells of the repeat (half the cells, other controls on either side)."
    return "There is no repeat of the experiment in this table."


def _legend(scores: Any) -> Element:
    text = (
        "Averages over conditions, contexts with equal weight; in brackets the 95 % interval over conditions. "
        "★ best and ▽ worst of the prediction and the baselines. Floor: what noise alone gives (for distances and "
        "errors, two halves of the real cells; for agreement, the chance level). "
    )
    if "matched_value" in scores:
        text += (
            "Repeat: real cells in place of the prediction. It needs two samples of real cells, so it is at half the "
            "cells; compare it with “prediction, at half”, not with “prediction”. Anchored: 0 is the control, 1 is the "
            "repeat, computed at half; “unresolved” where repeat and control do not differ by two standard errors."
        )
    return tag("p", text, class_="legend")


def _averages(scores: Any, means: Any) -> Element:
    baselines = [c for c in means.columns if c.startswith(PREFIX) and means[c].notna().any()]
    has_repeat = "matched_value" in means
    anchored = score(scores) if has_repeat and f"matched_{PREFIX}control" in scores else None
    heads = ["metric", "better", "prediction", "floor", *(c.removeprefix(PREFIX).replace("_", " ") for c in baselines)]
    heads += ["prediction, at half", "repeat"] if has_repeat else []
    heads += ["anchored"] if anchored is not None else []
    heads += ["conditions"]
    rows = []
    for name, row in means.iterrows():
        metric = METRICS[str(name)]
        marks = _marks([metric.loss(row[c]) for c in ("value", *baselines)])
        interval = (
            f" [{number(row['value_low'])}, {number(row['value_high'])}]"
            if row["value_low"] == row["value_low"]
            else ""
        )
        cells = [_marked(row["value"], marks[0], interval), _number(row["floor"])]
        cells += [_marked(row[c], mark) for c, mark in zip(baselines, marks[1:], strict=True)]
        cells += [_number(row["matched_value"]), _number(row["ceiling"])] if has_repeat else []
        if anchored is not None:
            known = anchored.loc[name]
            cells.append(_number(known["score"]) if known["is_resolved"] else tag("td", "unresolved", class_="number"))
        what = tag("td", str(name), tag("br"), tag("small", metric.title))
        valid = tag("td", f"{int(row['n_valid'])} of {int(row['n_conditions'])}", class_="number")
        rows.append([what, figures.better(str(name)).removesuffix(" is better"), *cells, valid])
    return table(heads, rows)


def _marks(losses: Sequence[float]) -> list[str]:
    """Mark the best and the worst of several; none where there is nothing to tell apart."""
    known = [loss for loss in losses if not np.isnan(loss)]
    if len(known) < 2 or min(known) == max(known):
        return [""] * len(losses)
    return ["best" if loss == min(known) else "worst" if loss == max(known) else "" for loss in losses]


def _number(value: float) -> Element:
    return tag("td", number(float(value)), class_="number")


def _marked(value: float, mark: str, interval: str = "") -> Element:
    sign = {"best": "★ ", "worst": "▽ ", "": ""}[mark]
    children = [tag("small", interval)] if interval else []
    return tag("td", f"{sign}{number(float(value))}", *children, class_=f"number {mark}".strip())


def _whole(scores: Any) -> list[Element]:
    fixed = ["context", "perturbation", "metric", "value", "floor", "ceiling"]
    baselines = [c for c in scores.columns if c.startswith(PREFIX) and scores[c].notna().any()]
    columns = [*fixed, *(["matched_value"] if "matched_value" in scores else []), *baselines]
    columns += ["n_real", "n_pred", "n_ctrl", "note"]
    shown = scores[columns].head(MAX_ROWS)
    heads = [c.removeprefix(PREFIX).replace("_", " ") for c in columns]
    notes = scores.loc[scores["note"] != "", "note"].value_counts()
    left_out = f" The first {MAX_ROWS:,} of {len(scores):,} rows are shown." if len(scores) > MAX_ROWS else ""
    blocks = [
        tag(
            "p",
            f"The table of metrics.evaluate, rounded.{left_out} ",
            download(scores.to_csv(index=False), "scores.csv", "All rows and digits as CSV"),
            class_="legend",
        ),
        table(
            heads, ([_count(c, v) for c, v in zip(columns, row, strict=True)] for row in shown.itertuples(index=False))
        ),
    ]
    if len(notes):
        rows = [(note, int(n)) for note, n in notes.head(50).items()]
        blocks += [tag("h3", "Notes, and how many values they are of"), table(["note", "values"], rows)]
    return blocks


def _count(column: str, value: Any) -> Any:
    """Give numbers of cells as whole numbers, and names of metrics unbroken."""
    if column == "metric":
        return tag("td", str(value), class_="name")
    return int(value) if column.startswith("n_") and value == value else value


def deltas(scored: Scored, rows: Sequence[int], simulated: bool) -> Element:
    """Show generated against real mean shifts."""
    caption = (
        "Each point is a gene: mean of log-normalised values less that of the real control cells of the context. "
        "Points on the dashed line are right. The genes that move most on either side are named. r is over all genes "
        "but the target; real control cells are in both shifts, so r is above 0 by chance (floor of pearson_delta)."
    )
    with figures.drawing():
        drawn = _drawn(figures.deltas(scored, rows), simulated, "Generated against real mean shifts of genes", caption)
    shifts = scored.shifts
    order = np.argsort(-shifts.size, kind="stable")
    lines = [
        (
            *_names(scored.conditions[row]),
            float(shifts.size[row]),
            float(_length(scored, row)),
            float(shifts.correlation[row]),
        )
        for row in order
    ]
    heads = ["context", "perturbation", "length of the real shift", "of the generated one", "r"]
    whole = tag("details", tag("summary", f"Shifts of all {len(lines)} conditions"), table(heads, lines))
    return section("deltas", "Mean shifts of genes", drawn, whole)


def _length(scored: Scored, row: int) -> float:
    shifts = scored.shifts
    return float(np.sqrt((shifts.pred[row] ** 2 * shifts.keep[row]).sum()))


def plane(scored: Scored, simulated: bool) -> Element:
    """Show real and generated cells in one plane."""
    if scored.fitted.n_cells < 4 or not np.minimum(scored.truth.real.sizes() // 2, scored.pred.sizes()).any():
        return section("umap", "Cells in a plane", tag("p", "There are too few cells for a UMAP."))
    places = scored.place()
    caption = (
        f"UMAP of principal components, fitted on {places.n_shaping:,} cells of {scored.fitted_on}; all cells shown "
        f"were placed in it afterwards by the same rule, {len(places.codes):,} of each kind, equally many of every "
        "condition, drawn in random order. The upper right panel is what a perfect prediction looks like. A UMAP "
        "distorts distances: read the scores for how far the cells are apart."
    )
    with figures.drawing():
        figure = figures.plane(scored, places)
        return section(
            "umap", "Cells in a plane", _drawn(figure, simulated, "UMAP of real and generated cells", caption)
        )


def recovery(scored: Scored, simulated: bool) -> Element:
    """Show how significant genes are recovered."""
    found = scored.recovery
    order = np.argsort(-found.table["de_n_real"], kind="stable")
    rows = order[: figures.MAX_BARS].tolist()
    caption = (
        "Wilcoxon rank-sum tests against the real control cells of the context, Benjamini-Hochberg below "
        f"{found.fdr:g}, at equal numbers of real and generated cells; targets are left out. Fold changes beyond "
        "the axes lie on their edge."
        + (
            f" The {len(rows)} of {len(order)} conditions with most significant genes."
            if len(order) > len(rows)
            else ""
        )
    )
    names = ("de_n_real", "de_n_pred", "de_precision", "de_recall", "de_f1", "de_direction_match", "de_roc_auc")
    heads = ["context", "perturbation", "real", "generated", "precision", "recall", "F1", "right sign", "ROC AUC"]
    lines = [
        (*_names(found.real.keys[row]), *(_count(n[3:], found.table[n][row]) for n in names)) for row in order.tolist()
    ]
    with figures.drawing():
        drawn = _drawn(figures.recovery(found, rows), simulated, "Recovery of significant genes", caption)
    note = tag("p", "Without significant genes in the real cells there is nothing to recover (–).", class_="legend")
    return section("recovery", "Recovery of significant genes", drawn, table(heads, lines), note)


def quality(scored: Scored, simulated: bool) -> Element:
    """Show single-cell figures of both sides."""
    real, pred = scored.quality
    caption = (
        f"{len(real.genes):,} cells of each side, equally many of every condition. Generated cells that are too alike "
        "have narrow histograms and variances below the real ones; averaged cells have too few zeros."
    )
    with figures.drawing():
        drawn = _drawn(figures.quality(real, pred), simulated, "Counts, genes, zeros and variances", caption)
    rows = [(label, a, b, b - a) for label, a, b in _figures_of(real, pred)]
    return section("quality", "Quality of cells", drawn, table(["", "real", "generated", "difference"], rows))


def _figures_of(real: Quality, pred: Quality) -> list[tuple[str, float, float]]:
    def quantile(values: tuple[np.ndarray, np.ndarray], q: float) -> tuple[float, float]:
        return float(np.quantile(values[0], q)), float(np.quantile(values[1], q))

    library, n_genes = (real.library, pred.library), (real.genes, pred.genes)
    unit = "log-normalised values" if np.isnan(real.library).any() else "counts"
    return [
        ("counts per cell, median", *quantile(library, 0.5)),
        ("counts per cell, lower quartile", *quantile(library, 0.25)),
        ("counts per cell, upper quartile", *quantile(library, 0.75)),
        ("genes per cell, median", *quantile(n_genes, 0.5)),
        ("share of zeros", float(real.zeros.mean()), float(pred.zeros.mean())),
        ("genes that no cell has", float((real.mean == 0).sum()), float((pred.mean == 0).sum())),
        (f"variance of {unit}, summed over genes", float(real.variance.sum()), float(pred.variance.sum())),
    ]
