"""Can the predicted effects be told apart: rank of the right real effect among those of the same context."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from scldm_cd4._errors import DataError

Distance = Literal["cosine", "l1", "l2"]


def discrimination(
    real: np.ndarray,
    pred: np.ndarray,
    contexts: Sequence[Any] | np.ndarray | None = None,
    *,
    metric: Distance = "cosine",
    exclude: np.ndarray | None = None,
    scope: Literal["panel", "own"] = "panel",
    direction: Literal["real", "pred"] = "real",
    denominator: Literal["n-1", "n"] = "n-1",
) -> np.ndarray:
    r"""Perturbation discrimination score.

    The distances of a predicted effect to all real effects of its context are ranked. With :math:`k` real effects
    nearer than the right one, equal distances counted as half, the score is :math:`1 - k/(n-1)`. Range 0 to 1, best 1,
    chance 0.5: a prediction without effect and one that is the same for all perturbations score 0.5 on average. Ranks
    are within context, since between donors the donor alone would solve the task. The cosine is the default; the L1
    score can be raised by scaling. Source: cell-eval2 ``pds_cosine``; cell-eval ``discrimination_score``
    (``scope="own"``, ``denominator="n"``); with ``direction="pred"`` as in perturbench, there 1 - score.

    Parameters
    ----------
    real, pred
        Effects of the same conditions in the same order, (K, genes).
    contexts
        Context of each condition, (K,) labels or tuples; one context by default.
    metric
        Distance between effects. The cosine distance to an effect of length zero is 1.
    exclude
        Target genes, True to leave out, (K, genes); see :func:`target_mask`.
    scope
        ``"panel"`` leaves the targets of all conditions out of all distances; ``"own"`` only each condition's own.
    direction
        ``"real"``: rank real effects for each prediction. ``"pred"``: rank predictions for each real effect.
    denominator
        What the number of nearer effects is divided by.

    Returns
    -------
    (K,). NaN for a condition alone in its context (with ``"n-1"``), and where the prediction is NaN.

    Raises
    ------
    DataError
        If shapes differ, an option is unknown, or leaving out the targets leaves no gene.

    Examples
    --------
    >>> effects = np.eye(3)
    >>> metrics.discrimination(effects, effects).tolist()
    [1.0, 1.0, 1.0]
    """
    x, y = np.asarray(real, dtype=np.float64), np.asarray(pred, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 2 or (exclude is not None and exclude.shape != x.shape):
        raise DataError(f"real {x.shape} and predicted effects {y.shape} (and `exclude`) must have the same shape")
    for value, known in ((metric, ("cosine", "l1", "l2")), (scope, ("panel", "own")), (direction, ("real", "pred"))):
        if value not in known:
            raise DataError(f"{value!r} is not known; use one of {known}")
    keep = None if exclude is None or not np.any(exclude) else ~np.asarray(exclude, dtype=bool)
    if keep is not None and scope == "panel":
        columns = keep.all(axis=0)
        if not columns.any():
            raise DataError("every gene is the target of some condition; use scope='own'")
        x, y, keep = x[:, columns], y[:, columns], None
    out = np.full(len(x), np.nan)
    labels = np.zeros(len(x), dtype=np.int64) if contexts is None else _codes(contexts, len(x))
    predicted = ~np.isnan(y).any(axis=1)
    for label in np.unique(labels):
        rows = np.flatnonzero((labels == label) & (predicted if direction == "pred" else True))
        sides = (y[rows], x[rows]) if direction == "real" else (x[rows], y[rows])
        out[rows] = _scores(effect_distances(*sides, metric, None if keep is None else keep[rows]), denominator)
    out[~predicted] = np.nan
    return out


def _codes(contexts: Sequence[Any] | np.ndarray, n: int) -> np.ndarray:
    values = list(contexts.tolist() if isinstance(contexts, np.ndarray) else contexts)
    if len(values) != n:
        raise DataError(f"{len(values)} contexts for {n} conditions")
    values = [tuple(value) if isinstance(value, list) else value for value in values]
    position = {value: code for code, value in enumerate(dict.fromkeys(values))}
    return np.array([position[value] for value in values], dtype=np.int64)


def _scores(distances: np.ndarray, denominator: str) -> np.ndarray:
    """Score each row by the mid-rank of its diagonal element."""
    n = len(distances)
    if denominator == "n-1" and n < 2:
        return np.full(n, np.nan)
    own = np.diagonal(distances)[:, None]
    close = 1e-12 * np.abs(distances).max(axis=1, initial=0.0, keepdims=True)  # equal but for rounding
    nearer = (distances < own - close).sum(axis=1)
    tied = (np.abs(distances - own) <= close).sum(axis=1) - 1
    scores: np.ndarray = 1.0 - (nearer + tied / 2) / (n - 1 if denominator == "n-1" else n)
    return scores


def effect_distances(
    queries: np.ndarray, candidates: np.ndarray, metric: Distance, keep: np.ndarray | None = None
) -> np.ndarray:
    """Distances of all queries to all candidates, by matrix products where the distance allows.

    Parameters
    ----------
    queries, candidates
        Effects, (K, genes) and (L, genes).
    metric
        ``"cosine"`` (0 to 2, and 1 for an effect of length zero), ``"l1"`` or ``"l2"``.
    keep
        Genes that count for each query, (K, genes).

    Returns
    -------
    (K, L).

    Examples
    --------
    >>> metrics.effect_distances(np.eye(2), np.eye(2), "l1").tolist()
    [[0.0, 2.0], [2.0, 0.0]]
    """
    if metric == "l1":
        return _l1(queries, candidates, keep)
    kept = queries if keep is None else np.where(keep, queries, 0.0)
    product = kept @ candidates.T
    lengths = np.square(kept).sum(axis=1)[:, None]
    squares = np.square(candidates)
    others = squares.sum(axis=1)[None, :]
    if keep is not None:
        # only the few genes that are left out need a product of their own
        columns = ~keep.all(axis=0)
        others = others - (~keep[:, columns]).astype(np.float64) @ squares[:, columns].T
    if metric == "l2":
        return np.sqrt(np.maximum(lengths + others - 2.0 * product, 0.0))
    norm = np.sqrt(lengths * np.maximum(others, 0.0))
    return np.clip(1.0 - np.divide(product, norm, out=np.zeros_like(product), where=norm > 0), 0.0, 2.0)


def _l1(queries: np.ndarray, candidates: np.ndarray, keep: np.ndarray | None) -> np.ndarray:
    from scipy.spatial.distance import cdist

    distances: np.ndarray = cdist(queries, candidates, metric="cityblock")
    if keep is not None:
        for row, gene in zip(*np.nonzero(~keep), strict=True):
            distances[row] -= np.abs(queries[row, gene] - candidates[:, gene])
    return np.maximum(distances, 0.0)
