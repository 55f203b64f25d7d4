"""The public CD4+ T cell Perturb-seq files, cell by cell."""

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np

from scldm_cd4._errors import DataError
from scldm_cd4.data.labels import get_column

LOGGER = logging.getLogger("scldm_cd4")
FACTS = "perturb_seq"
FILE_NAME = re.compile(r"^(D\d+)_([A-Za-z0-9]+?)(?:[._].*)?$")
"""Names of the public files: ``D1_Rest.assigned_guide.h5ad``."""
COLUMNS = ("guide_type", "perturbed_gene_id")


def read_perturb_seq(
    source: Any,
    *,
    donor: str | None = None,
    timepoint: str | None = None,
    label: str = "perturbed_gene_id",
    control: str = "NTC",
    drop_low_quality: bool = False,
    drop_no_guide: bool = False,
    drop_multi_guide: bool = False,
    backed: bool = False,
) -> Any:
    """Read a file of the public CD4+ T cell Perturb-seq, and count cells that a model should not see.

    All columns stay as they are. Up to three are added, which a model needs and the public files lack: ``perturbation``
    (the label column, where cells with one non-targeting guide have the label `control`, and cells without or with
    several guides have none), and, where they are missing, ``donor_id`` and ``culture_condition``. Nothing is dropped
    unless asked for.

    Parameters
    ----------
    source
        A file such as ``D1_Rest.assigned_guide.h5ad``, or an AnnData with its columns (``guide_type``,
        ``perturbed_gene_id``, ``guide_id``; ``guide_group`` and ``low_quality`` where they are there), which is not
        changed.
    donor, timepoint
        Levels for ``donor_id`` and ``culture_condition`` where the columns are missing; by default those in the name of
        the file (``D1``, ``Rest``).
    label
        Column with the perturbed gene: ``perturbed_gene_id`` (Ensembl) or ``perturbed_gene_name``.
    control
        Label of cells with a non-targeting guide.
    drop_low_quality
        Drop cells with ``low_quality``.
    drop_no_guide, drop_multi_guide
        Drop cells in which no guide, or more than one, was found. Such cells have no label, so that
        ``setup_anndata`` refuses them.
    backed
        Leave the counts in the file and read them when they are needed.

    Returns
    -------
    AnnData. ``uns["perturb_seq"]`` counts the cells: ``n_cells``, ``n_low_quality``, ``n_no_guide``, ``n_multi_guide``,
    ``n_single_guide``, ``n_control`` (a cell may count twice), ``n_dropped`` and ``n_kept``; and names the
    ``columns_added``.

    Raises
    ------
    DataError
        A column is missing, a flag is no truth value, donor or time point are not known, or no cell is left.

    Notes
    -----
    Columns and their meaning: Zhu, Dann et al. 2025 (bioRxiv 10.64898/2025.12.23.696273). Of the cells that passed
    quality control there, 66 % had one guide, 14 % none and 20 % several.

    Examples
    --------
    >>> public = adata.copy()
    >>> public.obs["perturbed_gene_id"] = public.obs["perturbation"].astype(str)
    >>> public.obs["guide_type"] = np.where(public.obs["perturbation"] == "NTC", "non-targeting", "targeting")
    >>> public.obs["guide_id"] = public.obs["perturbed_gene_id"] + "-1"
    >>> del public.obs["perturbation"]
    >>> read = pp.read_perturb_seq(public, timepoint="Rest", drop_no_guide=True)
    >>> read.uns["perturb_seq"]["n_dropped"]
    0
    """
    adata, place = _open(source)
    for name in (*COLUMNS, label):
        get_column(adata.obs, name, "a public column")
    low, none, multi = _low_quality(adata.obs), *_guides(adata.obs)
    is_control = _lower(adata.obs["guide_type"]).isin(["non-targeting", "non_targeting", "ntc"]).to_numpy()
    is_control &= ~(none | multi)
    dropped = (low & drop_low_quality) | (none & drop_no_guide) | (multi & drop_multi_guide)
    if dropped.all():
        raise DataError(f"no cell of {place} is left of {len(low)}: all were to be dropped")
    added = _levels(adata.obs, source, donor, timepoint)
    added["perturbation"] = _labels(adata.obs, label, control, is_control, none | multi)
    facts: dict[str, Any] = {
        "n_cells": len(low),
        "n_low_quality": int(low.sum()),
        "n_no_guide": int(none.sum()),
        "n_multi_guide": int(multi.sum()),
        "n_single_guide": int((~none & ~multi).sum()),
        "n_control": int(is_control.sum()),
        "n_dropped": int(dropped.sum()),
        "n_kept": int((~dropped).sum()),
    }
    LOGGER.info("%s: %s", place, ", ".join(f"{name} {n}" for name, n in facts.items()))
    facts["columns_added"] = list(added)
    if adata is not source:  # columns first: a view of a file takes none
        _add(adata, added, facts)
        out = adata[~dropped] if dropped.any() else adata
        return out if backed else out.to_memory()
    out = adata[~dropped].to_memory() if adata.isbacked else adata[~dropped].copy()
    _add(out, {name: values[~dropped] for name, values in added.items()}, facts)
    return out


