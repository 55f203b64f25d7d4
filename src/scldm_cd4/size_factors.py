"""Library sizes of the training cells per context, and draws from them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from scldm_cd4._errors import DataError

LEVELS = np.linspace(0.0, 1.0, 101)
"""The levels at which quantiles are stored."""


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
class SizeFactors:
    """Library sizes per context (donor x time point), per time point, and of all cells.

    A context with fewer than `min_cells` cells falls back to its time point, that to all cells.
    """

    contexts: dict[str, dict[str, LibraryStats]]
    """Time point -> donor -> statistics."""
    timepoints: dict[str, LibraryStats]
    overall: LibraryStats
    min_cells: int = 30

    @classmethod
    def fit(
        cls,
        log_library: np.ndarray,
        donor: np.ndarray,
        timepoint: np.ndarray,
        *,
        donors: Sequence[str],
        timepoints: Sequence[str],
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
        min_cells
            Groups with fewer cells are not used for draws.

        Raises
        ------
        DataError
            There are no cells, or a library size is not finite.
        """
        if not len(log_library) or not np.all(np.isfinite(log_library)):
            raise DataError("size factors need at least one cell, and library sizes that are positive and finite")
        contexts: dict[str, dict[str, LibraryStats]] = {}
        by_time = {}
        for t in np.unique(timepoint).tolist():
            at_time = timepoint == t
            by_time[timepoints[t]] = LibraryStats.of(log_library[at_time])
            contexts[timepoints[t]] = {
                donors[d]: LibraryStats.of(log_library[at_time & (donor == d)])
                for d in np.unique(donor[at_time]).tolist()
            }
        return cls(contexts, by_time, LibraryStats.of(log_library), min_cells)

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

    def sample(self, donor: str | None, timepoint: str | None, uniform: np.ndarray) -> np.ndarray:
        """Draw library sizes of one context.

        Parameters
        ----------
        donor, timepoint
            The context; None stands for any level.
        uniform
            Numbers in (0, 1), any shape.

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
        return self.lookup(donor, timepoint)[0].draw(uniform)

    def to_dict(self) -> dict[str, Any]:
        """Return nested plain values that JSON can hold."""
        return {
            "contexts": {t: {d: s.to_dict() for d, s in stats.items()} for t, stats in self.contexts.items()},
            "timepoints": {t: s.to_dict() for t, s in self.timepoints.items()},
            "overall": self.overall.to_dict(),
            "min_cells": self.min_cells,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SizeFactors":
        """Build from `to_dict`; raises KeyError, TypeError or ValueError for values of the wrong kind."""
        read = LibraryStats.from_dict
        contexts = {t: {d: read(s) for d, s in stats.items()} for t, stats in values["contexts"].items()}
        timepoints = {t: read(s) for t, s in values["timepoints"].items()}
        return cls(contexts, timepoints, read(values["overall"]), int(values["min_cells"]))
