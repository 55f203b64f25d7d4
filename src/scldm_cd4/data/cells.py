"""Cells as a model sees them: validated, genes aligned by name, labels as codes."""

import hashlib
import warnings
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from scldm_cd4._errors import DataError, GeneMismatchError, UnknownCategoryError
from scldm_cd4.config import ROLES
from scldm_cd4.data.labels import read_labels
from scldm_cd4.data.matrix import RowReader, check_block, counts_hint
from scldm_cd4.data.mudata import as_anndata
from scldm_cd4.data.rows import place_columns
from scldm_cd4.data.setup import (
    SETUP_KEY,
    fit_registry,
    gene_ids,
    read_declaration,
    read_library,
    refuse_empty_cells,
    require_anndata,
)
from scldm_cd4.registry import Registration, Registry

MAX_MISSING = 0.5
"""The largest share of the model's genes that may be absent with ``allow_missing=True``."""
SHOWN = 5


@dataclass(frozen=True)
class AlignmentReport:
    """How the genes of some data and of a model fit together; `str` gives a sentence."""

    n_model: int
    """Genes of the model."""
    n_found: int
    """Genes of the model that the data have."""
    n_extra: int
    """Genes of the data that the model does not know; they are left out."""
    missing: tuple[str, ...] = ()
    """All genes of the model that the data lack."""

    @property
    def n_missing(self) -> int:
        """The number of genes of the model that the data lack."""
        return self.n_model - self.n_found

    def __str__(self) -> str:
        text = f"{self.n_found} of the model's {self.n_model} genes found"
        if self.n_missing:
            shown = ", ".join(self.missing[:SHOWN]) + (", ..." if self.n_missing > SHOWN else "")
            text += f", {self.n_missing} missing ({self.n_missing / self.n_model:.1%}: {shown})"
        if self.n_extra:
            text += f", {self.n_extra} other genes left out"
        return f"{text}."


