"""Which genes a real perturbation changes: Welch's t from pseudobulks, top genes, and weights."""

import numpy as np

from scldm_cd4.metrics.cells.pseudobulk import Key, Pseudobulks


def welch_scores(bulks: Pseudobulks, rows: np.ndarray, controls: np.ndarray) -> np.ndarray:
    """Absolute Welch t of conditions against their controls, (K, genes); 0 where nothing varies or differs.

    Parameters
    ----------
    bulks
        Pseudobulks of real cells.
    rows, controls
        Rows of the conditions and of their controls, (K,).

    Returns
    -------
    (K, genes), at least 0.

    Examples
    --------
    >>> perturbed, control = keys.index(("CE0008162", "Rest", "IFNGR1")), keys.index(("CE0008162", "Rest", "NTC"))
    >>> metrics.welch_scores(bulks, np.array([perturbed]), np.array([control])).shape
    (1, 60)
    """
    n, m = bulks.n[rows, None], bulks.n[controls, None]
    error = bulks.variances[rows] / n + bulks.variances[controls] / m
    return _t(bulks.means[rows] - bulks.means[controls], error)


class RestScores:
    """Absolute Welch t of conditions against all other perturbed cells of their context.

    It is what is specific to a perturbation (Mejia et al. 2025). The sums over a context are made once.

    Parameters
    ----------
    bulks
        Pseudobulks of all real cells.
    control
        Label of the control.
    """

    def __init__(self, bulks: Pseudobulks, control: str) -> None:
        self._bulks = bulks
        groups: dict[Key, list[int]] = {}
        for row, key in enumerate(bulks.keys):
            if key[-1] != control:
                groups.setdefault(key[:-1], []).append(row)
        self._code = {context: code for code, context in enumerate(groups)}
        shape = (len(groups), bulks.means.shape[1])
        self._n, self._centre, self._squares = np.zeros((len(groups), 1)), np.zeros(shape), np.zeros(shape)
        for code, rows in enumerate(groups.values()):
            n = bulks.n[rows].astype(np.float64)
            self._n[code] = n.sum()
            self._centre[code] = n @ bulks.means[rows] / n.sum()
            shifts = bulks.means[rows] - self._centre[code]  # differences from the centre do not cancel
            self._squares[code] = (n - 1) @ bulks.variances[rows] + n @ np.square(shifts, out=shifts)

    def scores(self, rows: np.ndarray) -> np.ndarray:
        """Scores of perturbed conditions.

        Parameters
        ----------
        rows
            Rows of the pseudobulks, (K,).

        Returns
        -------
        (K, genes). A context with a single perturbation has no rest: 0.
        """
        at = np.array([self._code[self._bulks.keys[row][:-1]] for row in rows], dtype=np.int64)
        n, variances = self._bulks.n[rows, None].astype(np.float64), self._bulks.variances[rows]
        shift, rest = self._bulks.means[rows] - self._centre[at], self._n[at] - n
        mean = -n * shift / np.maximum(rest, 1)
        spread = self._squares[at] - (n - 1) * variances - n * np.square(shift) - rest * np.square(mean)
        error = variances / n + np.maximum(spread, 0.0) / np.maximum((rest - 1) * rest, 1)
        return np.where(rest > 0, _t(shift - mean, error), 0.0)


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

    Examples
    --------
    >>> metrics.effect_weights(np.array([[0.0, 1.0, 1.0]])).tolist()
    [[0.0, 0.5, 0.5]]
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


def top_genes(scores: np.ndarray, k: int, keep: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Find the k genes of largest score in each row.

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
    Positions in the order of falling score, (K, k) or (K, genes) if there are fewer, and which of them count.

    Examples
    --------
    >>> positions, counted = metrics.top_genes(np.array([[0.5, 3.0, 1.0]]), 2)
    >>> positions.tolist()
    [[1, 2]]
    """
    ranked = -scores if keep is None else np.where(keep, -scores, np.inf)
    k = min(k, ranked.shape[1])
    first = np.argpartition(ranked, k - 1, axis=1)[:, :k]
    values = np.take_along_axis(ranked, first, axis=1)
    order = np.lexsort((first, values), axis=1)
    return np.take_along_axis(first, order, axis=1), np.take_along_axis(values, order, axis=1) < np.inf
