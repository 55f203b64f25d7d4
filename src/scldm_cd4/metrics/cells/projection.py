"""Principal components of reference cells, applied to other cells."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp

from scldm_cd4._errors import DataError
from scldm_cd4.metrics.cells.genes import gene_order
from scldm_cd4.metrics.cells.pseudobulk import as_matrix


@dataclass(frozen=True)
class Projection:
    """Principal axes with the mean of the cells they were fitted on.

    Attributes
    ----------
    mean
        Mean of the reference cells, (genes,).
    components
        Orthonormal axes, (components, genes); the largest loading of each is positive.
    explained_variance
        Variance of the reference cells along each axis.
    genes
        Names of the genes where the reference cells had names, (genes,).
    n_cells
        Number of reference cells.

    Examples
    --------
    >>> metrics.fit_projection(values, n_components=3).apply(values).shape == (real.n_obs, 3)
    True
    """

    mean: np.ndarray
    components: np.ndarray
    explained_variance: np.ndarray
    genes: np.ndarray | None = None
    n_cells: int | None = None

    def apply(self, values: Any) -> np.ndarray:
        """Project cells after subtracting the mean of the *reference* cells.

        Parameters
        ----------
        values
            Matrix or AnnData, cells x genes, normalised like the reference cells. Genes with names on both sides are
            matched by name, others by position.

        Returns
        -------
        Coordinates, cells x components.

        Raises
        ------
        DataError
            If the number or the names of the genes differ from the reference.
        """
        if self.genes is not None and hasattr(values, "var_names"):
            values = values[:, gene_order(self.genes, values.var_names)]
        matrix = as_matrix(values)
        if matrix.shape[1] != self.mean.size:
            raise DataError(f"{matrix.shape[1]} genes given, but the axes were fitted on {self.mean.size}")
        return np.asarray(matrix @ self.components.T) - self.mean @ self.components.T


def fit_projection(reference: Any, n_components: int = 30) -> Projection:
    """Fit principal components on reference cells.

    Fit on cells that are not scored, by default the training cells: axes fitted on few scored cells overfit them, and
    an independent repeat of the experiment then looks worse than a crude baseline.

    Parameters
    ----------
    reference
        Matrix or AnnData of normalised values, cells x genes.
    n_components
        Number of axes.

    Returns
    -------
    The projection. The same input gives the same signs.

    Raises
    ------
    DataError
        If there are too few cells or genes for the axes asked for.

    Examples
    --------
    >>> projection = metrics.fit_projection(metrics.log_normalize(train), n_components=5)
    >>> projection.apply(values).shape == (real.n_obs, 5)
    True
    """
    from sklearn.decomposition import PCA

    matrix = as_matrix(reference)
    limit = min(matrix.shape) - 1
    if not 1 <= n_components <= limit:
        raise DataError(f"n_components={n_components} needs more cells and genes than {matrix.shape}; use 1 to {limit}")
    # Sparse input is centred implicitly by the Lanczos solver; the seed only sets its start vector.
    pca = PCA(n_components=n_components, svd_solver="arpack", random_state=0)
    pca.fit(matrix.astype(np.float64) if sp.issparse(matrix) else np.asarray(matrix, dtype=np.float64))
    peak = np.abs(pca.components_).argmax(axis=1)
    signs = np.sign(pca.components_[np.arange(n_components), peak])
    genes = np.asarray(reference.var_names, dtype=str) if hasattr(reference, "var_names") else None
    mean, components = np.asarray(pca.mean_).ravel(), pca.components_ * signs[:, None]
    return Projection(mean, components, pca.explained_variance_, genes, matrix.shape[0])
