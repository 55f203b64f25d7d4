"""Scores of effects: how well a change of expression agrees with wanted weights of genes.

Every score takes effects (k, genes), weights (m, genes) and the control's standard deviation (genes,), all on the genes
that take part, and gives (k, m). A higher score is more of what is wanted; no change scores 0.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def divide(a: Array, b: Array) -> Array:
    """Divide; 0 where the denominator is not positive."""
    return np.divide(a, b, out=np.zeros(np.broadcast_shapes(a.shape, b.shape)), where=b > 0)


def cosine(delta: Array, weights: Array, spread: Array) -> Array:
    """Cosine of the weights with the effect in units of the control's standard deviation; -1 to 1."""
    effect = delta / spread
    return divide(effect @ weights.T, np.outer(np.linalg.norm(effect, axis=1), np.linalg.norm(weights, axis=1)))


def projection(delta: Array, weights: Array, spread: Array) -> Array:
    """Length of the effect along the weights, in the effect's units (natural logarithm)."""
    return delta @ _unit(weights).T


def spearman(delta: Array, weights: Array, spread: Array) -> Array:
    """Rank correlation of the weights with the effect in units of the control's standard deviation; -1 to 1."""
    return _correlation(_ranks(delta / spread), _ranks(weights))


def ulm(delta: Array, weights: Array, spread: Array) -> Array:
    """Give the t value of the slope of a linear model of the effect on the weights, over all genes.

    The univariate linear model of decoupler (Badia-i-Mompel et al. 2022): t = r sqrt((G - 2) / (1 - r^2)).
    """
    r = _correlation(delta, weights)
    return r * np.sqrt((delta.shape[1] - 2) / np.maximum(1 - r**2, 1e-12))


def mean_diff(delta: Array, weights: Array, spread: Array) -> Array:
    """Mean effect on the genes wanted up minus that on the genes wanted down; a side without genes is all others."""
    up, down, rest = weights > 0, weights < 0, weights == 0
    up = np.where(up.any(axis=1, keepdims=True), up, rest)
    down = np.where(down.any(axis=1, keepdims=True), down, rest)
    return _means(delta, up) - _means(delta, down)


def auc(delta: Array, weights: Array, spread: Array) -> Array:
    """Probability that a gene wanted up ranks above one that is not, minus the same for down; each about 1/2."""
    ranks = _ranks(delta)
    return _auc(ranks, weights > 0) - _auc(ranks, weights < 0)


def wtcs(delta: Array, weights: Array, spread: Array) -> Array:
    """Weighted connectivity score (Subramanian et al. 2017): half the difference of the enrichments, 0 if they agree.

    The enrichment is the extreme of the weighted Kolmogorov-Smirnov walk (Subramanian et al. 2005, p = 1) over the
    effect in units of the control's standard deviation. With one set only, it is the enrichment of that set.
    """
    effect = delta / spread
    order = np.argsort(-effect, axis=1, kind="stable")
    sizes = np.abs(np.take_along_axis(effect, order, axis=1))
    out = np.zeros((len(delta), len(weights)))
    for m, row in enumerate(weights):
        ordered = row[order]
        up, down = _enrichment(sizes, ordered > 0), _enrichment(sizes, ordered < 0)
        if not (row > 0).any() or not (row < 0).any():
            out[:, m] = up - down
        else:
            out[:, m] = np.where(up * down < 0, (up - down) / 2, 0.0)
    return out


Score = Callable[[Array, Array, Array], Array]
SCORES: dict[str, Score] = {f.__name__: f for f in (cosine, projection, spearman, ulm, mean_diff, auc, wtcs)}
LINEAR = frozenset({"projection", "mean_diff", "edistance", "mmd"})
"""Scores that grow with the effect; the others see its pattern only."""


def _unit(weights: Array) -> Array:
    return divide(weights, np.linalg.norm(weights, axis=1, keepdims=True))


def _correlation(a: Array, b: Array) -> Array:
    a, b = a - a.mean(axis=1, keepdims=True), b - b.mean(axis=1, keepdims=True)
    return np.clip(divide(a @ b.T, np.outer(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1))), -1, 1)


def _ranks(values: Array) -> Array:
    from scipy.stats import rankdata

    return np.asarray(rankdata(values, axis=1), dtype=np.float64)


def _means(delta: Array, members: NDArray[np.bool_]) -> Array:
    chosen = members.astype(np.float64)
    return divide(delta @ chosen.T, np.broadcast_to(chosen.sum(axis=1), (len(delta), len(chosen))))


def _auc(ranks: Array, members: NDArray[np.bool_]) -> Array:
    """Area under the curve of each set against all other genes, (k, m); 1/2 for an empty set."""
    chosen = members.astype(np.float64)
    n = chosen.sum(axis=1)
    pairs = n * (ranks.shape[1] - n)
    above = ranks @ chosen.T - n * (n + 1) / 2
    return np.where(pairs > 0, above / np.maximum(pairs, 1), 0.5)


def _enrichment(sizes: Array, members: NDArray[np.bool_]) -> Array:
    """Largest deviation of the running sum of each row (k,); 0 for an empty set."""
    hits = np.where(members, sizes, 0.0)
    total, misses = hits.sum(axis=1, keepdims=True), ~members
    walk = np.cumsum(divide(hits, total) - misses / np.maximum(misses.sum(axis=1, keepdims=True), 1), axis=1)
    extreme = np.take_along_axis(walk, np.abs(walk).argmax(axis=1)[:, None], axis=1)[:, 0]
    return np.where(total[:, 0] > 0, extreme, 0.0)
