"""Scores anchored between a baseline and a repeat of the experiment."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Anchored:
    """A value between its baseline and its ceiling.

    Attributes
    ----------
    model
        Mean over redraws.
    baseline
        Likewise.
    ceiling
        Likewise.
    model_se
        Standard error of the mean; NaN with fewer than two redraws.
    baseline_se
        Likewise.
    ceiling_se
        Likewise.
    score
        (model - baseline) / (ceiling - baseline): 0 like the baseline, 1 like a repeat of the experiment; may lie
        outside.
    counted
        Whether the ceiling beats the baseline by more than the asked number of standard errors. Elsewhere the score
        is noise.

    Examples
    --------
    >>> result = metrics.anchored_score(np.array([0.8, 0.82]), np.array([0.5, 0.52]), np.array([0.9, 0.92]))
    >>> round(result.score, 2)
    0.75
    """

    model: float
    model_se: float
    baseline: float
    baseline_se: float
    ceiling: float
    ceiling_se: float
    score: float
    counted: bool


def mean_and_error(draws: np.ndarray) -> tuple[float, float]:
    """Mean over redraws and its standard error, NaN draws left out; NaN where undefined.

    Parameters
    ----------
    draws
        Values of redraws, (n,).

    Returns
    -------
    Mean and standard error.

    Examples
    --------
    >>> metrics.mean_and_error(np.array([1.0, 3.0]))
    (2.0, 1.0)
    """
    values = np.asarray(draws, dtype=np.float64)
    values = values[~np.isnan(values)]
    mean = float(values.mean()) if values.size else float("nan")
    error = float(values.std(ddof=1) / np.sqrt(values.size)) if values.size > 1 else float("nan")
    return mean, error


def anchored_score(
    model: np.ndarray,
    baseline: np.ndarray,
    ceiling: np.ndarray,
    *,
    higher_is_better: bool = True,
    n_errors: float = 3.0,
    single_draw: bool = False,
) -> Anchored:
    """Place a model between a baseline and a repeat of the experiment.

    Parameters
    ----------
    model, baseline, ceiling
        Values of one metric over redraws; a single value is allowed for ``model``. Undefined (NaN) draws are left out.
    higher_is_better
        Orientation of the metric. The score has the same formula for both; only ``counted`` depends on it.
    n_errors
        Standard errors by which the ceiling must beat the baseline. The error of the difference is the root of the
        summed squares of the two standard errors.
    single_draw
        Take the error of one draw (the standard deviation over redraws) instead of the error of the mean. Redraws
        come from finite pools and share the held-out cells, so the error of the mean shrinks with more redraws while
        these shares of the noise stay.

    Returns
    -------
    Means, errors, the score and whether it counts.

    Examples
    --------
    >>> model_draws, baseline_draws = np.array([0.80, 0.82, 0.81]), np.array([0.50, 0.52, 0.51])
    >>> repeat_draws = np.array([0.91, 0.93, 0.92])
    >>> round(metrics.anchored_score(model_draws, baseline_draws, repeat_draws).score, 2)
    0.73
    """
    (m, m_se), (b, b_se), (c, c_se) = (mean_and_error(np.atleast_1d(x)) for x in (model, baseline, ceiling))
    gap = c - b if higher_is_better else b - c
    error = np.hypot(_spread(baseline), _spread(ceiling)) if single_draw else np.hypot(b_se, c_se)
    counted = bool(gap > n_errors * error)
    score = (m - b) / (c - b) if c != b else float("nan")
    return Anchored(m, m_se, b, b_se, c, c_se, float(score), counted)


def _spread(draws: np.ndarray) -> float:
    values = np.asarray(draws, dtype=np.float64)
    values = values[~np.isnan(values)]
    return float(values.std(ddof=1)) if values.size > 1 else float("nan")
