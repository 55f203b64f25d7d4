"""Agreement of gene-wise means and variances."""

from typing import Any

import numpy as np
import scipy.sparse as sp

from scldm_cd4._errors import DataError
from scldm_cd4.metrics.cells.genes import aligned


def r2(real: np.ndarray, pred: np.ndarray) -> np.ndarray:
    r"""Coefficient of determination along the last axis.

    :math:`1 - \sum_g (r_g - p_g)^2 / \sum_g (r_g - \bar r)^2`. Best 1, 0 for predicting the mean of ``real``, no
    lower bound; not symmetric. Of raw mean profiles it is about 0.95 for unperturbed cells already, so use deltas to
    see effects.

    Parameters
    ----------
    real, pred
        (..., genes).

    Returns
    -------
    (...,); NaN where ``real`` is constant or a value is NaN.

    Raises
    ------
    DataError
        If the shapes differ.

    Examples
    --------
    >>> float(metrics.r2(np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 3.0])))
    1.0
    """
    x, y = np.asarray(real, dtype=np.float64), np.asarray(pred, dtype=np.float64)
    if x.shape != y.shape:
        raise DataError(f"real values {x.shape} and predicted values {y.shape} must have the same shape")
    if not x.shape[-1]:
        return np.full(x.shape[:-1], np.nan)
    residual = np.square(x - y).sum(axis=-1)
    centred = x - x.mean(axis=-1, keepdims=True)
    total = np.square(centred).sum(axis=-1)
    # what is left of a constant vector is rounding
    total = np.where(np.abs(centred).max(axis=-1) > 1e-12 * np.abs(x).max(axis=-1), total, np.nan)
    return 1.0 - residual / total


def r2_mean(real: Any, pred: Any) -> float:
    """R2 of the gene-wise means of log-normalised values over genes; see :func:`r2`.

    Parameters
    ----------
    real, pred
        Cells x genes; AnnData are matched by gene name.

    Returns
    -------
    R2, best 1; NaN without cells.

    Raises
    ------
    DataError
        If the genes differ.

    Examples
    --------
    >>> metrics.r2_mean(np.array([[1.0, 2.0, 3.0]]), np.array([[1.0, 2.0, 3.0]]))
    1.0
    """
    a, b = aligned(real, pred)
    if min(a.shape[0], b.shape[0]) < 1:
        return float("nan")
    return float(r2(moments(a)[0], moments(b)[0]))


def r2_variance(real: Any, pred: Any) -> float:
    """R2 of the gene-wise variances (divisor n - 1) of log-normalised values over genes; see :func:`r2`.

    Parameters, return and errors as in :func:`r2_mean`; NaN with fewer than two cells on a side.

    Parameters
    ----------
    real, pred
        As for `scldm_cd4.metrics.r2_mean`.

    Returns
    -------
    R2, best 1; NaN with fewer than two cells.

    Examples
    --------
    >>> metrics.r2_variance(x, x)
    1.0
    """
    a, b = aligned(real, pred)
    if min(a.shape[0], b.shape[0]) < 2:
        return float("nan")
    return float(r2(moments(a)[1], moments(b)[1]))


def moments(values: Any) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance (divisor n - 1) of every gene, sparse input staying sparse.

    Parameters
    ----------
    values
        Dense or CSR, cells x genes, with at least one cell.

    Returns
    -------
    Means and variances, both (genes,); the variance of one cell is NaN.
    """
    n = values.shape[0]
    mean = np.asarray(values.mean(axis=0, dtype=np.float64)).ravel()
    if n < 2:
        return mean, np.full(mean.size, np.nan)
    if not sp.issparse(values):
        return mean, np.asarray(values, dtype=np.float64).var(axis=0, ddof=1)
    matrix = sp.csc_matrix(values, dtype=np.float64)
    gene = np.repeat(np.arange(mean.size), np.diff(matrix.indptr))
    squares = np.bincount(gene, weights=np.square(matrix.data - mean[gene]), minlength=mean.size)
    zeros = n - np.diff(matrix.indptr)
    return mean, (squares + zeros * np.square(mean)) / (n - 1)
