"""Normalisation and group means, the common ground of all effect metrics."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp

from scldm_cd4._errors import DataError

TARGET_SUM = 1e4


def as_matrix(data: Any, layer: str | None = None) -> np.ndarray | sp.csr_matrix:
    """Take the matrix out of an AnnData, or pass an array on.

    Parameters
    ----------
    data
        AnnData, dense array or sparse matrix, cells x genes.
    layer
        Layer of the AnnData to use instead of ``X``.

    Returns
    -------
    Dense array, or CSR where the input is sparse.

    Raises
    ------
    DataError
        If the input is not two-dimensional, or ``layer`` is given for an array.
    """
    if hasattr(data, "layers"):
        data = data.X if layer is None else data.layers[layer]
    elif layer is not None:
        raise DataError(f"layer={layer!r} needs an AnnData, but an array was given; pass the layer's matrix itself")
    matrix = sp.csr_matrix(data) if sp.issparse(data) else np.asarray(data)
    if matrix.ndim != 2:
        raise DataError(f"expected a matrix of cells x genes, got {matrix.ndim} dimension(s)")
    return matrix


def dense(matrix: Any) -> np.ndarray:
    """Give a float64 array of any matrix."""
    return np.asarray(matrix.toarray() if sp.issparse(matrix) else matrix, dtype=np.float64)


def log_normalize(data: Any, *, layer: str | None = None, target_sum: float = TARGET_SUM) -> sp.csr_matrix:
    r"""Log-normalise counts by the cells' own totals over the given genes.

    :math:`\log(1 + s\,x_{cg} / \sum_g x_{cg})` with :math:`s` = ``target_sum``. Real and generated cells follow the
    same rule: each is divided by its own total on the panel, never by the total of another cell.

    Parameters
    ----------
    data
        AnnData or matrix of counts, cells x genes.
    layer
        Layer of the AnnData that holds the counts.
    target_sum
        Total of every cell after scaling.

    Returns
    -------
    CSR float64, cells x genes. A cell without counts stays zero.

    Raises
    ------
    DataError
        If a count is negative or not finite.
    """
    matrix = sp.csr_matrix(as_matrix(data, layer), dtype=np.float64, copy=True)
    if matrix.nnz and not (np.isfinite(matrix.data).all() and matrix.data.min() >= 0):
        raise DataError("counts must be finite and not negative; give raw counts, not scaled or log values")
    totals = np.asarray(matrix.sum(axis=1)).ravel()
    factor = np.divide(target_sum, totals, out=np.zeros_like(totals), where=totals > 0)
    matrix.data = np.log1p(matrix.data * np.repeat(factor, np.diff(matrix.indptr)))
    return matrix


def group_means(values: Any, codes: np.ndarray, n_groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Average cells by group in one pass, without densifying sparse input.

    Parameters
    ----------
    values
        Matrix, cells x genes.
    codes
        Integer group of each cell; negative means in no group.
    n_groups
        Number of groups.

    Returns
    -------
    Means (groups x genes, NaN for a group without cells) and cells per group.

    Raises
    ------
    DataError
        If there is not one code per cell.
    """
    codes = np.asarray(codes)
    if codes.shape != (values.shape[0],):
        raise DataError(f"{codes.shape} group codes for {values.shape[0]} cells; give one code per cell")
    rows = np.flatnonzero(codes >= 0)
    shape = (n_groups, values.shape[0])
    indicator = sp.csr_matrix((np.ones(len(rows)), (codes[rows], rows)), shape=shape)
    sizes = np.bincount(codes[rows], minlength=n_groups)
    sums = dense(indicator @ values)
    means = np.full_like(sums, np.nan)
    np.divide(sums, sizes[:, None], out=means, where=sizes[:, None] > 0)
    return means, sizes


def excluded_mask(n_genes: int, exclude: Sequence[int] | np.ndarray | None) -> np.ndarray:
    """Give a mask of the genes that stay when the given positions are left out."""
    keep = np.ones(n_genes, dtype=bool)
    if exclude is not None:
        keep[np.asarray(exclude, dtype=np.int64)] = False
    return keep
