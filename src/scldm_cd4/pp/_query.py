"""Cells from elsewhere set against what a model knows."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from scldm_cd4._errors import DataError
from scldm_cd4.config import ROLES
from scldm_cd4.data.labels import read_labels
from scldm_cd4.data.matrix import RowReader, check_block, counts_hint
from scldm_cd4.data.mudata import as_anndata
from scldm_cd4.data.setup import SETUP_KEY, gene_ids, read_declaration, require_anndata
from scldm_cd4.registry import Registry, near_matches

SHOWN = 5


@dataclass(frozen=True)
class QueryReport:
    """How cells fit to a model; `str` gives it in words, `to_frame` as a table.

    Examples
    --------
    >>> query, report = pp.prepare_query_anndata(adata[:, 5:].copy(), model)
    >>> len(report.missing)
    5
    >>> report.to_frame().shape[1]
    3
    """

    n_cells: int
    """Cells of the query."""
    n_model: int
    """Genes of the model."""
    found: tuple[str, ...]
    """Genes of the model that the query has, in the model's order."""
    missing: tuple[str, ...]
    """Genes of the model that the query lacks."""
    extra: tuple[str, ...]
    """Genes of the query that the model does not know; they are left out."""
    seen: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Cells by role (``donor``, ``timepoint``, ``perturbation``) and label, of labels that were trained."""
    unseen: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """The same, of labels that were not."""
    near: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Known labels with names like those of unseen ones."""
    absent: tuple[str, ...] = ()
    """Roles whose column the query lacks."""
    counts_per_cell: float = float("nan")
    """Median counts of a cell on the genes found."""
    genes_per_cell: float = float("nan")
    """Median number of genes found with counts in a cell."""
    density: float = float("nan")
    """Share of values that are not zero, 0 to 1."""
    model_counts_per_cell: float = float("nan")
    """Median over contexts of the median counts per training cell on all genes of the model; NaN where not known."""
    empty_cells: int = 0
    """Cells without counts on the genes found; a model refuses them."""

    @property
    def share_found(self) -> float:
        """Share of the model's genes that the query has, 0 to 1."""
        return len(self.found) / self.n_model

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            "n_cells": self.n_cells,
            "genes": {
                "model": self.n_model,
                "found": len(self.found),
                "missing": list(self.missing),
                "extra": list(self.extra),
            },
            "labels": {
                role: {"seen": dict(self.seen.get(role, {})), "unseen": dict(self.unseen.get(role, {}))}
                for role in ROLES
            },
            "absent_columns": list(self.absent),
            "counts_per_cell": self.counts_per_cell,
            "genes_per_cell": self.genes_per_cell,
            "density": self.density,
            "model_counts_per_cell": self.model_counts_per_cell,
            "empty_cells": self.empty_cells,
        }

    def to_frame(self) -> Any:
        """Return one row per finding: ``what``, ``value``, ``note``."""
        import pandas as pd

        return pd.DataFrame(self._rows(), columns=["what", "value", "note"])

    def _rows(self) -> list[tuple[str, str, str]]:
        rows = [
            ("cells", str(self.n_cells), ""),
            ("genes found", f"{len(self.found)} of {self.n_model}", f"{self.share_found:.1%}"),
            ("genes missing", str(len(self.missing)), _some(self.missing)),
            ("genes extra", str(len(self.extra)), _some(self.extra)),
        ]
        for role in ROLES:
            if role in self.absent:
                rows.append((f"{role}s", "no column", "labels are not needed to embed cells"))
                continue
            seen, unseen = self.seen.get(role, {}), self.unseen.get(role, {})
            if not seen and not unseen:
                continue
            rows.append((f"{role}s seen in training", str(len(seen)), f"{sum(seen.values())} cells"))
            if unseen:
                near = [f"{label} (near: {', '.join(self.near[label])})" for label in unseen if self.near.get(label)]
                note = f"{sum(unseen.values())} cells: {_some([*near, *(x for x in unseen if not self.near.get(x))])}"
                rows.append((f"{role}s not seen", str(len(unseen)), note))
        of_model = "" if np.isnan(self.model_counts_per_cell) else f"training cells {self.model_counts_per_cell:.0f}"
        rows.append(("counts per cell", f"{self.counts_per_cell:.0f}", of_model))
        rows.append(("genes per cell", f"{self.genes_per_cell:.0f}", ""))
        rows.append(("values above zero", f"{self.density:.1%}", ""))
        if self.empty_cells:
            rows.append(("cells without counts", str(self.empty_cells), "drop them: the model refuses them"))
        return rows

    def __str__(self) -> str:
        rows = self._rows()
        width = max(len(what) for what, _, _ in rows)
        return "\n".join(f"{what:<{width}}  {value}{f'  ({note})' if note else ''}" for what, value, note in rows)

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><th>{escape(what)}</th><td>{escape(value)}</td><td>{escape(note)}</td></tr>"
            for what, value, note in self._rows()
        )
        return f"<table>{cells}</table>"


