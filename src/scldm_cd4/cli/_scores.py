"""Generated cells beside held-out real cells, with a baseline and a repeat of the experiment in the same table.

Per perturbation, n cells of each pool are drawn with the contexts of the n held-out cells: generated cells; real
training cells of the same condition (what a repeat of the experiment reaches: ceiling, and floor of the distances);
and control cells (baseline: no effect at all). Effects are taken against other control cells than the baseline's.

The numbers are those of `scldm_cd4.metrics`; only who is compared with whom is settled here. `metrics.evaluate` scores
each condition by itself, and most conditions of a demo hold some five held-out cells.
"""

from typing import Any

import numpy as np
import pandas as pd

from scldm_cd4 import metrics
from scldm_cd4.cli._cells import Cells, halve, stack
from scldm_cd4.ranking.effects import target_genes
from scldm_cd4.registry import Registry

MEASURES = {
    "pearson_delta": ("correlation of effects, target left out", True),
    "energy_distance": ("energy distance in 30 PCs", False),
    "w2": ("Wasserstein-2 distance in 30 PCs", False),
    "de_f1": ("F1 of significant genes", True),
}
"""What is measured, and whether higher is better."""
RAW = {"w2": "energy_distance"}
"""Measures without a score, and the one whose perturbations are shown."""
POOLS = ("generated", "baseline", "ceiling")
N_DRAWS = 5
MIN_CELLS, MAX_CELLS = 8, 400
"""Held-out cells that a perturbation needs to be scored, and that are used of it."""
MAX_PERTURBATIONS = 50
"""The perturbations with most held-out cells are scored."""
MAX_FITTED = 20_000
"""Training cells that the principal components are fitted on."""


class Scorer:
    """Scores one set of generated cells.

    Attributes
    ----------
    reference
        The control cells that all effects are taken against.
    control
        The other half of the training control cells, from which the baseline is drawn.
    projection
        Principal components of the training cells.
    """

    def __init__(self, train: Cells, held_out: Cells, registry: Registry, seed: int) -> None:
        assert registry.control is not None
        self.train, self.held_out, self.registry, self.seed = train, held_out, registry, seed
        rng = np.random.default_rng([seed, 1])
        self.control_code = int(registry.perturbation.encode(registry.control)[0])
        half, self.control = halve(train.of_perturbation(self.control_code), rng)
        self.reference = stack([half, held_out.of_perturbation(self.control_code)])
        rows = rng.permutation(len(train))[:MAX_FITTED]
        self.projection = metrics.fit_projection(train.values[rows], min(30, *(n - 1 for n in train.values.shape)))
        levels = np.unique(self.reference.context).tolist()
        self._ranks = {
            level: metrics.ControlRanks(self.reference.values[self.reference.context == level]) for level in levels
        }

    def score(self, generated: Cells) -> pd.DataFrame:
        """Score all perturbations that have enough cells.

        Returns
        -------
        DataFrame, one row per perturbation and measure: ``perturbation``, ``measure``, ``n`` held-out cells, means
        over draws of ``generated``, ``baseline`` and ``ceiling``, ``score`` (generated between baseline and ceiling)
        and ``counted`` (the ceiling beats the baseline by 3 standard errors). The measure ``n_significant`` has no
        score; its column ``ceiling_q95`` is the 95th percentile of the draws of the ceiling.
        """
        sizes = np.bincount(self.held_out.perturbation, minlength=len(self.registry.perturbation))
        sizes[self.control_code] = 0
        codes = [code for code in np.argsort(-sizes, kind="stable")[:MAX_PERTURBATIONS] if sizes[code] >= MIN_CELLS]
        rows = [row for code in sorted(codes) for row in self._score(code, generated)]
        columns = ["perturbation", "measure", "n", *POOLS, "ceiling_q95", "score", "counted"]
        return pd.DataFrame(rows, columns=columns)

    def _score(self, code: int, generated: Cells) -> list[dict[str, Any]]:
        rng = np.random.default_rng([self.seed, 2, code])
        real = self.held_out.of_perturbation(code)
        real = real[np.sort(rng.permutation(len(real))[:MAX_CELLS])]
        pools = {
            "generated": generated.of_perturbation(code),
            "baseline": self.control,
            "ceiling": self.train.of_perturbation(code),
        }
        real = _common(real, [*pools.values(), self.reference])
        if len(real) < MIN_CELLS:
            return []
        label = self.registry.perturbation.levels[code]
        excluded = np.flatnonzero(target_genes(self.registry, label))
        truth = self._significant(real, excluded)
        draws: dict[str, list[dict[str, float]]] = {name: [] for name in POOLS}
        for name, pool in pools.items():
            for _ in range(N_DRAWS):
                drawn = pool.draw(real.context, rng)
                assert drawn is not None  # _common leaves contexts that all pools can serve
                draws[name].append(self._measure(real, drawn, truth, excluded))
        return [{"perturbation": label, "n": len(real), **row} for row in _rows(draws)]

    def _measure(self, real: Cells, drawn: Cells, truth: np.ndarray, excluded: np.ndarray) -> dict[str, float]:
        a, b = self.projection.apply(real.values), self.projection.apply(drawn.values)
        contexts = (real.context, drawn.context, self.reference.context)
        recovery = metrics.de_recovery(truth, self._significant(drawn, excluded))
        return {
            "pearson_delta": metrics.pearson_delta(
                real.values, drawn.values, self.reference.values, contexts=contexts, exclude=excluded
            ),
            "energy_distance": metrics.energy_distance(a, b),
            "w2": metrics.wasserstein(a, b),
            "de_f1": recovery["f1"],
            "n_significant": recovery["n_pred"],
        }

    def _significant(self, cells: Cells, excluded: np.ndarray) -> np.ndarray:
        """Return which genes differ from the reference controls at a false discovery rate of 5 %, target left out."""
        _, p = metrics.context_test(cells.values.toarray(), cells.context, self._ranks, "drawn cells")
        keep = np.ones(len(p), dtype=bool)
        keep[excluded] = False
        found = np.zeros(len(p), dtype=bool)
        found[keep] = metrics.benjamini_hochberg(p[keep]) <= 0.05
        return found


