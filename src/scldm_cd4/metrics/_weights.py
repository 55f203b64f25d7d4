"""Which genes a real perturbation changes: Welch's t from pseudobulks, top genes, and weights."""

import numpy as np

from scldm_cd4.metrics._pseudobulk import Pseudobulks


def welch_scores(bulks: Pseudobulks, rows: np.ndarray, controls: np.ndarray) -> np.ndarray:
    """Absolute Welch t of conditions against their controls, (K, genes); 0 where nothing varies or differs.

    Parameters
    ----------
    bulks
        Pseudobulks of real cells.
    rows, controls
        Rows of the conditions and of their controls, (K,).
    """
    n, m = bulks.n[rows, None], bulks.n[controls, None]
    error = bulks.variances[rows] / n + bulks.variances[controls] / m
    return _t(bulks.means[rows] - bulks.means[controls], error)


def welch_scores_versus_rest(bulks: Pseudobulks, rows: np.ndarray, control: str) -> np.ndarray:
    """Absolute Welch t of conditions against all other perturbed cells of their context, (K, genes).

    It is what is specific to a perturbation (Mejia et al. 2025). A context with a single perturbation has no rest: 0.

    Parameters
    ----------
    bulks
        Pseudobulks of all real cells.
    rows
        Rows of the conditions, (K,).
    control
        Label of the control.
    """
    out = np.zeros((len(rows), bulks.means.shape[1]))
    contexts = [key[:-1] for key in bulks.keys]
    for context in {contexts[row] for row in rows}:
        group = np.array([i for i, key in enumerate(bulks.keys) if key[:-1] == context and key[-1] != control])
        own = np.array([i for i, row in enumerate(rows) if contexts[row] == context])
        n, means = bulks.n[group, None].astype(np.float64), bulks.means[group]
        centre = (n * means).sum(axis=0) / n.sum()  # differences from the centre do not cancel
        sums = n * (means - centre)
        squares = (n - 1) * bulks.variances[group] + n * np.square(means - centre)
        at = np.searchsorted(group, rows[own])
        rest = n.sum() - n[at]
        mean = (sums.sum(axis=0) - sums[at]) / np.maximum(rest, 1)
        spread = squares.sum(axis=0) - squares[at] - rest * np.square(mean)
        error = bulks.variances[rows[own]] / n[at] + np.maximum(spread, 0.0) / np.maximum((rest - 1) * rest, 1)
        out[own] = np.where(rest > 0, _t(means[at] - centre - mean, error), 0.0)
    return out


def _t(difference: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Absolute difference over the root of its variance; without any variance, 0 or as large as the row's largest."""
    size = np.abs(difference)
    t = np.divide(size, np.sqrt(error), out=np.zeros_like(size), where=error > 0)
    certain = (error <= 0) & (size > 0)
    return np.where(certain, t.max(axis=1, keepdims=True, initial=0.0), t)


def effect_weights(scores: np.ndarray, keep: np.ndarray | None = None, *, exponent: float = 2.0) -> np.ndarray:
    r"""Turn scores into weights of genes.

    :math:`w_g \propto ((|s_g| - \min|s|) / (\max|s| - \min|s|))^{e}`, :math:`\sum_g w_g = 1` (Mejia et al. 2025).

    Parameters
    ----------
    scores
        (K, genes), from real cells.
    keep
        Which genes count, (K, genes); the others get weight 0.
    exponent
        :math:`e`; 1, 2 and 4 are in use.

    Returns
    -------
    (K, genes); NaN in rows where all scores are equal.
    """
    size = np.abs(scores)
    low = (size if keep is None else np.where(keep, size, np.inf)).min(axis=1, keepdims=True)
    high = (size if keep is None else np.where(keep, size, -np.inf)).max(axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):
        weights = np.power(np.clip((size - low) / np.where(high > low, high - low, np.nan), 0.0, 1.0), exponent)
        if keep is not None:
            weights = np.where(keep, weights, 0.0 * weights)
        result: np.ndarray = weights / weights.sum(axis=1, keepdims=True)
    return result


def top_genes(scores: np.ndarray, k: int, keep: np.ndarray | None = None) -> np.ndarray:
    """Mark the k genes of largest score in each row, ties by position; fewer where fewer count.

    Parameters
    ----------
    scores
        (K, genes), not negative.
    k
        Number of genes.
    keep
        Which genes count, (K, genes).

    Returns
    -------
    Mask, (K, genes).
    """
    ranked = scores if keep is None else np.where(keep, scores, -np.inf)
    order = np.argsort(-ranked, axis=1, kind="stable")[:, :k]
    mask = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(mask, order, True, axis=1)
    return mask if keep is None else mask & keep
