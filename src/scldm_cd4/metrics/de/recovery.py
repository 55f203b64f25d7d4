"""Recovery of the differentially expressed genes of many conditions."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from scldm_cd4._errors import DataError
from scldm_cd4.metrics.de.rank_tests import DETests
from scldm_cd4.metrics.effects.rows import spearman_rows

TOP = (20, 50, 100)
MIN_GENES = 10
"""Significant genes that a statistic over them needs."""
PURITY = 0.9
"""Share of right directions down to which ``de_direction_reach`` goes, as in cell-eval2."""


def de_table(
    real: DETests,
    pred: DETests,
    *,
    fdr: float = 0.05,
    top: Sequence[int] = TOP,
    sort_by: Literal["lfc", "z"] = "lfc",
    min_genes: int = MIN_GENES,
    exclude: np.ndarray | None = None,
    allow_missing: bool = False,
) -> dict[str, np.ndarray]:
    r"""Recovery of significant genes, their order and their direction, for all conditions.

    With R and P the real and predicted genes whose adjusted p is below ``fdr``, over genes tested on the real side. A
    gene that is not tested on the predicted side counts as not significant and without change.

    ======================== ======================================================================== ============
    name                     value                                                                    best, chance
    ======================== ======================================================================== ============
    ``de_precision``         \|R and P\| / \|P\|                                                      1, \|R\|/G
    ``de_recall``            \|R and P\| / \|R\|                                                      1, \|P\|/G
    ``de_f1``                2 \|R and P\| / (\|R\| + \|P\|)                                          1
    ``de_jaccard``           \|R and P\| / \|R or P\|                                                 1
    ``de_overlap``           the same number n = \|R\| of top genes of either side that both share    1
    ``de_overlap_top{k}``    the same with n = min(k, \|R\|) (cell-eval)                              1
    ``de_precision_top{k}``  the same with n = min(k, \|P\|) (cell-eval)                              1
    ``de_roc_auc``           area under the ROC curve: \|z\| of P finds R                             1, 0.5
    ``de_pr_auc``            average precision of the same                                            1, \|R\|/G
    ``de_spearman_lfc``      Spearman correlation of log2 fold changes over R                         1, 0
    ``de_lfc_nmae``          sum \|error of log2 fold change\| / sum \|log2 fold change\| over R      0, 1
    ``de_direction_match``   share of R whose fold change has the right sign                          1, 0.5
    ``de_direction_yield``   genes of P with the right sign / max(\|P\|, \|R\|) (cell-eval2)          1
    ``de_direction_reach``   part of R, in order of the predicted p, up to which 90 % have the        1, near 0
                             right sign (cell-eval2)
    ``de_n_real``            \|R\|                                                                    none
    ``de_n_pred``            \|P\|                                                                    none
    ======================== ======================================================================== ============

    Without real significant genes all scores are NaN: there is nothing to recover. With real but no predicted ones
    precision, recall, F1, Jaccard, overlaps and yield are 0: silence is not rewarded. Correlation and error of the fold
    changes need ``min_genes`` genes. The number found depends on the number of cells: compare equal numbers.

    Parameters
    ----------
    real, pred
        Tests of both sides against the same real controls, from :func:`de_tests`.
    fdr
        Adjusted p below which a gene is significant.
    top
        Numbers of top genes.
    sort_by
        Order of top genes: absolute log2 fold change, or absolute z.
    min_genes
        Significant genes that ``de_spearman_lfc`` and ``de_lfc_nmae`` need.
    exclude
        Genes to leave out of sets that were adjusted with them, (K, genes). Better leave them out of
        :func:`de_tests`.
    allow_missing
        Give NaN for conditions that were not predicted.

    Returns
    -------
    One array per name, (K,), in the order of ``real.keys``.

    Raises
    ------
    DataError
        If the genes differ in number, or a condition was not predicted (unless ``allow_missing``).

    Examples
    --------
    >>> scores = metrics.de_table(tests, guess_tests)
    >>> scores["de_recall"].shape == (len(tests.keys),)
    True
    """
    if real.z.shape[1] != pred.z.shape[1]:
        raise DataError(f"{real.z.shape[1]} real and {pred.z.shape[1]} predicted genes; align them by name")
    position = {key: row for row, key in enumerate(pred.keys)}
    rows = np.array([position.get(key, -1) for key in real.keys], dtype=np.int64)
    if (rows < 0).any() and not allow_missing:
        absent = [key for key, row in zip(real.keys, rows, strict=True) if row < 0]
        raise DataError(f"{len(absent)} conditions were not predicted {absent[:3]}; pass allow_missing=True")
    tested = ~np.isnan(real.p_adjusted)
    if exclude is not None:
        tested &= ~exclude
    sides = _Sides(real, pred.take(rows), tested, fdr)
    order = (np.abs(sides.real_lfc), np.abs(sides.lfc)) if sort_by == "lfc" else (np.abs(real.z), sides.size)
    table = {
        **_sets(sides),
        **_overlaps(sides, order[0], order[1], top),
        **_curves(sides),
        **_changes(sides, min_genes),
    }
    table["de_direction_reach"] = _reach(sides)
    for name, values in table.items():
        if not name.startswith("de_n_"):
            values[sides.n_real == 0] = np.nan
        values[rows < 0] = np.nan
    return table


class _Sides:
    """Significant genes, fold changes and absolute z of both sides over the genes that count."""

    def __init__(self, real: DETests, pred: DETests, tested: np.ndarray, fdr: float) -> None:
        self.tested, self.pred = tested, pred
        self.real = tested & (np.nan_to_num(real.p_adjusted, nan=1.0) < fdr)
        self.found = tested & (np.nan_to_num(pred.p_adjusted, nan=1.0) < fdr)
        self.real_lfc = np.where(tested, np.nan_to_num(real.log2_fold_change), 0.0)
        self.lfc = np.where(tested, np.nan_to_num(pred.log2_fold_change), 0.0)
        self.size = np.abs(np.nan_to_num(pred.z))
        self.n_real, self.n_found = self.real.sum(axis=1), self.found.sum(axis=1)
        self.right = (np.sign(self.real_lfc) == np.sign(self.lfc)) & (self.real_lfc != 0)


def _sets(sides: _Sides) -> dict[str, np.ndarray]:
    both = (sides.real & sides.found).sum(axis=1)
    n_real, n_pred = sides.n_real, sides.n_found
    return {
        "de_n_real": n_real.astype(np.float64),
        "de_n_pred": n_pred.astype(np.float64),
        "de_precision": both / np.maximum(n_pred, 1),
        "de_recall": both / np.maximum(n_real, 1),
        "de_f1": 2 * both / np.maximum(n_real + n_pred, 1),
        "de_jaccard": both / np.maximum(n_real + n_pred - both, 1),
    }


def _overlaps(sides: _Sides, real_score: np.ndarray, score: np.ndarray, top: Sequence[int]) -> dict[str, np.ndarray]:
    """Share of the top significant genes of one side that are top significant genes of the other."""
    real_rank, rank = _positions(real_score, sides.real), _positions(score, sides.found)

    def shared(n: np.ndarray) -> np.ndarray:
        both = (real_rank < n[:, None]) & (rank < n[:, None])
        result: np.ndarray = both.sum(axis=1) / np.maximum(n, 1)
        return result

    out = {"de_overlap": shared(sides.n_real)}
    for k in top:
        out[f"de_overlap_top{k}"] = shared(np.minimum(k, sides.n_real))
        out[f"de_precision_top{k}"] = shared(np.minimum(k, sides.n_found))
    return out


def _positions(score: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Place of each gene in the order of falling score of the chosen genes, ties by position; others come last."""
    order = np.argsort(-np.where(chosen, score, -np.inf), axis=1, kind="stable")
    places = np.empty_like(order)
    np.put_along_axis(places, order, np.broadcast_to(np.arange(score.shape[1]), score.shape), axis=1)
    return np.where(chosen, places, score.shape[1])


