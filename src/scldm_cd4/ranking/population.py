"""How far perturbed cells are on the way to a population of cells."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scldm_cd4._passes import chunks
from scldm_cd4.data.cells import AlignmentReport, CellData
from scldm_cd4.data.matrix import RowReader
from scldm_cd4.embedding import latents
from scldm_cd4.ranking.scores import divide
from scldm_cd4.registry import Registry

BLOCK = 1 << 20
"""Distances that are held at a time."""
Array = NDArray[np.float64]
Embed = Callable[[Any], Array]
"""Counts (n, genes) to coordinates (n, d)."""


@dataclass(frozen=True)
class PairSums:
    """Sums of distances of some cells to each other and to a target, by parts of the cells (folds)."""

    cross: Array
    """Over the cells of a fold, of the mean distance to the target (folds,)."""
    within: Array
    """Over pairs of different cells (folds, folds)."""
    sizes: Array
    """Cells (folds,)."""
    target: float
    """Mean distance of different target cells."""

    def distance(self, rows: Array) -> Array:
        """Return the energy distance (unbiased) of chosen folds, rows (k, folds) of 0 and 1, to the target (k,)."""
        n = rows @ self.sizes
        within = np.einsum("kf,fg,kg->k", rows, self.within, rows)
        return 2 * divide(rows @ self.cross, n) - divide(within, n * (n - 1)) - self.target


@dataclass(frozen=True)
class Population:
    """Cells that are wanted, in coordinates in which distances are taken.

    The score of an effect is 1 - D(perturbed, target) / D(control, target), the share of the way that is gone: 0 for no
    effect, 1 at the target. D is an unbiased squared distance between distributions: the energy distance (Székely &
    Rizzo 2013) or the squared maximum mean discrepancy with a Gaussian kernel (Gretton et al. 2012).
    """

    cells: Array
    """Coordinates (n, d)."""
    embed: Embed
    method: str
    """``edistance`` or ``mmd``."""
    bandwidth: float
    """Of the kernel: the median distance of target cells."""
    within: float
    kind: str = "population"
    share_found: float = 1.0

    @classmethod
    def of(cls, counts: Any, embed: Embed, method: str) -> "Population":
        """Embed the wanted cells (n, genes)."""
        cells = embed(counts)
        plain = cls(cells, embed, method, 1.0, 0.0)
        from scipy.spatial.distance import pdist

        bandwidth = float(np.median(pdist(cells))) or 1.0
        plain = cls(cells, embed, method, bandwidth, 0.0)
        all_pairs = plain.dissimilarity(cells, cells)
        within = (all_pairs.sum() - np.trace(all_pairs)) / (len(cells) * (len(cells) - 1))
        return cls(cells, embed, method, bandwidth, float(within))

    def dissimilarity(self, a: Array, b: Array) -> Array:
        """Return distances, or minus the kernel, of cells (n, d) and (m, d)."""
        from scipy.spatial.distance import cdist

        d = cdist(a, b)
        return d if self.method == "edistance" else -np.exp(-np.square(d) / (2 * self.bandwidth**2))

    def pairs(self, counts: Any, n_folds: int) -> PairSums:
        """Sum up cells (n, genes) in folds; of their distances, `BLOCK` are held at a time."""
        cells = self.embed(counts)
        members = fold_members(len(cells), n_folds)
        cross, within = np.zeros(n_folds), np.zeros((n_folds, n_folds))
        for some in chunks(len(cells), max(1, BLOCK // max(len(cells), len(self.cells)))):
            own = self.dissimilarity(cells, cells[some])
            own[some, np.arange(len(some))] = 0.0
            within += members @ own @ members[:, some].T
            cross += members[:, some] @ self.dissimilarity(cells[some], self.cells).mean(axis=1)
        return PairSums(cross, within, np.asarray(members.sum(axis=1)).ravel(), self.within)


def fold_members(n: int, folds: int) -> Any:
    """Return which of n cells are in each of consecutive, equally large parts, CSR of 0 and 1 (folds, n)."""
    from scipy import sparse

    cells = np.arange(n)
    return sparse.csr_matrix((np.ones(n), (cells * folds // n, cells)), shape=(folds, n))


def latent_embedding(vae: Any, registry: Registry) -> Embed:
    """Return what carries counts to flat latents."""

    def embed(counts: Any) -> Array:
        import anndata as ad

        n, n_genes = counts.shape
        adata = ad.AnnData(counts, obs=pd.DataFrame(index=pd.RangeIndex(n).astype(str)))
        library = np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
        cells = CellData(
            RowReader(adata, None),
            registry,
            np.arange(n_genes, dtype=np.int32),
            labels=None,
            library=library,
            report=AlignmentReport(n_genes, n_genes, 0),
            obs=adata.obs,
        )
        return latents(vae, cells, np.arange(n)).astype(np.float64)

    return embed
