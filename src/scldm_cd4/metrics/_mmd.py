"""Maximum mean discrepancy and energy distance: differences of mean kernels between populations."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from scldm_cd4._errors import DataError
from scldm_cd4.metrics._compositional import COMPOSITIONAL, compositional_kernel, compositional_means
from scldm_cd4.metrics._pairwise import aligned, check_finite, cross_blocks, pair, subset, within_blocks
from scldm_cd4.metrics._pseudobulk import as_matrix, dense

MULTI_SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Multiples of the bandwidth over which the multi-bandwidth MMD averages."""
KERNELS = ("rbf", *COMPOSITIONAL)
ROWS = 512
"""Rows of exact distances that are computed at a time."""
PERMUTATION_LIMIT = 5_000
"""Cells of both sides together that a permutation test takes: their kernel matrix has 200 MB."""


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


def median_distance(reference: Any, *, max_cells: int | None = 2000, seed: int = 0) -> float:
    """Median Euclidean distance between different cells: the bandwidth of the RBF kernel.

    Take it once per dataset from *real* cells, so that the kernel is the same for all conditions and all models; from
    the pooled cells a bad model would widen its own kernel.

    Parameters
    ----------
    reference
        Real cells x features.
    max_cells
        Cells drawn for the median; all with None.
    seed
        Seed of the draw.

    Returns
    -------
    The median, in units of the features; NaN with fewer than two cells.

    Raises
    ------
    DataError
        If a value is not finite.
    """
    from scipy.spatial.distance import pdist

    values = check_finite(dense(subset(as_matrix(reference), max_cells, seed, 0)), "the reference")
    return float(np.median(pdist(values))) if len(values) > 1 else float("nan")


def mmd2(
    real: Any,
    pred: Any,
    *,
    kernel: str = "rbf",
    bandwidth: float | None = None,
    scales: Sequence[float] = (1.0,),
    biased: bool = False,
    root: bool = False,
) -> float:
    r"""Squared maximum mean discrepancy between two populations.

    :math:`E\,k(X,X') + E\,k(Y,Y') - 2\,E\,k(X,Y)`, the within-terms over pairs of *different* cells (U-statistic;
    Gretton et al., J. Mach. Learn. Res. 2012, eq. 3). Best value 0. Two samples of one distribution have expected
    value 0, so single values may be negative and are not clipped; a copy of the cells lies below 0. With
    ``biased=True`` the V-statistic (eq. 5): 0 for a copy, never negative, about (1/n + 1/m)(1 - E k) for two samples
    of one distribution. Upper bound 2 (all kernels are at most 1; several scales are averaged, not summed).

    RBF kernel :math:`\exp(-\|x-y\|^2 / 2\sigma^2)`. Compositional kernels compare non-negative profiles gene by gene,
    for log-normalised values or counts, never for principal components: Bray-Curtis
    :math:`2\sum\min / \sum(x+y)`, Ruzicka :math:`\sum\min/\sum\max`, Tanimoto
    :math:`\langle x,y\rangle/(\|x\|^2+\|y\|^2-\langle x,y\rangle)`.

    Parameters
    ----------
    real, pred
        Cells x features; AnnData are matched by gene name.
    kernel
        ``"rbf"``, ``"braycurtis"``, ``"ruzicka"`` or ``"tanimoto"``.
    bandwidth
        Sigma of the RBF kernel, from :func:`median_distance` of real cells; by default of ``real``. Give it where
        values of several conditions or models are compared.
    scales
        Multiples of the bandwidth, averaged; :data:`MULTI_SCALES` is the multi-bandwidth form.
    biased
        Give the V-statistic.
    root
        Give the root; only of the V-statistic, since the unbiased value may be negative.

    Returns
    -------
    MMD^2 (not rooted unless asked); NaN with fewer than two cells on a side, or where the bandwidth is 0.

    Raises
    ------
    DataError
        If an option is unknown, the features differ, or a compositional kernel meets a negative value or empty cell.
    """
    if root and not biased:
        raise DataError("the unbiased MMD^2 may be negative and has no root; give biased=True or root=False")
    if kernel in COMPOSITIONAL:
        a, b = aligned(real, pred)
        if min(a.shape[0], b.shape[0]) < 2:
            return float("nan")
        value = _combine(*compositional_means(a, b, kernel), a.shape[0], b.shape[0], biased)
    elif kernel == "rbf":
        a, b = pair(real, pred)
        sigma = median_distance(a) if bandwidth is None else bandwidth
        widths = rbf_bandwidths(sigma, scales)
        x, y, between = within_means([a], widths), within_means([b], widths), cross_means([a], [b], widths)
        value = mmd2_of(x, y, between, np.array([len(a)]), np.array([len(b)]), biased=biased).mean(axis=1)[0]
    else:
        raise DataError(f"kernel={kernel!r} is not known; use one of {KERNELS}")
    return float(np.sqrt(max(value, 0.0)) if root else value)


