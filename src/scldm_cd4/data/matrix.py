"""Count matrices by rows, wherever they are stored; their exact check; and the arrays that the networks take."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from scldm_cd4._errors import DataError
from scldm_cd4.data.rows import RowSource, row_source
from scldm_cd4.registry import suggestion

CHUNK = 1 << 24
"""Entries (cells x genes) that are looked at at a time."""
TOLERANCE = 1e-6
"""How far a count may be from a whole number."""
MAX_TOTAL = 1e6
"""The most counts of one cell."""


class RowReader:
    """Rows of ``X`` or of a layer as sparse blocks: dense, CSR, CSC, in memory, a view or in files.

    Blocks are CSR with the columns of the AnnData, sorted, without explicit zeros, duplicates summed; float32 where it
    is stored so, else float64. Of matrices in files only the rows asked for are read (all of a CSC matrix). Cells are
    those of the AnnData, or `rows` of it.
    """

    def __init__(self, adata: Any, layer: str | None = None, rows: np.ndarray | None = None) -> None:
        self.where = "X" if layer is None else f"layers[{layer!r}]"
        self.shape: tuple[int, int] = (adata.n_obs if rows is None else len(rows), adata.n_vars)
        if layer is not None and layer not in adata.layers:
            raise DataError(f"there is no layer {layer!r}.{suggestion(layer, adata.layers.keys(), 'layers are')}")
        self._rows = rows
        self._columns: np.ndarray | None = None
        if adata.is_view:  # its X would be copied as a whole, from the file if backed: read rows of the parent
            parent = adata._adata_ref
            own, self._columns = np.arange(parent.n_obs)[adata._oidx], np.arange(parent.n_vars)[adata._vidx]
            self._rows = own if rows is None else own[rows]
            adata = parent
        self._width: int = adata.n_vars
        self.source: RowSource = row_source(adata.X if layer is None else adata.layers[layer], self.where)

    def read(self, rows: slice | np.ndarray) -> Any:
        """Return a block of rows, given as a slice or in any order, also repeated."""
        if self._rows is not None:
            rows = self._rows[rows]
        if isinstance(rows, slice):
            return self._block(rows)
        if (np.diff(rows) > 0).all():
            return self._block(rows)
        unique, inverse = np.unique(rows, return_inverse=True)
        return self._block(unique)[inverse]

    def chunks(self, size: int | None = None) -> Iterator[tuple[slice, Any]]:
        """Yield all rows in order, as slices and blocks of `size` cells (None: as many as fit `CHUNK`)."""
        size = size or max(1, CHUNK // max(self._width, 1))
        for start in range(0, self.shape[0], size):
            part = slice(start, min(start + size, self.shape[0]))
            yield part, self.read(part)

    def _block(self, rows: slice | np.ndarray) -> Any:
        from scipy import sparse

        block = self.source.read(rows)
        if not sparse.issparse(block):
            block = np.asarray(block)
            _check_dtype(block, self.where)
            return sparse.csr_matrix(block if self._columns is None else block[:, self._columns], dtype=np.float64)
        _check_dtype(block.data, self.where)
        if block.nnz and not 0 <= block.indices.min() <= block.indices.max() < self._width:
            raise DataError(f"{self.where} has column indices outside 0..{self._width - 1}: the matrix is damaged")
        if self._columns is not None:
            block = block[:, self._columns]
        data = block.data if block.dtype == np.float32 else block.data.astype(np.float64)
        parts = (data, block.indices.astype(np.int32, copy=False), block.indptr)
        out = sparse.csr_matrix(parts, shape=(block.shape[0], self.shape[1]), copy=np.shares_memory(data, block.data))
        out.sum_duplicates()  # sorts the indices too
        if not out.data.all():
            out.eliminate_zeros()
        return out


def _check_dtype(values: np.ndarray, where: str) -> None:
    if values.dtype.kind not in "biuf":
        raise DataError(f"{where} has dtype {values.dtype}; counts must be numbers")


def is_bad(values: np.ndarray) -> np.ndarray:
    """Return which values are no counts: not finite, negative, or not whole within `TOLERANCE`."""
    with np.errstate(invalid="ignore"):
        return ~(np.isfinite(values) & (values >= 0) & (np.abs(values - np.rint(values)) <= TOLERANCE))


def check_block(block: Any, start: int, where: str, obs_names: Any, genes: Any, hint: str = "") -> np.ndarray:
    """Check that a block holds raw counts and return the totals of its cells.

    Parameters
    ----------
    block
        CSR, shape (cells, genes).
    start
        The number of its first cell.
    where
        The name of the matrix, in messages.
    obs_names
        Names of all cells, or a function that reads them.
    genes
        Names of the columns.
    hint
        Added to the message about a value that is no count.

    Returns
    -------
    Totals per cell, float64, shape (cells,).

    Raises
    ------
    DataError
        A value is NaN, infinite, negative or not whole, or a cell has more than a million counts; with its position.
    """
    bad = np.flatnonzero(is_bad(block.data))
    if len(bad):
        at = bad[0]
        row = int(np.searchsorted(block.indptr, at, side="right")) - 1
        gene = genes[block.indices[at]]
        raise DataError(
            f"{where} must hold raw counts (finite, >= 0, whole), but has {block.data[at]:g} at cell "
            f"{_name(obs_names, start + row)!r} (row {start + row}), gene {gene!r}.{hint}"
        )
    totals = np.asarray(block.sum(axis=1, dtype=np.float64)).ravel()
    if len(totals) and totals.max() > MAX_TOTAL:
        row = int(totals.argmax())
        raise DataError(
            f"cell {_name(obs_names, start + row)!r} (row {start + row}) has {totals[row]:.0f} counts in {where}; more "
            f"than {MAX_TOTAL:.0f} per cell are no single-cell counts. Give raw UMI counts, or drop such cells"
        )
    return totals


def _name(obs_names: Any, row: int) -> Any:
    return (obs_names() if callable(obs_names) else obs_names)[row]


def counts_hint(adata: Any, layer: str | None) -> str:
    """Return a sentence on where raw counts may be found, or an empty string."""
    found = [
        "X (layer=None)" if name is None else f"layers[{name!r}] (layer={name!r})"
        for name in [None, *adata.layers]
        if name != layer and _looks_like_counts(adata, name)
    ]
    if found:
        return f" Raw counts seem to be in {' and '.join(found)}."
    if adata.raw is not None:
        return (
            " Raw counts may be in adata.raw: set adata.layers['counts'] = adata.raw[:, adata.var_names].X and name "
            "this layer with layer='counts'."
        )
    return " The values look normalised; give the matrix as it was before normalisation and log."


def _looks_like_counts(adata: Any, layer: str | None) -> bool:
    try:
        block = RowReader(adata, layer).read(slice(0, min(256, adata.n_obs)))
    except DataError:
        return False
    return block.nnz > 0 and not is_bad(block.data).any()


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
