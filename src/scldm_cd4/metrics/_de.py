"""Differential expression by the Wilcoxon rank-sum test, and its recovery."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from scldm_cd4._errors import DataError
from scldm_cd4.metrics._pseudobulk import as_matrix, dense


@dataclass(frozen=True)
class RankTest:
    """Rank-sum statistics per gene: shift of U from its mean, its variance, and the number of cells.

    Attributes
    ----------
    shift
        U of the group minus n m / 2, (genes,).
    variance
        Variance of U with tie correction, (genes,).
    n_cells
        Cells of group and control together.
    """

    shift: np.ndarray
    variance: np.ndarray
    n_cells: int


class ControlRanks:
    """Control cells sorted once per gene, so that many groups can be tested against them.

    Parameters
    ----------
    control
        Normalised values of the control cells, cells x genes.
    """

    def __init__(self, control: Any) -> None:
        values = dense(as_matrix(control))
        self.n_cells, self.n_genes = values.shape
        self._sorted = np.ascontiguousarray(np.sort(values, axis=0).T)
        genes, sizes, _ = _runs(self._sorted)
        self._ties = np.bincount(genes, weights=_cubic(sizes), minlength=self.n_genes)

    def test(self, group: Any) -> RankTest:
        """Compare a group with the control.

        Parameters
        ----------
        group
            Normalised values, cells x genes.

        Returns
        -------
        The statistics of every gene.

        Raises
        ------
        DataError
            If the genes differ in number.
        """
        values = dense(as_matrix(group))
        if values.shape[1] != self.n_genes:
            raise DataError(f"the group has {values.shape[1]} genes, the control {self.n_genes}")
        queries = np.ascontiguousarray(np.sort(values, axis=0).T)
        n, m = len(values), self.n_cells
        below = np.empty(queries.shape, dtype=np.int64)
        upto = np.empty(queries.shape, dtype=np.int64)
        for row, query, lower, upper in zip(self._sorted, queries, below, upto, strict=True):
            lower[:] = row.searchsorted(query, "left")
            upper[:] = row.searchsorted(query, "right")
        shift = (below + upto).sum(axis=1) / 2 - n * m / 2
        genes, sizes, starts = _runs(queries)
        shared = (upto - below).ravel()[starts]
        extra = _cubic(shared + sizes) - _cubic(shared)
        ties = self._ties + np.bincount(genes, weights=extra, minlength=self.n_genes)
        total = n + m
        variance = n * m / 12 * ((total + 1) - ties / max(total * (total - 1), 1))
        return RankTest(shift, np.maximum(variance, 0.0), total)


def _cubic(sizes: np.ndarray) -> np.ndarray:
    values = sizes.astype(np.float64)
    return values**3 - values


def _runs(ordered: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Give gene, length and flat start of every run of equal values in rows that are sorted."""
    if ordered.shape[1] == 0:
        return (np.empty(0, dtype=np.int64),) * 3
    change = np.ones(ordered.shape, dtype=bool)
    change[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    starts = np.flatnonzero(change)
    return starts // ordered.shape[1], np.diff(starts, append=ordered.size), starts


def combine_tests(tests: list[RankTest]) -> tuple[np.ndarray, np.ndarray]:
    r"""Combine the rank tests of several contexts into one z and p per gene.

    van Elteren's stratified test: :math:`z = \sum_s w_s (U_s - \mu_s) / \sqrt{\sum_s w_s^2 V_s}` with :math:`w_s =
    1/(N_s + 1)`, so cells are ranked only against cells of their own context. One context gives the Wilcoxon rank-sum
    test with tie correction and continuity correction, equal to ``scipy.stats.mannwhitneyu(method="asymptotic")``;
    several contexts have no continuity correction. Source: van Elteren, Bull. Int. Stat. Inst. 1960.

    Parameters
    ----------
    tests
        One result per context.

    Returns
    -------
    z and two-sided p, (genes,). A gene without any variation has z = 0 and p = 1.
    """
    from scipy.special import ndtr

    weights = [1.0 / (test.n_cells + 1) for test in tests]
    shift = sum(w * test.shift for w, test in zip(weights, tests, strict=True))
    spread = np.sqrt(sum(w**2 * test.variance for w, test in zip(weights, tests, strict=True)))
    distance = np.abs(shift)
    if len(tests) == 1:
        distance = distance - 0.5 * weights[0]
    z = np.divide(distance, spread, out=np.zeros_like(spread), where=spread > 0)
    p = np.where(spread > 0, np.minimum(2.0 * ndtr(-z), 1.0), 1.0)
    return np.sign(shift) * np.maximum(z, 0.0), p


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """Adjust p values by Benjamini & Hochberg (J. R. Stat. Soc. B 1995)."""
    order = np.argsort(p)
    scaled = p[order] * len(p) / np.arange(1, len(p) + 1)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1.0)
    return adjusted


