"""Normalisation and group means, the common ground of all effect metrics."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp

from scldm_cd4._errors import DataError
from scldm_cd4.registry import suggestion

TARGET_SUM = 1e4
BULK_SUM = 5e4
"""Total of a condition's summed counts before the logarithm, as in cell-eval2."""
CHUNK = 20_000
"""Cells that are summed at a time; bounds the memory."""

Key = tuple[str, ...]
"""Labels of a condition: the columns of its context, then the perturbation."""


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
        If the input is not two-dimensional, or has no such layer.
    """
    if hasattr(data, "layers"):
        if layer is not None and layer not in data.layers:
            raise DataError(f"there is no layer {layer!r}.{suggestion(layer, data.layers.keys(), 'layers are')}")
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


def log_normalize(
    data: Any, *, layer: str | None = None, target_sum: float = TARGET_SUM, totals: np.ndarray | None = None
) -> sp.csr_matrix:
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
    totals
        What to divide each cell by instead, (cells,): size factors that also count genes outside the panel.

    Returns
    -------
    CSR float64, cells x genes. A cell without counts stays zero.

    Raises
    ------
    DataError
        If a count is negative or not finite, or there is not one positive total per cell.

    Examples
    --------
    >>> metrics.log_normalize(np.array([[5.0, 5.0]])).toarray().round(2).tolist()
    [[8.52, 8.52]]
    """
    matrix = sp.csr_matrix(as_matrix(data, layer), dtype=np.float64, copy=True)
    if matrix.nnz and not (np.isfinite(matrix.data).all() and matrix.data.min() >= 0):
        raise DataError("counts must be finite and not negative; give raw counts, not scaled or log values")
    if totals is None:
        totals = np.asarray(matrix.sum(axis=1)).ravel()
    else:
        totals = np.asarray(totals, dtype=np.float64)
        if totals.shape != (matrix.shape[0],) or not (np.isfinite(totals).all() and (totals > 0).all()):
            raise DataError(f"totals {totals.shape} must be one finite, positive number for each cell")
    stored = np.repeat(totals, np.diff(matrix.indptr))
    scaled = matrix.data * target_sum
    # one rounding only: equal shares of unequal totals become equal values, which rank tests count as ties
    matrix.data = np.log1p(np.divide(scaled, stored, out=np.zeros_like(scaled), where=stored > 0))
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

    Examples
    --------
    >>> means, n = metrics.group_means(np.array([[1.0], [3.0], [5.0]]), np.array([0, 0, 1]), 2)
    >>> means.ravel().tolist(), n.tolist()
    ([2.0, 5.0], [2, 1])
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


@dataclass(frozen=True)
class Pseudobulks:
    """Moments of every condition, all that the effect metrics need of the cells.

    Attributes
    ----------
    keys
        Labels of each condition, context first and perturbation last.
    means
        Means of the log-normalised values, (K, genes).
    variances
        Their variances over cells (n - 1 in the denominator; 0 for a single cell), (K, genes).
    n
        Cells, (K,).
    log_sum
        log(1 + 5e4 x share of the condition's summed counts), (K, genes); None where no counts were given.
    log_sum_noise
        Sampling variance of ``log_sum`` summed over genes, by the delete-one jackknife, (K,); None likewise.

    Examples
    --------
    >>> bulks.means.shape == (len(bulks.keys), real.n_vars)
    True
    """

    keys: tuple[Key, ...]
    means: np.ndarray
    variances: np.ndarray
    n: np.ndarray
    log_sum: np.ndarray | None = None
    log_sum_noise: np.ndarray | None = None

    def conditions(self, control: str) -> tuple[Key, ...]:
        """Keys of the perturbed conditions, in order."""
        return tuple(key for key in self.keys if key[-1] != control)

    def rows(self, keys: Sequence[Key]) -> np.ndarray:
        """Row of each key; -1 where it is absent."""
        position = {key: row for row, key in enumerate(self.keys)}
        return np.array([position.get(key, -1) for key in keys], dtype=np.int64)

    def noise(self) -> np.ndarray:
        """Sum the sampling variance of the means over genes, (K,): trace of the covariance over n."""
        total: np.ndarray = self.variances.sum(axis=1) / self.n
        return total


def condition_codes(labels: Any) -> tuple[np.ndarray, tuple[Key, ...]]:
    """Give every condition of the cells a code.

    Parameters
    ----------
    labels
        DataFrame, or sequence of columns: those of the context, then the perturbation. Labels become strings, so
        numbers and categories match their text.

    Returns
    -------
    Code of each cell and the key of each code, in sorted order.

    Raises
    ------
    DataError
        If a label is missing.

    Examples
    --------
    >>> codes, keys = metrics.condition_codes(real.obs[["donor_id", "timepoint", "perturbation"]])
    >>> keys[0]
    ('CE0008162', 'Rest', 'GATA3')
    """
    import pandas as pd

    columns = [labels[name] for name in labels.columns] if hasattr(labels, "columns") else list(labels)
    factors = []
    for column in columns:
        raw, found = pd.factorize(column if hasattr(column, "dtype") else np.asarray(column))
        if (raw < 0).any():
            raise DataError(f"{int((raw < 0).sum())} cells have no label in a condition column; drop them first")
        levels, merged = np.unique(np.asarray(found).astype(str), return_inverse=True)
        factors.append((levels, merged[raw]))
    sizes = tuple(len(levels) for levels, _ in factors)
    present, codes = np.unique(np.ravel_multi_index([own for _, own in factors], sizes), return_inverse=True)
    rows = zip(*np.unravel_index(present, sizes), strict=True)
    keys = tuple(tuple(str(levels[i]) for (levels, _), i in zip(factors, row, strict=True)) for row in rows)
    return codes, keys


