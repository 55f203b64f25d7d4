"""Where drawn cells go: an AnnData in memory, or a file written as they come, which appears when it is complete."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

from scldm_cd4._errors import DataError
from scldm_cd4.sampling import Drawn

CHUNK = 65536
"""Values of a chunk on disk."""


class MemorySink:
    """Collects cells in memory."""

    def __init__(self) -> None:
        self.blocks: list[Any] = []

    def append(self, block: Any) -> None:
        """Add the next cells."""
        self.blocks.append(block)

    def joined(self) -> Any:
        """Return all cells as one matrix."""
        if sparse.issparse(self.blocks[0]):
            return sparse.vstack(self.blocks, format="csr")
        return np.concatenate(self.blocks)

    def finish(self, obs: pd.DataFrame, var: pd.DataFrame, uns: dict[str, Any]) -> Any:
        """Return the AnnData."""
        import anndata as ad

        return ad.AnnData(self.joined(), obs=obs, var=var, uns=uns)

    def abort(self) -> None:
        """Forget everything."""
        self.blocks = []


class FileSink:
    """Writes cells to an h5ad file as they come; the file appears when it is complete.

    Parameters
    ----------
    path
        The file. Missing folders are made.
    overwrite
        Replace a file that is there.

    Raises
    ------
    FileExistsError
        There is something at `path`, and it may not be replaced.
    DataError
        The place cannot be written, or the name has another ending.
    """

    endings: tuple[str, ...] = (".h5ad",)

    def __init__(self, path: str | Path, *, overwrite: bool = False) -> None:
        self.path = Path(path).expanduser().resolve()
        if self.path.suffix not in self.endings:
            raise DataError(f"out= takes the name of an .h5ad file or a .zarr store, got {str(path)!r}")
        self._check_free(overwrite)
        self.part = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = self._open()
        except OSError as error:
            raise DataError(f"{self.path} cannot be written: {error}") from error
        self.n = 0

    def _check_free(self, overwrite: bool) -> None:
        if self.path.is_dir() or (self.path.exists() and not overwrite):
            raise FileExistsError(f"there is something at {self.path}; pass overwrite=True to replace a file")

    def _open(self) -> Any:
        import h5py

        return h5py.File(self.part, "w")

    def append(self, block: Any) -> None:
        """Write the next cells."""
        if sparse.issparse(block):
            self._append_csr(sparse.csr_matrix(block))
        else:
            self._extend("X", np.asarray(block), {"encoding-type": "array", "encoding-version": "0.2.0"})
        self.n += block.shape[0]

    def append_obs(self, obs: pd.DataFrame) -> None:
        """Write the rows of ``obs`` of the next cells; all have the same columns with the same categories."""
        import anndata as ad

        if "obs" not in self.file:
            ad.io.write_elem(self.file, "obs", obs, dataset_kwargs=self._growing())
            return
        group = self.file["obs"]
        self._grow(group[group.attrs["_index"]], obs.index.to_numpy())
        for name, column in obs.items():
            values = column.cat.codes if isinstance(column.dtype, pd.CategoricalDtype) else column
            element = group[f"{name}/codes"] if values is not column else group[name]
            self._grow(element, values.to_numpy().astype(element.dtype))

    def _append_csr(self, block: sparse.csr_matrix) -> None:
        if "X" not in self.file:
            group = self.file.create_group("X")
            group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0"})
            self._extend("X/indptr", np.zeros(1, dtype=np.int64))
        start = int(self.file["X/indptr"][-1])
        self._extend("X/data", block.data.astype(np.float32))
        self._extend("X/indices", block.indices.astype(np.int32))
        self._extend("X/indptr", start + block.indptr[1:].astype(np.int64))
        self.file["X"].attrs["shape"] = self._shape(self.n + block.shape[0], block.shape[1])

    def _extend(self, name: str, values: NDArray[Any], attrs: dict[str, str] | None = None) -> None:
        if name in self.file:
            self._grow(self.file[name], values)
            return
        data = self._create(name, values, (max(1, CHUNK // max(1, int(np.prod(values.shape[1:])))), *values.shape[1:]))
        data.attrs.update(attrs or {})

    def _create(self, name: str, values: NDArray[Any], chunks: tuple[int, ...]) -> Any:
        return self.file.create_dataset(
            name, data=values, maxshape=(None, *values.shape[1:]), chunks=chunks, dtype=values.dtype
        )

    def _growing(self) -> dict[str, Any]:
        return {"chunks": (CHUNK // 8,), "maxshape": (None,)}

    def _shape(self, *shape: int) -> Any:
        return np.array(shape)

    def _grow(self, data: Any, values: NDArray[Any]) -> None:
        size = data.shape[0]
        data.resize(size + len(values), axis=0)
        data[size:] = values

    def finish(self, obs: pd.DataFrame, var: pd.DataFrame, uns: dict[str, Any]) -> Any:
        """Complete the file, move it into place and return it as AnnData whose ``X`` stays on disk."""
        self.complete(obs, var, uns)
        return open_written(self.path)

    def complete(self, obs: pd.DataFrame | None, var: pd.DataFrame, uns: dict[str, Any]) -> None:
        """Complete the file and move it into place; ``obs`` is None where `append_obs` gave it with the cells."""
        import anndata as ad

        self.file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        for name, value in (("obs", obs), ("var", var), ("uns", uns)):
            if value is not None:
                ad.io.write_elem(self.file, name, value)
        for name in ("layers", "obsm", "obsp", "varm", "varp"):
            ad.io.write_elem(self.file, name, {})
        self._move()

    def _move(self) -> None:
        self.file.close()
        with self.part.open("rb") as handle:
            os.fsync(handle.fileno())
        self.part.replace(self.path)

    def abort(self) -> None:
        """Close and delete the unfinished file."""
        self.file.close()
        self.part.unlink(missing_ok=True)


class ZarrSink(FileSink):
    """Writes cells to a zarr store as they come; the store appears when it is complete."""

    endings = (".zarr",)

    def _check_free(self, overwrite: bool) -> None:
        store = self.path.is_dir() and any((self.path / name).exists() for name in (".zgroup", "zarr.json"))
        if self.path.exists() and not (overwrite and store):
            raise FileExistsError(f"there is something at {self.path}; pass overwrite=True to replace a zarr store")

    def _open(self) -> Any:
        import anndata as ad

        return _zarr().open_group(self.part, mode="w", zarr_format=ad.settings.zarr_write_format)

    def _create(self, name: str, values: NDArray[Any], chunks: tuple[int, ...]) -> Any:
        return self.file.create_array(name, data=values, chunks=chunks)

    def _growing(self) -> dict[str, Any]:
        return {"chunks": (CHUNK // 8,)}

    def _shape(self, *shape: int) -> Any:
        return list(shape)

    def _grow(self, data: Any, values: NDArray[Any]) -> None:
        data.append(values)

    def _move(self) -> None:
        if self.path.exists():
            shutil.rmtree(self.path)
        self.part.rename(self.path)

    def abort(self) -> None:
        """Delete the unfinished store."""
        shutil.rmtree(self.part, ignore_errors=True)


def file_sink(path: str | Path, *, overwrite: bool = False) -> FileSink:
    """Return what writes an h5ad file or a zarr store, by the ending of its name."""
    return (ZarrSink if Path(path).suffix == ".zarr" else FileSink)(path, overwrite=overwrite)


def open_written(path: Path) -> Any:
    """Return cells that a sink wrote as AnnData whose ``X`` stays on disk."""
    import anndata as ad

    if path.suffix != ".zarr":
        return ad.read_h5ad(path, backed="r")
    zarr = _zarr()
    store = zarr.open_group(path, mode="r")
    x = store["X"]
    parts = {name: ad.io.read_elem(store[name]) for name in ("obs", "var", "uns")}
    return ad.AnnData(ad.io.sparse_dataset(x) if isinstance(x, zarr.Group) else x, **parts)


def written_fact(path: Path, name: str) -> Any:
    """Return one entry of ``uns["scldm_cd4"]`` of cells that a sink wrote, or None where there is none."""
    import anndata as ad
    import h5py

    key = f"uns/scldm_cd4/{name}"
    try:
        if path.suffix == ".zarr":
            return ad.io.read_elem(_zarr().open_group(path, mode="r")[key])
        with h5py.File(path, "r") as file:
            return ad.io.read_elem(file[key])
    except (OSError, KeyError, ValueError):
        return None


def _zarr() -> Any:
    try:
        import zarr
    except ImportError as error:
        raise DataError("a .zarr store needs zarr: pip install 'zarr>=3'") from error
    if not hasattr(zarr.Group, "create_array"):
        raise DataError(f"a .zarr store needs zarr 3, this is {zarr.__version__}: pip install 'zarr>=3'")
    return zarr


def collect(
    drawn: Iterable[Drawn], sink: MemorySink | FileSink, genes: NDArray[np.int64] | None
) -> NDArray[np.float64]:
    """Hand all cells to a sink, some genes or all (None); return their library sizes (n,)."""
    libraries = []
    for part in drawn:
        sink.append(part.values if genes is None else part.values[:, genes])
        libraries.append(part.library)
    return np.concatenate(libraries)