class CellData:
    """Cells with the genes of a model; counts are read when asked for.

    Build it with `from_adata`. The AnnData is not copied and not changed.

    Attributes
    ----------
    registry
        What the genes and label codes mean.
    labels
        Label codes, int64, shape (n_cells, 3), in the order of `scldm_cd4.config.ROLES`; None if not asked for.
    totals
        Counts on the panel, float64, shape (n_cells,).
    library
        Library sizes, float64, shape (n_cells,): the totals, or those given by ``size_factor_key``.
    present
        Which genes of the model the data have, bool, shape (n_genes,); all unless genes may be missing.
    report
        How the genes fit together.
    obs
        The table of these cells as it was given.
    """

    def __init__(
        self,
        reader: RowReader,
        registry: Registry,
        target: np.ndarray,
        *,
        labels: np.ndarray | None,
        library: np.ndarray,
        report: AlignmentReport,
        obs: Any,
        named: Any = None,
        rows: np.ndarray | None = None,
    ) -> None:
        self._reader = reader
        self._named, self._rows = named, rows  # what has the names, and which of them
        self._target = target  # (genes of the data,): gene of the model, -1 for none
        self.registry = registry
        self.labels = labels
        self.library = self.totals = library
        self.report = report
        self.obs = obs
        self.present = np.zeros(registry.n_genes, dtype=bool)
        self.present[target[target >= 0]] = True

    @classmethod
    def from_adata(
        cls,
        adata: Any,
        registry: Registry | None = None,
        *,
        rows: np.ndarray | None = None,
        labels: bool = True,
        allow_missing: bool = False,
    ) -> "CellData":
        """Check cells and align them to a model.

        Columns and layer are those that `setup_anndata` declared for `adata`, for the model's own cells before it took
        them; where it was not called, those of `registry`, and ``X`` where the model's layer is absent (as in generated
        cells).

        Parameters
        ----------
        adata
            The cells; in memory, a view, backed, or from `open_cells`.
        registry
            The model's; None to take it from `adata`, declared by `setup_anndata`.
        rows
            Numbers of the cells to take; None takes all. The counts and labels of others are not looked at.
        labels
            Read the labels, which must all be known to `registry`. Without, `labels` is None.
        allow_missing
            Accept that up to half of the model's genes are missing; warns with their share. `present` tells which are
            there.

        Raises
        ------
        DataError
            A column, layer or label is missing, a value is no raw count, or a cell has no counts on the model's genes.
        GeneMismatchError
            Genes of the model are missing in `adata`.
        UnknownCategoryError
            A label is unknown to `registry`.
        """
        adata = as_anndata(adata)
        require_anndata(adata)
        obs = adata.obs if rows is None else adata.obs.iloc[rows]
        if not len(obs):
            raise DataError("the AnnData has no cells")
        registry = registry or fit_registry(adata)
        keys = _keys(adata, registry)
        target, report = _align(adata, registry, keys["gene_id_key"], allow_missing)
        codes = _labels(obs, registry, keys) if labels else None
        cells = cls(
            RowReader(adata, keys["layer"], rows),
            registry,
            target,
            labels=codes,
            library=np.empty(len(obs)),
            report=report,
            obs=obs,
            named=adata,
            rows=rows,
        )
        cells._fill_library(adata, keys)
        if report.n_missing:
            warnings.warn(f"{report} The missing genes are left out of the encoder's input.", UserWarning, stacklevel=2)
        return cells

    @property
    def block(self) -> int:
        """Neighbouring cells that should be read together; 1 where the counts are in memory."""
        return self._reader.source.block

    @property
    def slow(self) -> str:
        """Why cells are slow to read in random order and what helps; empty where they are not."""
        return self._reader.source.slow

    @property
    def n_cells(self) -> int:
        """The number of cells."""
        return self._reader.shape[0]

    @property
    def n_genes(self) -> int:
        """The number of genes of the model."""
        return self.registry.n_genes

    @property
    def obs_names(self) -> Any:
        """The names of the cells, a pandas Index."""
        names = self.obs.index if self._named is None else self._named.obs_names
        return names if self._rows is None else names[self._rows]

    @property
    def identity(self) -> str:
        """A hash of names and labels of the cells in their order, which tells whether these are the same cells."""
        return _hash(self.obs_names, self.labels)

    def __len__(self) -> int:
        return self.n_cells

    def __repr__(self) -> str:
        return f"CellData: {self.n_cells} cells x {self.n_genes} genes; {self.report}"

    def counts(self, rows: np.ndarray | slice) -> Any:
        """Return counts of some cells.

        Parameters
        ----------
        rows
            Numbers of cells in any order, also repeated; a mask of all cells; or a slice.

        Returns
        -------
        scipy CSR matrix, float32 whole numbers, shape (len(rows), n_genes), genes in the model's order, indices sorted
        and without zeros; genes missing in the data are empty columns.

        Raises
        ------
        IndexError
            There is no such cell.
        """
        if not isinstance(rows, slice):
            rows = np.asarray(rows)
            if rows.dtype == bool:
                if rows.shape != (self.n_cells,):
                    raise IndexError(f"a mask needs {self.n_cells} values, got shape {rows.shape}")
                rows = np.flatnonzero(rows)
            rows = rows.astype(np.int64)
            if rows.size and not 0 <= rows.min() <= rows.max() < self.n_cells:
                raise IndexError(f"cells are 0..{self.n_cells - 1}, asked for {rows.min()}..{rows.max()}")
        return self._select(self._reader.read(rows))

    def _fill_library(self, adata: Any, keys: dict[str, str | None]) -> None:
        where, genes = self._reader.where, self.registry.genes
        for rows, block in self._reader.chunks():
            try:
                self.totals[rows] = check_block(self._to_model(block), rows.start, where, lambda: self.obs_names, genes)
            except DataError as error:
                raise DataError(f"{error}{counts_hint(adata, keys['layer'])}") from None
        refuse_empty_cells(self.totals, where)
        if keys["size_factor_key"] is not None:
            self.library = read_library(self.obs, keys["size_factor_key"])

    def _select(self, block: Any) -> Any:
        out = self._to_model(block)
        out.data = np.rint(out.data).astype(np.float32, copy=False)
        if not out.data.all():
            out.eliminate_zeros()
        out.indices, out.indptr = out.indices.astype(np.int32, copy=False), out.indptr.astype(np.int32, copy=False)
        return out

    def _to_model(self, block: Any) -> Any:
        """Return a block of the reader with the model's genes as columns."""
        same = len(self._target) == self.n_genes and np.array_equal(self._target, np.arange(self.n_genes))
        return place_columns(block, None if same else self._target, self.n_genes)


def registered(registry: Registry, adata: Any) -> Registry:
    """Return a copy that keeps the present declaration of a model's cells, whatever is declared for them later."""
    is_declared = adata is not None and SETUP_KEY in adata.uns
    return replace(registry, own=Registration(adata, _keys(adata, registry)) if is_declared else Registration())


def identity(adata: Any, registry: Registry) -> str | None:
    """Return `CellData.identity` without a look at the counts; None where labels are missing or unknown."""
    try:
        return _hash(adata.obs_names, _labels(adata.obs, registry, _keys(adata, registry)))
    except (DataError, UnknownCategoryError):
        return None