def present_conditions(codes: np.ndarray, keys: Sequence[Key]) -> tuple[np.ndarray, tuple[Key, ...]]:
    """Leave out the conditions without cells: new codes and keys; cells with a negative code get -1."""
    present = np.unique(codes[codes >= 0])
    local = np.full(len(keys) + 1, -1)
    local[present] = np.arange(len(present))
    return local[np.where(codes >= 0, codes, len(keys))], tuple(keys[code] for code in present)


def pseudobulks(values: Any, codes: np.ndarray, keys: Sequence[Key], *, counts: Any = None) -> Pseudobulks:
    """Sum up cells by condition in one pass over chunks of cells.

    Parameters
    ----------
    values
        Log-normalised values, cells x genes; sparse stays sparse.
    codes, keys
        Condition of each cell and labels of each condition, from :func:`condition_codes`. Cells with a negative code
        are left out.
    counts
        Raw counts of the same cells, for the logarithm of summed counts. The mean of logarithms falls with the
        dispersion of the cells, the logarithm of sums does not.

    Returns
    -------
    Moments of every condition that has cells.

    Raises
    ------
    DataError
        If codes or counts do not match the cells.

    Examples
    --------
    >>> bulks = metrics.pseudobulks(values, codes, keys)
    >>> bulks.means.shape == (len(keys), real.n_vars)
    True
    """
    matrix, codes = as_matrix(values), np.asarray(codes)
    if codes.shape != (matrix.shape[0],):
        raise DataError(f"{codes.shape} condition codes for {matrix.shape[0]} cells; give one code per cell")
    codes, keys = present_conditions(codes, keys)
    n = np.bincount(codes[codes >= 0], minlength=len(keys))
    means, squares = np.zeros((len(keys), matrix.shape[1])), np.zeros((len(keys), matrix.shape[1]))
    for rows, present, indicator in _indicators(codes):
        chunk = matrix[rows]
        means[present] += dense(indicator @ chunk)
        squares[present] += dense(indicator @ _squared(chunk))
    means /= n[:, None]
    squares -= n[:, None] * np.square(means)
    np.maximum(squares, 0.0, out=squares)
    squares /= np.maximum(n - 1, 1)[:, None]
    bulk = (None, None) if counts is None else _log_sums(counts, codes, n, matrix.shape)
    return Pseudobulks(keys, means, squares, n, *bulk)


def _squared(values: Any) -> Any:
    return values.power(2) if sp.issparse(values) else np.square(values)


def _indicators(codes: np.ndarray) -> Iterator[tuple[slice, np.ndarray, sp.csr_matrix]]:
    """Give rows, conditions present in them, and the matrix that sums these rows by condition."""
    for start in range(0, len(codes), CHUNK):
        rows = slice(start, min(start + CHUNK, len(codes)))
        used = np.flatnonzero(codes[rows] >= 0)
        present, local = np.unique(codes[rows][used], return_inverse=True)
        shape = (len(present), rows.stop - rows.start)
        yield rows, present, sp.csr_matrix((np.ones(len(used)), (local, used)), shape=shape)


def _log_sums(counts: Any, codes: np.ndarray, n: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    r"""Logarithm of each condition's summed counts, and its delete-one jackknife variance summed over genes.

    :math:`(n-1)/n \sum_i \|b_{(i)} - \bar b_{(\cdot)}\|^2` with :math:`b_{(i)}` the logarithm without cell i.
    """
    matrix = as_matrix(counts)
    if matrix.shape != shape:
        raise DataError(f"counts {matrix.shape} and values {shape} must be of the same cells and genes")
    sums = np.zeros((len(n), shape[1]))
    for rows, present, indicator in _indicators(codes):
        sums[present] += dense(indicator @ matrix[rows].astype(np.float64))
    logs = np.log1p(_scaled(sums))
    noise, order = np.zeros(len(n)), np.argsort(codes, kind="stable")[-n.sum() :]
    for code, cells in enumerate(np.split(order, np.cumsum(n)[:-1])):
        first, second = np.zeros(shape[1]), np.zeros(shape[1])
        for start in range(0, len(cells), 256):
            left_out = sums[code] - dense(matrix[cells[start : start + 256]])
            shift = np.log1p(_scaled(left_out)) - logs[code]
            first += shift.sum(axis=0)
            second += np.square(shift).sum(axis=0)
        noise[code] = (n[code] - 1) / n[code] * (second - first**2 / n[code]).sum()
    return logs, noise


def _scaled(sums: np.ndarray) -> np.ndarray:
    totals = sums.sum(axis=1, keepdims=True)
    return np.divide(BULK_SUM * sums, totals, out=np.zeros_like(sums), where=totals > 0)


def target_mask(keys: Sequence[Key], genes: Sequence[str], target_genes: Mapping[str, str] | None = None) -> np.ndarray:
    """Mark each condition's own target gene.

    Parameters
    ----------
    keys
        Labels of the conditions, perturbation last.
    genes
        Gene names.
    target_genes
        Gene name of each perturbation label; a label that is not in it is taken as the gene name itself. A target
        that is not among the genes marks nothing.

    Returns
    -------
    True at the target, (K, genes).

    Examples
    --------
    >>> metrics.target_mask([("D1", "GATA3"), ("D1", "NTC")], ["TBX21", "GATA3"]).tolist()
    [[False, True], [False, False]]
    """
    position = {str(gene): i for i, gene in enumerate(genes)}
    named = target_genes or {}
    mask = np.zeros((len(keys), len(genes)), dtype=bool)
    for row, key in enumerate(keys):
        column = position.get(named.get(key[-1], key[-1]))
        if column is not None:
            mask[row, column] = True
    return mask
