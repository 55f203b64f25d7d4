"""Genes are matched by name, whatever their order."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from scldm_cd4._errors import DataError, GeneMismatchError
from scldm_cd4.data.setup import gene_ids
from scldm_cd4.metrics.cells.places import declared
from scldm_cd4.metrics.cells.pseudobulk import as_matrix


def gene_names(adata: Any, what: str) -> np.ndarray:
    """Give the names of the genes as strings: the declared identifiers, else ``var_names``.

    Raises
    ------
    DataError
        If declared identifiers are missing or occur twice.
    GeneMismatchError
        If a name occurs twice.
    """
    key = declared(adata).get("gene_id_key")
    if key is not None:
        return np.array(gene_ids(adata, key), dtype=object)
    names = np.asarray(adata.var_names.astype(str), dtype=object)
    unique, counts = np.unique(names.astype(str), return_counts=True)
    if len(unique) < len(names):
        raise GeneMismatchError(
            f"{what}: {int((counts > 1).sum())} gene names occur more than once, e.g. {list(unique[counts > 1][:3])}; "
            "genes are matched by name, so make them unique (adata.var_names_make_unique())"
        )
    return names


def common_genes(cells: Mapping[str, Any], genes: Any = None) -> np.ndarray:
    """Decide which genes are scored.

    Parameters
    ----------
    cells
        AnnData by what they are called in messages; the first sets the order.
    genes
        ``"exact"``: all must have the same set. ``"intersection"``: those that all have. Or a list of names. None is
        ``"exact"`` of a caller that gives no choice, so that messages name none.

    Returns
    -------
    Names, (genes,).

    Raises
    ------
    GeneMismatchError
        If the sets differ, a listed gene is missing, or none is left.
    """
    choice = "" if genes is None else ", or genes='intersection'"
    genes = "exact" if genes is None else genes
    names = {what: gene_names(adata, what) for what, adata in cells.items()}
    first, *others = names
    chosen = names[first] if isinstance(genes, str) else np.asarray([str(g) for g in genes], dtype=object)
    if isinstance(genes, str) and genes not in ("exact", "intersection"):
        raise GeneMismatchError(f"genes={genes!r} is not known; use 'exact', 'intersection' or a list of names")
    for what in names if not isinstance(genes, str) else others:
        have = set(names[what])
        if genes == "intersection":
            chosen = np.array([name for name in chosen if name in have], dtype=object)
            continue
        missing = [name for name in chosen if name not in have]
        extra = len(have) - (len(chosen) - len(missing)) if isinstance(genes, str) else 0
        if missing or extra:
            raise GeneMismatchError(
                f"{what}: {len(missing)} genes of {first} are missing (e.g. {missing[:3]}) and {extra} are extra; "
                f"give the same genes by the same names (setup_anndata(gene_id_key=) chooses a var column){choice}"
            )
    if len(chosen) < 2 or len(set(chosen)) < len(chosen):
        raise GeneMismatchError(f"{len(chosen)} genes to score ({len(set(chosen))} different); give at least two")
    return chosen


def aligned(real: Any, pred: Any) -> tuple[Any, Any]:
    """Take the matrices of two populations, the genes of the second in the order of the first.

    Parameters
    ----------
    real, pred
        Matrices or AnnData (whose ``X`` holds log-normalised values), cells x features.

    Returns
    -------
    Two matrices, dense or CSR.

    Raises
    ------
    DataError
        If the numbers or the names of the features differ.
    """
    if hasattr(real, "var_names") and hasattr(pred, "var_names"):
        pred = pred[:, gene_order(real.var_names, pred.var_names)]
    a, b = as_matrix(real), as_matrix(pred)
    if a.shape[1] != b.shape[1]:
        raise DataError(
            f"the two populations have {a.shape[1]} and {b.shape[1]} features; project both in the same way"
        )
    return a, b


def gene_order(wanted: Any, given: Any) -> np.ndarray:
    """Positions of the wanted genes among the given ones, which must be the same set of unique names.

    Raises
    ------
    DataError
        If names are duplicated, or one side has a gene that the other has not.
    """
    import pandas as pd

    left, right = pd.Index(wanted).astype(str), pd.Index(given).astype(str)
    for names in (left, right):
        if not names.is_unique:
            raise DataError(f"gene names must be unique; {names[names.duplicated()][0]!r} occurs more than once")
    missing, extra = left.difference(right), right.difference(left)
    if len(missing) or len(extra):
        raise DataError(
            f"the two sides must have the same genes: {len(missing)} are missing {list(missing[:3])} and {len(extra)} "
            f"are in excess {list(extra[:3])}; subset both to the same genes first"
        )
    return np.asarray(right.get_indexer(left))
