"""How sure scores and ranks are: over cells, over donors, together, and against chance."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scldm_cd4.metrics import benjamini_hochberg
from scldm_cd4.noise import stream
from scldm_cd4.ranking.effects import jackknife_variance

LEVEL = 0.9
"""Of all intervals."""
MIN_DONORS = 3
"""Donors that an interval over donors needs."""
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Spread:
    """What the scores of several perturbations in one group of contexts rest on; NaN where a donor is absent."""

    scores: Array
    """(K,)"""
    folds: tuple[Array, ...]
    """Scores without each fold, per perturbation (folds,)."""
    donors: Array
    """Scores without each donor (K, donors)."""


@dataclass(frozen=True)
class Uncertainty:
    """Standard errors, intervals and ranks of K scores, each (K,)."""

    se_cells: Array
    se_donors: Array
    """What donors add to the cells; NaN with fewer than `MIN_DONORS`."""
    se_total: Array
    df: Array
    """Degrees of freedom of `se_total`."""
    lo: Array
    hi: Array
    rank_lo: Array
    rank_hi: Array
    p_top_k: Array


def assess(spread: Spread, *, n_boot: int, top_k: int, seed: int) -> Uncertainty:
    r"""Estimate how far scores and ranks would move with other cells and other donors.

    Standard errors are jackknife ones (Tukey 1958), over folds of cells and over donors. The variance over donors has
    few degrees of freedom and is moderated over the perturbations (:func:`moderate`). It contains that over cells; the
    total is the larger of both. Ranks come from bootstrap replicates of the scores, linear in the resampling weights
    (the infinitesimal jackknife; Efron 1982): :math:`s_b = s + \sum_f (w_{bf} - 1) u_f / F`. All perturbations take the
    same weights, as they share the control's cells, the noise and the donors.

    Parameters
    ----------
    spread
        The scores.
    n_boot
        Replicates.
    top_k
        Size of the shortlist.
    seed
        Of the replicates.
    """
    from scipy import stats

    n_donors = (~np.isnan(spread.donors)).sum(axis=1)
    cells = np.array([float(jackknife_variance(x)) for x in spread.folds])
    over_donors = np.full(len(cells), np.nan)
    df = np.array([len(x) - 1.0 for x in spread.folds])
    for n in np.unique(n_donors[n_donors >= MIN_DONORS]):
        rows = n_donors == n
        left_out = spread.donors[rows]
        raw = jackknife_variance(left_out[~np.isnan(left_out)].reshape(rows.sum(), n).T)
        over_donors[rows], df[rows] = moderate(np.asarray(raw), n - 1.0)
    total = np.fmax(over_donors, cells)
    added = np.where(np.isnan(over_donors), np.nan, np.sqrt(np.maximum(over_donors - cells, 0.0)))
    margin = stats.t.ppf((1 + LEVEL) / 2, np.maximum(df, 1)) * np.sqrt(total)
    replicates = _replicates(spread, cells, added, n_boot, seed)
    ranks = stats.rankdata(-replicates, axis=1)
    lo, hi = np.quantile(ranks, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    top = (ranks <= top_k).mean(axis=0)
    scores = spread.scores
    return Uncertainty(
        np.sqrt(cells), added, np.sqrt(total), df, scores - margin, scores + margin, np.floor(lo), np.ceil(hi), top
    )


def _replicates(spread: Spread, cells: Array, added: Array, n_boot: int, seed: int) -> Array:
    """Return scores under resampled folds and donors (n_boot, K)."""
    out = np.repeat(spread.scores[None], n_boot, axis=0)
    sizes = np.array([len(x) for x in spread.folds])
    for n in np.unique(sizes):
        rows = np.flatnonzero(sizes == n)
        left_out = np.stack([spread.folds[row] for row in rows], axis=1)
        out[:, rows] += _resampled(left_out, np.sqrt(cells[rows]), n_boot, seed, "folds")
    known = np.flatnonzero(np.nan_to_num(added) > 0)
    if len(known):
        left_out = spread.donors[known].T
        centred = np.where(np.isnan(left_out), np.nanmean(left_out, axis=0), left_out)
        out[:, known] += _resampled(centred, added[known], n_boot, seed, "donors")
    return out


def _resampled(left_out: Array, size: Array, n_boot: int, seed: int, what: str) -> Array:
    """Return shifts (n_boot, K) of standard deviation `size`, linear in shared multinomial weights of the groups."""
    n = len(left_out)
    weights = stream(seed, (what,), n, "bootstrap").multinomial(n, np.full(n, 1.0 / n), size=n_boot)
    influence = left_out.mean(axis=0) - left_out
    norm = np.linalg.norm(influence, axis=0)  # of weights that are counts, the sum has this standard deviation
    return (weights - 1.0) @ (influence * np.divide(size, norm, out=np.zeros_like(size), where=norm > 0))


def moderate(variances: Array, df: float) -> tuple[Array, Array]:
    """Shrink variances with few degrees of freedom toward their common value (Smyth 2004, as in limma).

    Parameters
    ----------
    variances
        (K,), not negative.
    df
        Degrees of freedom of each.

    Returns
    -------
    Moderated variances and their degrees of freedom, (K,) each; unchanged with fewer than three.
    """
    from scipy.special import digamma, polygamma

    positive = variances[variances > 0]
    if len(positive) < 3:
        return variances, np.full(len(variances), df)
    logs = np.log(positive) - digamma(df / 2) + np.log(df / 2)
    excess = float(logs.var(ddof=1) - polygamma(1, df / 2))
    if excess <= 0:
        return np.full(len(variances), np.exp(logs.mean())), np.full(len(variances), 1e6)
    prior_df = 2 * _inverse_trigamma(excess)
    prior = float(np.exp(logs.mean() + digamma(prior_df / 2) - np.log(prior_df / 2)))
    total = df + prior_df
    return (df * variances + prior_df * prior) / total, np.full(len(variances), total)


def _inverse_trigamma(value: float) -> float:
    from scipy.optimize import brentq
    from scipy.special import polygamma

    return float(brentq(lambda x: polygamma(1, x) - value, 1e-6, 1e8))


def p_values(excess: Array, se: Array, df: Array) -> Array:
    """Return the probability of a score so far above chance or further (one-sided t); NaN stays."""
    from scipy import stats

    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(se > 0, excess / se, np.where(excess > 0, np.inf, -np.inf))
    return np.where(np.isnan(excess), np.nan, stats.t.sf(t, np.maximum(df, 1)))


def joint_df(first: Array, first_df: Array, second: Array, second_df: float) -> Array:
    r"""Return the degrees of freedom of the sum of two independent variances.

    :math:`(a + b)^2 / (a^2 / f_a + b^2 / f_b)` (Satterthwaite 1946, *Biometrics Bulletin* 2, 110).
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        df = np.square(first + second) / (np.square(first) / np.maximum(first_df, 1) + np.square(second) / second_df)
    return np.where(second > 0, df, first_df)


def false_discovery_rates(p: Array) -> Array:
    """Adjust p values (K,) by Benjamini & Hochberg (1995); NaN stays."""
    return np.asarray(benjamini_hochberg(p), dtype=np.float64)
