"""Differential expression by the Wilcoxon rank-sum test, and its recovery."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp

from scldm_cd4._errors import DataError
from scldm_cd4.metrics.cells.pseudobulk import Key, as_matrix, dense, excluded_mask, group_means, present_conditions
from scldm_cd4.metrics.de.backends import Backend, rank_test
from scldm_cd4.metrics.de.ranks import ControlRanks, benjamini_hochberg, combine_tests


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


def refuse_tiled(values: Any, codes: np.ndarray, keys: Sequence[Key]) -> None:
    """Refuse conditions whose cells are copies of one profile; see :func:`refuse_constant`.

    Raises
    ------
    DataError
        If a condition has two or more cells and no gene varies between them.
    """
    rows = np.argsort(codes, kind="stable")
    rows = rows[codes[rows] >= 0]
    present, first, sizes = np.unique(codes[rows], return_index=True, return_counts=True)
    several = present[sizes > 1]
    matrix = sp.csr_matrix(values)
    # cheap look first: copies have equal sums in the first and the last cell of their condition
    sums = np.asarray(matrix.sum(axis=1)).ravel()
    last = rows[first + sizes - 1]
    suspects = np.intersect1d(several, present[sums[rows[first]] == sums[last]])
    for code in suspects:
        cells = matrix[rows[codes[rows] == code]]
        if not (cells - sp.csr_matrix(cells[:1].toarray().repeat(cells.shape[0], axis=0))).nnz:
            refuse_constant(cells.toarray(), f"condition {keys[code]}")


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

    Examples
    --------
    >>> group = codes == keys.index(("CE0008162", "Rest", "IFNGR1"))
    >>> own = {"Rest": controls[("CE0008162", "Rest")]}
    >>> z, p = metrics.context_test(values[group].toarray(), ["Rest"] * group.sum(), own)
    >>> p.shape
    (60,)
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

    Examples
    --------
    >>> label = real.obs["perturbation"].to_numpy()
    >>> found = metrics.de_genes(values[label == "GATA3"], values[label == "NTC"], genes=real.var_names)
    >>> found.columns[0]
    'gene'
    """
    import pandas as pd

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


@dataclass(frozen=True)
class DETests:
    """Tests of many conditions against the control of their context.

    Attributes
    ----------
    keys
        Labels of each condition.
    z
        Statistic, positive where the condition is higher, (K, genes). NaN for a gene that was not tested.
    p
        Two-sided p, likewise.
    p_adjusted
        Benjamini-Hochberg p within the condition, likewise.
    log2_fold_change
        (K, genes), always finite.
    n
        Cells, (K,).
    n_control
        Control cells, (K,).

    Examples
    --------
    >>> tests.z.shape == (len(tests.keys), real.n_vars)
    True
    """

    keys: tuple[Key, ...]
    z: np.ndarray
    p: np.ndarray
    p_adjusted: np.ndarray
    log2_fold_change: np.ndarray
    n: np.ndarray
    n_control: np.ndarray

    def significant(self, fdr: float = 0.05) -> np.ndarray:
        """Mark the genes whose adjusted p is below ``fdr``, (K, genes)."""
        return np.nan_to_num(self.p_adjusted, nan=1.0) < fdr

    def take(self, rows: np.ndarray) -> "DETests":
        """Give the tests of some rows, in that order."""
        keys = tuple(self.keys[row] for row in rows)
        arrays = (self.z, self.p, self.p_adjusted, self.log2_fold_change, self.n, self.n_control)
        return DETests(keys, *(values[rows] for values in arrays))


def control_ranks(values: Any, codes: np.ndarray, keys: Sequence[Key], *, control: str) -> dict[Key, ControlRanks]:
    """Sort the control cells of every context once, for the tests of real and of any predicted cells.

    Parameters
    ----------
    values
        Log-normalised values of real cells, cells x genes.
    codes, keys
        Condition of each cell and labels of each condition, from :func:`condition_codes`.
    control
        Label of the control.

    Returns
    -------
    The controls of each context.

    Examples
    --------
    >>> controls = metrics.control_ranks(values, codes, keys, control="NTC")
    >>> sorted(controls)[0]
    ('CE0008162', 'Rest')
    """
    matrix = as_matrix(values)
    rows = {key[:-1]: np.flatnonzero(np.asarray(codes) == code) for code, key in enumerate(keys) if key[-1] == control}
    return {context: ControlRanks(matrix[cells]) for context, cells in rows.items() if len(cells)}


