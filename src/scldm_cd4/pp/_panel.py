"""The genes of a model: the most variable ones, and those that are perturbed."""

import warnings
from typing import Any

import numpy as np

from scldm_cd4._errors import DataError
from scldm_cd4.data.labels import get_column, read_labels
from scldm_cd4.data.matrix import counts_hint
from scldm_cd4.data.setup import require_anndata

SHOWN = 5


def select_panel(
    adata: Any,
    n_top_genes: int = 2000,
    *,
    perturbation_key: str | None = None,
    control: str | None = None,
    gene_key: str | None = None,
    batch_key: str | None = None,
    layer: str | None = None,
    flavor: str = "seurat_v3",
) -> Any:
    """Choose the most variable genes, and keep the perturbed genes in the panel.

    The choice is that of `scanpy.pp.highly_variable_genes`. Choose on training cells only, or held-out cells have had
    a say in what is scored. Without its own gene in the panel, the knock-down of a perturbation cannot be seen.

    Parameters
    ----------
    adata
        AnnData of raw counts; not changed.
    n_top_genes
        Most variable genes. The panel may be larger by the perturbed genes that are not among them.
    perturbation_key
        Column of ``obs`` with the perturbation of each cell; None keeps no further genes.
    control
        The perturbation label of unperturbed cells, which is no gene.
    gene_key
        Column of ``var`` that the perturbation labels are found in, such as gene symbols; None for ``var_names``.
    batch_key
        Column of ``obs``: genes are chosen within each batch and then merged, so that no batch difference is chosen.
    layer
        Layer with the raw counts; None for ``X``.
    flavor
        As of scanpy. ``seurat_v3`` and ``seurat_v3_paper`` take raw counts and need scikit-misc; the others take
        log-normalised values.

    Returns
    -------
    pandas Index of ``var_names``, in the order of the AnnData: ``adata[:, panel].copy()``.

    Raises
    ------
    DataError
        A column or layer is missing, values are no counts, cells are not in memory, scikit-misc is not installed,
        `n_top_genes` is no positive number, or no perturbation label is a gene.

    Warns
    -----
    UserWarning
        Some perturbed genes were not measured, and so cannot be in the panel.

    Examples
    --------
    >>> panel = pp.select_panel(adata, 40, perturbation_key="perturbation", control="NTC")
    >>> smaller = adata[:, panel].copy()
    >>> {"GATA3", "IFNGR1"} <= set(panel)
    True
    """
    require_anndata(adata)
    if adata.isbacked:
        raise DataError(
            "scanpy chooses genes on cells in memory: give all of them, adata.to_memory(), or a random part: "
            "adata[rows].to_memory(), of open_cells cells.to_memory(rows)"
        )
    if isinstance(n_top_genes, bool) or not isinstance(n_top_genes, int | np.integer) or n_top_genes < 1:
        raise DataError(f"n_top_genes must be a whole number of at least 1, got {n_top_genes!r}")
    if layer is not None and layer not in adata.layers:
        raise DataError(f"there is no layer {layer!r}; layers are {', '.join(map(repr, adata.layers)) or 'none'}")
    if batch_key is not None:
        get_column(adata.obs, batch_key, "batch_key")
    keep = np.zeros(adata.n_vars, dtype=bool)
    if perturbation_key is not None:
        keep = _perturbed(adata, perturbation_key, control, gene_key)
    if n_top_genes >= adata.n_vars:
        return adata.var_names.copy()
    chosen = _variable(adata, int(n_top_genes), batch_key, layer, flavor)
    return adata.var_names[chosen | keep]


def _variable(adata: Any, n: int, batch_key: str | None, layer: str | None, flavor: str) -> np.ndarray:
    import scanpy as sc
    from threadpoolctl import threadpool_limits

    options = {"n_top_genes": n, "batch_key": batch_key, "layer": layer, "flavor": flavor}
    with warnings.catch_warnings(), threadpool_limits(1):  # numba would change the thread count of torch for good
        warnings.simplefilter("ignore", FutureWarning)  # of pandas, inside scanpy
        warnings.filterwarnings("error", message=".*expects raw count data")
        try:
            table = sc.pp.highly_variable_genes(adata, inplace=False, **options)
        except ImportError as error:
            raise DataError(f"flavor={flavor!r} needs scikit-misc: pip install scikit-misc") from error
        except UserWarning:
            where = "X" if layer is None else f"layers[{layer!r}]"
            raise DataError(
                f"flavor={flavor!r} chooses genes by raw counts, but {where} holds other values."
                f"{counts_hint(adata, layer)}"
            ) from None
        except ValueError as error:
            raise DataError(
                f"scanpy could not choose genes: {error}. A sparse batch or a constant gene may be the cause"
            ) from error
    if "highly_variable" not in table:
        raise DataError(f"scanpy chose no genes with flavor={flavor!r}")
    table = table.reindex(adata.var_names) if set(table.index) == set(adata.var_names) else table
    return np.asarray(table["highly_variable"], dtype=bool)


def _perturbed(adata: Any, key: str, control: str | None, gene_key: str | None) -> np.ndarray:
    """Mark the genes that are perturbed."""
    _, levels = read_labels(adata.obs, key, "perturbation_key")
    column = adata.var_names if gene_key is None else get_column(adata.var, gene_key, "gene_key", table_name="var")
    names = np.asarray(column).astype(str)
    targets = [level for level in levels if level != control]
    keep: np.ndarray = np.isin(names, targets)
    known = set(names)
    absent = [level for level in targets if level not in known]
    where = "var_names" if gene_key is None else f"var[{gene_key!r}]"
    if targets and not keep.any():
        raise DataError(
            f"none of the {len(targets)} labels in obs[{key!r}], such as {targets[0]!r}, is in {where}. Name the var "
            "column that holds such names with gene_key=, or leave out perturbation_key where labels are not genes"
        )
    if absent:
        shown = ", ".join(absent[:SHOWN]) + (", ..." if len(absent) > SHOWN else "")
        warnings.warn(
            f"{len(absent)} of {len(targets)} perturbed genes are not in {where}, so not in the panel: {shown}",
            UserWarning,
            stacklevel=3,
        )
    return keep