def _add(adata: Any, columns: dict[str, Any], facts: dict[str, Any]) -> None:
    import pandas as pd

    for name, values in columns.items():
        adata.obs[name] = pd.Categorical(values)
    adata.uns[FACTS] = facts


def _open(source: Any) -> tuple[Any, str]:
    if isinstance(source, str | Path):
        from scldm_cd4.data.files import open_h5ad

        return open_h5ad(source, backed=True), str(source)
    from scldm_cd4.data.setup import require_anndata

    require_anndata(source)
    return source, "the AnnData"


def _lower(column: Any) -> Any:
    return column.astype(object).where(column.notna(), "").astype(str).str.lower()


def _low_quality(obs: Any) -> np.ndarray:
    if "low_quality" not in obs:
        return np.zeros(len(obs), dtype=bool)
    column = obs["low_quality"]
    text = _lower(column)
    known = {"true": True, "false": False, "1": True, "0": False}
    if not text.isin(known).all():
        wrong = column[~text.isin(known)].iloc[0]
        raise DataError(f"obs['low_quality'] must hold truth values, found {wrong!r}")
    return text.map(known).to_numpy(dtype=bool)


def _guides(obs: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return which cells have no guide, and which have several: by ``guide_group``, and by ``guide_id``."""
    none, multi = np.zeros(len(obs), dtype=bool), np.zeros(len(obs), dtype=bool)
    for name in ("guide_group", "guide_id"):
        if name in obs:
            text = _lower(obs[name]).str.replace("_", " ").str.replace("-", " ")
            none |= ((text == "") | text.str.match(r"^no (sgrna|guide)")).to_numpy()
            multi |= text.str.match(r"^multi\W*(sgrna|guide)").to_numpy()
    if not {"guide_group", "guide_id"} & set(obs.columns):
        none |= (_lower(obs["guide_type"]) == "").to_numpy()
    return none & ~multi, multi


def _labels(obs: Any, label: str, control: str, is_control: np.ndarray, unknown: np.ndarray) -> np.ndarray:
    values = obs[label].astype(object).where(obs[label].notna(), None).to_numpy(dtype=object, copy=True)
    if clash := int((np.asarray([v == control for v in values]) & ~is_control & ~unknown).sum()):
        raise DataError(
            f"{clash} cells with a targeting guide have {control!r} in obs[{label!r}]; choose another control="
        )
    if "perturbation" in obs:
        raise DataError("obs has a column 'perturbation' already: rename it, as the labels of the guides go there")
    values[is_control], values[unknown] = control, None
    return values


def _levels(obs: Any, source: Any, donor: str | None, timepoint: str | None) -> dict[str, Any]:
    """Return the columns of donor and time point that are missing."""
    found = FILE_NAME.match(Path(source).name) if isinstance(source, str | Path) else None
    from_name = found.groups() if found else (None, None)
    out: dict[str, Any] = {}
    sides = (("donor_id", donor, from_name[0], "donor"), ("culture_condition", timepoint, from_name[1], "timepoint"))
    for column, given, guess, argument in sides:
        if column in obs:
            if given is not None and set(obs[column].astype(str)) != {given}:
                raise DataError(
                    f"obs has a column {column!r} that differs from {argument}={given!r}; leave {argument}= out"
                )
            continue
        level = guess if given is None else given
        if level is None:
            raise DataError(f"obs has no column {column!r} and the source tells none: pass {argument}=")
        out[column] = np.full(len(obs), level, dtype=object)
    return out
