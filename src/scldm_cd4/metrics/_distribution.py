"""Distances between two populations of cells."""

from typing import Any

import numpy as np

from scldm_cd4._errors import DataError
from scldm_cd4.metrics._pseudobulk import as_matrix, dense


def _pair(x: Any, y: Any) -> tuple[np.ndarray, np.ndarray]:
    a, b = dense(as_matrix(x)), dense(as_matrix(y))
    if a.shape[1] != b.shape[1]:
        raise DataError(
            f"the two populations have {a.shape[1]} and {b.shape[1]} features; project both in the same way"
        )
    return a, b


def within_distance(x: Any) -> float:
    """Mean Euclidean distance over ordered pairs of different cells; NaN with fewer than two cells."""
    from scipy.spatial.distance import pdist

    values = dense(as_matrix(x))
    return float(pdist(values).mean()) if len(values) > 1 else float("nan")


def energy_distance(x: Any, y: Any, *, within_x: float | None = None, within_y: float | None = None) -> float:
    r"""Unbiased energy distance between two populations.

    :math:`2\,E\|X-Y\| - E\|X-X'\| - E\|Y-Y'\|` with Euclidean norms, not squared and not rooted, each within-term
    over pairs of *different* cells (U-statistic). Best value 0; expected value 0 for two samples of one distribution,
    so single values may be negative and are not clipped; no upper bound. Székely & Rizzo, J. Stat. Plan. Inference
    2013; scPerturb (Peidli et al., Nat. Methods 2024) with the U-statistic. For an exact copy of the cells the value
    is below 0 by about the mean within-distance times 2/n.

    Parameters
    ----------
    x, y
        Cells x features, in a space fitted on other cells (see :func:`fit_projection`).
    within_x, within_y
        The within-terms where already known (:func:`within_distance`).

    Returns
    -------
    The distance; NaN if either side has fewer than two cells.

    Raises
    ------
    DataError
        If the numbers of features differ.
    """
    from scipy.spatial.distance import cdist

    a, b = _pair(x, y)
    if min(len(a), len(b)) < 2:
        return float("nan")
    within = (within_distance(a) if within_x is None else within_x) + (
        within_distance(b) if within_y is None else within_y
    )
    return float(2.0 * cdist(a, b).mean() - within)


def wasserstein(x: Any, y: Any) -> float:
    r"""Exact 2-Wasserstein distance with equal weights, rooted.

    :math:`W_2 = \sqrt{\min_\pi \sum_{ij} \pi_{ij} \|x_i - y_j\|^2}` (POT, network simplex). Best value 0, no upper
    bound. The value between two samples of one distribution is far from 0 and falls slowly with n: print that floor
    at the same n beside it.

    Parameters
    ----------
    x, y
        Cells x features.

    Returns
    -------
    The distance, in units of the features; NaN if either side is empty.

    Raises
    ------
    DataError
        If the numbers of features differ.
    """
    from ot import emd2, unif
    from scipy.spatial.distance import cdist

    a, b = _pair(x, y)
    if not (len(a) and len(b)):
        return float("nan")
    cost = emd2(unif(len(a)), unif(len(b)), cdist(a, b, "sqeuclidean"), numItermax=1_000_000)
    return float(np.sqrt(max(float(cost), 0.0)))
