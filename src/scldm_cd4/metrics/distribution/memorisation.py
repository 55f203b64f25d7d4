"""Whether generated cells repeat training cells."""

from typing import Any

import numpy as np

from scldm_cd4._errors import DataError
from scldm_cd4.metrics.cells.pseudobulk import as_matrix, dense
from scldm_cd4.metrics.distribution.pairwise import check_finite, pair


def nearest_distance(cells: Any, train: Any) -> np.ndarray:
    """Euclidean distance of every cell to the nearest training cell.

    Parameters
    ----------
    cells, train
        Cells x features.

    Returns
    -------
    Distances, (cells,); exactly 0 for a copy.

    Raises
    ------
    DataError
        If the features differ, or there are no training cells.

    Examples
    --------
    >>> metrics.nearest_distance(np.array([[0.0], [4.0]]), np.array([[1.0], [4.0]])).tolist()
    [1.0, 0.0]
    """
    from sklearn.neighbors import NearestNeighbors

    a, b = pair(cells, train)
    if not len(b):
        raise DataError("there are no training cells to compare with")
    if not len(a):
        return np.empty(0)
    # centring keeps the expansion of the square accurate; the distance itself is then taken directly
    centre = b.mean(axis=0)
    found = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(b - centre)
    index = found.kneighbors(a - centre, return_distance=False)[:, 0]
    return np.asarray(np.sqrt(np.square(a - b[index]).sum(axis=1)))


def memorisation(real: Any, pred: Any, train: Any) -> float:
    """How near generated cells are to training cells, compared with real cells that were not trained on.

    Median distance of the generated cells to their nearest training cell over that of held-out real cells. 1: no
    memorisation, the generated cells are as far from the training cells as new real cells; 0: copies; above 1:
    generated cells lie away from where cells are. Held-out and generated cells must be of the same conditions, else
    the ratio compares conditions. Cells without the spread of real ones also give values below 1: look at
    :func:`memorised_share` and the variances.

    Parameters
    ----------
    real
        Held-out real cells x features.
    pred
        Generated cells of the same conditions.
    train
        The training cells of the model.

    Returns
    -------
    The ratio; NaN without cells on a side, or where the held-out cells are themselves copies.

    Raises
    ------
    DataError
        If the features differ, or there are no training cells.

    Examples
    --------
    >>> metrics.memorisation(x, z[:20], z)  # copies of training cells
    0.0
    """
    held_out, generated = nearest_distance(real, train), nearest_distance(pred, train)
    return ratio_of_medians(generated, held_out)


def memorised_share(real: Any, pred: Any, train: Any, *, quantile: float = 0.05) -> float:
    """Share of generated cells that lie nearer to a training cell than almost all held-out real cells do.

    Range 0 to 1; ``quantile`` without memorisation, 1 for copies. It sees a few copied cells, which the median of
    :func:`memorisation` does not.

    Parameters
    ----------
    real, pred, train
        As in :func:`memorisation`.
    quantile
        Quantile of the held-out distances below which a generated cell counts.

    Returns
    -------
    The share; NaN without cells on a side.

    Raises
    ------
    DataError
        As in :func:`memorisation`, or if ``quantile`` is not between 0 and 1.

    Examples
    --------
    >>> metrics.memorised_share(x, z[:20], z)  # copies of training cells
    1.0
    """
    if not 0 < quantile < 1:
        raise DataError(f"quantile={quantile} must lie between 0 and 1")
    held_out, generated = nearest_distance(real, train), nearest_distance(pred, train)
    if not (held_out.size and generated.size):
        return float("nan")
    return float((generated < np.quantile(held_out, quantile)).mean())


def ratio_of_medians(generated: np.ndarray, held_out: np.ndarray) -> float:
    """Median of the generated distances over that of the held-out ones; NaN where undefined."""
    if not (len(generated) and len(held_out)):
        return float("nan")
    below = float(np.median(held_out))
    return float(np.median(generated)) / below if below > 0 else float("nan")


def memorisation_table(real: list[Any], pred: list[Any], train: Any) -> np.ndarray:
    """Memorisation of many conditions with one search among the training cells; see :func:`memorisation`.

    Parameters
    ----------
    real, pred
        One block of cells x features per condition.
    train
        The training cells of all conditions.

    Returns
    -------
    The ratio of every condition, (conditions,).

    Raises
    ------
    DataError
        If the lists differ in length, or as in :func:`memorisation`.

    Examples
    --------
    >>> metrics.memorisation_table([x[:20], x[20:40]], [y[:20], y[20:40]], z).shape
    (2,)
    """
    if len(real) != len(pred):
        raise DataError(f"{len(real)} real and {len(pred)} predicted conditions; give one block of each")
    blocks = [dense(as_matrix(block)) for block in (*real, *pred)]
    if not blocks:
        return np.empty(0)
    distances = nearest_distance(check_finite(np.vstack(blocks), "a condition"), train)
    parts = np.split(distances, np.cumsum([len(block) for block in blocks])[:-1])
    return np.array([ratio_of_medians(b, a) for a, b in zip(parts[: len(real)], parts[len(real) :], strict=True)])