def _common(real: Cells, pools: list[Cells]) -> Cells:
    """Leave out the cells of contexts in which a pool has fewer cells than `real`."""
    levels, sizes = np.unique(real.context, return_counts=True)
    ok = [level for level, n in zip(levels, sizes, strict=True) if all((p.context == level).sum() >= n for p in pools)]
    return real[np.flatnonzero(np.isin(real.context, ok))]


def _rows(draws: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    out = []
    for measure in (*MEASURES, "n_significant"):
        values = {name: np.array([draw[measure] for draw in draws[name]], dtype=np.float64) for name in POOLS}
        if measure in MEASURES:
            anchored = metrics.anchored_score(
                values["generated"], values["baseline"], values["ceiling"], higher_is_better=MEASURES[measure][1]
            )
            means = {"generated": anchored.model, "baseline": anchored.baseline, "ceiling": anchored.ceiling}
            row = {**means, "ceiling_q95": np.nan, "score": anchored.score, "counted": anchored.counted}
        else:
            means = {name: float(value.mean()) for name, value in values.items()}
            row = {
                **means,
                "ceiling_q95": float(np.quantile(values["ceiling"], 0.95)),
                "score": np.nan,
                "counted": False,
            }
        out.append({"measure": measure, **row})
    return out


def summarise(scores: pd.DataFrame) -> pd.DataFrame:
    """Return the medians over the perturbations that count, one row per measure, with their number.

    The Wasserstein distance is given raw, beside its floor, over the perturbations that count for the energy distance:
    between small samples floor and baseline are too close for a score.
    """
    rows = []
    for measure in MEASURES:
        of_measure = scores[scores["measure"] == measure]
        chosen = scores[scores["counted"].astype(bool) & (scores["measure"] == RAW.get(measure, measure))]
        counted = of_measure[of_measure["perturbation"].isin(chosen["perturbation"])]
        medians = counted[[*POOLS, "score"]].median()
        if measure in RAW:
            medians["score"] = np.nan
        rows.append({"measure": measure, **medians, "n_counted": len(counted), "n_scored": len(of_measure)})
    return pd.DataFrame(rows).set_index("measure")