def _hash(names: Any, labels: np.ndarray | None) -> str:
    import pandas as pd

    digest = hashlib.sha256(pd.util.hash_array(np.asarray(names, dtype=object)).tobytes())
    if labels is not None:
        digest.update(labels.tobytes())
    return digest.hexdigest()[:16]


def _keys(adata: Any, registry: Registry) -> dict[str, str | None]:
    """Return the declared keys of the data, else those of the model."""
    if registry.own.holds(adata):
        return registry.own.keys
    own = {f"{role}_key": attribute.column for role, attribute in zip(ROLES, registry.attributes, strict=True)}
    own |= {name: getattr(registry, name) for name in ("layer", "size_factor_key", "gene_id_key")}
    if SETUP_KEY not in adata.uns:
        there = {"layer": adata.layers, "size_factor_key": adata.obs, "gene_id_key": adata.var}
        return own | {name: None for name, table in there.items() if own[name] not in table}
    declared = read_declaration(adata)
    for role in ROLES:
        declared[f"{role}_key"] = declared[f"{role}_key"] or own[f"{role}_key"]
    return declared


def _labels(obs: Any, registry: Registry, keys: dict[str, str | None]) -> np.ndarray:
    codes = np.zeros((len(obs), len(ROLES)), dtype=np.int64)
    for position, attribute in enumerate(registry.attributes):
        key = keys[f"{attribute.role}_key"]
        if attribute.column is None or key is None:  # the single level of the model
            continue
        own, levels = read_labels(obs, key, f"{attribute.role}_key")
        codes[:, position] = attribute.encode(levels)[own]
    return codes


def _align(
    adata: Any, registry: Registry, gene_id_key: str | None, allow_missing: bool
) -> tuple[np.ndarray, AlignmentReport]:
    """Return the model's gene of every gene of the data (-1 for none), and the report."""
    ids = gene_ids(adata, gene_id_key)
    position = {gene: index for index, gene in enumerate(registry.genes)}
    target = np.fromiter((position.get(gene, -1) for gene in ids), dtype=np.int32, count=len(ids))
    known = set(ids)
    missing = tuple(gene for gene in registry.genes if gene not in known)
    n_found = registry.n_genes - len(missing)
    report = AlignmentReport(registry.n_genes, n_found, len(ids) - n_found, missing)
    if missing and (not allow_missing or len(missing) > MAX_MISSING * registry.n_genes):
        remedy = _other_names(adata, registry, n_found)
        if not remedy:
            remedy = (
                f" At most {MAX_MISSING:.0%} may be missing; give data with more of the model's genes."
                if len(missing) > MAX_MISSING * registry.n_genes
                else " Pass allow_missing=True to leave them out of the encoder's input, where a method takes it, as "
                "get_latent does; all others need all genes of the model."
            )
        elif registry.own.holds(adata):
            remedy += " Then load the model with these cells again: it keeps the declaration that they had."
        raise GeneMismatchError(f"{report}{remedy}")
    return target, report


def _other_names(adata: Any, registry: Registry, n_found: int) -> str:
    """Return a sentence about names by which at least half of the genes and more than now fit, or an empty string."""
    enough = max(MAX_MISSING * registry.n_genes, n_found + 1)
    genes = set(registry.genes)
    for name in adata.var.columns[~adata.var.columns.duplicated()]:
        if len(genes.intersection(map(str, adata.var[name]))) >= enough:
            return f" var[{name!r}] holds the model's identifiers: pass gene_id_key={name!r} to setup_anndata."
    if len(genes.intersection(adata.var_names)) >= enough:
        return " var_names holds the model's identifiers: call setup_anndata without gene_id_key."
    if len(genes.intersection(str(gene).split(".")[0] for gene in adata.var_names)) >= enough:
        return " Without the version suffix (.1, .2) the names would fit: remove it from var_names."
    folded = {gene.casefold() for gene in genes}
    if len(folded.intersection(str(gene).casefold() for gene in adata.var_names)) >= enough:
        return " The names differ in letter case only: spell them as the model does."
    for name, values in registry.var.items():
        if len(set(values).intersection(adata.var_names)) >= enough:
            return (
                f" The data are named by what the model keeps as {name!r} (such as {adata.var_names[0]!r}), but its "
                f"identifiers are like {registry.genes[0]!r}: add them to var and pass gene_id_key= to setup_anndata."
            )
    ensembl = sum(gene.startswith("ENS") for gene in registry.genes) > enough
    if ensembl != (sum(str(gene).startswith("ENS") for gene in adata.var_names) * 2 > adata.n_vars):
        kinds = ("Ensembl identifiers", "gene symbols")
        return f" The model's genes are {kinds[not ensembl]}, those of the data {kinds[ensembl]}: translate them first."
    return ""