def rbf_bandwidths(sigma: float, scales: Sequence[float]) -> tuple[float, ...]:
    """Multiply the bandwidth by every scale; NaN where the bandwidth is 0 or undefined.

    Raises
    ------
    DataError
        If there is no scale, or the bandwidth or a scale is negative.
    """
    if not len(scales) or min(scales) <= 0 or sigma < 0:
        raise DataError(f"bandwidth={sigma} and scales={tuple(scales)} must be positive")
    return tuple(float(sigma * scale) if sigma > 0 else float("nan") for scale in scales)


def energy_distance(
    real: Any,
    pred: Any,
    *,
    squared: bool = False,
    biased: bool = False,
    within_x: float | None = None,
    within_y: float | None = None,
) -> float:
    r"""Energy distance between two populations, unbiased.

    :math:`2\,E\|X-Y\| - E\|X-X'\| - E\|Y-Y'\|` with Euclidean norms, not squared and not rooted, each within-term
    over pairs of *different* cells (U-statistic). Best value 0; expected value 0 for two samples of one distribution,
    so single values may be negative and are not clipped; no upper bound. Székely & Rizzo, J. Stat. Plan. Inference
    2013; scPerturb (Peidli et al., Nat. Methods 2024) with the U-statistic. For an exact copy of the cells the value
    is below 0 by about the mean within-distance times 2/n.

    Parameters
    ----------
    real, pred
        Cells x features, in a space fitted on other cells (see :func:`fit_projection`).
    squared
        Take squared norms. The V-statistic then is twice the squared distance of the means and sees nothing else; it
        is what early releases of scPerturb computed.
    biased
        Give the V-statistic: 0 for a copy, never negative, positive for two samples of one distribution.
    within_x, within_y
        The within-terms where already known (:func:`within_distance`); only for the default form.

    Returns
    -------
    The distance; NaN if either side has fewer than two cells.

    Raises
    ------
    DataError
        If the features differ, or known within-terms are given for another form.
    """
    a, b = pair(real, pred)
    n, m = len(a), len(b)
    if (squared or biased) and not (within_x is None and within_y is None):
        raise DataError("within_x and within_y are for the unbiased distance that is not squared")
    if min(n, m) < 2:
        return float("nan")
    metric = "sqeuclidean" if squared else "euclidean"
    known = ((a, within_x), (b, within_y))
    within = [_mean_within(side, metric) if value is None else value for side, value in known]
    if biased:
        within = [value * (len(side) - 1) / len(side) for side, value in zip((a, b), within, strict=True)]
    between = sum(float(block.sum()) for block in _distances(a, b, metric)) / (n * m)
    return 2.0 * between - sum(within)


def within_distance(x: Any) -> float:
    """Mean Euclidean distance over ordered pairs of different cells; NaN with fewer than two cells."""
    return _mean_within(dense(as_matrix(x)), "euclidean")


def _mean_within(x: np.ndarray, metric: str) -> float:
    """Mean distance over pairs of different cells, each pair computed once."""
    n, total = len(x), 0.0
    for start in range(0, n, ROWS):
        (block,) = _distances(x[start : start + ROWS], x[start:], metric)
        # the first columns are these rows with themselves, the rest has its mirror image elsewhere
        total += 2.0 * float(block.sum()) - float(block[:, : len(block)].sum())
    return total / (n * (n - 1)) if n > 1 else float("nan")


def _distances(a: np.ndarray, b: np.ndarray, metric: str) -> Iterator[np.ndarray]:
    """Give the distances of some rows of ``a`` at a time."""
    from scipy.spatial.distance import cdist

    return (cdist(a[start : start + ROWS], b, metric) for start in range(0, len(a), ROWS))


