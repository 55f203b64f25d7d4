"""The figures of the summary, with stand-ins for the model: a perfect one and one without any effect."""

import json

import numpy as np
import pandas as pd
import pytest

from scldm_cd4 import datasets
from scldm_cd4._errors import UnknownCategoryError
from scldm_cd4.cli._cells import Cells, halve, stack
from scldm_cd4.cli._report import Report
from scldm_cd4.cli._scores import MEASURES, Scorer, summarise
from scldm_cd4.cli._truth import axis_of, compare_effects, compare_ranking, log2_changes
from scldm_cd4.data.cells import CellData
from scldm_cd4.data.setup import setup_anndata
from scldm_cd4.ranking.effects import target_genes


@pytest.fixture(scope="module")
def simulated():
    adata = datasets.synthetic_cd4(4000, 150, n_perturbations=6, n_donors=2, n_timepoints=2, no_effect_share=0.34)
    keys = {"perturbation_key": "perturbation", "donor_key": "donor_id", "timepoint_key": "timepoint"}
    setup_anndata(adata, **keys, control="NTC")
    cells = CellData.from_adata(adata)
    everything = Cells.of(cells.counts(slice(None)), cells.labels, cells.registry)
    part = np.arange(len(everything)) % 5  # cells are in random order
    split = [everything[np.flatnonzero(np.isin(part, parts))] for parts in ((0, 1), (2,), (3, 4))]
    return adata, cells.registry, Scorer(split[0], split[1], cells.registry, seed=0), split[2]


@pytest.fixture(scope="module")
def perfect_scores(simulated) -> pd.DataFrame:
    _, _, scorer, made = simulated
    return scorer.score(made)


def test_a_perfect_model_scores_as_a_repeat(perfect_scores):
    table = summarise(perfect_scores)
    assert list(table.index) == list(MEASURES)
    assert (table["n_scored"] == 6).all()
    assert (table.loc[["pearson_delta", "energy_distance", "de_f1"], "n_counted"] >= 2).all()
    assert table.loc[["pearson_delta", "energy_distance", "de_f1"], "score"].between(0.85, 1.15).all()
    assert np.isnan(table.loc["w2", "score"])  # raw, beside its floor
    assert table.loc["w2", "n_counted"] == table.loc["energy_distance", "n_counted"]
    assert table.loc["w2", "ceiling"] < table.loc["w2", "baseline"]


def test_a_model_without_effects_scores_as_the_control(simulated):
    _, _, scorer, made = simulated
    control = made.of_perturbation(scorer.control_code)
    rng = np.random.default_rng(0)
    effectless = []
    for code in range(len(scorer.registry.perturbation)):
        drawn = control[rng.permutation(len(control))]
        effectless.append(Cells(drawn.counts, drawn.values, np.full(len(drawn), code), drawn.context))
    table = summarise(scorer.score(stack(effectless)))
    assert table.loc[["pearson_delta", "energy_distance", "de_f1"], "score"].abs().max() < 0.2


def test_no_effect_perturbations_have_few_significant_genes(simulated, perfect_scores):
    adata, _, _, _ = simulated
    settings = adata.uns["synthetic_cd4"]
    none = settings["perturbations"][settings["kinds"] == "none"]
    found = perfect_scores[perfect_scores["measure"] == "n_significant"].set_index("perturbation")
    assert len(none) == 2
    assert (found.loc[none, "generated"] <= found.loc[none, "ceiling_q95"] + 1).all()
    assert found["generated"].max() > 10


def test_too_few_generated_cells_leave_a_perturbation_out(simulated):
    _, registry, scorer, made = simulated
    some = made[np.flatnonzero(made.perturbation != registry.perturbation.encode("GATA3")[0])]
    assert set(scorer.score(some)["perturbation"]) == set(registry.perturbation.levels) - {"GATA3", "NTC"}


