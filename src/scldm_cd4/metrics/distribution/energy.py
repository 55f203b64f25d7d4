"""Energy distance between populations."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from scldm_cd4._errors import DataError
from scldm_cd4.metrics.cells.pseudobulk import as_matrix, dense
from scldm_cd4.metrics.distribution.pair_means import PairMeans, cross_means, within_means
from scldm_cd4.metrics.distribution.pairwise import check_blocks, pair
from scldm_cd4.metrics.effects.delta import safe_pearson

ROWS = 512
"""Rows of exact distances that are computed at a time."""


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

    Examples
    --------
    >>> metrics.energy_distance(np.zeros((5, 2)), np.ones((5, 2)), squared=True) > 0
    True
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
    """Mean Euclidean distance over ordered pairs of different cells; NaN with fewer than two cells.

    Parameters
    ----------
    x
        Cells x features.

    Returns
    -------
    The mean distance, in units of the features.

    Examples
    --------
    >>> metrics.within_distance(np.array([[0.0], [2.0]]))
    2.0
    """
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


def control_distances(cells: Sequence[Any], control: Any, *, biased: bool = False) -> np.ndarray:
    """Energy distance of every condition to the same control cells.

    Parameters
    ----------
    cells
        One block of cells x features per condition.
    control
        Control cells x features.
    biased
        Give the V-statistic, as in :func:`energy_distance`.

    Returns
    -------
    Distances, (conditions,); NaN with fewer than two cells on a side.

    Raises
    ------
    DataError
        If the features differ.

    Examples
    --------
    >>> metrics.control_distances([x[:20], x[20:40]], x[40:]).shape
    (2,)
    """
    blocks, (reference,) = check_blocks(cells), check_blocks([control])
    check_blocks([*blocks[:1], reference])
    n, m = np.array([len(block) for block in blocks]), len(reference)
    x, y = within_means(blocks, (), distance=True), within_means([reference], (), distance=True)
    between = cross_means(blocks, [reference] * len(blocks), (), distance=True)
    if not biased:
        return energy_of(x, y, between)
    shares = (x.distance * (n - 1) / np.maximum(n, 1), y.distance * (m - 1) / max(m, 1))
    return np.asarray(2.0 * between.distance - shares[0] - shares[1])


def energy_correlation(
    real: Sequence[Any],
    pred: Sequence[Any],
    control: Any,
    *,
    pred_control: Any = None,
    biased: bool = False,
) -> float:
    """Correlation over perturbations of the real and the predicted energy distance to the control.

    Whether strong perturbations are predicted to be strong, whatever their direction. Range -1 to 1, best 1, chance
    0. The ``pearson_edistance`` of cell-eval is ``biased=True`` with the predicted controls, in gene space.

    Parameters
    ----------
    real, pred
        One block of cells x features per perturbation of one context.
    control
        Real control cells of that context.
    pred_control
        Control cells for the predicted side; the real ones by default.
    biased
        Take V-statistics.

    Returns
    -------
    Pearson correlation over the perturbations that are defined on both sides; NaN for fewer than two of them, or where
    all distances are equal.

    Raises
    ------
    DataError
        If the numbers of perturbations or of features differ.

    Examples
    --------
    >>> value = metrics.energy_correlation([x[:20], x[20:40], x[40:60]], [y[:20], y[20:40], y[40:60]], x[60:])
    >>> bool(-1 <= value <= 1)
    True
    """
    if len(real) != len(pred):
        raise DataError(f"{len(real)} real and {len(pred)} predicted perturbations; give one block of each")
    a = control_distances(real, control, biased=biased)
    b = control_distances(pred, control if pred_control is None else pred_control, biased=biased)
    ok = np.isfinite(a) & np.isfinite(b)
    return safe_pearson(a[ok], b[ok])


def energy_of(x: PairMeans, y: PairMeans, between: PairMeans) -> np.ndarray:
    """Combine means over pairs into the unbiased energy distance, (conditions,)."""
    return 2.0 * between.distance - x.distance - y.distance
