"""Declare what the columns of an AnnData mean, and read genes and vocabularies from one."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from scldm_cd4._errors import DataError
from scldm_cd4.config import ROLES
from scldm_cd4.data.labels import as_label, get_column, label_kind, read_labels
from scldm_cd4.data.matrix import RowReader, check_block, counts_hint
from scldm_cd4.data.store import CellStore
from scldm_cd4.registry import Attribute, Registry, suggestion

SETUP_KEY = "_scldm_cd4"
"""The place of the declaration in ``uns``."""
GENERATED = "scldm_cd4"
"""The place of the facts on generated cells, whose counts are in ``X`` and genes in ``var_names``."""
SCHEMA_VERSION = 1
ALL = "all"
"""The single level of an attribute without a column."""
TAKEN = ("is_generated", "size_factor", "n_train_cells", "n_train_contexts")
"""Columns of generated cells that are not labels."""

_KEYS = (*(f"{role}_key" for role in ROLES), "control", "layer", "size_factor_key", "gene_id_key")


def setup_anndata(
    adata: Any,
    *,
    perturbation_key: str,
    donor_key: str | None = None,
    timepoint_key: str | None = None,
    control: str | None = None,
    layer: str | None = None,
    size_factor_key: str | None = None,
    gene_id_key: str | None = None,
) -> None:
    """Check an AnnData of raw counts and declare what its columns mean.

    Every value of the count matrix is looked at, in a stream. Labels of any dtype are read as strings: whole numbers as
    their digits (``1`` and ``1.0`` give ``"1"``), truth values as ``"True"`` and ``"False"``, dates as
    ``"2024-05-01"``. Levels are sorted, those of an ordered categorical in its order. Generated cells have labels of
    the kind of the column: strings, whole numbers, floats or truth values.

    A model keeps the declaration that its cells had when it was built or loaded; a later call changes it for later
    models alone.

    Parameters
    ----------
    adata
        Cells x genes; in memory, a view, or backed. Only ``uns["_scldm_cd4"]`` is written: a plain dict of the keys
        given and a schema version. It stays with subsets and copies, and is lost by `anndata.concat`.
    perturbation_key
        Column of ``obs`` with the perturbation of each cell, controls included.
    donor_key, timepoint_key
        Columns of ``obs``; an attribute without a column has the single level ``all``.
    control
        The perturbation label of unperturbed cells; None if there are none.
    layer
        The layer with the raw counts; None for ``X``.
    size_factor_key
        Column of ``obs`` with positive size factors on any scale. `CD4Model.generate` then draws library sizes from
        their distribution in the training cells, in place of the counts per cell; they are multiplied by one number,
        so that they add up to the counts of the training cells on the panel, which is the scale that the decoder
        takes. Training and embedding go by the counts themselves.
    gene_id_key
        Column of ``var`` with the gene identifiers; None for ``var_names``.

    Raises
    ------
    DataError
        A column or layer is missing, a label is missing, the control is no level, gene identifiers are not unique, a
        value is no raw count, a cell has no counts or above a million, or there are fewer than 2 cells or 1 gene.

    Examples
    --------
    >>> adata = datasets.synthetic_cd4(300, 50, n_perturbations=3, n_donors=2)
    >>> CD4Model.setup_anndata(adata, perturbation_key="perturbation", donor_key="donor_id", control="NTC")
    >>> adata.uns["_scldm_cd4"]["control"]
    'NTC'
    """
    require_anndata(adata)
    if adata.n_obs < 2 or adata.n_vars < 1:
        raise DataError(f"at least 2 cells and 1 gene are needed, the AnnData has {adata.n_obs} x {adata.n_vars}")
    keys = dict(zip(ROLES, (donor_key, timepoint_key, perturbation_key), strict=True))
    attributes = read_attributes(adata.obs, keys)
    if control is not None:
        control = as_label(control)
        levels = attributes["perturbation"].levels
        if control not in levels:
            hint = suggestion(control, levels, f"labels in obs[{perturbation_key!r}] are")
            raise DataError(f"control={control!r} does not occur in obs[{perturbation_key!r}].{hint}")
    genes = gene_ids(adata, gene_id_key)
    if size_factor_key is not None:
        read_library(adata.obs, size_factor_key)
    _check_counts(adata, layer, genes)
    given = (donor_key, timepoint_key, perturbation_key, control, layer, size_factor_key, gene_id_key)
    declaration = {name: value for name, value in zip(_KEYS, given, strict=True) if value is not None}
    _declare(adata, {"schema_version": SCHEMA_VERSION, **declaration})


def read_declaration(adata: Any) -> dict[str, str | None]:
    """Return the keys declared by `setup_anndata`, None for those not given.

    Raises
    ------
    DataError
        There is no declaration, or one of a newer version.
    """
    require_anndata(adata)
    found = adata.uns.get(SETUP_KEY)
    if found is None:
        raise DataError(
            f"uns[{SETUP_KEY!r}] is absent: call CD4Model.setup_anndata(adata, perturbation_key=...) first, and again "
            "after anndata.concat, which drops the declaration"
        )
    if int(found.get("schema_version", 0)) != SCHEMA_VERSION:
        raise DataError(
            f"uns[{SETUP_KEY!r}] has schema version {found.get('schema_version')}, this package reads "
            f"{SCHEMA_VERSION}; call CD4Model.setup_anndata again"
        )
    return {name: str(found[name]) if name in found else None for name in _KEYS}


def require_anndata(adata: Any) -> None:
    """Raise DataError for what is no AnnData or `CellStore`, such as the name of a file."""
    import pandas as pd
    from anndata import AnnData

    if not isinstance(adata, AnnData | CellStore):
        hint = ": declare a MuData with setup_mudata" if type(adata).__name__ == "MuData" else ""
        if isinstance(adata, str | Path | list | tuple):
            hint = ": open files first, scldm_cd4.open_cells(...), or read one into memory, anndata.read_h5ad(...)"
        if isinstance(adata, pd.Index):
            hint = ": names of genes, as of pp.select_panel, choose columns of one: adata = adata[:, panel].copy()"
        raise DataError(f"an AnnData is needed, got {type(adata).__name__}{hint}")


def fit_registry(adata: Any) -> Registry:
    """Return genes, vocabularies and control of an AnnData declared by `setup_anndata`.

    Training fills in the size factors and the numbers of training cells.

    Raises
    ------
    DataError
        The AnnData is not declared, or no longer fits its declaration.
    """
    declared = read_declaration(adata)
    attributes = read_attributes(adata.obs, {role: declared[f"{role}_key"] for role in ROLES})
    control, levels = declared["control"], attributes["perturbation"].levels
    if control is not None and control not in levels:
        raise DataError(
            f"the declared control {control!r} does not occur in obs[{declared['perturbation_key']!r}] any more: the "
            "cells were subset after setup_anndata. Keep the control cells, or call setup_anndata again without control"
        )
    return Registry(
        genes=tuple(gene_ids(adata, declared["gene_id_key"])),
        donor=attributes["donor"],
        timepoint=attributes["timepoint"],
        perturbation=attributes["perturbation"],
        control=control,
        var=_string_columns(adata),
        gene_id_key=declared["gene_id_key"],
        layer=declared["layer"],
        size_factor_key=declared["size_factor_key"],
    )


def read_attributes(obs: Any, keys: dict[str, str | None]) -> dict[str, Attribute]:
    """Return the attribute by role, from columns by role; levels of an ordered categorical keep their order.

    Raises
    ------
    DataError
        A column is missing, has missing labels, is used for two roles, or has a name of `TAKEN`.
    """
    used = [key for key in keys.values() if key is not None]
    if taken := [key for key in used if key in TAKEN]:
        raise DataError(
            f"obs[{taken[0]!r}] cannot hold labels, as generated cells have a column of that name for something else: "
            f"rename it, adata.obs = adata.obs.rename(columns={{{taken[0]!r}: {taken[0] + '_label'!r}}})"
        )
    if doubled := {repr(key) for key in used if used.count(key) > 1}:
        raise DataError(f"one obs column cannot play two roles: {', '.join(doubled)}")
    out = {}
    for role, key in keys.items():
        if key is None and role != "perturbation":
            out[role] = Attribute(role, None, (ALL,))
        else:
            _, levels = read_labels(obs, key, f"{role}_key")
            if getattr(obs[key].dtype, "ordered", False):
                levels = tuple(x for x in map(as_label, obs[key].cat.categories) if x in levels)
            out[role] = Attribute(role, key, levels, label_kind(obs[key]))
    return out


def gene_ids(adata: Any, gene_id_key: str | None) -> list[str]:
    """Return the gene identifiers in the order of the AnnData.

    Raises
    ------
    DataError
        The column is missing, or identifiers are missing or not unique.
    """
    import pandas as pd

    if gene_id_key is None:
        column, what = pd.Series(adata.var_names), "var_names"
    else:
        column, what = get_column(adata.var, gene_id_key, "gene_id_key", table_name="var"), f"var[{gene_id_key!r}]"
    if n_missing := int(column.isna().sum()):
        raise DataError(f"{what} is missing for {n_missing} genes; drop them: adata[:, adata.{what}.notna()].copy()")
    ids = [as_label(value) for value in column]
    doubled = pd.Index(ids)[pd.Index(ids).duplicated()].unique()
    if len(doubled):
        remedy = "set gene_id_key= to a var column of unique identifiers, or call adata.var_names_make_unique()"
        if gene_id_key is not None:
            remedy = "keep one of each: adata[:, ~adata.var[...].duplicated()].copy()"
        shown = ", ".join(map(repr, doubled[:5]))
        raise DataError(f"{what} has {len(doubled)} names that occur more than once, for example {shown}; {remedy}")
    return ids


def read_library(obs: Any, key: str) -> np.ndarray:
    """Return given library sizes, float64.

    Raises
    ------
    DataError
        The column is missing, or a value is not a positive finite number.
    """
    column = get_column(obs, key, "size_factor_key")
    try:
        library = column.astype("float64").to_numpy()
    except (TypeError, ValueError) as error:
        raise DataError(f"obs[{key!r}] (size_factor_key) does not hold numbers: {error}") from error
    bad = np.flatnonzero(~(np.isfinite(library) & (library > 0)))
    if len(bad):
        raise DataError(
            f"obs[{key!r}] (size_factor_key) must be positive and finite, but is {library[bad[0]]} in row {bad[0]} "
            f"and bad in {len(bad)} of {len(library)} cells"
        )
    return library


def refuse_empty_cells(totals: np.ndarray, where: str) -> None:
    """Raise DataError if any of the totals, shape (cells,), is zero."""
    empty = np.flatnonzero(totals == 0)
    if len(empty):
        raise DataError(
            f"{len(empty)} of {len(totals)} cells have no counts in {where} on this panel (first: row {empty[0]}). "
            "Drop them: keep = np.asarray(counts.sum(axis=1)).ravel() > 0; adata = adata[keep].copy(); for X of the "
            "same panel: sc.pp.filter_cells(adata, min_counts=1)"
        )


def _check_counts(adata: Any, layer: str | None, genes: list[str]) -> None:
    reader = RowReader(adata, layer)
    totals = np.empty(adata.n_obs)
    for rows, block in reader.chunks():
        try:
            totals[rows] = check_block(block, rows.start, reader.where, lambda: adata.obs_names, genes)
        except DataError as error:
            raise DataError(f"{error}{counts_hint(adata, layer)}") from None
    refuse_empty_cells(totals, reader.where)


def _declare(adata: Any, declaration: dict[str, Any]) -> None:
    from anndata import ImplicitModificationWarning

    if adata.is_view and adata.isbacked:
        raise DataError("a view of a backed AnnData cannot be declared: call setup_anndata before subsetting")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImplicitModificationWarning)  # a view becomes a copy of its own
        adata.uns[SETUP_KEY] = declaration


def _string_columns(adata: Any) -> dict[str, tuple[str, ...]]:
    """Return the string columns of ``var`` (missing: empty strings), and var_names where these are not the ids."""
    out = {}
    for name in adata.var.columns[~adata.var.columns.duplicated()]:
        values = adata.var[name].astype(object)
        known = values.notna()
        if isinstance(name, str) and known.any() and all(isinstance(value, str) for value in values[known]):
            out[name] = tuple(map(str, values.where(known, "")))
    if adata.uns[SETUP_KEY].get("gene_id_key") is not None:
        out.setdefault(adata.var_names.name or "var_names", tuple(map(str, adata.var_names)))
    return out
