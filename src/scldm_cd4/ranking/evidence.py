"""What stands beside a score: training cells, names of genes, and how the model did on conditions it never saw."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scldm_cd4.data.labels import read_labels
from scldm_cd4.noise import stream
from scldm_cd4.ranking.effects import MIN_OBSERVED, Change, Context, Observed, jackknife_variance
from scldm_cd4.ranking.scoring import Scorer
from scldm_cd4.registry import Attribute, Registry

MIN_CONDITIONS = 10
"""Held-out conditions that an estimate of the model's error needs."""
MAX_CONDITIONS = 500


@dataclass(frozen=True)
class Reliability:
    """Generated minus observed scores of held-out conditions, beyond the sampling error of both."""

    n_conditions: int
    spearman: float
    base_sd: float
    """Standard deviation of the error where the generated score is 0."""
    relative_sd: float
    """What the error grows by per generated score: its variance is base_sd^2 + (relative_sd score)^2."""
    shared: float
    """Share of the error's variance that all contexts of a perturbation have in common."""
    note: str

    def model_sd(self, score: float, n_contexts: int) -> float:
        """Return the standard deviation of the model's error in a score that is a mean over contexts."""
        variance = self.base_sd**2 + (self.relative_sd * score) ** 2
        return float(np.sqrt(variance * (self.shared + (1 - self.shared) / max(n_contexts, 1))))

    @classmethod
    def unknown(cls, note: str) -> "Reliability":
        """Return one without figures."""
        return cls(0, np.nan, np.nan, np.nan, np.nan, note)


class HeldOut:
    """Collects scores of held-out conditions while perturbations are ranked.

    Parameters
    ----------
    observed
        All given cells.
    wanted
        Held-out conditions (perturbation, context), from `held_out_conditions`.
    n_cells
        As for the ranking; it sets the number of folds.
    """

    def __init__(self, observed: Observed, wanted: Sequence[tuple[str, Context]], n_cells: int) -> None:
        self.observed, self.wanted, self.n_cells = observed, set(wanted), n_cells
        self.controls = observed.controls(list(dict.fromkeys(context for _, context in wanted)), n_cells)
        self.found: dict[tuple[str, Context], tuple[float, float, float]] = {}

    def add(self, name: str, changes: Mapping[Context, Change], scorer: Scorer, keep: NDArray[np.bool_]) -> None:
        """Look at the effects of one perturbation."""
        contexts = {c: self.controls[c] for c in changes if (name, c) in self.wanted and c in self.controls}
        if not contexts:
            return
        seen = next(self.observed.changes([name], contexts, self.n_cells))
        for context, change in seen.items():
            pair = [scorer.score(side, keep) for side in (changes[context], change)]
            noise = sum(float(jackknife_variance(scores[1:])) for scores in pair)
            if np.isfinite(noise):
                self.found[name, context] = (float(pair[0][0]), float(pair[1][0]), noise)

    def reliability(self) -> Reliability:
        """Return the figures."""
        from scipy.optimize import nnls
        from scipy.stats import spearmanr

        n = len(self.found)
        if n < MIN_CONDITIONS:
            return Reliability.unknown(
                f"{n} held-out conditions with {MIN_OBSERVED} cells and a control among those ranked; "
                f"{MIN_CONDITIONS} are needed to say how far generated scores are off"
            )
        names = np.array([name for name, _ in self.found])
        made, seen, noise = np.array(list(self.found.values())).T
        error = made - seen
        total = max(float(np.mean(np.square(error)) - noise.mean()), 0.0)
        _, codes = np.unique(names, return_inverse=True)
        pairs = float((np.bincount(codes) * (np.bincount(codes) - 1)).sum())
        products = float((np.bincount(codes, error) ** 2 - np.bincount(codes, error**2)).sum())
        # errors of different contexts have no sampling error in common, so their products hold what they share
        enough = pairs >= MIN_CONDITIONS and total > 0
        shared = min(max(products / pairs / total, 0.0), 1.0) if enough else 1.0
        terms = np.column_stack([np.ones(n), np.square(made)])
        base, growth = nnls(terms, np.square(error) - noise)[0]
        varies = np.ptp(made) > 0 and np.ptp(seen) > 0
        return Reliability(
            n,
            float(spearmanr(made, seen).statistic) if varies else np.nan,
            float(np.sqrt(base)),
            float(np.sqrt(growth)),
            shared,
            f"from {n} conditions (perturbation x context) without training cells",
        )


def held_out_conditions(
    adata: Any, registry: Registry, names: Sequence[str], contexts: Sequence[Context], seed: int
) -> list[tuple[str, Context]]:
    """Return ranked conditions that have enough given cells and no training cells, at most `MAX_CONDITIONS`."""
    if adata is None or not registry.train_counts:
        return []
    columns = [_labels(adata.obs, attribute) for attribute in registry.attributes]
    ranked, places = set(names), set(contexts)
    sizes = pd.Series(1, index=range(len(adata.obs))).groupby(columns).sum()
    found = [
        (str(name), (str(donor), str(timepoint)))
        for (donor, timepoint, name), n in sizes.items()
        if n >= MIN_OBSERVED
        and name in ranked
        and (donor, timepoint) in places
        and not registry.n_train(name, donor, timepoint)
    ]
    if len(found) > MAX_CONDITIONS:
        chosen = stream(seed, ("held out",), 0, "reliability").choice(len(found), MAX_CONDITIONS, replace=False)
        found = [found[i] for i in np.sort(chosen)]
    return found


def _labels(obs: Any, attribute: Attribute) -> NDArray[np.object_]:
    """Return the labels of cells as strings, those of any kind of column."""
    if attribute.column is None:
        return np.full(len(obs), attribute.levels[0], dtype=object)
    codes, levels = read_labels(obs, attribute.column, f"{attribute.role}_key")
    return np.array(levels, dtype=object)[codes]


def gene_names(registry: Registry, hit: NDArray[np.bool_]) -> tuple[str, str]:
    """Return symbol and Ensembl identifier of a perturbed gene; empty where they are not known."""
    if not hit.any():
        return "", ""
    g = int(np.flatnonzero(hit)[0])
    names = [registry.genes[g], *(column[g] for column in registry.var.values())]
    ids = [name for name in names if name.startswith("ENS")]
    columns = {name: column[g] for name, column in registry.var.items()}
    named = [value for key, value in columns.items() if "symbol" in key.lower() or "gene_name" in key.lower()]
    symbols = [*named, *([registry.genes[g]] if not registry.genes[g].startswith("ENS") else [])]
    return (symbols[0] if symbols else ""), (ids[0] if ids else "")
