"""Cells in one or several h5ad files or zarr stores, opened without reading their counts."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from scldm_cd4._errors import DataError
from scldm_cd4.data.files import open_group
from scldm_cd4.data.rows import DenseRows, JoinedRows, Reopened, RowSource, SparseRows

NAMES_PART = 1 << 16
"""Strings of ``obs`` that are read at a time."""


class CellStore:
    """Cells x genes in files, with what `CD4Model` needs of an AnnData; made by `open_cells`.

    Counts stay in the files and are read by rows. In memory are ``obs`` (numbers and categories; a few bytes a cell),
    ``var``, ``uns`` (empty; `setup_anndata` declares there), and 8 bytes a cell for where its counts lie.

    Attributes
    ----------
    obs
        Table of cells, numbered. Columns that all files have; labels as one set of categories. Columns of strings that
        are nearly all different, such as barcodes, stay in the files.
    var
        Table of genes of the first file.
    uns
        Plain dict; nothing is written to the files.
    obsm
        Likewise.
    X
        Where the counts come from, read by rows.
    layers
        The same of other counts by name; a layer is there if all files have it.
    paths
        The files.
    """

    is_view, isbacked, raw = False, True, None

    def __init__(
        self,
        paths: list[Path],
        obs: Any,
        var: Any,
        X: RowSource | None,
        layers: dict[str, RowSource],
        names: list[Reopened],
    ) -> None:
        self.paths, self.obs, self.var, self.X, self.layers = paths, obs, var, X, layers
        self.uns: dict[str, Any] = {}
        self.obsm: dict[str, np.ndarray] = {}
        self._names = names

    @property
    def n_obs(self) -> int:
        """The number of cells."""
        return len(self.obs)

    @property
    def n_vars(self) -> int:
        """The number of genes."""
        return len(self.var)

    @property
    def shape(self) -> tuple[int, int]:
        """Cells and genes."""
        return self.n_obs, self.n_vars

    @property
    def obs_names(self) -> Any:
        """Names of the cells, a pandas Index, read from the files at each use."""
        import pandas as pd
        from anndata.io import read_elem

        return pd.Index(np.concatenate([np.asarray(read_elem(node.get()), dtype=object) for node in self._names]))

    @property
    def var_names(self) -> Any:
        """Names of the genes, a pandas Index."""
        return self.var.index

    def to_memory(self, rows: Any = None) -> Any:
        """Read cells into an AnnData, such as a sample of them for scanpy or a plot.

        Parameters
        ----------
        rows
            Numbers of cells in any order, a mask of all cells, or a slice; None reads all.

        Returns
        -------
        AnnData: ``X`` and layers CSR, ``obs`` with the names of the cells, ``var``, ``uns`` and ``obsm``.

        Examples
        --------
        >>> cells = scldm_cd4.open_cells(adata.write_h5ad("cells.h5ad") or "cells.h5ad")
        >>> cells.to_memory([5, 3]).obs_names.equals(adata.obs_names[[5, 3]])
        True
        """
        import anndata as ad

        from scldm_cd4.data.matrix import RowReader

        rows = np.arange(self.n_obs)[slice(None) if rows is None else rows]
        obs = self.obs.iloc[rows].set_axis(self.obs_names[rows].astype(str))
        X = None if self.X is None else RowReader(self).read(rows)
        layers = {name: RowReader(self, name).read(rows) for name in self.layers}
        obsm = {name: values[rows] for name, values in self.obsm.items()}
        return ad.AnnData(X, obs=obs, var=self.var.copy(), uns=dict(self.uns), layers=layers, obsm=obsm)

    def __len__(self) -> int:
        return self.n_obs

    def __repr__(self) -> str:
        files = f"{len(self.paths)} files" if len(self.paths) > 1 else str(self.paths[0])
        found = {"obs": self.obs.columns, "layers": self.layers, "obsm": self.obsm}
        parts = [f"\n    {name}: {', '.join(map(repr, names))}" for name, names in found.items() if len(names)]
        return f"CellStore: {self.n_obs} cells x {self.n_vars} genes in {files}{''.join(parts)}"


def open_cells(paths: Any, *, join: str | None = None) -> CellStore:
    """Open h5ad files or zarr stores for training and embedding, without reading their counts into memory.

    Parameters
    ----------
    paths
        A path, or several; their cells come one after the other. Genes are matched by name.
    join
        What to do where the files have different genes: None refuses, ``"inner"`` keeps those that all have.

    Returns
    -------
    CellStore, which `CD4Model` and its methods take in place of an AnnData.

    Raises
    ------
    DataError
        A file is missing, damaged or no h5ad or zarr, refers to other files, or has other genes than the first.

    Examples
    --------
    >>> adata.write_h5ad("cells.h5ad")
    >>> cells = scldm_cd4.open_cells("cells.h5ad")
    >>> CD4Model.setup_anndata(cells, perturbation_key="perturbation", donor_key="donor_id", control="NTC")
    >>> cells.shape == adata.shape
    True
    """
    if join not in (None, "inner"):
        raise DataError(f"join takes None or 'inner', got {join!r}")
    several = isinstance(paths, Iterable) and not isinstance(paths, str | Path)
    found = [Path(path) for path in (paths if several else [paths])]
    if not found:
        raise DataError("give at least one file")
    parts = [_open(path) for path in found]
    if len(parts) == 1:
        return parts[0]
    columns = _join_genes(parts, join)
    kept = np.flatnonzero(columns[0] >= 0) if columns[0] is not None else np.arange(parts[0].n_vars)
    var = parts[0].var.iloc[kept]
    layers = [name for name in parts[0].layers if all(name in part.layers for part in parts)]
    X = None if any(part.X is None for part in parts) else JoinedRows([p.X for p in parts if p.X], columns, len(var))
    joined: dict[str, RowSource] = {
        name: JoinedRows([part.layers[name] for part in parts], columns, len(var)) for name in layers
    }
    names = [node for part in parts for node in part._names]
    return CellStore(found, _join_obs([part.obs for part in parts]), var, X, joined, names)


def _open(path: Path) -> CellStore:
    from anndata.io import read_elem

    group = open_group(path)
    try:
        var, obs = read_elem(group["var"]), _read_obs(group["obs"])
        X = _matrix(group["X"]) if "X" in group else None
        layers = {name: _matrix(group["layers"][name]) for name in group.get("layers", ())}
        index = str(group["obs"].attrs["_index"])
    except (KeyError, ValueError, TypeError, OSError) as error:
        raise DataError(f"{path} cannot be read as an AnnData: {error}") from error
    store = CellStore([path], obs, var, X, {k: v for k, v in layers.items() if v is not None}, [])
    if (X := store.X) is not None and X.shape != store.shape:
        raise DataError(f"{path} is damaged: X has shape {X.shape} for {store.n_obs} cells and {store.n_vars} genes")
    store._names = [Reopened(group["obs"][index])]
    return store


def _matrix(node: Any) -> RowSource | None:
    kind = str(node.attrs.get("encoding-type", node.attrs.get("h5sparse_format", "array")))
    if kind.startswith("csc"):
        from anndata.io import read_elem
        from scipy import sparse

        from scldm_cd4.data.rows import MemoryRows

        return MemoryRows(sparse.csr_matrix(read_elem(node)))
    if kind.startswith("csr"):
        return SparseRows(node)
    return DenseRows(node) if kind == "array" else None


def _read_obs(group: Any) -> Any:
    """Return the columns of ``obs`` but those of strings that are nearly all different."""
    import pandas as pd
    from anndata.io import read_elem

    order, columns = [str(name) for name in group.attrs["column-order"]], {}
    for name in order:
        node = group[name]
        if str(node.attrs.get("encoding-type", "")) == "string-array":
            if (labels := _categories(node)) is not None:
                columns[name] = labels
        else:
            columns[name] = read_elem(node)
    return pd.DataFrame(columns, index=pd.RangeIndex(group[str(group.attrs["_index"])].shape[0]))


def _categories(node: Any) -> Any:
    """Return an array of strings as categories, or None where they are nearly all different."""
    import pandas as pd

    codes, levels = np.empty(node.shape[0], dtype=np.int32), dict[str, int]()
    for start in range(0, len(codes), NAMES_PART):
        part = node[start : start + NAMES_PART]
        own, names = pd.factorize(np.array([v.decode() if isinstance(v, bytes) else str(v) for v in part], object))
        codes[start : start + len(own)] = np.array([levels.setdefault(name, len(levels)) for name in names])[own]
        if len(levels) > max(100, (start + len(own)) // 2):
            return None
    return pd.Categorical.from_codes(codes, list(levels))


def _join_genes(parts: list[CellStore], join: str | None) -> list[np.ndarray | None]:
    """Return the gene of the result of each gene of each part, -1 for none; None where they are the same."""
    import pandas as pd

    first = parts[0].var_names
    for part in parts:
        if not part.var_names.is_unique:
            raise DataError(f"{part.paths[0]} has gene names that occur more than once")
        missing, extra = first.difference(part.var_names), part.var_names.difference(first)
        if join is None and (len(missing) or len(extra)):
            shown = ", ".join(map(repr, [*missing[:3], *extra[:3]]))
            raise DataError(
                f"{part.paths[0]} lacks {len(missing)} genes of {parts[0].paths[0]} and has {len(extra)} others ("
                f"{shown}, ...); open_cells(..., join='inner') keeps those that all files have"
            )
    genes = pd.Index([g for g in first if all(g in p.var_names for p in parts)])
    if not len(genes):
        raise DataError("the files have no gene in common")
    out = [genes.get_indexer(part.var_names).astype(np.int32) for part in parts]
    return [None if np.array_equal(c, np.arange(len(genes))) and len(c) == len(genes) else c for c in out]


def _join_obs(tables: list[Any]) -> Any:
    """Return one table with the columns that all have, labels of equal names unified."""
    import pandas as pd
    from pandas.api.types import union_categoricals

    out: Mapping[str, Any] = {}
    for name in [c for c in tables[0].columns if all(c in table for table in tables)]:
        columns = [table[name] for table in tables]
        if any(isinstance(c.dtype, pd.CategoricalDtype) for c in columns):
            categories = [c.astype("category").cat.rename_categories(str) for c in columns]
            out = {**out, name: union_categoricals(categories)}
        else:
            out = {**out, name: pd.concat(columns, ignore_index=True)}
    return pd.DataFrame(out, index=pd.RangeIndex(sum(len(table) for table in tables)))
