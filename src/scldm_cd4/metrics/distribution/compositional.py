"""Kernels of non-negative profiles: Bray-Curtis, Ruzicka and Tanimoto."""

from typing import Any

import numpy as np
import scipy.sparse as sp

from scldm_cd4._errors import DataError
from scldm_cd4.metrics.cells.pseudobulk import dense

COMPOSITIONAL = ("braycurtis", "ruzicka", "tanimoto")
ROWS = 256


def compositional_kernel(a: Any, b: Any, kernel: str) -> np.ndarray:
    r"""Kernel between all cells of two populations of non-negative profiles.

    With :math:`S = \sum_g x_g + \sum_g y_g` and :math:`L = \sum_g |x_g - y_g|`, the sums of minima and maxima are
    :math:`(S - L)/2` and :math:`(S + L)/2`: Bray-Curtis :math:`(S-L)/S`, Ruzicka :math:`(S-L)/(S+L)`. Tanimoto
    :math:`\langle x,y\rangle / (\|x\|^2 + \|y\|^2 - \langle x,y\rangle)` is one product. No array of cells x cells x
    genes is needed. All three are positive definite on non-negative profiles, with values from 0 to 1, and 1 only
    for equal profiles.

    Parameters
    ----------
    a, b
        Dense or CSR, cells x genes, not negative.
    kernel
        ``"braycurtis"``, ``"ruzicka"`` or ``"tanimoto"``.

    Returns
    -------
    Kernel, cells of ``a`` x cells of ``b``.

    Raises
    ------
    DataError
        If the kernel is unknown, a value is negative or not finite, or a cell is empty.
    """
    if kernel not in COMPOSITIONAL:
        raise DataError(f"kernel={kernel!r} is not known; use one of {COMPOSITIONAL}")
    a, b = _profiles(a), _profiles(b)
    if kernel == "tanimoto":
        product = a @ b.T
        product = product.toarray() if sp.issparse(product) else product
        return product / (_squared_norms(a)[:, None] + _squared_norms(b) - product)
    total = _totals(a)[:, None] + _totals(b)
    distance = _manhattan(a, b)
    return (total - distance) / (total if kernel == "braycurtis" else total + distance)


def compositional_means(a: Any, b: Any, kernel: str) -> tuple[float, float, float]:
    """Mean kernel over pairs of different cells of ``a``, of ``b``, and over all pairs of both.

    Parameters and errors as in :func:`compositional_kernel`; both sides need two cells. Rows are taken in pieces.
    """
    within = []
    for side in (a, b):
        n = side.shape[0]
        total = 0.0
        for i in range(0, n, ROWS):
            # the rest of the columns mirrors rows already seen
            values = compositional_kernel(side[i : i + ROWS], side[i:], kernel)
            total += 2.0 * values.sum() - values[:, : len(values)].sum()
        within.append((total - n) / (n * (n - 1)))
    between = sum(compositional_kernel(a[i : i + ROWS], b, kernel).sum() for i in range(0, a.shape[0], ROWS))
    return within[0], within[1], float(between) / (a.shape[0] * b.shape[0])


def _manhattan(a: Any, b: Any) -> np.ndarray:
    """Give sums of absolute differences; sparse cells are made dense some rows at a time, which beats sparse loops."""
    from scipy.spatial.distance import cdist

    out = np.empty((a.shape[0], b.shape[0]))
    for i in range(0, a.shape[0], ROWS):
        rows = dense(a[i : i + ROWS])
        for j in range(0, b.shape[0], ROWS):
            out[i : i + ROWS, j : j + ROWS] = cdist(rows, dense(b[j : j + ROWS]), "cityblock")
    return out


def _profiles(values: Any) -> Any:
    """Take profiles as float64, and refuse those that the kernels are not defined for."""
    matrix: Any = sp.csr_matrix(values, dtype=np.float64) if sp.issparse(values) else np.asarray(values, np.float64)
    data = np.asarray(matrix.data if sp.issparse(matrix) else matrix)
    if data.size and not (np.isfinite(data).all() and data.min() >= 0):
        raise DataError(
            "compositional kernels need finite values that are not negative: counts or log-normalised counts, "
            "not principal components"
        )
    if (_totals(matrix) == 0).any():
        raise DataError("compositional kernels are undefined for cells without any count; remove these cells first")
    return matrix


def _totals(matrix: Any) -> np.ndarray:
    return np.asarray(matrix.sum(axis=1)).ravel()


def _squared_norms(matrix: Any) -> np.ndarray:
    squares = matrix.multiply(matrix) if sp.issparse(matrix) else np.square(matrix)
    return np.asarray(squares.sum(axis=1)).ravel()
