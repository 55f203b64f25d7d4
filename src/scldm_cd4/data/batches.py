"""Sparse counts as the arrays that the networks take."""

from typing import Any

import numpy as np


def expressed_batch(counts: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the expressed genes of cells and their counts, padded on the right.

    Parameters
    ----------
    counts
        Sparse matrix, shape (B, n_genes).

    Returns
    -------
    Genes, int64, shape (B, W): 1 + column, 0 for padding. Counts, float32, shape (B, W), 0 for padding. W is the
    largest number of expressed genes of a cell, at least 1.
    """
    from scipy import sparse

    csr = sparse.csr_matrix(counts)
    if csr.nnz and not csr.data.all():
        csr = csr.copy()
        csr.eliminate_zeros()
    width = np.diff(csr.indptr)
    n_cells = csr.shape[0]
    row = np.repeat(np.arange(n_cells), width)
    place = np.arange(csr.nnz) - np.repeat(csr.indptr[:-1], width)
    shape = (n_cells, max(1, int(width.max(initial=0))))
    genes, values = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.float32)
    genes[row, place] = csr.indices + 1
    values[row, place] = csr.data
    return genes, values
