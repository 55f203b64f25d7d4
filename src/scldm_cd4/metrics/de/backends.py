"""Other implementations of the rank-sum test, for comparison with ours."""

from typing import Any, Literal

import numpy as np
import scipy.sparse as sp

from scldm_cd4._errors import DataError
from scldm_cd4.metrics.de.ranks import ControlRanks, combine_tests

Backend = Literal["ranks", "illico", "scanpy"]


def rank_test(
    values: Any, codes: np.ndarray, n_groups: int, control: ControlRanks, backend: Backend = "ranks"
) -> tuple[np.ndarray, np.ndarray]:
    """Test groups of cells against one control.

    Parameters
    ----------
    values
        Normalised values, cells x genes.
    codes
        Group of each cell.
    n_groups
        Number of groups.
    control
        Control cells.
    backend
        Which implementation.

    Returns
    -------
    z and two-sided p, (groups, genes).

    Raises
    ------
    DataError
        If the backend is unknown or not installed, or a group without cells is given to another backend than ours.
    """
    if backend == "ranks":
        return combine_tests([control.test_groups(values, codes, n_groups)])
    if backend not in ("illico", "scanpy"):
        raise DataError(f"backend={backend!r} is not known; use 'ranks', 'illico' or 'scanpy'")
    if len(np.unique(codes)) != n_groups:
        raise DataError(f"backend={backend!r} needs cells in every group; use backend='ranks'")
    import anndata as ad

    stacked = sp.vstack([sp.csr_matrix(control.values), sp.csr_matrix(values)], format="csr")
    adata = ad.AnnData(stacked)
    names = [f"group{code}" for code in range(n_groups)]
    adata.obs["group"] = ["control"] * control.n_cells + [names[code] for code in codes]
    adata.obs["group"] = adata.obs["group"].astype("category")
    return _illico(adata, names) if backend == "illico" else _scanpy(adata, names)


def _illico(adata: Any, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    from scipy.special import ndtri

    try:
        from illico import asymptotic_wilcoxon
    except ImportError as error:
        raise DataError("backend='illico' needs the extra: pip install 'scldm_cd4[de]'") from error
    table = asymptotic_wilcoxon(adata, group_keys="group", reference="control", is_log1p=True, n_threads=1)
    p, u = (
        table[column].unstack().loc[names, adata.var_names].to_numpy(dtype=np.float64)
        for column in ("p_value", "statistic")
    )
    sizes = adata.obs["group"].value_counts()
    middle = sizes[names].to_numpy()[:, None] * sizes["control"] / 2
    return np.sign(u - middle) * -ndtri(np.maximum(p, np.finfo(float).tiny) / 2), p


def _scanpy(adata: Any, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    import scanpy as sc
    from threadpoolctl import threadpool_limits

    # fold changes are not taken from here, so that X counts as log1p of any base
    adata.uns["log1p"] = {"base": None}
    with threadpool_limits(1):  # numba would change the thread count of torch for good
        sc.tl.rank_genes_groups(adata, "group", groups=names, reference="control", method="wilcoxon", tie_correct=True)
    found = adata.uns["rank_genes_groups"]
    z, p = np.empty((2, len(names), adata.n_vars))
    for row, name in enumerate(names):
        at = adata.var_names.get_indexer(found["names"][name])
        z[row, at], p[row, at] = found["scores"][name], found["pvals"][name]
    return z, p
