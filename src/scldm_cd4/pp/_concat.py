"""Real and generated cells in one AnnData."""

from typing import Any

import numpy as np

from scldm_cd4._errors import DataError, GeneMismatchError
from scldm_cd4.data.mudata import is_mudata, modality_of, with_modality
from scldm_cd4.data.setup import GENERATED, require_anndata

KINDS = ("real", "generated")


def concat_generated(
    real: Any,
    generated: Any,
    *,
    origin_key: str = "origin",
    layer: str | None = None,
    modality: str | None = None,
) -> Any:
    """Put generated cells below real ones, and mark which is which.

    Genes are matched by name: the genes of the generated cells are kept, in their order. Values must be of one kind:
    generated ``counts`` go with raw counts, ``lognorm`` with values that ``normalize_total(target_sum=1e4)`` and
    ``log1p`` of scanpy made on these genes. Use ``output="counts"`` and normalise both together afterwards.

    Parameters
    ----------
    real
        AnnData of real cells; or MuData, of which one modality gets the generated cells (its other modalities keep
        their cells, as MuData allows). Not changed.
    generated
        Cells of `scldm_cd4.CD4Model.generate`.
    origin_key
        New column of ``obs``: ``real`` or ``generated``.
    layer
        Layer of `real` with the values; by default that declared by ``setup_anndata``, else ``X``.
    modality
        Of a MuData; by default that declared by ``setup_mudata``.

    Returns
    -------
    AnnData (MuData for MuData). ``X``: the values of both, CSR float32. ``obs``: all columns of both; a column that one
    side lacks is missing (NaN) there; categories are those of the real cells, in their order, then new ones;
    ``is_generated`` (bool) and `origin_key` (categorical). ``var``: that of the generated cells. ``obsm`` and
    ``layers`` are left out. ``uns["scldm_cd4"]``: how the cells were generated. The declaration of ``setup_anndata``
    is not kept, so that no model is trained on generated cells by accident. Generated cells whose names are those of
    real ones get the ending ``-generated``.

    Raises
    ------
    DataError
        `generated` holds no counts or log-normalised values, the kinds of values differ, the column is there already,
        or labels of one column are of different types.
    GeneMismatchError
        A gene of the generated cells is missing in `real`, or names of genes occur twice.

    Examples
    --------
    >>> both = pp.concat_generated(adata, cells)
    >>> both.obs["origin"].cat.categories.tolist()
    ['real', 'generated']
    """
    if is_mudata(real):
        name = modality_of(real) if modality is None else modality
        if name not in real.mod:
            raise DataError(f"the MuData has no modality {name!r}; it has {', '.join(map(repr, real.mod))}")
        one = concat_generated(_with_labels(real, name, generated), generated, origin_key=origin_key, layer=layer)
        return with_modality(real, name, one)
    require_anndata(real)
    require_anndata(generated)
    import anndata as ad

    values, genes = _values(real, generated, layer)
    obs = _obs(real.obs.set_axis(real.obs_names), generated.obs, origin_key)  # cells in files are numbered in obs
    matrix = _stack(values, generated.X)
    return ad.AnnData(matrix, obs=obs, var=generated.var.copy(), uns={GENERATED: dict(generated.uns[GENERATED])})


def _values(real: Any, generated: Any, layer: str | None) -> tuple[Any, np.ndarray]:
    """Return the values of the real cells at the genes of the generated ones, and these genes."""
    from scldm_cd4.data.matrix import RowReader, is_bad
    from scldm_cd4.metrics.cells.genes import gene_names
    from scldm_cd4.metrics.cells.places import layers_of

    facts = generated.uns.get(GENERATED)
    if facts is None or facts.get("output") not in ("counts", "lognorm"):
        found = "no uns['scldm_cd4']" if facts is None else f"output={facts.get('output')!r}"
        raise DataError(f"cells generated with output='counts' (or 'lognorm') are needed, these have {found}")
    counts = facts["output"] == "counts"
    layer = layers_of({"real": real}, layer, counts=counts)["real"]
    position = {gene: i for i, gene in enumerate(gene_names(real, "real"))}
    genes = [str(gene) for gene in generated.var_names]
    if missing := [gene for gene in genes if gene not in position]:
        raise GeneMismatchError(
            f"{len(missing)} of {len(genes)} generated genes are not among the real ones, first {missing[0]!r}; "
            "generate only shared ones with genes="
        )
    reader = RowReader(real, layer)
    block = reader.read(slice(0, real.n_obs))[:, [position[gene] for gene in genes]]
    has_counts = not is_bad(block.data).any()
    if has_counts != counts:
        kinds = ("log-normalised values", "raw counts")
        raise DataError(
            f"{reader.where} of the real cells holds {kinds[has_counts]}, the generated cells hold {kinds[counts]}; "
            "both must be of one kind: name the layer of the real cells with layer=, or generate with "
            f"output={'counts' if has_counts else 'lognorm'!r}"
        )
    return block, np.array(genes)


