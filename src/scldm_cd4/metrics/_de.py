"""Differential expression by the Wilcoxon rank-sum test, and its recovery."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from scldm_cd4._errors import DataError
from scldm_cd4.metrics._pseudobulk import as_matrix, dense
from scldm_cd4.metrics._ranks import ControlRanks, benjamini_hochberg, combine_tests


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
