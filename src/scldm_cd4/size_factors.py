"""Library sizes of the training cells per context and perturbation, and draws from them.

A perturbation that changes how much RNA a cell has changes the spread and the zeros of its log-normalised counts; cells
generated at the library sizes of other perturbations then differ from real ones in genes that it leaves alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from scldm_cd4._errors import DataError

LEVELS = np.linspace(0.0, 1.0, 101)
"""The levels at which quantiles are stored."""
N_ITERATIONS = 20
"""Of the additive model of contexts and perturbations, solved by turns."""
FLOOR = 0.05
"""Added to a ratio of variances, so that a perturbation with one cell has a finite logarithm."""


@dataclass(frozen=True)
class LibraryStats:
    """The natural logarithm of the library sizes of one group of cells."""

    mean: float
    sd: float
    """Population standard deviation (ddof 0)."""
    n: int | None
    """Cells; None where only mean and sd are known."""
    quantiles: tuple[float, ...] | None = None
    """Of the log library at `LEVELS`."""

    def __post_init__(self) -> None:
        if not (np.isfinite(self.mean) and np.isfinite(self.sd) and self.sd >= 0):
            raise DataError(f"mean and sd of a log library must be finite and sd >= 0, got {self.mean}, {self.sd}")
        if self.quantiles is not None:
            steps = np.diff(self.quantiles)
            if len(self.quantiles) != len(LEVELS) or not np.all(steps >= 0) or not np.all(np.isfinite(self.quantiles)):
                raise DataError(f"quantiles must be {len(LEVELS)} finite, ascending numbers")

    @classmethod
    def of(cls, log_library: np.ndarray) -> "LibraryStats":
        """Return the statistics of log library sizes, shape (n,)."""
        quantiles = tuple(np.maximum.accumulate(np.quantile(log_library, LEVELS)).tolist())
        return cls(float(log_library.mean()), float(log_library.std()), len(log_library), quantiles)

    @classmethod
    def mixture(cls, parts: Sequence["LibraryStats"]) -> "LibraryStats":
        """Return mean and sd of an equal mixture of groups."""
        means = np.array([p.mean for p in parts])
        variance = np.mean([p.sd**2 for p in parts]) + means.var()
        return cls(float(means.mean()), float(np.sqrt(variance)), None)

    def draw(self, uniform: np.ndarray) -> np.ndarray:
        """Return library sizes (counts, float64) at uniform numbers in (0, 1): the inverse distribution function."""
        if self.quantiles is not None:
            return np.exp(np.interp(uniform, LEVELS, self.quantiles))
        from scipy.special import ndtri

        return np.exp(self.mean + self.sd * ndtri(uniform))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that JSON can hold."""
        quantiles = None if self.quantiles is None else list(self.quantiles)
        return {"mean": self.mean, "sd": self.sd, "n": self.n, "quantiles": quantiles}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LibraryStats":
        """Build from `to_dict`; raises KeyError, TypeError or ValueError for values of the wrong kind."""
        n, quantiles = values["n"], values["quantiles"]
        quantiles = None if quantiles is None else tuple(float(q) for q in quantiles)
        return cls(float(values["mean"]), float(values["sd"]), None if n is None else int(n), quantiles)


@dataclass(frozen=True)
class LibraryShift:
    """What a perturbation does to the log library of a context, in all contexts alike."""

    shift: float = 0.0
    """Added to the mean."""
    scale: float = 1.0
    """Factor on the distance from the mean."""


