"""Spending cells on the contenders: successive halving over perturbations."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

ETA = 4
"""By what each round raises the cells and lowers the perturbations."""
MIN_ROUND = 4
"""Cells per condition in the first round, at least."""
MARGIN = 2
"""The last round keeps at least so many times the shortlist."""


def rounds(n_cells: int, n_names: int, top_k: int) -> list[tuple[int, int]]:
    """Return cells per condition and perturbations of each round (Jamieson & Talwalkar 2016), the last with `n_cells`.

    Perturbations fall by `ETA` from round to round while cells rise by it. A round does not take over cells of the one
    before: noise is keyed by the number of the cell, so the first ones come again, and the last round gives exactly
    what it would give without racing, in memory that does not grow with the number of perturbations.
    """
    least = MARGIN * top_k
    n_rounds = 1
    while n_cells // ETA**n_rounds >= MIN_ROUND and n_names / ETA ** (n_rounds - 1) > least:
        n_rounds += 1
    sizes = [n_cells // ETA ** (n_rounds - 1 - r) for r in range(n_rounds)]
    return [(n, n_names if r == 0 else min(n_names, max(least, -(-n_names // ETA**r)))) for r, n in enumerate(sizes)]


def race(
    names: Sequence[str],
    plan: Sequence[tuple[int, int]],
    scores: Callable[[Sequence[str], int], NDArray[np.float64]],
) -> tuple[list[str], NDArray[np.int64]]:
    """Run a race.

    Parameters
    ----------
    names
        Those who start.
    plan
        From `rounds`.
    scores
        Gives the scores (groups, names) of some at a number of cells; more is better, NaN is worst. It is not called
        for the last round.

    Returns
    -------
    Names that reach the last round, in their first order, and the last round of every name.
    """
    reached = np.zeros(len(names), dtype=np.int64)
    alive = np.arange(len(names))
    for r, (n_cells, _) in enumerate(plan[:-1]):
        found = np.nan_to_num(scores([names[i] for i in alive.tolist()], n_cells), nan=-np.inf)
        place = (-found).argsort(axis=1, kind="stable").argsort(axis=1)
        best = np.sort(place.min(axis=0))[: plan[r + 1][1]]
        alive = alive[place.min(axis=0) <= best[-1]]
        reached[alive] = r + 1
    return [names[i] for i in alive.tolist()], reached
