"""Generated cells and their ranking against the truth of simulated cells."""

from typing import Any

import numpy as np
import pandas as pd

from scldm_cd4 import metrics
from scldm_cd4.cli._cells import Cells
from scldm_cd4.cli._scores import Scorer
from scldm_cd4.datasets import true_log2fc
from scldm_cd4.ranking.effects import target_genes

AXIS = "true_th1_axis"
EXPRESSED = 1.0
"""Genes with at least this many counts per 10,000 in the control cells enter the correlation of fold changes."""


def axis_of(adata: Any, genes: tuple[str, ...]) -> pd.Series:
    """Return the planted Th1-Th2 axis of simulated cells: 1 for a Th1 gene, -1 for a Th2 gene, others left out."""
    axis = pd.Series(adata.var[AXIS].to_numpy(dtype=np.float64), index=list(genes))
    return axis[axis != 0]


def log2_changes(cells: Cells, reference: Cells) -> np.ndarray:
    """Return log2 fold changes of the mean shares of the library, (genes,), the control weighted by context."""
    means = [_mean_shares(side, cells.context) for side in (cells, reference)]
    changes: np.ndarray = np.log2((means[0] + 0.1) / (means[1] + 0.1))
    return changes


def _mean_shares(cells: Cells, contexts: np.ndarray) -> np.ndarray:
    """Return the mean counts per 10,000, the contexts weighted as in `contexts`."""
    levels, sizes = np.unique(contexts, return_counts=True)
    totals = np.maximum(np.asarray(cells.counts.sum(axis=1)).ravel(), 1.0)
    shares = cells.counts.multiply(1e4 / totals[:, None]).tocsr()
    means = np.stack([np.asarray(shares[cells.context == level].mean(axis=0)).ravel() for level in levels])
    weighted: np.ndarray = sizes / sizes.sum() @ means
    return weighted


def compare_effects(adata: Any, scorer: Scorer, generated: Cells) -> pd.DataFrame:
    """Compare effects with the truth, all cells of each pool taken together.

    Returns
    -------
    DataFrame, one row per perturbation: ``kind``; the correlation with the true log2 fold changes (target left out,
    expressed genes) of ``generated`` cells, of the training cells (``ceiling``) and of control cells (``baseline``);
    ``axis_true`` and ``axis_ceiling``, the true effect and that in the training cells along the Th1-Th2 axis (cosine).
    """
    registry, settings = scorer.registry, adata.uns["synthetic_cd4"]
    genes, axis = list(registry.genes), axis_of(adata, registry.genes)
    kinds = dict(zip(map(str, settings["perturbations"]), map(str, settings["kinds"]), strict=True))
    expressed = _mean_shares(scorer.reference, scorer.reference.context) >= EXPRESSED
    rows = []
    for code, name in enumerate(registry.perturbation.levels):
        pools = {"generated": generated, "ceiling": scorer.train}
        cells = {pool: side.of_perturbation(code) for pool, side in pools.items()} | {"baseline": scorer.control}
        if code == scorer.control_code or not all(len(side) for side in cells.values()):
            continue
        keep = ~target_genes(registry, name)
        true = true_log2fc(adata, name).to_numpy()
        found = {pool: log2_changes(side, scorer.reference) for pool, side in cells.items()}
        used = keep & expressed
        row = {pool: metrics.safe_pearson(change[used], true[used]) for pool, change in found.items()}
        along = {"axis_true": true, "axis_ceiling": found["ceiling"]}
        row |= {column: _cosine(pd.Series(change, index=genes)[keep], axis) for column, change in along.items()}
        rows.append({"perturbation": name, "kind": kinds[name], **row})
    return pd.DataFrame(rows)


def _cosine(change: pd.Series, axis: pd.Series) -> float:
    common = axis.index.intersection(change.index)
    a, b = change[common].to_numpy(), axis[common].to_numpy()
    norm = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / norm) if norm > 0 else float("nan")


def compare_ranking(effects: pd.DataFrame, ranking: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, float]]:
    """Compare a ranking toward the Th1-Th2 axis with the true one.

    Parameters
    ----------
    effects
        From `compare_effects`.
    ranking
        With columns ``perturbation`` and ``score``.

    Returns
    -------
    The planted Th1 and Th2 regulators with their true and generated position; and figures: Spearman correlation over
    all perturbations with an effect of generated scores (``spearman``) and of the training cells
    (``spearman_ceiling``) with the truth, planted regulators whose direction is right (``signs_right`` of
    ``n_regulators``), and the largest absolute score of a no-effect perturbation beside the median of the regulators'.
    """
    from scipy.stats import spearmanr

    table = effects.merge(ranking[["perturbation", "score"]], on="perturbation", how="inner")
    active = table[(table["kind"] != "none") & table["axis_true"].notna()]
    planted = active[(active["kind"] == "known") & (active["axis_true"].abs() > 0.1)]
    none = table.loc[table["kind"] == "none", "score"].abs()
    figures = {
        "spearman": _statistic(spearmanr, active["score"], active["axis_true"]),
        "spearman_ceiling": _statistic(spearmanr, active["axis_ceiling"], active["axis_true"]),
        "n_ranked": float(len(active)),
        "signs_right": float((np.sign(planted["score"]) == np.sign(planted["axis_true"])).sum()),
        "n_regulators": float(len(planted)),
        "score_no_effect": float(none.max()) if len(none) else float("nan"),
        "score_regulators": float(planted["score"].abs().median()),
    }
    return planted[["perturbation", "axis_true", "score", "axis_ceiling"]].sort_values("axis_true"), figures


def _statistic(test: Any, x: pd.Series, y: pd.Series) -> float:
    return float(test(x, y).statistic) if len(x) > 2 else float("nan")
