"""Nearest-neighbour metrics: 1-NN accuracy, precision, recall, density and coverage."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from scldm_cd4._errors import DataError
from scldm_cd4.metrics.distribution.pairwise import cross_blocks, equal_sizes, pair, within_blocks

NEIGHBOURS = 5
"""Neighbours that span the radius around a cell, as in prdc."""


@dataclass(frozen=True)
class Neighbours:
    """Squared distances of every cell to its nearest other cells of the same population.

    Attributes
    ----------
    nearest
        To the nearest, one array (cells,) per condition; infinite for a single cell.
    radius
        To the k-th nearest; infinite where there are not k others.
    """

    nearest: list[np.ndarray]
    radius: list[np.ndarray]


def one_nn_accuracy(real: Any, pred: Any, *, seed: int = 0) -> float:
    """Leave-one-out accuracy of telling real from predicted cells by their nearest neighbour.

    The nearest other cell among both populations lends its label (Lopez-Paz & Oquab, ICLR 2017). Range 0 to 1. Two
    samples of one distribution give 0.5, which is best; 1 means that the populations are apart; below 0.5 predicted
    cells are near-copies of the real ones (0 for a copy). At unequal sizes the chance level would not be 0.5, so cells
    of the larger side are drawn at random to the size of the smaller. A neighbour of each label at the same distance
    counts half.

    Parameters
    ----------
    real, pred
        Cells x features, in principal components.
    seed
        Seed of the draw.

    Returns
    -------
    The accuracy; NaN with fewer than two cells on a side. Warns where cells occur on both sides.

    Raises
    ------
    DataError
        If the features differ.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> metrics.one_nn_accuracy(rng.normal(0, 1, (50, 2)), rng.normal(20, 1, (50, 2)))  # far apart
    1.0
    """
    a, b = equal_sizes(*pair(real, pred), seed)
    scores = neighbour_scores([a], [b])
    if scores["n_shared"][0]:
        warnings.warn(
            f"{int(scores['n_shared'][0])} predicted cells are equal to a real cell, which pulls 1-NN accuracy to 0; "
            "compare with cells that were not copied",
            stacklevel=2,
        )
    return float(scores["one_nn_accuracy"][0])


def prdc(real: Any, pred: Any, *, k: int = NEIGHBOURS, equal_n: bool = True, seed: int = 0) -> dict[str, float]:
    """Precision, recall, density and coverage of the predicted cells.

    A cell's ball reaches to its k-th nearest neighbour in its own population. *Precision*: share of predicted cells in
    a ball of a real cell; *recall*: share of real cells in a ball of a predicted cell (Kynkäänniemi et al., NeurIPS
    2019). *Density*: mean number of real balls around a predicted cell over k; *coverage*: share of real balls that
    hold a predicted cell (Naeem et al., ICML 2020). Range 0 to 1, density from 0 without bound; best 1. Two samples of
    one distribution give about 0.95 for the first two, 1 for density, and 1 - 2^-k (0.97 at k = 5) for coverage.
    Euclidean distances, the cell itself not counted among its neighbours, strictly inside: as in the package prdc.

    Parameters
    ----------
    real, pred
        Cells x features, in principal components.
    k
        Neighbours that span a ball.
    equal_n
        Draw cells of the larger side to the size of the smaller; the scores depend on both sizes.
    seed
        Seed of the draw.

    Returns
    -------
    ``precision``, ``recall``, ``density``, ``coverage``; NaN if a side has no k + 1 cells.

    Raises
    ------
    DataError
        If the features differ, or k is below 1.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> metrics.prdc(rng.normal(0, 1, (50, 2)), rng.normal(30, 1, (50, 2)))["precision"]  # far apart
    0.0
    """
    a, b = pair(real, pred)
    if equal_n:
        a, b = equal_sizes(a, b, seed)
    scores = neighbour_scores([a], [b], k=k)
    return {name: float(scores[name][0]) for name in ("precision", "recall", "density", "coverage")}


def neighbours_within(cells: Sequence[np.ndarray], k: int = NEIGHBOURS) -> Neighbours:
    """Find the nearest and the k-th nearest other cell of every cell.

    Parameters
    ----------
    cells
        One array per condition, cells x features.
    k
        Which neighbour spans the ball.

    Returns
    -------
    Squared distances.

    Raises
    ------
    DataError
        If k is below 1.
    """
    if k < 1:
        raise DataError(f"k={k} must be at least 1")
    nearest = [np.full(len(x), np.inf) for x in cells]
    radius = [np.full(len(x), np.inf) for x in cells]
    for block in within_blocks(cells, triangle=False):
        squares = block.squares
        rows = np.arange(squares.shape[1])
        squares[:, rows, block.rows.start + rows] = np.inf
        np.copyto(squares, np.inf, where=~block.column_mask[:, None, :])
        if k < squares.shape[2]:
            squares.partition(k - 1, axis=2)
            kth = squares[:, :, k - 1]
            smallest = squares[:, :, :k].min(axis=2)
        else:
            kth, smallest = np.full(squares.shape[:2], np.inf), squares.min(axis=2)
        for i, mask, low, high in zip(block.index, block.row_mask, smallest, kth, strict=True):
            nearest[i][block.rows] = low[mask]
            radius[i][block.rows] = high[mask]
    return Neighbours(nearest, radius)


def neighbour_scores(
    real: Sequence[np.ndarray],
    pred: Sequence[np.ndarray],
    *,
    k: int = NEIGHBOURS,
    real_neighbours: Neighbours | None = None,
) -> dict[str, np.ndarray]:
    """1-NN accuracy, precision, recall, density and coverage of many conditions, of the cells as they are.

    Parameters
    ----------
    real, pred
        One array per condition, cells x features.
    k
        Neighbours that span a ball.
    real_neighbours
        From :func:`neighbours_within` of the same real cells, where already known.

    Returns
    -------
    ``one_nn_accuracy``, ``precision``, ``recall``, ``density``, ``coverage`` and ``n_shared`` (predicted cells that
    equal a real cell), each (conditions,).
    """
    x = neighbours_within(real, k) if real_neighbours is None else real_neighbours
    y = neighbours_within(pred, k)
    found = _Cross(real, pred, x.radius, y.radius)
    names = ("one_nn_accuracy", "precision", "recall", "density", "coverage", "n_shared")
    out = {name: np.full(len(real), np.nan) for name in names}
    for i, (a, b) in enumerate(zip(real, pred, strict=True)):
        n, m = len(a), len(b)
        out["n_shared"][i] = (found.to_real[i] == 0).sum()
        if min(n, m) >= 2:
            right = [
                _below(own, other)
                for own, other in ((x.nearest[i], found.to_pred[i]), (y.nearest[i], found.to_real[i]))
            ]
            out["one_nn_accuracy"][i] = sum(value.sum() for value in right) / (n + m)
        if min(n, m) > k:
            out["precision"][i] = (found.n_balls[i] > 0).mean()
            out["density"][i] = found.n_balls[i].mean() / k
            out["recall"][i] = found.recalled[i].mean()
            out["coverage"][i] = (found.to_pred[i] < x.radius[i]).mean()
    return out


def _below(own: np.ndarray, other: np.ndarray) -> np.ndarray:
    """1 where the own neighbour is nearer, one half for a tie."""
    return (own < other) + 0.5 * (own == other)


class _Cross:
    """What is needed of the distances between the two sides, gathered block by block.

    Attributes
    ----------
    to_pred, to_real
        Squared distance of each real cell to the nearest predicted one, and the other way round.
    n_balls
        Balls of real cells around each predicted cell.
    recalled
        Whether each real cell is in a ball of a predicted one.
    """

    def __init__(
        self,
        real: Sequence[np.ndarray],
        pred: Sequence[np.ndarray],
        real_radius: list[np.ndarray],
        pred_radius: list[np.ndarray],
    ) -> None:
        self.to_pred = [np.full(len(x), np.inf) for x in real]
        self.to_real = [np.full(len(y), np.inf) for y in pred]
        self.n_balls = [np.zeros(len(y), dtype=np.int64) for y in pred]
        self.recalled = [np.zeros(len(x), dtype=bool) for x in real]
        for block in cross_blocks(real, pred):
            for i, squares, rows, columns in zip(
                block.index, block.squares, block.row_mask, block.column_mask, strict=True
            ):
                n, m = int(rows.sum()), int(columns.sum())
                values, here = squares[:n, :m], slice(block.rows.start, block.rows.start + n)
                if not n:
                    continue
                self.to_pred[i][here] = values.min(axis=1)
                np.minimum(self.to_real[i], values.min(axis=0), out=self.to_real[i])
                self.n_balls[i] += (values < real_radius[i][here, None]).sum(axis=0)
                self.recalled[i][here] = (values < pred_radius[i]).any(axis=1)
