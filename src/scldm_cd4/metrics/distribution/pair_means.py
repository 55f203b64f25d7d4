"""Mean kernels and distances over pairs of cells, for many conditions at once."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scldm_cd4.metrics.distribution.pairwise import cross_blocks, within_blocks


@dataclass(frozen=True)
class PairMeans:
    """Means over pairs of cells, one entry per condition, NaN where there is no pair.

    Attributes
    ----------
    kernel
        Mean RBF kernel at every bandwidth, (conditions, bandwidths).
    distance
        Mean Euclidean distance, (conditions,).
    """

    kernel: np.ndarray
    distance: np.ndarray


def within_means(cells: Sequence[np.ndarray], bandwidths: Sequence[float], *, distance: bool = False) -> PairMeans:
    """Mean kernels and distances over pairs of different cells of every condition.

    Parameters
    ----------
    cells
        One array per condition, cells x features.
    bandwidths
        Bandwidths of the RBF kernel; may be empty.
    distance
        Whether the mean distance is wanted; NaN otherwise.

    Returns
    -------
    The means; NaN for conditions with fewer than two cells.
    """
    sums = _Sums(len(cells), bandwidths, distance)
    for block in within_blocks(cells, triangle=True):
        n = block.squares.shape[1]
        weights = block.column_mask * np.where(np.arange(block.squares.shape[2]) < n, 1.0, 2.0)
        sums.add(block.index, block.squares, block.row_mask, weights)
    n_cells = np.array([len(x) for x in cells])
    # a cell with itself has kernel 1 and distance 0
    return sums.means(n_cells * (n_cells - 1.0), own=n_cells)


def cross_means(
    real: Sequence[np.ndarray], pred: Sequence[np.ndarray], bandwidths: Sequence[float], *, distance: bool = False
) -> PairMeans:
    """Mean kernels and distances over pairs of a real and a predicted cell of every condition.

    Parameters and return as in :func:`within_means`.
    """
    sums = _Sums(len(real), bandwidths, distance)
    for block in cross_blocks(real, pred):
        sums.add(block.index, block.squares, block.row_mask, block.column_mask.astype(np.float64))
    n_pairs = np.array([float(len(x) * len(y)) for x, y in zip(real, pred, strict=True)])
    return sums.means(n_pairs, own=np.zeros(len(real)))


class _Sums:
    """Weighted sums of kernels and distances over blocks."""

    def __init__(self, n_conditions: int, bandwidths: Sequence[float], distance: bool) -> None:
        self.bandwidths = np.asarray(bandwidths, dtype=np.float64)
        self.kernel = np.zeros((n_conditions, len(self.bandwidths)))
        self.distance = np.full(n_conditions, 0.0 if distance else np.nan)
        self.wants_distance = distance

    def add(self, index: np.ndarray, squares: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> None:
        kernel, previous = np.empty_like(squares), 0.0
        for position in np.argsort(-self.bandwidths):
            width = self.bandwidths[position]
            if previous == 2.0 * width:  # half the width is the fourth power
                np.square(kernel, out=kernel)
                np.square(kernel, out=kernel)
            else:
                np.multiply(squares, -0.5 / width**2, out=kernel)
                np.exp(kernel, out=kernel)
            self.kernel[index, position] += _weighted(kernel, rows, columns)
            previous = width
        if self.wants_distance:
            self.distance[index] += _weighted(np.sqrt(squares, out=kernel), rows, columns)

    def means(self, n_pairs: np.ndarray, own: np.ndarray) -> PairMeans:
        """Divide by the number of pairs, after taking out the cells' kernels with themselves."""
        pairs = np.where(n_pairs > 0, n_pairs, np.nan)
        return PairMeans((self.kernel - own[:, None]) / pairs[:, None], self.distance / pairs)


def _weighted(values: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    return np.einsum("br,br->b", np.matmul(values, columns[..., None])[..., 0], rows)
