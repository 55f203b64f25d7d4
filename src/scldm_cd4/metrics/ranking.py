"""How good a ranking of perturbations is, beside rankings that need no model."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from scldm_cd4._errors import DataError

CONTEXT, PERTURBATION = "context", "perturbation"


def spearman(truth: Any, guess: Any) -> float:
    """Spearman correlation of scores; NaN where one side is constant.

    Parameters
    ----------
    truth, guess
        True and guessed scores of the same items, higher is better, (n,).

    Returns
    -------
    -1 to 1, 0 by chance.

    Examples
    --------
    >>> metrics.ranking.spearman([1, 2, 3], [10, 20, 30])
    1.0
    """
    from scipy.stats import spearmanr

    truth, guess = _pair(truth, guess)
    return float(spearmanr(truth, guess).statistic) if _varies(truth, guess) else np.nan


def kendall(truth: Any, guess: Any) -> float:
    """Kendall's tau-b of scores; NaN where one side is constant.

    Parameters
    ----------
    truth, guess
        True and guessed scores of the same items, higher is better, (n,).

    Returns
    -------
    -1 to 1, 0 by chance.

    Examples
    --------
    >>> round(metrics.ranking.kendall([1, 2, 3], [10, 30, 20]), 3)
    0.333
    """
    from scipy.stats import kendalltau

    truth, guess = _pair(truth, guess)
    return float(kendalltau(truth, guess).statistic) if _varies(truth, guess) else np.nan


def precision_at_k(truth: Any, guess: Any, k: int) -> float:
    """Share of the k best by guess that are among the k best by truth; ties count by their expected share.

    Chance level k / n.

    Parameters
    ----------
    truth, guess
        True and guessed scores of the same items, higher is better, (n,).
    k
        Size of the shortlist.

    Returns
    -------
    0 to 1, k / n by chance.

    Examples
    --------
    >>> metrics.ranking.precision_at_k([4, 3, 2, 1], [4, 1, 3, 2], k=2)
    0.5
    """
    truth, guess = _pair(truth, guess)
    return float(_membership(truth, k) @ _membership(guess, k) / _size(truth, k))


def enrichment(truth: Any, guess: Any, k: int) -> float:
    """`precision_at_k` over its chance level k / n; 1 by chance.

    Parameters
    ----------
    truth, guess
        True and guessed scores of the same items, higher is better, (n,).
    k
        Size of the shortlist.

    Returns
    -------
    At least 0.

    Examples
    --------
    >>> metrics.ranking.enrichment([4, 3, 2, 1], [4, 3, 2, 1], k=2)
    2.0
    """
    truth, guess = _pair(truth, guess)
    return precision_at_k(truth, guess, k) * len(truth) / _size(truth, k)


def ndcg(truth: Any, guess: Any, k: int | None = None) -> float:
    """Normalised discounted cumulative gain (Järvelin & Kekäläinen 2002), of true scores above their smallest.

    1 for the true order. Ties of the guess share their discounts (McSherry & Najork 2008). NaN where the truth is
    constant.

    Parameters
    ----------
    truth, guess
        True and guessed scores of the same items, higher is better, (n,).
    k
        Items that count; None: all.

    Returns
    -------
    0 to 1, best 1.

    Examples
    --------
    >>> round(metrics.ranking.ndcg([4, 3, 2, 1], [4, 3, 2, 1], k=2), 6)
    1.0
    """
    from sklearn.metrics import ndcg_score

    truth, guess = _pair(truth, guess)
    if not np.ptp(truth):
        return np.nan
    return float(ndcg_score([truth - truth.min()], [guess], k=None if k is None else _size(truth, k)))


def regret_at_k(truth: Any, guess: Any, k: int) -> float:
    """Mean true score of the k truly best minus that of the k best by guess; 0 is best, ties count in expectation.

    Parameters
    ----------
    truth, guess
        True and guessed scores of the same items, higher is better, (n,).
    k
        Size of the shortlist.

    Returns
    -------
    At least 0, in units of the true scores.

    Examples
    --------
    >>> metrics.ranking.regret_at_k([4, 3, 2, 1], [4, 1, 3, 2], k=2)
    0.5
    """
    truth, guess = _pair(truth, guess)
    return float((_membership(truth, k) - _membership(guess, k)) @ truth / _size(truth, k))


def auroc(is_positive: Any, guess: Any) -> float:
    """Area under the ROC curve of known positives; 1/2 by chance, NaN without positives or negatives.

    Parameters
    ----------
    is_positive
        Which items are known to be right, (n,).
    guess
        Guessed scores, (n,).

    Returns
    -------
    0 to 1.

    Examples
    --------
    >>> metrics.ranking.auroc([True, True, False], [0.9, 0.4, 0.5])
    0.5
    """
    positive, guess = _pair(is_positive, guess)
    if set(np.unique(positive)) != {0.0, 1.0}:
        return np.nan
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(positive, guess))


def bootstrap_auroc(
    is_positive: Any, guess: Any, *, n_boot: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """Area under the ROC curve with a percentile interval from redrawn positives and negatives: value, low, high.

    Parameters
    ----------
    is_positive, guess
        As for `scldm_cd4.metrics.ranking.auroc`.
    n_boot
        Redraws.
    level
        Share of the redraws that the interval holds.
    seed
        Of the redraws.

    Returns
    -------
    The area, and the ends of its interval.

    Examples
    --------
    >>> value, low, high = metrics.ranking.bootstrap_auroc(truth > 9, guess, n_boot=50)
    >>> low <= value <= high
    True
    """
    positive, guess = _pair(is_positive, guess)
    value = auroc(positive, guess)
    if np.isnan(value):
        return value, np.nan, np.nan
    rng = np.random.default_rng(seed)
    sides = [np.flatnonzero(positive == side) for side in (0, 1)]
    draws = []
    for _ in range(n_boot):
        rows = np.concatenate([rng.choice(side, len(side)) for side in sides])
        draws.append(auroc(positive[rows], guess[rows]))
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return value, float(low), float(high)


def compare(truth: Any, rankings: Mapping[str, Any], *, k: int = 20, known: Iterable[str] = ()) -> pd.DataFrame:
    """Score rankings of the same perturbations.

    Parameters
    ----------
    truth
        True or observed scores, a Series by perturbation (or by any index); more is better.
    rankings
        Scores by method, each a Series with the index of `truth`. A missing score counts as worst.
    k
        Size of the shortlist.
    known
        Entries of the index that are known to belong on top.

    Returns
    -------
    One row per method: ``spearman``, ``kendall``, ``precision`` and ``enrichment`` at k, ``ndcg`` at k, ``regret`` at
    k, ``auroc`` of the known; ``attrs`` has k, n and the chance level of the precision.

    Raises
    ------
    DataError
        There are fewer than three perturbations, one is listed twice, or none of the known is among them.

    Examples
    --------
    >>> truth = pd.Series([3.0, 2.0, 1.0, 0.0], index=["A", "B", "C", "D"])
    >>> table = metrics.ranking.compare(truth, {"mine": truth, "other": -truth}, k=2)
    >>> float(table.loc["mine", "spearman"])
    1.0
    """
    truth = pd.Series(truth, dtype=float)
    if len(truth) < 3 or not truth.index.is_unique or not np.isfinite(truth).all():
        raise DataError("truth needs at least three different entries with finite scores")
    positive = truth.index.isin(list(known))
    if list(known) and not positive.any():
        raise DataError(f"none of the known, such as {next(iter(known))!r}, is among the ranked")
    rows = {}
    for name, scores in rankings.items():
        guess = pd.Series(scores, dtype=float).reindex(truth.index)
        if guess.notna().sum() == 0:
            raise DataError(f"the ranking {name!r} has no score for any of {list(truth.index[:3])} ...")
        guess = guess.fillna(guess.min() - 1.0)
        rows[name] = {
            "spearman": spearman(truth, guess),
            "kendall": kendall(truth, guess),
            "precision": precision_at_k(truth, guess, k),
            "enrichment": enrichment(truth, guess, k),
            "ndcg": ndcg(truth, guess, k),
            "regret": regret_at_k(truth, guess, k),
            "auroc": auroc(positive, guess),
        }
    table = pd.DataFrame.from_dict(rows, orient="index")
    size = _size(truth.to_numpy(), k)
    table.attrs = {"k": size, "n": len(truth), "precision_by_chance": size / len(truth)}
    return table


def baselines(
    effects: Mapping[tuple[str, str], Any],
    wanted: Sequence[tuple[str, str]],
    score: Callable[[np.ndarray], np.ndarray],
    *,
    seed: int = 0,
) -> pd.DataFrame:
    """Rank perturbations without a model, from effects in training conditions.

    Parameters
    ----------
    effects
        Effects (genes,) in training, by context and perturbation.
    wanted
        Conditions to score (context, perturbation), held out of `effects`.
    score
        Gives scores (k,) of effects (k, genes).
    seed
        Of the random ranking.

    Returns
    -------
    Scores by condition (index `context`, `perturbation`): ``transfer``, the score of the perturbation's mean effect in
    its other contexts; ``mean_context``, the score of the mean effect of all perturbations in the context (equal for
    all, so it orders contexts only); ``effect_size``, the L2 norm of the transferred effect; ``random``. NaN where
    training has nothing to take.

    Raises
    ------
    DataError
        A condition is both wanted and among the training effects.

    Examples
    --------
    >>> effects = {("D1", "A"): [1.0, 0.0], ("D2", "A"): [3.0, 0.0], ("D1", "B"): [0.0, 1.0]}
    >>> table = metrics.ranking.baselines(effects, [("D2", "B")], lambda e: e[:, 1])
    >>> table["transfer"].tolist()
    [1.0]
    """
    if missing := [key for key in wanted if key in effects]:
        raise DataError(f"{missing[0]} is both wanted and among the training effects, which would give it away")
    keys = list(effects)
    values = np.array([np.asarray(effects[key], dtype=np.float64) for key in keys])
    contexts, names = (np.array([key[i] for key in keys], dtype=object) for i in (0, 1))
    nothing = np.full(values.shape[1], np.nan)
    transfer = np.array([values[names == p].mean(axis=0) if (names == p).any() else nothing for _, p in wanted])
    context = np.array([values[contexts == c].mean(axis=0) if (contexts == c).any() else nothing for c, _ in wanted])
    out = pd.DataFrame(index=pd.MultiIndex.from_tuples(list(wanted), names=[CONTEXT, PERTURBATION]))
    for name, guess in (("transfer", transfer), ("mean_context", context)):
        known = ~np.isnan(guess).any(axis=1)
        out[name] = np.nan
        out.loc[known, name] = score(guess[known]) if known.any() else np.nan
    out["effect_size"] = np.linalg.norm(transfer, axis=1)
    out["random"] = np.random.default_rng(seed).random(len(out))
    return out


def _pair(a: Any, b: Any) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.ndim != 1 or first.shape != second.shape or not len(first):
        raise DataError(f"scores {first.shape} and {second.shape} must be two lists of the same perturbations")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise DataError("scores must be finite; leave out perturbations without a score on both sides")
    return first, second


def _varies(a: np.ndarray, b: np.ndarray) -> bool:
    return len(a) > 2 and bool(np.ptp(a) > 0 and np.ptp(b) > 0)


def _size(values: np.ndarray, k: int) -> int:
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise DataError(f"k must be a whole number of at least 1, got {k!r}")
    return min(int(k), len(values))


def _membership(values: np.ndarray, k: int) -> np.ndarray:
    """Return the probability of being among the k best when ties are broken at random, (n,)."""
    k = _size(values, k)
    edge = np.sort(values)[-k]
    above, tied = values > edge, values == edge
    return above + tied * (k - above.sum()) / tied.sum()
