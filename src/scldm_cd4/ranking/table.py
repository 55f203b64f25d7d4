"""The table of a ranking."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from scldm_cd4._errors import DataError
from scldm_cd4.output import evidence
from scldm_cd4.ranking.effects import target_genes
from scldm_cd4.ranking.evidence import Reliability, gene_names
from scldm_cd4.ranking.scoring import Group, Row
from scldm_cd4.ranking.uncertainty import MIN_DONORS, Spread, assess, false_discovery_rates, joint_df, p_values
from scldm_cd4.registry import Registry

Z90 = 1.6449


@dataclass(frozen=True)
class Criteria:
    """By what scores are judged; the names are those of `CD4Model.rank_perturbations`."""

    sign: float
    """1 toward the target, -1 away from it."""
    n_boot: int
    top_k: int
    min_effect: float | None
    seed: int
    reliability: Reliability


def group_table(
    registry: Registry,
    group: Group,
    names: Sequence[str],
    rows: Sequence[Row | None],
    reached: np.ndarray,
    criteria: Criteria,
) -> pd.DataFrame:
    """Return the ranked perturbations of one group of contexts, best first.

    Parameters
    ----------
    rows
        Scores of `names`; None where there is no effect.
    reached
        Last round of a race of each name.
    """
    ok = np.array([row is not None and np.isfinite(row.score) for row in rows], dtype=bool)
    good = [row for row, is_ok in zip(rows, ok, strict=True) if is_ok and row is not None]
    table = pd.DataFrame({"perturbation": list(names), "donor": group.donor, "timepoint": group.timepoint})
    symbols = [gene_names(registry, target_genes(registry, name)) for name in names]
    table.insert(1, "gene_symbol", [x[0] for x in symbols])
    table.insert(2, "gene_id", [x[1] for x in symbols])
    if not good:
        raise DataError(f"no perturbation has an effect that can be scored in {group.donor}, {group.timepoint}")
    table = table.join(_judged(good, criteria).set_axis(np.flatnonzero(ok)))
    table["passes_min_effect"] = table["passes_min_effect"].eq(True)
    seen = [[evidence(registry, (*c, name))[0] for c in group.contexts] for name in names]
    is_known = bool(registry.train_counts)
    table["n_train_cells"] = [sum(n) if is_known else np.nan for n in seen]
    table["n_train_contexts"] = [int(np.count_nonzero(n)) if is_known else np.nan for n in seen]
    table["round"] = reached
    table["top_genes"] = [top_genes(registry, row) for row in rows]
    table["warning"] = [_warning(row, n, group) for row, n in zip(rows, table["n_train_cells"], strict=True)]
    return _ranked(table)


def top_genes(registry: Registry, row: Row | None) -> str:
    """Return the genes with the largest part in a score, with their log2 fold changes: ``IRF1:+0.52; GBP1:+0.31``."""
    if row is None:
        return ""
    return "; ".join(f"{_symbol(registry, g)}:{change:+.2f}" for g, _, change in row.drivers)


def _symbol(registry: Registry, g: int) -> str:
    hit = np.zeros(registry.n_genes, dtype=bool)
    hit[g] = True
    return gene_names(registry, hit)[0] or registry.genes[g]


def _judged(rows: Sequence[Row], criteria: Criteria) -> pd.DataFrame:
    sign = criteria.sign
    donors = list(dict.fromkeys(d for row in rows for d in row.by_donor))
    by_donor = sign * np.array([[row.by_donor.get(d, np.nan) for d in donors] for row in rows])
    without = sign * np.array([[row.without_donor.get(d, np.nan) for d in donors] for row in rows])
    score = sign * np.array([row.score for row in rows])
    spread = Spread(score, tuple(sign * row.folds for row in rows), without)
    sure = assess(spread, n_boot=criteria.n_boot, top_k=criteria.top_k, seed=criteria.seed)
    chance = np.array([row.chance for row in rows])
    mean, sd, q05, q95 = sign * chance[:, 0], chance[:, 1], *(sign * chance[:, 2:].T)
    model = np.array([criteria.reliability.model_sd(row.score, len(row.contexts)) for row in rows])
    known = np.nan_to_num(model)
    sampled = np.fmax(sd, sure.se_total)
    df = joint_df(np.square(sampled), sure.df, np.square(known), max(criteria.reliability.n_conditions, 1))
    p_chance = p_values(score - mean, np.hypot(sampled, known), df)
    z_genes = sign * np.array([row.z_genes for row in rows])
    p_genes = p_values(z_genes, np.ones(len(rows)), np.full(len(rows), 1e6))
    pval = np.fmax(p_chance, p_genes)
    size = np.array([row.effect_size for row in rows])
    typical, large = np.array([row.effect_chance for row in rows]).T
    margin = Z90 * np.hypot(sure.se_total, model)
    table: dict[str, Any] = {"score": score, "score_lo": sure.lo, "score_hi": sure.hi, "rank": np.nan}
    table |= {"rank_lo": sure.rank_lo, "rank_hi": sure.rank_hi, "p_top_k": sure.p_top_k}
    table |= {"se_cells": sure.se_cells, "se_donors": sure.se_donors, "se_total": sure.se_total, "se_model": model}
    table |= {"calibrated_lo": score - margin, "calibrated_hi": score + margin}
    table |= {"chance_lo": np.minimum(q05, q95), "chance_hi": np.maximum(q05, q95)}
    table |= {"z": (score - mean) / np.maximum(sd, 1e-300), "z_genes": z_genes}
    table |= {"pval": pval, "fdr": false_discovery_rates(pval)}
    table |= {"effect_size": size, "effect_ratio": size / np.maximum(typical, 1e-300)}
    table |= {"passes_min_effect": size > (large if criteria.min_effect is None else criteria.min_effect)}
    table |= {"cosine": sign * np.array([row.cosine for row in rows])}
    with np.errstate(invalid="ignore"):
        agree = (np.sign(by_donor) == np.sign(score)[:, None]).sum(axis=1)
    table |= {"n_donors": (~np.isnan(by_donor)).sum(axis=1), "n_donors_agree": agree}
    table |= {"score_min_donor": np.nanmin(by_donor, axis=1)}
    if len(donors) > 1:
        table |= {f"score_{donor}": by_donor[:, i] for i, donor in enumerate(donors)}
    for name in rows[0].parts:
        table[f"part_{name}"] = sign * np.array([row.parts[name] for row in rows])
    table |= {"ontarget_pred_log2fc": [row.on_target for row in rows]}
    table |= {"n_genes_used": [row.n_genes for row in rows], "n_cells": [row.n_cells for row in rows]}
    return pd.DataFrame(table)


def _warning(row: Row | None, n_train: float, group: Group) -> str:
    if row is None:
        return "not ranked: no cells of this perturbation in these contexts"
    if not np.isfinite(row.score):
        return "not ranked: the control is no farther from the target than chance"
    notes = []
    if n_train == 0:
        notes.append("no training cells in these contexts")
    if np.isnan(row.on_target):
        notes.append("the perturbed gene is not in the panel, so its knock-down cannot be checked")
    if len(row.contexts) < len(group.contexts):
        notes.append(f"seen in {len(row.contexts)} of {len(group.contexts)} contexts")
    return "; ".join(notes)


def _ranked(table: pd.DataFrame) -> pd.DataFrame:
    """Rank by score; rows without one come last and have no rank."""
    rank = table["score"].rank(ascending=False, method="average").to_numpy()
    table["rank"] = rank
    table["rank_lo"], table["rank_hi"] = np.fmin(table["rank_lo"], rank), np.fmax(table["rank_hi"], rank)
    return table.sort_values("rank", kind="stable", na_position="last", ignore_index=True)


def flagged(table: pd.DataFrame, off_target: Any) -> pd.DataFrame:
    """Add the flag of off-target effects that a user gives, by perturbation.

    Raises
    ------
    DataError
        It is no Series or dict.
    """
    if off_target is None:
        return table
    if not isinstance(off_target, pd.Series | Mapping):
        raise DataError("off_target must be a Series or a dict by perturbation")
    table["offtarget_flag"] = table["perturbation"].map(dict(off_target))
    return table


def donor_note(groups: Sequence[Group]) -> str:
    """Say what is known over donors."""
    n = max(len({c[0] for c in group.contexts}) for group in groups)
    if n < MIN_DONORS:
        return f"none: effects of {n} donor(s) are averaged, and fewer than three give no interval"
    return f"over {n} donors, moderated over perturbations"