@dataclass(frozen=True)
class SizeFactors:
    """Library sizes per context (donor x time point), per time point, and of all cells, and shifts of perturbations.

    A context with fewer than `min_cells` cells falls back to its time point, that to all cells. Their statistics are of
    cells without the shifts of their perturbations.
    """

    contexts: dict[str, dict[str, LibraryStats]]
    """Time point -> donor -> statistics."""
    timepoints: dict[str, LibraryStats]
    overall: LibraryStats
    min_cells: int = 30
    perturbations: dict[str, LibraryShift] = field(default_factory=dict)
    """Those that are known; others, and a dropped perturbation, shift nothing."""

    @classmethod
    def fit(
        cls,
        log_library: np.ndarray,
        donor: np.ndarray,
        timepoint: np.ndarray,
        *,
        donors: Sequence[str],
        timepoints: Sequence[str],
        perturbation: np.ndarray | None = None,
        perturbations: Sequence[str] = (),
        shifts: Mapping[str, LibraryShift] | None = None,
        min_cells: int = 30,
    ) -> "SizeFactors":
        """Take the statistics of training cells.

        Parameters
        ----------
        log_library
            Natural logarithm of the library sizes, shape (n,).
        donor, timepoint
            Codes into `donors` and `timepoints`, shape (n,).
        donors, timepoints
            The levels.
        perturbation, perturbations
            Codes (n,) and levels; without them no shifts are estimated.
        shifts
            Shifts that are known already, in place of estimates.
        min_cells
            Groups with fewer cells are not used for draws.

        Raises
        ------
        DataError
            There are no cells, or a library size is not finite.
        """
        if not len(log_library) or not np.all(np.isfinite(log_library)):
            raise DataError("size factors need at least one cell, and library sizes that are positive and finite")
        if perturbation is not None:
            context = donor * len(timepoints) + timepoint
            context = (np.cumsum(np.bincount(context) > 0, dtype=np.int32) - 1)[context]  # those with cells, numbered
            if shifts is None:
                shifts = estimate_shifts(log_library, context, perturbation, perturbations)
            known = [shifts.get(label, LibraryShift()) for label in perturbations]
            shift, scale = (np.array([getattr(s, name) for s in known]) for name in ("shift", "scale"))
            centre = _group_means(log_library - shift[perturbation], context)
            log_library = log_library - centre[context]  # in place from here: a step has one temporary of all cells
            log_library -= shift[perturbation]
            log_library /= scale[perturbation]
            log_library += centre[context]
        contexts: dict[str, dict[str, LibraryStats]] = {}
        by_time = {}
        for t in np.unique(timepoint).tolist():
            at_time = timepoint == t
            by_time[timepoints[t]] = LibraryStats.of(log_library[at_time])
            contexts[timepoints[t]] = {
                donors[d]: LibraryStats.of(log_library[at_time & (donor == d)])
                for d in np.unique(donor[at_time]).tolist()
            }
        return cls(contexts, by_time, LibraryStats.of(log_library), min_cells, dict(shifts or {}))

    @classmethod
    def from_reference(
        cls, mean: Mapping[str, float], sd: Mapping[str, float], *, donors: Sequence[str], timepoints: Sequence[str]
    ) -> "SizeFactors":
        """Read the flat layout of the released size factors, whose keys are ``{timepoint}_{donor}``.

        Parameters
        ----------
        mean, sd
            Mean and standard deviation of the natural log library size by key.
        donors, timepoints
            The levels, by which the keys are taken apart.

        Raises
        ------
        DataError
            The keys of `mean` and `sd` differ, a key fits no or several contexts, or there are none.

        Notes
        -----
        A time point, and all cells, are equal mixtures of their contexts, as cell numbers are not known.
        """
        if set(mean) != set(sd) or not mean:
            raise DataError("the means and the standard deviations of the size factors must have the same keys")
        owners: dict[str, list[tuple[str, str]]] = {}
        for t in timepoints:
            for d in donors:
                owners.setdefault(f"{t}_{d}", []).append((t, d))
        contexts: dict[str, dict[str, LibraryStats]] = {}
        for key in mean:
            found = owners.get(key, [])
            if len(found) != 1:
                raise DataError(
                    f"size factor {key!r} fits {len(found)} contexts; keys are 'timepoint_donor', with time points "
                    f"{list(timepoints)} and donors {list(donors)}"
                )
            t, d = found[0]
            contexts.setdefault(t, {})[d] = LibraryStats(float(mean[key]), float(sd[key]), None)
        return cls.of_contexts(contexts)

    @classmethod
    def of_contexts(cls, contexts: Mapping[str, Mapping[str, LibraryStats]]) -> "SizeFactors":
        """Take the statistics of contexts (time point -> donor) of which the cell numbers are not known.

        A time point, and all cells, are then equal mixtures of their contexts.
        """
        by_time = {t: LibraryStats.mixture(list(stats.values())) for t, stats in contexts.items()}
        overall = LibraryStats.mixture([s for stats in contexts.values() for s in stats.values()])
        return cls({t: dict(stats) for t, stats in contexts.items()}, by_time, overall)

    def with_contexts(self, other: "SizeFactors") -> "SizeFactors":
        """Return a copy with the contexts and time points of `other` that are not known yet; nothing else changes."""
        contexts = {
            t: other.contexts.get(t, {}) | self.contexts.get(t, {}) for t in {**self.contexts, **other.contexts}
        }
        return replace(self, contexts=contexts, timepoints=other.timepoints | self.timepoints)

    def lookup(
        self, donor: str | None, timepoint: str | None
    ) -> tuple[LibraryStats, Literal["context", "timepoint", "all"]]:
        """Return the statistics used for a context and where they come from; None stands for any level."""
        candidates: tuple[tuple[LibraryStats | None, Literal["context", "timepoint"]], ...] = (
            (self.contexts.get(timepoint or "", {}).get(donor or ""), "context"),
            (self.timepoints.get(timepoint or ""), "timepoint"),
        )
        for stats, source in candidates:
            if stats is not None and (stats.n is None or stats.n >= self.min_cells):
                return stats, source
        return self.overall, "all"

    def sample(
        self, donor: str | None, timepoint: str | None, uniform: np.ndarray, perturbation: str | None = None
    ) -> np.ndarray:
        """Draw library sizes of one condition.

        Parameters
        ----------
        donor, timepoint
            The context; None stands for any level.
        uniform
            Numbers in (0, 1), any shape.
        perturbation
            Whose shift is added; None adds none.

        Returns
        -------
        Library sizes (counts per cell on the panel), float64, same shape: the interpolated quantiles of the training
        cells where these are known, else lognormal.

        Raises
        ------
        DataError
            A number is not in (0, 1).
        """
        uniform = np.asarray(uniform, dtype=np.float64)
        if uniform.size and not (uniform.min() > 0 and uniform.max() < 1):
            raise DataError("uniform numbers must lie in (0, 1)")
        stats = self.lookup(donor, timepoint)[0]
        drawn, known = stats.draw(uniform), self.perturbations.get(perturbation or "")
        if known is None:
            return drawn
        return np.exp(stats.mean + known.shift + known.scale * (np.log(drawn) - stats.mean))

    def to_dict(self) -> dict[str, Any]:
        """Return nested plain values that JSON can hold."""
        return {
            "contexts": {t: {d: s.to_dict() for d, s in stats.items()} for t, stats in self.contexts.items()},
            "timepoints": {t: s.to_dict() for t, s in self.timepoints.items()},
            "overall": self.overall.to_dict(),
            "min_cells": self.min_cells,
            "perturbations": {label: [known.shift, known.scale] for label, known in self.perturbations.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SizeFactors":
        """Build from `to_dict`; raises KeyError, TypeError or ValueError for values of the wrong kind."""
        read = LibraryStats.from_dict
        contexts = {t: {d: read(s) for d, s in stats.items()} for t, stats in values["contexts"].items()}
        timepoints = {t: read(s) for t, s in values["timepoints"].items()}
        shifts = {label: LibraryShift(*map(float, pair)) for label, pair in values.get("perturbations", {}).items()}
        return cls(contexts, timepoints, read(values["overall"]), int(values["min_cells"]), shifts)


def estimate_shifts(
    log_library: np.ndarray, context: np.ndarray, perturbation: np.ndarray, labels: Sequence[str]
) -> dict[str, LibraryShift]:
    """Estimate what perturbations do to the log library, in all contexts alike.

    Means are those of an additive model of contexts and perturbations, spreads those of its residuals. Both are shrunk
    toward no shift by their sampling noise, with the variance over perturbations by moments (empirical Bayes, normal
    prior), so that perturbations of few cells, and data without shifts, keep the library sizes of their contexts.

    Parameters
    ----------
    log_library, context, perturbation
        Of each cell (n,); codes from 0.
    labels
        Levels of the perturbation.

    Returns
    -------
    Shifts of the perturbations that have cells.
    """
    n = np.bincount(perturbation, minlength=len(labels)).astype(np.float64)
    some, shift = n > 0, np.zeros(len(labels))
    for _ in range(N_ITERATIONS):
        means = _group_means(log_library - shift[perturbation], context)
        residual = log_library - means[context]
        variance = float(np.var(residual - shift[perturbation]))
        shift[some] = _shrunk(_group_means(residual, perturbation, len(n))[some], variance / n[some])
        shift[some] -= np.average(shift[some], weights=n[some])
    residual -= shift[perturbation]
    spread = np.square(residual, out=residual)
    log_scale = np.zeros(len(labels))
    if variance > 0:
        kurtosis = float(np.mean(np.square(spread))) / variance**2
        ratio = (_group_means(spread, perturbation, len(n))[some] + FLOOR * variance) / ((1 + FLOOR) * variance)
        log_scale[some] = _shrunk(0.5 * np.log(ratio), max(kurtosis - 1, 1e-9) / (4 * n[some]))
    return {
        labels[p]: LibraryShift(float(shift[p]), float(np.exp(log_scale[p]))) for p in np.flatnonzero(some).tolist()
    }


def _shrunk(values: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Posterior means of values with known noise variances under a normal prior around 0, its variance by moments."""
    signal = max(0.0, float(np.average(np.square(values) - noise, weights=1 / np.maximum(noise, 1e-12))))
    shrunk: np.ndarray = values * signal / np.maximum(signal + noise, 1e-300)
    return shrunk


def _group_means(values: np.ndarray, codes: np.ndarray, n_groups: int = 0) -> np.ndarray:
    """Mean of the values of each code; 0 where it has none."""
    n = np.bincount(codes, minlength=n_groups)
    return np.bincount(codes, weights=values, minlength=n_groups) / np.maximum(n, 1)