def refuse_constant(values: np.ndarray, what: str) -> None:
    """Refuse cells that are copies of one profile: a rank test on them calls almost every gene significant.

    Raises
    ------
    DataError
        If there are two or more cells and no gene varies between them.
    """
    if len(values) > 1 and not (values != values[0]).any():
        raise DataError(
            f"{what}: all {len(values)} cells are the same profile, which makes a rank test meaningless; "
            "give cells with their own variation, such as drawn counts"
        )


def context_test(
    values: np.ndarray, contexts: np.ndarray, controls: Mapping[Any, ControlRanks], what: str = "group"
) -> tuple[np.ndarray, np.ndarray]:
    """Test cells against the sorted controls of their own contexts.

    Parameters
    ----------
    values
        Normalised values, cells x genes.
    contexts
        Context of each cell.
    controls
        Sorted controls of every context that occurs.
    what
        Name of the cells for the error message.

    Returns
    -------
    z and p per gene.

    Raises
    ------
    DataError
        If a context has no control, or all cells are one profile.
    """
    refuse_constant(values, what)
    levels = list(dict.fromkeys(np.asarray(contexts).tolist()))
    missing = [level for level in levels if level not in controls]
    if missing or not levels:
        raise DataError(f"{what}: no control cells in context {missing}" if missing else f"{what}: no cells")
    return combine_tests([controls[level].test(values[np.asarray(contexts) == level]) for level in levels])


def de_genes(
    group: Any,
    control: Any,
    *,
    genes: Any = None,
    contexts: tuple[np.ndarray, np.ndarray] | None = None,
    exclude: Any = None,
    fdr: float = 0.05,
) -> Any:
    """Find the genes that differ between a group of cells and its control.

    Wilcoxon rank-sum test with tie correction (stratified over contexts, see :func:`combine_tests`), then
    Benjamini-Hochberg over the tested genes. With small groups the number found depends on the number of cells:
    compare real and predicted cells at equal n.

    Parameters
    ----------
    group, control
        Log-normalised values, cells x genes.
    genes
        Gene names; positions by default.
    contexts
        Context of each cell of ``group`` and of ``control``.
    exclude
        Positions of genes to leave out before the adjustment, such as the perturbation's own target.
    fdr
        Adjusted p at or below which a gene counts as significant.

    Returns
    -------
    DataFrame with one row per tested gene: ``gene``, ``z`` (positive where the group is higher), ``p``, ``p_adjusted``,
    ``delta`` (difference of the mean log-normalised values over all cells), ``significant``.

    Raises
    ------
    DataError
        If all cells of the group are one profile, or a context has no control.
    """
    import pandas as pd

    from scldm_cd4.metrics._pseudobulk import excluded_mask

    x, c = dense(as_matrix(group)), dense(as_matrix(control))
    here, there = contexts or (np.zeros(len(x)), np.zeros(len(c)))
    there = np.asarray(there)
    controls = {level: ControlRanks(c[there == level]) for level in np.unique(there).tolist()}
    z, p = context_test(x, here, controls)
    keep = excluded_mask(x.shape[1], exclude)
    names = np.arange(x.shape[1]) if genes is None else np.asarray(genes)
    adjusted = benjamini_hochberg(p[keep])
    delta = (x.mean(axis=0) - c.mean(axis=0))[keep]
    columns = {"gene": names[keep], "z": z[keep], "p": p[keep], "p_adjusted": adjusted, "delta": delta}
    return pd.DataFrame(columns).assign(significant=adjusted <= fdr)


def de_recovery(real: np.ndarray, pred: np.ndarray) -> dict[str, float]:
    """Precision, recall and F1 of predicted against real significant genes.

    F1 = 2 |real and pred| / (|real| + |pred|). Range 0 to 1, best 1; a random set of the same size has precision
    |real| / genes.

    Parameters
    ----------
    real, pred
        Boolean masks over the same genes, (genes,).

    Returns
    -------
    ``precision``, ``recall``, ``f1``, ``n_real``, ``n_pred``. No real gene: all scores NaN (nothing to recover). Real
    but no predicted genes: all scores 0 (silence is not rewarded).

    Raises
    ------
    DataError
        If the masks differ in length.
    """
    truth, guess = np.asarray(real, dtype=bool), np.asarray(pred, dtype=bool)
    if truth.shape != guess.shape:
        raise DataError(f"the masks cover {truth.size} and {guess.size} genes; align the genes first")
    n_real, n_pred, both = int(truth.sum()), int(guess.sum()), int((truth & guess).sum())
    if n_real == 0:
        scores = dict.fromkeys(("precision", "recall", "f1"), float("nan"))
    else:
        scores = {"precision": both / max(n_pred, 1), "recall": both / n_real, "f1": 2 * both / (n_real + n_pred)}
    return {**scores, "n_real": n_real, "n_pred": n_pred}
