"""Maximum mean discrepancy: the difference of mean kernels within and between populations."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from scldm_cd4._errors import DataError
from scldm_cd4.metrics.cells.genes import aligned
from scldm_cd4.metrics.cells.pseudobulk import as_matrix, dense
from scldm_cd4.metrics.distribution.compositional import COMPOSITIONAL, compositional_kernel, compositional_means
from scldm_cd4.metrics.distribution.pair_means import PairMeans, cross_means, within_means
from scldm_cd4.metrics.distribution.pairwise import check_finite, pair, subset

MULTI_SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Multiples of the bandwidth over which the multi-bandwidth MMD averages."""
KERNELS = ("rbf", *COMPOSITIONAL)
PERMUTATION_LIMIT = 5_000
"""Cells of both sides together that a permutation test takes: their kernel matrix has 200 MB."""


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

    Examples
    --------
    >>> metrics.median_distance(np.array([[0.0], [1.0], [3.0]]))
    2.0
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

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> bool(metrics.mmd2(rng.normal(0, 1, (100, 2)), rng.normal(2, 1, (100, 2))) > 0.1)
    True
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

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> statistic, p = metrics.permutation_test(rng.normal(0, 1, (30, 2)), rng.normal(3, 1, (30, 2)), n_permutations=99)
    >>> p
    0.01
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