def test_effects_against_the_truth(simulated):
    adata, registry, scorer, made = simulated
    effects = compare_effects(adata, scorer, made).set_index("perturbation")
    known = effects[effects["kind"] == "known"]
    assert set(effects.index) == set(registry.perturbation.levels) - {"NTC"}
    assert (known["generated"] > 0.6).all()
    assert (known["ceiling"] > 0.6).all()
    assert known["baseline"].abs().max() < 0.4
    assert effects.loc["GATA3", "axis_true"] > 0.3
    assert effects.loc["IFNGR1", "axis_true"] < -0.3


def test_log2_changes_weight_the_control_by_context(simulated):
    _, _, scorer, _ = simulated
    reference = scorer.reference
    one = reference[np.flatnonzero(reference.context == 0)]
    np.testing.assert_allclose(log2_changes(one, reference), 0, atol=1e-12)


def test_ranking_against_the_truth(simulated):
    adata, registry, scorer, made = simulated
    effects = compare_effects(adata, scorer, made)
    right = pd.DataFrame({"perturbation": effects["perturbation"], "score": effects["axis_true"]})
    planted, figures = compare_ranking(effects, right)
    assert figures["spearman"] == pytest.approx(1)
    assert figures["signs_right"] == figures["n_regulators"] == len(planted) >= 3
    assert figures["score_no_effect"] < figures["score_regulators"]
    _, wrong = compare_ranking(effects, right.assign(score=-right["score"]))
    assert wrong["spearman"] == pytest.approx(-1)
    assert wrong["signs_right"] == 0
    assert set(axis_of(adata, registry.genes)) == {-1.0, 1.0}


def test_generated_cells_are_read_by_the_users_columns(simulated):
    adata, registry, _, _ = simulated
    cells = Cells.generated(adata[:50], registry)
    again = CellData.from_adata(adata[:50], registry)
    np.testing.assert_array_equal(cells.perturbation, again.labels[:, 2])
    np.testing.assert_array_equal(cells.context, again.labels[:, 0] * 2 + again.labels[:, 1])
    strange = adata[:2].copy()
    strange.obs["donor_id"] = "nobody"
    with pytest.raises(UnknownCategoryError, match="nobody"):
        Cells.generated(strange, registry)


def test_draw_keeps_contexts_and_refuses_what_is_not_there(simulated):
    _, _, scorer, made = simulated
    rng = np.random.default_rng(0)
    wanted = np.array([0, 0, 2, 3])
    assert sorted(made.draw(wanted, rng).context) == [0, 0, 2, 3]
    assert made.draw(np.zeros(len(made), dtype=int), rng) is None
    a, b = halve(made, rng)
    assert len(a) + len(b) == len(made)
    assert abs(np.bincount(a.context) - np.bincount(b.context)).max() <= 1


def test_target_gene_is_found_by_any_name(simulated):
    _, registry, _, _ = simulated
    assert np.array(registry.genes)[target_genes(registry, "STAT6")].tolist() == ["STAT6"]
    assert not target_genes(registry, "NTC").any()


def test_report_is_strict_json_and_labelled(perfect_scores):
    pairs = [f"{what}_{side}" for what in ("zeros", "counts") for side in ("generated", "held_out")]
    others = ["nb_error", "nb_error_intercept", "n_latent", "probe_latent", "probe_pcs", "probe_chance", "reload_equal"]
    quality = dict.fromkeys([*pairs, *others], float("nan"))
    ranking = pd.DataFrame({"perturbation": ["GATA3"], "score": [0.5], "chance_lo": [-0.1], "chance_hi": [0.1]})
    report = Report(True, "1", {"cells": "few"}, summarise(perfect_scores), quality, "Th1", ranking)
    values = json.loads(report.to_json(), parse_constant=pytest.fail)
    assert values["data"] == "SIMULATED"
    assert values["quality"]["nb_error"] is None
    assert [row["measure"] for row in values["held_out"]] == list(MEASURES)
    assert report.to_text().count("SIMULATED") >= 4
    report.simulated = False
    assert "SIMULATED" not in report.to_text() + report.to_json()
