"""Correlations between matching rows of two matrices, over the genes that count in each row."""

import numpy as np


def pearson_rows(x: np.ndarray, y: np.ndarray, keep: np.ndarray | None = None) -> np.ndarray:
    """Pearson correlation of matching rows.

    Parameters
    ----------
    x, y
        (K, genes).
    keep
        Which genes count, (K, genes); all by default.

    Returns
    -------
    (K,), -1 to 1. NaN where a row is constant, or fewer than two genes count.
    """
    a, b = centred_rows(x, keep), centred_rows(y, keep)
    norm = np.sqrt(_dot(a, a) * _dot(b, b))
    return np.clip(_ratio(_dot(a, b), norm), -1.0, 1.0)


def cosine_rows(x: np.ndarray, y: np.ndarray, keep: np.ndarray | None = None) -> np.ndarray:
    """Cosine of matching rows, (K,), -1 to 1; NaN where a row is zero."""
    a, b = (np.where(keep, side, 0.0) if keep is not None else side for side in (x, y))
    return np.clip(_ratio(_dot(a, b), np.sqrt(_dot(a, a) * _dot(b, b))), -1.0, 1.0)


def spearman_rows(x: np.ndarray, y: np.ndarray, keep: np.ndarray | None = None) -> np.ndarray:
    """Spearman correlation of matching rows (mid-ranks), (K,), -1 to 1; NaN where a row is constant."""
    return pearson_rows(_ranks(x, keep), _ranks(y, keep), keep)


def shift(values: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Subtract a reference; differences that are rounding only become zero, so that no change stays no change."""
    difference: np.ndarray = values - reference
    difference[np.abs(difference) <= 1e-11 * np.abs(values)] = 0.0
    return difference


def centred_rows(values: np.ndarray, keep: np.ndarray | None = None) -> np.ndarray:
    """Subtract each row's mean over the genes that count; the others, and what rounding leaves, become zero."""
    x = np.asarray(values, dtype=np.float64)
    if keep is None:
        size, kept = np.full((len(x), 1), x.shape[1]), x
    else:
        size, kept = keep.sum(axis=1, keepdims=True), np.where(keep, x, 0.0)
    centred = kept - kept.sum(axis=1, keepdims=True) / np.maximum(size, 1)
    if keep is not None:
        centred[~keep] = 0.0
    peak = np.abs(kept).max(axis=1, initial=0.0)
    centred[np.abs(centred).max(axis=1, initial=0.0) <= 1e-12 * peak] = 0.0
    return centred


def _ranks(values: np.ndarray, keep: np.ndarray | None) -> np.ndarray:
    """Mid-ranks of each row. Genes that do not count rank last, so that the ranks of the others stay 1, 2, ..."""
    x = values if keep is None else np.where(keep, values, np.inf)
    order = np.argsort(x, axis=1)  # scipy's rankdata sorts stably, which is five times slower
    ordered = np.take_along_axis(x, order, axis=1)
    places = np.arange(1, x.shape[1] + 1, dtype=np.float64)
    change = np.ones(x.shape, dtype=bool)
    change[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    if change.all():
        ranked = np.broadcast_to(places, x.shape)
    else:
        first = np.maximum.accumulate(np.where(change, places, 0.0), axis=1)
        is_last = np.roll(change, -1, axis=1)
        is_last[:, -1:] = True
        last = np.minimum.accumulate(np.where(is_last, places, np.inf)[:, ::-1], axis=1)[:, ::-1]
        ranked = (first + last) / 2
    ranks = np.empty(x.shape)
    np.put_along_axis(ranks, order, ranked, axis=1)
    return ranks


def _dot(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    product: np.ndarray = np.einsum("kg,kg->k", x, y)
    return product


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.full_like(below, np.nan), where=below > 0)