def prepare_query_anndata(adata: Any, reference: Any) -> tuple[Any, QueryReport]:
    """Bring cells to the genes of a model, in its order, and say how they fit.

    The model does not need this step: it matches genes by name. Use it to look at cells first, or to give scanpy the
    same panel. Genes that the query lacks are not filled with zeros, which would look like measured values.

    Parameters
    ----------
    adata
        Cells with raw counts (AnnData, or a MuData declared by ``setup_mudata``); not changed. Columns and layer are
        those that ``setup_anndata`` declared, else those of the model.
    reference
        A `scldm_cd4.CD4Model`, or the folder of a saved one, of which only the registry is read.

    Returns
    -------
    AnnData and report. The AnnData is a copy with the genes of the model that were found, named as in the model: ``X``
    raw counts (CSR float32), ``obs`` as it was. For the report see `QueryReport`.

    Raises
    ------
    DataError
        Values are no counts, no gene of the model is there, or gene names are not unique.
    CheckpointError
        The folder is no saved model.

    Examples
    --------
    >>> query, report = pp.prepare_query_anndata(adata[:100, ::-1].copy(), model)
    >>> query.var_names.equals(adata.var_names)
    True
    >>> report.share_found
    1.0
    """
    import anndata as ad

    adata = as_anndata(adata)
    require_anndata(adata)
    registry = _registry(reference)
    declared = _declared(adata, registry)
    ids = gene_ids(adata, declared["gene_id_key"])
    position = {gene: i for i, gene in enumerate(ids)}
    found = tuple(gene for gene in registry.genes if gene in position)
    if not found:
        raise DataError(
            f"none of the model's {registry.n_genes} genes (such as {registry.genes[0]!r}) is among the {len(ids)} of "
            f"the query (such as {ids[0]!r}): name the column with the model's names, setup_anndata(gene_id_key=)"
        )
    matrix = _counts(adata, declared["layer"], [position[gene] for gene in found], ids)
    var = adata.var.iloc[[position[gene] for gene in found]].copy()
    var.index = list(found)
    obs = adata.obs.set_axis(adata.obs_names.astype(str))  # cells in files are numbered in obs
    query = ad.AnnData(matrix, obs=obs, var=var)
    known = set(registry.genes)
    missing = tuple(gene for gene in registry.genes if gene not in position)
    extra = tuple(gene for gene in ids if gene not in known)
    totals = np.asarray(matrix.sum(axis=1)).ravel()
    report = QueryReport(
        n_cells=adata.n_obs,
        n_model=registry.n_genes,
        found=found,
        missing=missing,
        extra=extra,
        **_labels(adata.obs, registry, declared),
        counts_per_cell=float(np.median(totals)) if len(totals) else float("nan"),
        genes_per_cell=float(np.median(np.diff(matrix.indptr))) if len(totals) else float("nan"),
        density=matrix.nnz / max(1, matrix.shape[0] * matrix.shape[1]),
        model_counts_per_cell=_typical(registry),
        empty_cells=int((totals == 0).sum()),
    )
    return query, report


