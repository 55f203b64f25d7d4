"""Effects, discrimination and recovery of genes in the conventions of cell-eval and cell-eval2, for one context."""

from typing import Literal

import numpy as np

from scldm_cd4.metrics.cells.pseudobulk import Key, target_mask
from scldm_cd4.metrics.cells.samples import Sample
from scldm_cd4.metrics.de.rank_tests import control_ranks, de_tests
from scldm_cd4.metrics.de.recovery import area_under_curves, de_table
from scldm_cd4.metrics.effects.discrimination import Distance, discrimination
from scldm_cd4.metrics.effects.table import effect_table

Rows = list[tuple[Key, str, float]]
CELL_EVAL_DE = {
    "overlap_at_N": "de_overlap",
    "overlap_at_50": "de_overlap_top50",
    "overlap_at_100": "de_overlap_top100",
    "overlap_at_200": "de_overlap_top200",
    "overlap_at_500": "de_overlap_top500",
    "precision_at_50": "de_precision_top50",
    "precision_at_100": "de_precision_top100",
    "precision_at_200": "de_precision_top200",
    "precision_at_500": "de_precision_top500",
    "de_sig_genes_recall": "de_recall",
    "de_direction_match": "de_direction_match",
    "de_spearman_lfc_sig": "de_spearman_lfc",
    "de_nsig_counts_real": "de_n_real",
    "de_nsig_counts_pred": "de_n_pred",
}
CELL_EVAL_TOP = (50, 100, 200, 500)
VCC_DE = {
    "de_wilcoxon_sig_jaccard": "de_jaccard",
    "de_wilcoxon_lfc_nmae": "de_lfc_nmae",
    "de_wilcoxon_direction_fidelity_yield_raw": "de_direction_yield",
    "de_wilcoxon_direction_reach_raw": "de_direction_reach",
}


def cell_eval_v1(real: Sample, pred: Sample, control: str) -> Rows:
    """Measure as cell-eval 0.8.2: each side against its own controls, all genes, geometric fold changes."""
    sides = [side.pseudobulks() for side in (real, pred)]
    keys = sides[0].conditions(control)
    table = effect_table(*sides, control=control, control_source="pred")
    found = {name: table[name] for name in ("pearson_delta", "mse", "mae")}
    found["mse_delta"] = np.square(table["l2_delta"]) / len(real.genes)
    mask = target_mask(keys, list(real.genes))
    control_key = (*keys[0][:-1], control)
    deltas = [side.means[side.rows(keys)] - side.means[side.rows([control_key])] for side in sides]
    metrics: tuple[Distance, ...] = ("l1", "l2", "cosine")
    for metric in metrics:
        found[f"discrimination_score_{metric}"] = discrimination(
            *deltas, metric=metric, exclude=mask, scope="own", denominator="n"
        )
    tests = []
    for side in (real, pred):
        own = control_ranks(side.values, side.codes, side.keys, control=control)
        options = {"mean": "geometric", "pseudocount": 1e-12}
        tests.append(de_tests(side.values, side.codes, side.keys, own, control=control, **options))  # type: ignore[arg-type]
    recovery = de_table(*tests, min_genes=2, top=CELL_EVAL_TOP)
    found |= {theirs: recovery[ours] for theirs, ours in CELL_EVAL_DE.items()}
    position = {key: row for row, key in enumerate(tests[1].keys)}
    predicted = tests[1].take(np.array([position[key] for key in keys]))
    score = -np.log10(np.clip(predicted.p_adjusted, 1e-10, 1.0))
    found["roc_auc"], found["pr_auc"] = area_under_curves(
        tests[0].significant(), score, np.ones(score.shape, dtype=bool)
    )
    return _rows(keys, found)


def vcc2026(real: Sample, pred: Sample, control: str, *, own_controls: bool = False) -> Rows:
    """Measure as cell-eval2 0.20.0 with its preset of 2026: real controls on both sides, targets left out.

    With ``own_controls`` predicted effects are against predicted controls, as for a replicate.
    """
    sides = [side.pseudobulks() for side in (real, pred)]
    keys = sides[0].conditions(control)
    mask = target_mask(keys, list(real.genes))
    source: Literal["real", "pred"] = "pred" if own_controls else "real"
    table = effect_table(*sides, control=control, exclude=mask, space="log_sum", control_source=source)
    control_key = (*keys[0][:-1], control)
    deltas = []
    for side, own in ((sides[0], sides[0]), (sides[1], sides[1] if own_controls else sides[0])):
        deltas.append(side.log_sum[side.rows(keys)] - own.log_sum[own.rows([control_key])])  # type: ignore[index]
    found = {
        "pds_cosine": discrimination(*deltas, exclude=mask),
        "expr_mse_unbiased_capped": table["mse_corrected"],
        "expr_distance_unbiased": table["mse_effect"],
    }
    tests = []
    for cells, owner in ((real, real), (pred, pred if own_controls else real)):
        controls = control_ranks(owner.values, owner.codes, owner.keys, control=control)
        # tested genes: above 5 counts per million in the control; 1e-9 per million stabilises fold changes
        found_genes = de_tests(
            cells.values, cells.codes, cells.keys, controls, control=control, min_control=0.05, pseudocount=1e-11
        )
        tests.append(found_genes)
    recovery = de_table(*tests, exclude=mask)
    found |= {theirs: recovery[ours] for theirs, ours in VCC_DE.items()}
    ratio = found["expr_mse_unbiased_capped"].sum() / found["expr_distance_unbiased"].sum()
    return [*_rows(keys, found), ((*keys[0][:-1], "(panel)"), "expr_mse_unbiased_capped_norm", float(ratio))]


def _rows(keys: tuple[Key, ...], found: dict[str, np.ndarray]) -> Rows:
    return [(key, name, float(values[row])) for row, key in enumerate(keys) for name, values in found.items()]