def _curves(sides: _Sides) -> dict[str, np.ndarray]:
    roc, pr = area_under_curves(sides.real, sides.size, sides.tested)
    return {"de_roc_auc": roc, "de_pr_auc": pr}


def area_under_curves(labels: np.ndarray, scores: np.ndarray, keep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Areas under the ROC curve and (average precision) the precision-recall curve of each row.

    Parameters
    ----------
    labels
        True for what is to be found, (K, genes).
    scores
        Higher is more certain, (K, genes); ties share a threshold.
    keep
        Which genes count, (K, genes).

    Returns
    -------
    Both areas, (K,); NaN where only one class is there.

    Examples
    --------
    >>> labels, scores = np.array([[True, False, True]]), np.array([[3.0, 2.0, 1.0]])
    >>> roc, precision = metrics.area_under_curves(labels, scores, np.ones((1, 3), dtype=bool))
    >>> float(roc[0])
    0.5
    """
    labels = labels & keep
    order = np.argsort(-np.where(keep, scores, -np.inf), axis=1, kind="stable")
    ordered = np.take_along_axis(np.where(keep, scores, -np.inf), order, axis=1)
    hits = np.cumsum(np.take_along_axis(labels, order, axis=1), axis=1)
    width = labels.shape[1]
    is_last = np.ones(labels.shape, dtype=bool)
    is_last[:, :-1] = ordered[:, 1:] != ordered[:, :-1]
    ends = np.where(is_last, np.arange(width), width)
    ends = np.minimum.accumulate(ends[:, ::-1], axis=1)[:, ::-1]  # last place of the same score
    found = np.take_along_axis(hits, ends, axis=1)
    is_hit = np.take_along_axis(labels, order, axis=1)
    n, total = labels.sum(axis=1), keep.sum(axis=1)
    precision = np.where(is_hit, found / (ends + 1), 0.0).sum(axis=1)
    # mid-ranks from the top: places 1 to `total`
    starts = np.where(np.roll(is_last, 1, axis=1) | (np.arange(width) == 0), np.arange(width), 0)
    starts = np.maximum.accumulate(starts, axis=1)
    ranks = np.where(is_hit, (starts + ends) / 2 + 1, 0.0).sum(axis=1)
    defined = (n > 0) & (n < total)
    pairs = np.where(defined, n * (total - n), 1)
    roc = np.where(defined, 1.0 - (ranks - n * (n + 1) / 2) / pairs, np.nan)
    return roc, np.where(defined, precision / np.maximum(n, 1), np.nan)


def _changes(sides: _Sides, min_genes: int) -> dict[str, np.ndarray]:
    enough = sides.n_real >= min_genes
    error = np.where(sides.real, np.abs(sides.lfc - sides.real_lfc), 0.0).sum(axis=1)
    scale = np.where(sides.real, np.abs(sides.real_lfc), 0.0).sum(axis=1)
    judged = sides.found & (sides.real_lfc != 0)
    budget = np.maximum(np.maximum(judged.sum(axis=1), sides.n_real), 1)
    return {
        "de_spearman_lfc": np.where(enough, spearman_rows(sides.real_lfc, sides.lfc, sides.real), np.nan),
        "de_lfc_nmae": np.divide(error, scale, out=np.full_like(scale, np.nan), where=enough & (scale > 0)),
        "de_direction_match": (sides.right & sides.real).sum(axis=1) / np.maximum(sides.n_real, 1),
        "de_direction_yield": (sides.right & judged).sum(axis=1) / budget,
    }


def _reach(sides: _Sides) -> np.ndarray:
    """Deepest part of the real genes, in order of the predicted p, of which `PURITY` have the right direction."""
    judged = sides.real & (sides.real_lfc != 0)
    adjusted = np.where(judged, np.nan_to_num(sides.pred.p_adjusted, nan=1.0), np.inf)
    keys = (-np.abs(sides.lfc), np.nan_to_num(sides.pred.p, nan=1.0), adjusted)
    order = np.lexsort(keys, axis=1)
    right = np.cumsum(np.take_along_axis(sides.right & judged, order, axis=1), axis=1)
    depth = np.arange(1, right.shape[1] + 1)
    is_pure = (right / depth >= PURITY) & (depth <= judged.sum(axis=1)[:, None])
    deepest = np.where(is_pure, depth, 0).max(axis=1, initial=0)
    result: np.ndarray = deepest / np.maximum(sides.n_real, 1)
    return result
