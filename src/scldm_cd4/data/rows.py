"""Where counts come from: matrices in memory, in h5ad or zarr files, or in several of them one after the other."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from scldm_cd4._errors import DataError

Rows = slice | np.ndarray
"""Row numbers: a slice with step 1, or ascending numbers without repeats."""
GAP = 16
"""So many unwanted rows between wanted ones are read over: one long read is quicker than two short ones."""
BLOCK = 64
"""Rows that are read together from a file without compression."""
MAX_BLOCK = 1024
"""The most rows to read together, however many a compressed chunk has: larger blocks shuffle worse."""


class RowSource(Protocol):
    """Rows of a matrix.

    Attributes
    ----------
    shape
        Rows and columns.
    block
        Neighbouring rows that should be read together; 1 where rows can be read in any order at no cost (in memory).
    slow
        Why reading few rows at a time is slow, with what to do about it; empty where it is not.
    """

    shape: tuple[int, int]
    block: int
    slow: str

    def read(self, rows: Rows) -> Any:
        """Return rows as CSR or dense, of the stored dtype."""


class MemoryRows:
    """Rows of a numpy array or of a scipy CSR matrix."""

    block, slow = 1, ""

    def __init__(self, matrix: Any) -> None:
        self.matrix = matrix
        self.shape: tuple[int, int] = matrix.shape

    def read(self, rows: Rows) -> Any:
        """Return rows."""
        return self.matrix[rows]


class DenseRows:
    """Rows of a dense matrix in a file, an `h5py.Dataset` or a `zarr.Array`."""

    def __init__(self, array: Any) -> None:
        self._array = Reopened(array)
        self.shape: tuple[int, int] = tuple(array.shape)
        chunk = array.chunks[0] if array.chunks else 1
        self.block, self.slow = _block(array, chunk), _slow(array, chunk)

    def read(self, rows: Rows) -> np.ndarray:
        """Return rows."""
        array = self._array.get()
        if isinstance(rows, slice):
            return np.asarray(array[rows])
        out = np.empty((len(rows), self.shape[1]), dtype=array.dtype)
        for first, last in _runs(rows):
            start = rows[first]
            out[first:last] = np.asarray(array[start : rows[last - 1] + 1])[rows[first:last] - start]
        return out


class SparseRows:
    """Rows of a CSR matrix in a file, an `h5py.Group` or a `zarr.Group` as anndata writes it.

    The starts of the rows are kept in memory, 8 bytes a row. Unlike anndata's own `CSRDataset`, neighbouring rows are
    read over small gaps, and the file is opened again in another process.
    """

    def __init__(self, group: Any) -> None:
        self._group = Reopened(group)
        shape = group.attrs.get("shape", group.attrs.get("h5sparse_shape"))
        self.shape: tuple[int, int] = (int(shape[0]), int(shape[1]))
        self._starts = np.asarray(group["indptr"][:], dtype=np.int64)  # (rows + 1,)
        data = group["data"]
        chunk = data.chunks[0] if data.chunks else 1
        per_row = max(1.0, self._starts[-1] / max(1, self.shape[0]))
        self.block, self.slow = _block(data, chunk / per_row), _slow(data, chunk / per_row)

    def read(self, rows: Rows) -> Any:
        """Return rows."""
        from scipy import sparse

        group = self._group.get()
        parts = {name: group[name] for name in ("data", "indices")}
        if isinstance(rows, slice):
            starts = self._starts[rows.start or 0 : (self.shape[0] if rows.stop is None else rows.stop) + 1]
            span = slice(int(starts[0]), int(starts[-1])) if len(starts) else slice(0, 0)
            data, indices = (np.asarray(part[span]) for part in parts.values())
            return sparse.csr_matrix((data, indices, starts - span.start), shape=(len(starts) - 1, self.shape[1]))
        runs = _runs(rows)
        cover = np.concatenate([np.arange(rows[first], rows[last - 1] + 1) for first, last in runs] or [rows])
        indptr = np.concatenate([[0], np.cumsum(self._starts[cover + 1] - self._starts[cover])])
        out = {name: np.empty(indptr[-1], dtype=part.dtype) for name, part in parts.items()}
        at = 0
        for first, last in runs:
            low, high = int(self._starts[rows[first]]), int(self._starts[rows[last - 1] + 1])
            for name, part in parts.items():
                out[name][at : at + high - low] = part[low:high]
            at += high - low
        block = sparse.csr_matrix((out["data"], out["indices"], indptr), shape=(len(cover), self.shape[1]))
        return block if len(cover) == len(rows) else block[np.searchsorted(cover, rows)]


class JoinedRows:
    """Rows of several sources, one after the other.

    Parameters
    ----------
    sources
        The sources.
    columns
        For each source, the column of the result of each of its columns, -1 for one that is left out; None where they
        are the same.
    n_columns
        Columns of the result.
    """

    def __init__(self, sources: Sequence[RowSource], columns: Sequence[np.ndarray | None], n_columns: int) -> None:
        self._sources, self._columns = list(sources), list(columns)
        self._ends = np.cumsum([source.shape[0] for source in sources])
        self.shape: tuple[int, int] = (int(self._ends[-1]), n_columns)
        self.block = max(source.block for source in sources)
        self.slow = next((source.slow for source in sources if source.slow), "")

    def read(self, rows: Rows) -> Any:
        """Return rows as CSR."""
        from scipy import sparse

        if isinstance(rows, slice):
            rows = np.arange(rows.start or 0, self.shape[0] if rows.stop is None else rows.stop)
        parts, cuts = [], np.searchsorted(rows, self._ends)
        for number, (first, last) in enumerate(zip(np.concatenate([[0], cuts[:-1]]), cuts, strict=True)):
            if first < last:
                start = self._ends[number] - self._sources[number].shape[0]
                block = self._sources[number].read(rows[first:last] - start)
                parts.append(place_columns(sparse.csr_matrix(block), self._columns[number], self.shape[1]))
        return sparse.vstack(parts, format="csr") if parts else sparse.csr_matrix((0, self.shape[1]))


class Reopened:
    """A group or an array of a file that another process opens anew.

    Parameters
    ----------
    node
        Of h5py or zarr.
    """

    def __init__(self, node: Any) -> None:
        self._node = node

    def get(self) -> Any:
        """Return the group or array."""
        return self._node

    def __getstate__(self) -> dict[str, str]:
        node = self._node
        if hasattr(node, "file"):
            return {"kind": "h5py", "file": str(node.file.filename), "name": str(node.name)}
        return {"kind": "zarr", "file": str(node.store.root), "name": str(node.path)}

    def __setstate__(self, state: dict[str, str]) -> None:
        if state["kind"] == "h5py":
            import h5py

            self._node = h5py.File(state["file"], "r")[state["name"]]
        else:
            import zarr

            root = zarr.open_group(state["file"], mode="r")
            self._node = root[state["name"]] if state["name"] else root


def row_source(matrix: Any, where: str) -> RowSource:
    """Return the rows of what an AnnData or an open file holds as a matrix.

    Parameters
    ----------
    matrix
        A numpy array, a scipy sparse matrix, a backed matrix of anndata, a dataset or group of h5py or zarr, or a
        `RowSource`. A CSC matrix cannot be read by rows; it is loaded and turned.
    where
        Its name in messages.

    Raises
    ------
    DataError
        It is none of these.
    """
    import h5py
    from anndata.abc import CSCDataset, CSRDataset
    from scipy import sparse

    if matrix is None:
        raise DataError(f"{where} is empty; name the layer that holds the raw counts: layer=...")
    if isinstance(matrix, MemoryRows | DenseRows | SparseRows | JoinedRows):
        return matrix
    if isinstance(matrix, CSCDataset):
        matrix = matrix.to_memory()
    if sparse.issparse(matrix):
        matrix = matrix if matrix.format == "csr" else matrix.tocsr()
        if matrix.indices.dtype != matrix.indptr.dtype:  # scipy would convert all of it for every block
            matrix = sparse.csr_matrix((matrix.data, matrix.indices, matrix.indptr), shape=matrix.shape)
        return MemoryRows(matrix)
    if isinstance(matrix, CSRDataset):
        return SparseRows(matrix.group)
    if isinstance(matrix, h5py.Dataset) or type(matrix).__module__.startswith("zarr."):
        return DenseRows(matrix)
    if isinstance(matrix, np.ndarray):
        return MemoryRows(np.asarray(matrix))
    raise DataError(
        f"{where} is a {type(matrix).__name__}; counts must be a numpy array, a scipy sparse or a backed matrix"
    )


def place_columns(block: Any, columns: np.ndarray | None, n_columns: int) -> Any:
    """Return a CSR block with its columns moved.

    Parameters
    ----------
    block
        CSR; its column indices are in range.
    columns
        The new column of each column, -1 for one to leave out; None leaves all in place.
    n_columns
        Columns of the result.
    """
    from scipy import sparse

    if columns is None:
        return block
    column = columns[block.indices]
    data, indptr = block.data, block.indptr
    keep = column >= 0
    if not keep.all():
        indptr = np.concatenate([[0], np.cumsum(keep)])[indptr]
        data, column = data[keep], column[keep]
    out = sparse.csr_matrix((data, column, indptr), shape=(block.shape[0], n_columns))
    out.sort_indices()
    return out


def _runs(rows: np.ndarray) -> list[tuple[int, int]]:
    """Return where in ascending `rows` (first, last + 1) the stretches without a gap above `GAP` lie."""
    if not len(rows):
        return []
    cuts = np.flatnonzero(np.diff(rows) > GAP + 1) + 1
    return list(zip([0, *cuts.tolist()], [*cuts.tolist(), len(rows)], strict=True))


def _block(array: Any, rows_per_chunk: float) -> int:
    """Return how many rows to read together: those of a chunk where it is unpacked as a whole."""
    if hasattr(array, "compression") and array.compression is None:  # HDF5 then reads parts of chunks
        return BLOCK
    return int(np.clip(rows_per_chunk, BLOCK, MAX_BLOCK))


def _slow(array: Any, rows_per_chunk: float) -> str:
    """Say that chunks must be unpacked as a whole for any row in them, where that is so."""
    if getattr(array, "compression", None) not in ("gzip", "szip"):  # of HDF5; lzf and the codecs of zarr are quick
        return ""
    return (
        f"the matrix is compressed with {array.compression}, about {max(1, round(rows_per_chunk))} cells to a chunk, "
        "unpacked as a whole: blocks of cells are read at about half the speed, single cells some 20 times slower. "
        "Write the file again without: h5repack -f NONE IN.h5ad OUT.h5ad (of HDF5), or write_h5ad without compression="
    )