def de_tests(
    values: Any,
    codes: np.ndarray,
    keys: Sequence[Key],
    controls: Mapping[Key, ControlRanks],
    *,
    control: str,
    exclude: np.ndarray | None = None,
    min_control: float = 0.0,
    mean: Literal["arithmetic", "geometric"] = "arithmetic",
    pseudocount: float = 0.01,
    backend: Backend = "ranks",
) -> DETests:
    r"""Test every perturbed condition against the control of its context.

    Wilcoxon rank-sum test with tie and continuity correction, Benjamini-Hochberg within each condition. The fold change
    is :math:`\log_2 (\bar x_p + \epsilon) / (\bar x_c + \epsilon)` of values per 10,000 counts.

    Parameters
    ----------
    values
        Log-normalised values, cells x genes.
    codes, keys
        Condition of each cell and labels of each condition, from :func:`condition_codes`. Control cells are not tested,
        nor are conditions without cells.
    controls
        From :func:`control_ranks` of the real cells; make them once and use them for both sides.
    control
        Label of the control.
    exclude
        Genes to leave out before the adjustment, (K, genes) for the tested conditions in order of ``keys``.
    min_control
        Test genes whose mean in the control is at least this, per 10,000 counts. A filter that also looks at the
        perturbed cells would give the direction away.
    mean
        Mean of counts, or ``expm1`` of the mean logarithm (as scanpy and cell-eval have it).
    pseudocount
        :math:`\epsilon`, per 10,000 counts. With 0 fold changes of genes absent from one side would be infinite.
    backend
        ``"ranks"``: this package. ``"illico"`` (extra ``de``) and ``"scanpy"`` (no continuity correction) for
        comparison.

    Returns
    -------
    The tests, in the order of the perturbed ``keys``.

    Raises
    ------
    DataError
        If a context has no control, the pseudocount is not positive, or all cells of a condition are one profile.

    Examples
    --------
    >>> controls = metrics.control_ranks(values, codes, keys, control="NTC")
    >>> tests = metrics.de_tests(values, codes, keys, controls, control="NTC")
    >>> significant = tests.p_adjusted < 0.05
    """
    matrix, codes = as_matrix(values), np.asarray(codes)
    perturbed = np.array([key[-1] != control for key in keys] + [False])
    codes, own = present_conditions(np.where(perturbed[codes], codes, -1), keys)
    absent = sorted({key[:-1] for key in own} - set(controls))
    if absent:
        raise DataError(f"no real control cells ({control!r}) in context {absent}; add them or drop the context")
    if not pseudocount > 0:
        raise DataError(f"pseudocount must be above 0, got {pseudocount}")
    if exclude is not None and exclude.shape != (len(own), matrix.shape[1]):
        raise DataError(f"exclude is {exclude.shape}, expected {(len(own), matrix.shape[1])}: conditions x genes")
    refuse_tiled(matrix, codes, own)
    z, p = np.empty((2, len(own), matrix.shape[1]))
    baseline = np.empty_like(z)
    for context in dict.fromkeys(key[:-1] for key in own):
        group = np.array([key[:-1] == context for key in own])
        inside, _ = present_conditions(np.where(np.append(group, False)[codes], codes, -1), own)
        cells, reference = np.flatnonzero(inside >= 0), controls[context]
        z[group], p[group] = rank_test(matrix[cells], inside[cells], int(group.sum()), reference, backend)
        whole = np.zeros(reference.n_cells, dtype=np.int64)
        baseline[group] = _levels(reference.values, whole, 1, mean)
        skipped = _levels(reference.values, whole, 1, "arithmetic")[0] < min_control
        z[np.ix_(group, skipped)] = p[np.ix_(group, skipped)] = np.nan
    if exclude is not None:
        z[exclude] = p[exclude] = np.nan
    levels = _levels(matrix, codes, len(own), mean)
    n = np.bincount(codes[codes >= 0], minlength=len(own))
    change = np.log2((levels + pseudocount) / (baseline + pseudocount))
    n_control = np.array([controls[key[:-1]].n_cells for key in own])
    return DETests(own, z, p, benjamini_hochberg(p), change, n, n_control)


def _levels(values: Any, codes: np.ndarray, n_groups: int, mean: str) -> np.ndarray:
    """Mean of each group in counts per 10,000."""
    if mean == "geometric":
        return np.expm1(group_means(values, codes, n_groups)[0])
    natural = values.copy() if sp.issparse(values) else np.expm1(values)
    if sp.issparse(values):
        natural.data = np.expm1(natural.data)
    return group_means(natural, codes, n_groups)[0]


def de_recovery(real: np.ndarray, pred: np.ndarray) -> dict[str, float]:
    """Precision, recall and F1 of predicted against real significant genes.

    With R real genes, P predicted and B in both, F1 = 2 B / (R + P). Range 0 to 1, best 1; a random set of the same
    size has precision R / genes.

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

    Examples
    --------
    >>> metrics.de_recovery(np.array([True, True, False]), np.array([True, False, False]))["recall"]
    0.5
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
