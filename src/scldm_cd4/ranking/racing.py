"""Spending cells on the contenders: rounds in which perturbations that are surely in or out of the shortlist stop."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

ETA = 4
"""By what the cells rise from round to round."""
MIN_ROUND = 4
"""Cells per condition in the first round, at least."""
Z = 3.0
"""Standard errors from the border of the shortlist at which a perturbation stops."""
Array = NDArray[np.float64]
Evaluate = Callable[[Sequence[str], int], tuple[Array, Array]]
"""Scores and standard errors (groups, names) of some perturbations at a number of cells; more is better."""


def rounds(n_cells: int) -> list[int]:
    """Return the cells per condition of each round, the last with all."""
    out = [n_cells]
    while out[0] // ETA >= MIN_ROUND:
        out.insert(0, out[0] // ETA)
    return out


def race(names: Sequence[str], sizes: Sequence[int], evaluate: Evaluate, top_k: int) -> NDArray[np.int64]:
    """Run a race for the best `top_k`.

    After each round, perturbations stop whose score is `Z` standard errors above or below the border between the best
    `top_k` and the rest (successive accepts and rejects; Bubeck et al. 2013, with intervals as in Kalyanakrishnan et
    al. 2012). Those that go on are drawn anew, as noise is keyed by the number of the cell: the first cells come again,
    the last round gives exactly what it would give without racing, and no sums are kept meanwhile.

    Parameters
    ----------
    names
        Those who start.
    sizes
        From `rounds`.
    evaluate
        Scores some of them. One without a score (NaN) stops.
    top_k
        Size of the shortlist.

    Returns
    -------
    The last round (from 0) of every name.
    """
    reached = np.zeros(len(names), dtype=np.int64)
    alive = np.arange(len(names))
    accepted: NDArray[np.int64] | None = None
    settled = np.zeros((0, 0), dtype=bool)
    for r, n_cells in enumerate(sizes):
        scores, errors = evaluate([names[i] for i in alive.tolist()], n_cells)
        reached[alive] = r
        if accepted is None:
            accepted, settled = np.zeros(len(scores), dtype=np.int64), np.zeros((len(scores), len(names)), dtype=bool)
        for g in range(len(scores)):
            open_ = np.flatnonzero(~settled[g, alive])
            is_in, is_out = _decide(scores[g, open_], errors[g, open_], top_k - int(accepted[g]))
            accepted[g] += is_in.sum()
            settled[g, alive[open_[is_in | is_out]]] = True
        alive = alive[~settled[:, alive].all(axis=0)]
        if not len(alive):
            break
    return reached


def _decide(scores: Array, errors: Array, places: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return who is surely among the best, and who surely is not."""
    known = np.isfinite(scores)
    n = int(known.sum())
    if places <= 0 or places >= n:
        everyone = np.ones(len(scores), dtype=bool)
        return (known, ~known) if places > 0 else (~everyone, everyone)
    ordered = np.sort(scores[known])[::-1]
    border = (ordered[places - 1] + ordered[places]) / 2
    # an error from few cells is itself uncertain: none is taken as smaller than the typical one
    typical = float(np.sqrt(np.nanmean(np.square(errors[known]))))
    margin = Z * np.fmax(errors, typical)
    return known & (scores > border + margin), ~known | (scores < border - margin)