def _registry(reference: Any) -> Registry:
    if isinstance(reference, str | Path):
        from scldm_cd4.checkpoint.native import load_folder

        return Registry.from_dict(load_folder(reference).registry)
    state = getattr(reference, "_state", None)
    if state is None:
        raise DataError(f"reference must be a CD4Model or the folder of a saved one, got {type(reference).__name__}")
    registry: Registry = state.registry
    return registry


def _declared(adata: Any, registry: Registry) -> dict[str, str | None]:
    """Return the columns and the layer: those declared, else those of the model that are there."""
    own = {f"{a.role}_key": a.column for a in registry.attributes}
    own |= {"layer": registry.layer, "gene_id_key": registry.gene_id_key}
    if SETUP_KEY in adata.uns:
        declared = read_declaration(adata)
        return {
            key: declared[key] if declared[key] is not None or "_id" in key or key == "layer" else own[key]
            for key in own
        }
    there = {"layer": adata.layers, "gene_id_key": adata.var}
    return own | {key: None for key, table in there.items() if own[key] not in table}


def _counts(adata: Any, layer: str | None, columns: list[int], genes: list[str]) -> Any:
    """Return the counts of some genes, CSR float32, after a look at all of them."""
    from scipy import sparse

    reader = RowReader(adata, layer)
    parts = []
    for rows, block in reader.chunks():
        try:
            check_block(block, rows.start, reader.where, adata.obs_names, genes)
        except DataError as error:
            raise DataError(f"{error}{counts_hint(adata, layer)}") from None
        part = block[:, columns].astype(np.float32)
        part.eliminate_zeros()
        parts.append(part)
    if not parts:
        raise DataError("the AnnData has no cells")
    return sparse.vstack(parts, format="csr")


def _labels(obs: Any, registry: Registry, declared: Mapping[str, str | None]) -> dict[str, Any]:
    """Return the cells by role and label, those trained and those not."""
    seen: dict[str, dict[str, int]] = {}
    unseen: dict[str, dict[str, int]] = {}
    near: dict[str, tuple[str, ...]] = {}
    absent = []
    for attribute in registry.attributes:
        key = declared[f"{attribute.role}_key"]
        if attribute.column is None:
            continue
        if key is None or key not in obs:
            absent.append(attribute.role)
            continue
        known = set(attribute.levels) - (set(registry.untrained(attribute.role)) if registry.train_counts else set())
        column = obs[key].dropna()
        if not len(column):
            absent.append(attribute.role)
            continue
        codes, levels = read_labels(column.to_frame(), key, f"{attribute.role}_key")
        numbers = dict(zip(levels, np.bincount(codes, minlength=len(levels)).tolist(), strict=True))
        seen[attribute.role] = {label: n for label, n in numbers.items() if label in known}
        unseen[attribute.role] = {label: n for label, n in numbers.items() if label not in known}
        near |= {label: tuple(near_matches(label, sorted(known))) for label in unseen[attribute.role]}
    return {"seen": seen, "unseen": unseen, "near": {k: v for k, v in near.items() if v}, "absent": tuple(absent)}


def _typical(registry: Registry) -> float:
    """Return the median over contexts of the median library size of training cells."""
    known = registry.size_factors
    if known is None:
        return float("nan")
    contexts = {(d, t) for donors in registry.train_counts.values() for d, times in donors.items() for t in times}
    contexts = contexts or {(d, t) for d in registry.donor.levels for t in registry.timepoint.levels}
    return float(np.median([float(known.sample(d, t, np.array([0.5]))[0]) for d, t in sorted(contexts)]))


def _some(names: Any) -> str:
    names = list(names)
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