def permutation_test(
    real: Any,
    pred: Any,
    *,
    kernel: str = "rbf",
    bandwidth: float | None = None,
    scales: Sequence[float] = (1.0,),
    n_permutations: int = 999,
    seed: int = 0,
) -> tuple[float, float]:
    """MMD^2 or energy distance with the p-value of a permutation test.

    The labels real and predicted are exchanged among the pooled cells; the kernel stays the same, so all permutations
    are one matrix product (Gretton et al. 2012). p is the share of values at least as large as the observed, which
    counts as one of them: the least is 1 / (n_permutations + 1). With many cells any model differs from the truth
    significantly; p says whether a difference was seen, not whether it is small.

    Parameters
    ----------
    real, pred
        Cells x features.
    kernel
        As in :func:`mmd2`, or ``"energy"`` for the energy distance (Sejdinovic et al., Ann. Stat. 2013).
    bandwidth, scales
        As in :func:`mmd2`.
    n_permutations
        Number of permutations.
    seed
        Seed of the permutations.

    Returns
    -------
    The unbiased statistic and p; both NaN with fewer than two cells on a side.

    Raises
    ------
    DataError
        If there are more cells than the kernel matrix can be kept for, or as in :func:`mmd2`.
    """
    a, b = aligned(real, pred)
    n, m = a.shape[0], b.shape[0]
    if n + m > PERMUTATION_LIMIT:
        raise DataError(f"{n + m} cells are too many for a permutation test; draw at most {PERMUTATION_LIMIT} in all")
    if min(n, m) < 2:
        return float("nan"), float("nan")
    matrix = _kernel_matrix(a, b, kernel, bandwidth, scales)
    np.fill_diagonal(matrix, 0.0)
    rng = np.random.default_rng(seed)
    first = np.zeros((n + m, n_permutations + 1))
    first[:n, 0] = 1.0
    for column in first.T[1:]:
        column[rng.permutation(n + m)[:n]] = 1.0
    to_first = matrix @ first
    xx = (first * to_first).sum(axis=0)
    xy = to_first.sum(axis=0) - xx
    yy = matrix.sum() - xx - 2.0 * xy
    values = xx / (n * (n - 1)) + yy / (m * (m - 1)) - 2.0 * xy / (n * m)
    # the observed order is one of the permutations; ties with it are equal up to rounding
    larger = values >= values[0] - 1e-12 * max(abs(values[0]), float(np.abs(matrix).max()))
    return float(values[0]), float(larger.mean()) if np.isfinite(values[0]) else float("nan")


def _kernel_matrix(a: Any, b: Any, kernel: str, bandwidth: float | None, scales: Sequence[float]) -> np.ndarray:
    """Kernel of the pooled cells, (n + m, n + m)."""
    from scipy.spatial.distance import cdist

    if kernel in COMPOSITIONAL:
        import scipy.sparse as sp

        pooled = (
            sp.vstack([a, b], format="csr") if sp.issparse(a) and sp.issparse(b) else np.vstack([dense(a), dense(b)])
        )
        return compositional_kernel(pooled, pooled, kernel)
    if kernel not in ("rbf", "energy"):
        raise DataError(f"kernel={kernel!r} is not known; use one of {(*KERNELS, 'energy')}")
    x, y = pair(a, b)
    pooled = np.vstack([x, y])
    if kernel == "energy":
        return -cdist(pooled, pooled)
    sigma = median_distance(x) if bandwidth is None else bandwidth
    squares = cdist(pooled, pooled, "sqeuclidean")
    out = np.zeros_like(squares)
    for width in rbf_bandwidths(sigma, scales):
        out += np.exp(squares / (-2.0 * width**2)) / len(scales)
    return out


def _combine(x: float, y: float, between: float, n: int, m: int, biased: bool) -> float:
    if biased:
        x, y = (x * (n - 1) + 1) / n, (y * (m - 1) + 1) / m
    return x + y - 2.0 * between


def mmd2_of(
    x: PairMeans, y: PairMeans, between: PairMeans, n: np.ndarray, m: np.ndarray, *, biased: bool = False
) -> np.ndarray:
    """Combine means over pairs into MMD^2, (conditions, bandwidths)."""
    n, m = n[:, None], m[:, None]
    if biased:
        return (x.kernel * (n - 1) + 1) / n + (y.kernel * (m - 1) + 1) / m - 2.0 * between.kernel
    return x.kernel + y.kernel - 2.0 * between.kernel


def energy_of(x: PairMeans, y: PairMeans, between: PairMeans) -> np.ndarray:
    """Combine means over pairs into the unbiased energy distance, (conditions,)."""
    return 2.0 * between.distance - x.distance - y.distance


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
