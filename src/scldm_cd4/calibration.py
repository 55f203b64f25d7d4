"""A regression of how well predictions agree with observed effects, few parameters, judged on what was left out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scldm_cd4._errors import CheckpointError

FEATURES = ("effect_size", "agreement", "n_train_cells_perturbation")
PENALTIES = (0.01, 0.1, 1.0, 10.0, 1e6)
"""Ridge penalties per condition; the largest leaves the mean alone."""
FEW_PERTURBATIONS = 5
"""Below so many, conditions are left out one by one."""
MAX_R = 0.99
NORMAL_95 = 1.645
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Calibration:
    """What validation conditions taught; `predict` applies it."""

    centre: tuple[float, ...]
    scale: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    """Range of the features; beyond it nothing was learned, so they are clipped."""
    weights: tuple[float, ...]
    """Intercept and slopes for standardised features, in Fisher's z."""
    sd: float
    """Standard deviation of z around predictions of left-out perturbations."""
    facts: dict[str, Any]
    """Numbers of conditions and cells, and how left-out perturbations were predicted."""

    def predict(self, features: Array) -> Array:
        """Return expected value and limits of a 90 % interval (n, 3) for features (n, 3); NaN where one is NaN."""
        x = (np.clip(features, self.low, self.high) - self.centre) / self.scale
        z = self.weights[0] + x @ np.array(self.weights[1:])
        return np.tanh(np.stack([z, z - NORMAL_95 * self.sd, z + NORMAL_95 * self.sd], axis=1))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that JSON can hold."""
        names = ("centre", "scale", "low", "high", "weights")
        return {n: list(getattr(self, n)) for n in names} | {"sd": self.sd, "facts": dict(self.facts)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Calibration":
        """Build from `to_dict`.

        Raises
        ------
        CheckpointError
            The values do not fit.
        """
        try:
            columns = {n: tuple(map(float, values[n])) for n in ("centre", "scale", "low", "high", "weights")}
            if [len(c) for c in columns.values()] != [len(FEATURES)] * 4 + [len(FEATURES) + 1]:
                raise ValueError("a number of features that this version does not know")
            return cls(**columns, sd=float(values["sd"]), facts=dict(values["facts"]))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the saved figures on reliability are damaged: {error!r}") from error


def calibrate(features: Array, r: Array, perturbations: Sequence[str], n_cells: Array) -> tuple[Calibration, Array]:
    """Learn from validation conditions.

    Parameters
    ----------
    features
        Of `FEATURES`, logarithms of the first and last (n, 3).
    r
        Observed Pearson-delta (n,).
    perturbations
        Of the conditions; all of one are left out together, as contexts of one perturbation are alike.
    n_cells
        Observed cells (n,).

    Returns
    -------
    The calibration, and what it gives for every condition without its perturbation (n, 3).
    """
    from scipy.stats import spearmanr

    z = np.arctanh(np.clip(r, -MAX_R, MAX_R))
    names, group = np.unique(np.asarray(perturbations, dtype=object).astype(str), return_inverse=True)
    if len(names) < FEW_PERTURBATIONS:
        group = np.arange(len(z))
    left_out, mean_alone = np.empty(len(z)), np.empty(len(z))
    for g in np.unique(group):
        rest = group != g
        left_out[~rest] = _ridge(features[rest], z[rest], {}).z(features[~rest])
        mean_alone[~rest] = z[rest].mean()
    error = {"mae": np.tanh(left_out) - r, "mae_of_mean": np.tanh(mean_alone) - r}
    facts: dict[str, Any] = {
        "n_conditions": len(z),
        "n_perturbations": len(names),
        "median_n_cells": float(np.median(n_cells)),
        "mean_pearson_delta": float(r.mean()),
        "left_out_spearman": float(spearmanr(left_out, r).statistic) if np.ptp(left_out) * np.ptp(r) > 0 else None,
        **{f"left_out_{name}": float(np.abs(e).mean()) for name, e in error.items()},
    }
    sd = float(np.sqrt(np.mean(np.square(z - left_out))))
    facts["left_out_coverage"] = float(np.mean(np.abs(z - left_out) <= NORMAL_95 * sd))
    limits = [left_out, left_out - NORMAL_95 * sd, left_out + NORMAL_95 * sd]
    return _ridge(features, z, facts).calibration(sd), np.tanh(np.stack(limits, axis=1))


@dataclass(frozen=True)
class _Fit:
    centre: Array
    scale: Array
    low: Array
    high: Array
    weights: Array
    facts: dict[str, Any]

    def z(self, features: Array) -> Array:
        return self.weights[0] + (np.clip(features, self.low, self.high) - self.centre) / self.scale @ self.weights[1:]

    def calibration(self, sd: float) -> Calibration:
        values = [tuple(map(float, v)) for v in (self.centre, self.scale, self.low, self.high, self.weights)]
        centre, scale, low, high, weights = values
        return Calibration(centre, scale, low, high, weights, sd, self.facts)


def _ridge(features: Array, z: Array, facts: dict[str, Any]) -> _Fit:
    """Fit by ridge; the penalty has the least generalised cross-validation error (Golub, Heath & Wahba 1979)."""
    n, centre, scale = len(z), features.mean(axis=0), features.std(axis=0)
    scale = np.where(scale > 1e-9, scale, 1.0)
    x, y = (features - centre) / scale, z - z.mean()
    gram, best = x.T @ x / n, (np.inf, np.zeros(x.shape[1]))
    for penalty in PENALTIES:
        inverse = np.linalg.inv(gram + penalty * np.eye(x.shape[1]))
        slopes = inverse @ x.T @ y / n
        freedom = 1.0 + np.trace(inverse @ gram)
        score = np.mean(np.square(y - x @ slopes)) / max(1.0 - freedom / n, 1e-3) ** 2
        best = min(best, (score, slopes), key=lambda pair: pair[0])
    weights = np.concatenate([[z.mean()], best[1]])
    return _Fit(centre, scale, features.min(axis=0), features.max(axis=0), weights, facts)
