"""Generated cells as AnnData, in memory or written to disk as they come."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

from scldm_cd4._errors import DataError, GeneMismatchError
from scldm_cd4.conditions import Request
from scldm_cd4.config import ROLES
from scldm_cd4.registry import Registry, suggestion
from scldm_cd4.sampling import Drawn, role_columns

UNCONDITIONAL = "unconditional"
"""The label in ``obs`` of an attribute that played no part."""
UNITS = {
    "counts": "counts (whole numbers)",
    "mean": "expected counts at the cell's library size",
    "lognorm": "log1p(1e4 counts / counts of the cell)",
    "latent": "latent of the autoencoder",
}


def gene_positions(registry: Registry, genes: Any) -> NDArray[np.int64] | None:
    """Return the positions of genes, or None for all.

    Raises
    ------
    GeneMismatchError
        A gene is not one of the model's, occurs twice, or there are none.
    """
    if genes is None:
        return None
    names = [genes] if isinstance(genes, str) else [str(gene) for gene in genes]
    position = {gene: i for i, gene in enumerate(registry.genes)}
    if unknown := [gene for gene in names if gene not in position]:
        hint = suggestion(unknown[0], registry.genes, "genes are")
        raise GeneMismatchError(f"{len(unknown)} of {len(names)} genes are unknown, first {unknown[0]!r}.{hint}")
    if not names or len(set(names)) < len(names):
        raise GeneMismatchError("genes must be a list of different genes with at least one")
    return np.array([position[gene] for gene in names], dtype=np.int64)


def describe_genes(registry: Registry, genes: NDArray[np.int64] | None) -> pd.DataFrame:
    """Return ``var``: identifiers and the string columns that the model keeps."""
    var = pd.DataFrame({name: list(values) for name, values in registry.var.items()}, index=pd.Index(registry.genes))
    return var if genes is None else var.iloc[genes]


def describe_latents(n: int) -> pd.DataFrame:
    """Return ``var`` of flat latents."""
    return pd.DataFrame(index=pd.Index([f"latent_{i}" for i in range(n)]))


def describe_cells(registry: Registry, requests: Sequence[Request], library: NDArray[np.float64]) -> pd.DataFrame:
    """Return ``obs`` of requested cells: labels, library size and evidence."""
    numbers = np.array([request.n_cells for request in requests])
    obs: dict[str, Any] = {
        "is_generated": np.ones(int(numbers.sum()), dtype=bool),
        "size_factor": library,
    }
    obs |= _evidence(registry, [request.labels for request in requests], numbers)
    obs |= label_columns(registry, [request.labels for request in requests], numbers)
    names = [f"{_name(registry, r.labels)}:{i}" for r in requests for i in range(r.first, r.first + r.n_cells)]
    return pd.DataFrame(obs, index=pd.Index(names, dtype=object))


def describe_counterfactuals(
    registry: Registry,
    names: pd.Index,
    source: NDArray[np.int64],
    target: NDArray[np.int64],
    dropped: Sequence[str],
    library: NDArray[np.float64],
) -> pd.DataFrame:
    """Return ``obs`` of counterfactual cells: their own names, new labels, and old labels as ``source_<column>``."""
    conditions, inverse = np.unique(target, axis=0, return_inverse=True)
    labels = [_decode(registry, codes, dropped) for codes in conditions]
    index = inverse.ravel()
    ones = np.ones(len(labels), dtype=np.int64)
    obs: dict[str, Any] = {"is_generated": np.ones(len(target), dtype=bool), "size_factor": library}
    obs |= {name: values[index] for name, values in _evidence(registry, labels, ones).items()}
    obs |= {name: values[index] for name, values in label_columns(registry, labels, ones).items()}
    conditions, inverse = np.unique(source, axis=0, return_inverse=True)
    before = label_columns(registry, [_decode(registry, c) for c in conditions], np.ones(len(conditions), dtype=int))
    obs |= {f"source_{name}": values[inverse.ravel()] for name, values in before.items()}
    return pd.DataFrame(obs, index=pd.Index(names.astype(str), dtype=object))


def _decode(registry: Registry, codes: NDArray[np.int64], dropped: Sequence[str] = ()) -> tuple[str | None, ...]:
    return tuple(
        None if a.role in dropped else a.levels[code] for a, code in zip(registry.attributes, codes, strict=True)
    )


def label_columns(
    registry: Registry, labels: Sequence[tuple[str | None, ...]], numbers: NDArray[np.int64]
) -> dict[str, pd.Categorical]:
    """Return the user's columns as categoricals, with the levels that occur in the model's order.

    The categories are of the kind of the user's column, so that `anndata.concat` with the user's cells can be written;
    a column with `UNCONDITIONAL` has strings.
    """
    out = {}
    columns = role_columns(registry)
    for position, attribute in enumerate(registry.attributes):
        if attribute.role not in columns:
            continue
        values = [UNCONDITIONAL if (x := each[position]) is None else x for each in labels]
        order = [*attribute.levels, *([UNCONDITIONAL] if UNCONDITIONAL not in attribute.levels else [])]
        present = set(values)
        levels = [level for level in order if level in present]
        code = {level: i for i, level in enumerate(levels)}
        codes = np.repeat(np.array([code[v] for v in values], dtype=np.int64), numbers)
        categories = levels if None in {each[position] for each in labels} else attribute.values(levels)
        out[columns[attribute.role]] = pd.Categorical.from_codes(codes, categories)
    return out


def evidence(registry: Registry, labels: tuple[str | None, ...]) -> tuple[int, int]:
    """Return the training cells, and the contexts with training cells, that agree with labels (None: any)."""
    donor, timepoint, perturbation = labels
    n = contexts = 0
    trained = registry.train_counts
    chosen = trained.values() if perturbation is None else [trained.get(perturbation, {})]
    seen = set()
    for by_donor in chosen:
        for d, by_time in by_donor.items():
            for t, count in by_time.items():
                if count > 0:
                    seen.add((d, t))
                    n += count * (donor in (None, d) and timepoint in (None, t))
    contexts = len(seen)
    return n, contexts


def _evidence(
    registry: Registry, labels: Sequence[tuple[str | None, ...]], numbers: NDArray[np.int64]
) -> dict[str, Any]:
    if not registry.train_counts:
        return {}
    found = np.array([evidence(registry, x) for x in labels], dtype=np.int64)
    return {
        "n_train_cells": np.repeat(found[:, 0], numbers),
        "n_train_contexts": np.repeat(found[:, 1], numbers),
    }


def _name(registry: Registry, labels: tuple[str | None, ...]) -> str:
    """Labels joined so that different labels never give the same name."""
    columns = role_columns(registry)
    shown = [
        (UNCONDITIONAL if x is None else x).replace("\\", "\\\\").replace(":", "\\:")
        for role, x in zip(ROLES, labels, strict=True)
        if role in columns
    ]
    return ":".join(reversed(shown))


class MemorySink:
    """Collects cells in memory."""

    def __init__(self) -> None:
        self.blocks: list[Any] = []

    def append(self, block: Any) -> None:
        """Add the next cells."""
        self.blocks.append(block)

    def finish(self, obs: pd.DataFrame, var: pd.DataFrame, uns: dict[str, Any]) -> Any:
        """Return the AnnData."""
        import anndata as ad

        joined = sparse.vstack(self.blocks, format="csr") if sparse.issparse(self.blocks[0]) else None
        return ad.AnnData(np.concatenate(self.blocks) if joined is None else joined, obs=obs, var=var, uns=uns)

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
        The place cannot be written, or the name does not end in ``.h5ad``.
    """

    def __init__(self, path: str | Path, *, overwrite: bool = False) -> None:
        import h5py

        self.path = Path(path).expanduser().resolve()
        if self.path.suffix != ".h5ad":
            raise DataError(f"out= takes the name of an .h5ad file, got {str(path)!r}")
        if self.path.is_dir() or (self.path.exists() and not overwrite):
            raise FileExistsError(f"there is something at {self.path}; pass overwrite=True to replace a file")
        self.part = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = h5py.File(self.part, "w")
        except OSError as error:
            raise DataError(f"{self.path} cannot be written: {error}") from error
        self.n = 0

    def append(self, block: Any) -> None:
        """Write the next cells."""
        if sparse.issparse(block):
            self._append_csr(sparse.csr_matrix(block))
        else:
            self._extend("X", np.asarray(block), {"encoding-type": "array", "encoding-version": "0.2.0"})
        self.n += block.shape[0]

    def _append_csr(self, block: sparse.csr_matrix) -> None:
        if "X" not in self.file:
            group = self.file.create_group("X")
            group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0"})
            self._extend("X/indptr", np.zeros(1, dtype=np.int64))
        start = int(self.file["X/indptr"][-1])
        self._extend("X/data", block.data.astype(np.float32))
        self._extend("X/indices", block.indices.astype(np.int32))
        self._extend("X/indptr", start + block.indptr[1:].astype(np.int64))
        self.file["X"].attrs["shape"] = np.array([self.n + block.shape[0], block.shape[1]])

    def _extend(self, name: str, values: NDArray[Any], attrs: dict[str, str] | None = None) -> None:
        if name not in self.file:
            row = max(1, int(np.prod(values.shape[1:])))
            chunks = (max(1, 65536 // row), *values.shape[1:])
            data = self.file.create_dataset(
                name, data=values, maxshape=(None, *values.shape[1:]), chunks=chunks, dtype=values.dtype
            )
            data.attrs.update(attrs or {})
            return
        data = self.file[name]
        size = data.shape[0]
        data.resize(size + len(values), axis=0)
        data[size:] = values

    def finish(self, obs: pd.DataFrame, var: pd.DataFrame, uns: dict[str, Any]) -> Any:
        """Complete the file, move it into place and return it as a backed AnnData."""
        import anndata as ad

        self.file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        for name, value in (("obs", obs), ("var", var), ("uns", uns)):
            ad.io.write_elem(self.file, name, value)
        for name in ("layers", "obsm", "obsp", "varm", "varp"):
            ad.io.write_elem(self.file, name, {})
        self.file.close()
        with self.part.open("rb") as handle:
            os.fsync(handle.fileno())
        self.part.replace(self.path)
        return ad.read_h5ad(self.path, backed="r")

    def abort(self) -> None:
        """Close and delete the unfinished file."""
        self.file.close()
        self.part.unlink(missing_ok=True)


def collect(
    drawn: Iterable[Drawn], sink: MemorySink | FileSink, genes: NDArray[np.int64] | None
) -> NDArray[np.float64]:
    """Hand all cells to a sink, some genes or all (None); return their library sizes (n,)."""
    libraries = []
    for part in drawn:
        sink.append(part.values if genes is None else part.values[:, genes])
        libraries.append(part.library)
    return np.concatenate(libraries)
