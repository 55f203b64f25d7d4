"""MuData: which modality holds the counts, and where the labels of its cells are."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from scldm_cd4._errors import DataError
from scldm_cd4.data.labels import get_column
from scldm_cd4.data.setup import SETUP_KEY, read_declaration, setup_anndata
from scldm_cd4.registry import suggestion

MODALITIES = "modalities"
OBS_KEYS = ("perturbation_key", "donor_key", "timepoint_key", "size_factor_key")
"""Arguments that name a column of cells, of one modality or of the whole."""


def setup_mudata(
    mdata: Any,
    *,
    perturbation_key: str,
    donor_key: str | None = None,
    timepoint_key: str | None = None,
    control: str | None = None,
    layer: str | None = None,
    size_factor_key: str | None = None,
    gene_id_key: str | None = None,
    modalities: Mapping[str, str] | None = None,
) -> None:
    """Check a MuData with raw counts in one modality and declare what its columns mean; see `setup_anndata`.

    The cells are those of the modality with the counts. Labels of cells may be there, in another modality (such as one
    of guides), or in ``mdata.obs``; they are found by the names of the cells.

    Parameters
    ----------
    mdata
        Only ``uns["_scldm_cd4"]`` is written. Later uses of this MuData find the counts and labels by it.
    perturbation_key, donor_key, timepoint_key, control, layer, size_factor_key, gene_id_key
        As for `setup_anndata`.
    modalities
        The modality of each argument, as in scvi-tools: ``{"layer": "rna", "perturbation_key": "rna"}``. ``layer`` says
        which modality holds the counts (also where they are in its ``X``); it may be left out with a single modality.
        Columns of cells that are not listed are looked for in ``mdata.obs``.

    Raises
    ------
    DataError
        It is no MuData, a modality or a column is missing, a cell has no label, or what `setup_anndata` raises for.

    Examples
    --------
    >>> import mudata
    >>> with mudata.set_options(pull_on_update=False):
    ...     mdata = mudata.MuData({"rna": adata})
    >>> where = dict.fromkeys(["layer", "perturbation_key", "donor_key"], "rna")
    >>> keys = {"perturbation_key": "perturbation", "donor_key": "donor_id"}
    >>> CD4Model.setup_mudata(mdata, **keys, control="NTC", modalities=where)
    >>> CD4Model(mdata, "tiny").adata.shape == mdata["rna"].shape
    True
    """
    if not is_mudata(mdata):
        raise DataError(f"a MuData is needed, got {type(mdata).__name__}; use setup_anndata for an AnnData")
    given = {
        "perturbation_key": perturbation_key,
        "donor_key": donor_key,
        "timepoint_key": timepoint_key,
        "size_factor_key": size_factor_key,
        "control": control,
        "layer": layer,
        "gene_id_key": gene_id_key,
    }
    places = _places(mdata, dict(modalities or {}), given)
    cells = _with_columns(mdata, places["layer"], {key: (given[key], places.get(key)) for key in OBS_KEYS})
    setup_anndata(cells, **given)  # type: ignore[arg-type]
    mdata.uns[SETUP_KEY] = dict(cells.uns[SETUP_KEY]) | {MODALITIES: places}


def is_mudata(data: Any) -> bool:
    """Return whether this is a MuData; does not import mudata, which whoever has one has done."""
    module = sys.modules.get("mudata")
    return module is not None and isinstance(data, module.MuData)


def as_anndata(data: Any) -> Any:
    """Return the cells of a MuData with their counts and labels as AnnData that shares the counts; others unchanged.

    Raises
    ------
    DataError
        The MuData is not declared, or no longer fits its declaration.
    """
    if not is_mudata(data):
        return data
    places = _declared(data)
    declared = {k: v for k, v in data.uns[SETUP_KEY].items() if k != MODALITIES}
    keys = {key: (declared.get(key), places.get(key)) for key in OBS_KEYS}
    out = _with_columns(data, places["layer"], keys)
    out.uns[SETUP_KEY] = declared
    read_declaration(out)
    return out


def writable(data: Any) -> Any:
    """Return the AnnData to write results to: the modality with the counts of a MuData, else what was given."""
    return data.mod[modality_of(data)] if is_mudata(data) else data


def modality_of(mdata: Any) -> str:
    """Return the modality with the counts: the declared one, or the only one.

    Raises
    ------
    DataError
        There are several, and none is declared.
    """
    if SETUP_KEY not in mdata.uns and len(mdata.mod) == 1:
        return str(next(iter(mdata.mod)))
    return _declared(mdata)["layer"]


def joined(mdata: Any, name: str, columns: Sequence[str]) -> Any:
    """Return a modality as AnnData that shares its values, with further columns of ``mdata.obs``."""
    import anndata as ad

    cells = mdata.mod[name]
    obs = cells.obs.copy()
    for column in columns:
        obs[column] = mdata.obs[column].reindex(cells.obs_names)
    uns = {SETUP_KEY: cells.uns[SETUP_KEY]} if SETUP_KEY in cells.uns else {}
    if SETUP_KEY in mdata.uns:
        uns = {SETUP_KEY: {k: v for k, v in mdata.uns[SETUP_KEY].items() if k != MODALITIES}}
    return ad.AnnData(cells.X, obs=obs, var=cells.var, layers=dict(cells.layers), uns=uns)


def with_modality(mdata: Any, name: str, cells: Any) -> Any:
    """Return a MuData with other cells in one modality; the other modalities and the columns of the whole stay."""
    import mudata

    others = {key: value.copy() for key, value in mdata.mod.items() if key != name}
    with mudata.set_options(pull_on_update=False):
        out = mudata.MuData({key: cells if key == name else others[key] for key in mdata.mod})
        prefixes = tuple(f"{key}:" for key in mdata.mod)
        for column in mdata.obs.columns:
            if not str(column).startswith(prefixes):
                out.obs[column] = mdata.obs[column].reindex(out.obs_names)
    out.uns.update({key: value for key, value in mdata.uns.items() if key != SETUP_KEY})
    return out


def _declared(mdata: Any) -> dict[str, str]:
    found = mdata.uns.get(SETUP_KEY)
    if found is None or MODALITIES not in found:
        raise DataError(
            f"uns[{SETUP_KEY!r}] of the MuData is absent: call CD4Model.setup_mudata(mdata, perturbation_key=..., "
            "modalities={'layer': 'rna', ...}) first"
        )
    places = {str(key): str(value) for key, value in found[MODALITIES].items()}
    for name in set(places.values()) - set(mdata.mod):
        raise DataError(f"the declared modality {name!r} is not in the MuData any more; call setup_mudata again")
    return places


def _places(mdata: Any, modalities: dict[str, str], given: Mapping[str, str | None]) -> dict[str, str]:
    """Return the modality of each argument that has one; of the counts in any case."""
    allowed = ("layer", "gene_id_key", *OBS_KEYS)
    for argument, name in modalities.items():
        if argument not in allowed:
            raise DataError(f"modalities= takes {', '.join(allowed)} as keys, got {argument!r}")
        if name not in mdata.mod:
            raise DataError(
                f"modalities[{argument!r}]={name!r} is no modality.{suggestion(name, mdata.mod, 'modalities are')}"
            )
    if "layer" not in modalities:
        if len(mdata.mod) != 1:
            raise DataError(
                "say which modality holds the counts: modalities={'layer': ...}, one of "
                f"{', '.join(map(repr, mdata.mod))} (also where the counts are in its X)"
            )
        modalities["layer"] = next(iter(mdata.mod))
    if modalities.pop("gene_id_key", modalities["layer"]) != modalities["layer"]:
        raise DataError("gene_id_key is a column of the modality with the counts: leave it out of modalities=")
    return {key: str(name) for key, name in modalities.items() if key == "layer" or given[key] is not None}


def _with_columns(mdata: Any, name: str, columns: Mapping[str, tuple[Any, str | None]]) -> Any:
    """Return the cells of a modality as AnnData that shares its values, with columns from elsewhere."""
    import anndata as ad

    cells = mdata.mod[name]
    obs = cells.obs.copy()
    for what, (column, place) in columns.items():
        if column is None or place == name:
            continue
        table, where = (
            (mdata.obs, "obs of the MuData") if place is None else (mdata.mod[place].obs, f"obs of {place!r}")
        )
        if place is None and column not in table and column in cells.obs:
            raise DataError(
                f"{what}={column!r} is not a column of mdata.obs, but of the modality {name!r}: pass "
                f"modalities={{..., {what!r}: {name!r}}}"
            )
        found = get_column(table, column, what, table_name=where)
        obs[column] = found.reindex(cells.obs_names)
    return ad.AnnData(cells.X, obs=obs, var=cells.var, layers=dict(cells.layers))