def _stack(real: Any, generated: Any) -> Any:
    from scipy import sparse

    made = generated[:] if hasattr(generated, "format") and not sparse.issparse(generated) else generated
    return sparse.vstack([sparse.csr_matrix(real), sparse.csr_matrix(made)], format="csr", dtype=np.float32)


def _obs(real: Any, generated: Any, origin_key: str) -> Any:
    """Return both tables of cells, one below the other."""
    import pandas as pd

    if origin_key in real or origin_key in generated:
        raise DataError(f"obs has a column {origin_key!r} already: choose another origin_key=")
    if "is_generated" in real and real["is_generated"].astype("boolean").fillna(False).any():
        raise DataError("some of the real cells are marked as generated (obs['is_generated']): leave them out first")
    columns = list(dict.fromkeys([*real.columns, *generated.columns]))
    index, n = _names(real.index, generated.index), len(real)
    out = pd.DataFrame(index=index)
    for name in columns:
        if name == "is_generated":
            continue
        sides = [table.get(name) for table in (real, generated)]
        out[name] = _column(name, sides, (n, len(generated)))
    out["is_generated"] = np.arange(len(index)) >= n
    out[origin_key] = pd.Categorical.from_codes((np.arange(len(index)) >= n).astype(int), list(KINDS))
    return out


def _names(real: Any, generated: Any) -> Any:
    import pandas as pd

    shared = generated.isin(real)
    made = [f"{name}-generated" if is_shared else str(name) for name, is_shared in zip(generated, shared, strict=True)]
    return pd.Index([*real.astype(str), *made], dtype=object)


def _column(name: str, sides: list[Any], lengths: tuple[int, int]) -> Any:
    """Return one column of both sides, as a type that files can hold."""
    import pandas as pd

    present = [side for side in sides if side is not None]
    if any(isinstance(side.dtype, pd.CategoricalDtype) or side.dtype == object for side in present):
        return _categories(name, sides, lengths)
    if len(present) == 1:  # a type that can be missing
        kind = {"b": "boolean", "i": "Int64", "u": "UInt64"}.get(getattr(present[0].dtype, "kind", "O"))
        known = present[0] if kind is None else present[0].astype(kind)
        start = 0 if sides[0] is not None else lengths[0]
        return known.set_axis(range(start, start + len(known))).reindex(range(sum(lengths))).array
    try:
        return pd.concat(present, ignore_index=True).array
    except (TypeError, ValueError) as error:
        raise DataError(f"obs[{name!r}] is of different types in real and generated cells: {error}") from error


def _categories(name: str, sides: list[Any], lengths: tuple[int, int]) -> Any:
    """Return labels of both sides: the categories of the real cells in their order, then new ones."""
    import pandas as pd

    parts = [None if side is None else pd.Categorical(side) for side in sides]
    levels = list(dict.fromkeys(level for part in parts if part is not None for level in part.categories))
    kinds = {type(level).__name__ for level in levels if not isinstance(level, str)}
    if kinds and len({isinstance(level, str) for level in levels}) > 1:
        raise DataError(
            f"obs[{name!r}] holds strings on one side and {', '.join(sorted(kinds))} on the other; make both strings: "
            f"adata.obs[{name!r}] = adata.obs[{name!r}].astype(str)"
        )
    codes = [
        np.full(n, -1) if part is None else pd.Index(levels).get_indexer(np.asarray(part.categories))[part.codes]
        for part, n in zip(parts, lengths, strict=True)
    ]
    codes = [c if part is None else np.where(part.codes < 0, -1, c) for c, part in zip(codes, parts, strict=True)]
    ordered = bool(parts[0] is not None and parts[0].ordered and len(levels) == len(parts[0].categories))
    return pd.Categorical.from_codes(np.concatenate(codes), levels, ordered=ordered)


def _with_labels(mdata: Any, name: str, generated: Any) -> Any:
    """Return a modality with those columns of the whole that the generated cells have and it lacks."""
    from scldm_cd4.data.mudata import joined

    facts = generated.uns.get(GENERATED, {})
    keys = [facts[key] for key in ("donor_key", "timepoint_key", "perturbation_key") if key in facts]
    return joined(mdata, name, [key for key in keys if key not in mdata.mod[name].obs and key in mdata.obs])
