"""The figures of a report. No pyplot: no window, no global state."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from scldm_cd4.metrics.cells.pseudobulk import Key
from scldm_cd4.metrics.page.scored import Places, Quality, Recovery, Scored
from scldm_cd4.metrics.registry import METRICS
from scldm_cd4.pl._figure import (
    GENERATED,
    GREY,
    INK,
    REAL,
    SIGNIFICANT,
    agreement_lines,
    histograms,
    name_points,
    plain,
)

N_LABELS = 8
"""Genes that are named in a scatter of shifts."""
MAX_NAMED = 5
"""Perturbations with a colour of their own in a plane."""
MAX_BARS = 24
"""Conditions with a bar of their own."""


@contextmanager
def drawing() -> Iterator[None]:
    """Draw with the defaults of matplotlib, whatever the settings of the session are."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"font.size": 9.0, "axes.titlesize": 9.5, "legend.fontsize": 8.5})
        matplotlib.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": GREY})
        yield


def name(key: Key) -> str:
    """Give the short name of a condition, perturbation first."""
    context = " | ".join(key[:-1])
    return f"{plain(key[-1], 22)}, {plain(context, 24)}" if context else plain(key[-1], 30)


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _panels(n: int, columns: int, width: float, height: float) -> tuple[Any, list[Any]]:
    columns = min(n, columns)
    rows = -(-n // columns)
    figure = _figure(width * columns, height * rows)
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for ax in axes[n:]:
        ax.set_visible(False)
    return figure, axes[:n]


def scores(table: Any, metrics: Sequence[str], seed: int) -> Any:
    """Draw the values of all conditions: prediction, baselines and a repeat of the experiment, one panel per metric.

    Parameters
    ----------
    table
        From :func:`scldm_cd4.metrics.evaluate`.
    metrics
        Those to draw.
    seed
        Of the vertical scatter of the points.

    Returns
    -------
    The Figure. Values are those at the number of cells of the ceiling where there is one.
    """
    prefix = "matched_" if "matched_value" in table else ""
    sides = {f"{prefix}value": ("prediction", GENERATED)}
    sides |= {
        f"{prefix}{c}": (c.removeprefix("baseline_").replace("_", " "), GREY)
        for c in table.columns
        if c.startswith("baseline_") and f"{prefix}{c}" in table and table[c].notna().any()
    }
    if table["ceiling"].notna().any():
        sides["ceiling"] = ("repeat of the experiment", REAL)
    figure, axes = _panels(len(metrics), 3, 3.9, 0.9 + 0.24 * len(sides))
    rng = np.random.default_rng([seed, 11])
    for i, (ax, metric) in enumerate(zip(axes, metrics, strict=True)):
        rows = table[table["metric"] == metric]
        for y, (column, (_, colour)) in enumerate(sides.items()):
            values = rows[column].dropna().to_numpy(dtype=np.float64)
            ax.scatter(values, y + rng.uniform(-0.22, 0.22, len(values)), s=10, c=colour, alpha=0.5, linewidths=0)
            if len(values):
                ax.plot([np.median(values)] * 2, [y - 0.36, y + 0.36], color=INK, lw=1.8)
        chance = METRICS[metric].chance
        if isinstance(chance, float):  # one that depends on the cells is another one at half of them
            ax.axvline(chance, color=INK, lw=0.8, ls=":")
        elif not prefix and chance is not None and rows["floor"].notna().any():
            ax.axvline(rows["floor"].mean(), color=INK, lw=0.8, ls=":")
        names = [label for label, _ in sides.values()] if i % 3 == 0 else [""] * len(sides)
        ax.set_yticks(range(len(sides)), names)
        ax.set(ylim=(len(sides) - 0.4, -0.6), title=f"{metric} ({better(metric)})")
        ax.tick_params(axis="y", length=0)
        ax.locator_params(axis="x", nbins=5)
    return figure


def better(metric: str) -> str:
    """Say in words which values of a metric are better."""
    known = METRICS[metric]
    return f"near {known.best:g} is better" if known.direction == "target" else f"{known.direction} is better"


def deltas(scored: Scored, rows: Sequence[int]) -> Any:
    """Draw generated against real mean shifts of all genes, one panel per condition, the largest named.

    Parameters
    ----------
    scored
        The cells.
    rows
        Conditions to draw.

    Returns
    -------
    The Figure.
    """
    shifts, significant = scored.shifts, scored.recovery.real.significant(scored.recovery.fdr)
    figure, axes = _panels(len(rows), 3, 3.9, 3.9)
    for ax, row in zip(axes, rows, strict=True):
        real, pred, keep = shifts.real[row], shifts.pred[row], shifts.keep[row]
        hit = significant[row] & keep
        limit = 1.12 * max(np.abs(real).max(), np.abs(pred).max(), 1e-6)
        agreement_lines(ax)
        rest = keep & ~hit
        ax.scatter(real[rest], pred[rest], s=9, c=GREY, alpha=0.45, linewidths=0, label="gene")
        ax.scatter(
            real[hit], pred[hit], s=15, c=SIGNIFICANT, alpha=0.9, linewidths=0, label="significant in real cells"
        )
        if not keep.all():
            ax.scatter(real[~keep], pred[~keep], s=34, c=INK, marker="x", lw=1.2, label="target (left out)")
        ax.set(
            xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xlabel="real shift", ylabel="generated shift"
        )
        r = shifts.correlation[row]
        ax.set_title(f"{name(scored.conditions[row])}\nr = {r:.2f}, {int(hit.sum())} significant genes")
    handles, labels = max((ax.get_legend_handles_labels() for ax in axes), key=lambda pair: len(pair[0]))
    figure.legend(handles, labels, loc="outside lower center", ncol=3, frameon=False)
    for ax, row in zip(axes, rows, strict=True):
        real, pred = shifts.real[row], shifts.pred[row]
        shown = np.argsort(-np.maximum(np.abs(real), np.abs(pred)), kind="stable")[:N_LABELS]
        name_points(ax, real[shown], pred[shown], [plain(scored.truth.real.genes[g], 16) for g in shown])
    return figure


def plane(scored: Scored, places: Places) -> Any:
    """Draw generated beside real cells, real beside other real cells, and both by perturbation.

    Parameters
    ----------
    scored
        The cells.
    places
        Their coordinates.

    Returns
    -------
    The Figure.
    """
    from scldm_cd4 import pl

    labels = np.array([plain(key[-1], 16) for key in scored.conditions], dtype=object)
    strong = scored.shifts.size[np.unique(places.codes)].argsort()[::-1]
    named = list(dict.fromkeys(labels[np.unique(places.codes)[strong]].tolist()))[:MAX_NAMED]
    groups, seed = labels[places.codes], scored.truth.options.seed
    n, both = len(places.codes), np.concatenate([places.real, places.repeat, places.pred])
    figure = _figure(10.4, 10.0)
    axes = figure.subplots(2, 2)
    for ax, other, what in ((axes[0, 0], places.pred, "generated"), (axes[0, 1], places.repeat, "real, other half")):
        sources = np.repeat(["real", what], n)
        pl.embedding(
            np.concatenate([places.real, other]),
            sources,
            named=["real", what],
            title=f"real and {what} cells, {n} each" if what == "generated" else f"real and other real cells, {n} each",
            limits=both,
            seed=seed,
            ax=ax,
        )
    for ax, cells, what in ((axes[1, 0], places.pred, "generated"), (axes[1, 1], places.real, "real")):
        pl.embedding(cells, groups, named=named, title=f"{what} cells by perturbation", limits=both, seed=seed, ax=ax)
    return figure


def recovery(found: Recovery, rows: Sequence[int]) -> Any:
    """Draw how many significant genes are recovered, missed and made up, and the fold changes of the real ones.

    Parameters
    ----------
    found
        Rank tests of both sides.
    rows
        Conditions with a bar of their own; fold changes are of all conditions.

    Returns
    -------
    The Figure.
    """
    real, pred = found.real.significant(found.fdr), found.pred.significant(found.fdr)
    parts = np.stack([(real & pred).sum(axis=1), (real & ~pred).sum(axis=1), (~real & pred).sum(axis=1)])[:, rows]
    figure = _figure(11.4, max(3.8, 1.3 + 0.27 * len(rows)))
    left, right = figure.subplots(1, 2, width_ratios=(1.35, 1.0))
    y = np.arange(len(rows))
    left.barh(y, parts[0], color=SIGNIFICANT, label="in both")
    left.barh(y, parts[1], left=parts[0], color=REAL, label="real cells only (missed)")
    left.barh(y, -parts[2], color=GENERATED, label="generated cells only", hatch="///", edgecolor="white", lw=0)
    left.axvline(0, color=INK, lw=0.8)
    left.set_yticks(y, [name(found.real.keys[row]) for row in rows])
    left.set(ylim=(len(rows) - 0.4, -0.6), xlabel="significant genes (left of 0: generated cells only)")
    left.xaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
    left.locator_params(axis="x", integer=True, nbins=7)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower left", ncol=3, frameon=False)
    x, guess = found.real.log2_fold_change[real], found.pred.log2_fold_change[real]
    limit = 1.08 * max(np.quantile(np.abs(np.concatenate([x, guess, [0.1]])), 0.995), 0.1)
    agreement_lines(right)
    clipped = np.clip(np.stack([x, guess]), -limit, limit)
    right.scatter(*clipped, s=9, c=SIGNIFICANT, alpha=0.5, linewidths=0)
    right.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    right.set(xlabel="log2 fold change, real cells", ylabel="log2 fold change, generated cells")
    right.set_anchor("N")
    agree = f", {np.mean(np.sign(x) == np.sign(guess)):.0%} with the right sign" if len(x) else ""
    right.set_title(f"{len(x)} significant genes of real cells{agree}")
    return figure


def quality(real: Quality, pred: Quality) -> Any:
    """Draw counts and genes per cell, and zeros and variance of each gene.

    Parameters
    ----------
    real, pred
        Of as many real as generated cells.

    Returns
    -------
    The Figure.
    """
    has_counts = not np.isnan(real.library).any()
    figure, axes = _panels(4, 2, 5.2, 3.5)
    if has_counts:
        histograms(axes[0], real.library, pred.library, "counts per cell", log=True)
    else:
        axes[0].text(0.5, 0.5, "no counts were given", ha="center", color=INK, transform=axes[0].transAxes)
        axes[0].set_axis_off()
    histograms(axes[1], real.genes, pred.genes, "genes per cell", log=False)
    axes[2].axline((0, 0), slope=1, color=GREY, lw=0.9, ls="--", zorder=0)
    axes[2].scatter(real.zeros, pred.zeros, s=10, c=INK, alpha=0.4, linewidths=0)
    axes[2].set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel="share of zeros, real", ylabel="generated")
    axes[2].set_title("share of zeros of each gene")
    for side, colour, marker, what in ((real, REAL, "o", "real"), (pred, GENERATED, "^", "generated")):
        seen = (side.mean > 0) & (side.variance > 0)
        axes[3].scatter(
            side.mean[seen], side.variance[seen], s=10, c=colour, marker=marker, alpha=0.45, linewidths=0, label=what
        )
    axes[3].set(xscale="log", yscale="log", xlabel="mean", ylabel="variance", title="mean and variance of each gene")
    if has_counts and (real.mean > 0).any():
        ends = [real.mean[real.mean > 0].min(), real.mean.max()]
        axes[3].plot(ends, ends, color=GREY, lw=0.9, ls="--", label="Poisson")
    axes[3].legend(frameon=False)
    return figure
