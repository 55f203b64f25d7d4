"""Effects, evidence, and what stands beside a score."""

import weakref
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from scldm_cd4 import DataError
from scldm_cd4.data.cells import CellData
from scldm_cd4.ranking.effects import (
    Change,
    Observed,
    Summariser,
    exchange,
    jackknife_variance,
    leave_one_out,
    shrink,
)
from scldm_cd4.ranking.evidence import HeldOut, held_out_conditions
from scldm_cd4.ranking.population import Population
from scldm_cd4.sampling import lognormal

OPTIONS: dict[str, Any] = {"n_cells": 20, "seed": 0}


@pytest.fixture(scope="module")
def signature(four_donors: Any) -> pd.Series:
    return four_donors.var["true_th1_axis"] + 0.01 * np.arange(four_donors.n_vars)


def test_observed_effects_are_pseudobulk_differences(ranked: Any, four_donors: Any) -> None:
    registry = ranked._state.registry
    observed = Observed(CellData.from_adata(four_donors, registry), registry)
    context = (registry.donor.levels[0], "Rest")
    controls = observed.controls([context], 20)
    change = next(observed.changes(["GATA3"], controls, 20))[context]
    obs = four_donors.obs
    here = (obs["donor_id"] == context[0]) & (obs["timepoint"] == "Rest")
    sums = [
        np.asarray(four_donors.X[(here & (obs["perturbation"] == name)).to_numpy()].sum(axis=0)).ravel()
        for name in ("GATA3", "NTC")
    ]
    expected = np.subtract(*(np.log1p(1e4 * s / s.sum()) for s in sums))
    np.testing.assert_allclose(change.delta[0], expected, atol=1e-6)
    assert change.n_cells == (here & (obs["perturbation"] == "GATA3")).sum()
    assert change.delta.shape == (21, registry.n_genes)


def test_moments_of_control_cells(four_donors: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scldm_cd4.ranking.effects.PART", 7)
    counts = sparse.csr_matrix(four_donors.X[:50])
    found, values = Summariser().control(counts, 4), lognormal(counts).toarray().astype(float)
    np.testing.assert_allclose(found.mean, values.mean(axis=0))
    np.testing.assert_allclose(found.variance, values.var(axis=0), atol=1e-12)


@pytest.mark.parametrize("with_population", [False, True])
def test_observed_cells_are_held_one_condition_at_a_time(
    ranked: Any, four_donors: Any, with_population: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = ranked._state.registry
    cells, read = CellData.from_adata(four_donors, registry), CellData.counts
    target = Population.of(cells.counts(slice(0, 30)), lambda c: c.toarray(), "edistance")
    made: list[weakref.ref[Any]] = []
    held: list[int] = []

    def watched(self: CellData, rows: Any) -> Any:
        counts = read(self, rows)
        made.append(weakref.ref(counts))
        held.append(sum(ref() is not None for ref in made))
        return counts

    monkeypatch.setattr(CellData, "counts", watched)
    observed = Observed(cells, registry, Summariser((target,) if with_population else ()))
    contexts = [(d, t) for d in registry.donor.levels for t in registry.timepoint.levels]
    controls = observed.controls(contexts, 20)
    assert held == [1] * len(contexts)
    for _ in observed.changes(["GATA3", "JAK2"], controls, 20):
        pass
    assert max(held) == 1 + with_population  # and as many control cells, for the perturbed gene


def test_the_perturbed_gene_has_no_part_in_distances(ranked: Any, four_donors: Any) -> None:
    registry = ranked._state.registry
    gene, adata = registry.genes.index("GATA3"), four_donors.copy()
    adata.X = adata.X.toarray()
    adata.X[:, gene] = np.where(adata.obs["perturbation"] == "GATA3", 0, 5)  # nothing else is looked at
    wanted = np.zeros((20, registry.n_genes))
    wanted[:, gene] = np.arange(20)
    target = Population.of(sparse.csr_matrix(wanted), lambda c: c[:, [gene]].toarray(), "edistance")
    observed = Observed(CellData.from_adata(adata, registry), registry, Summariser((target,)))
    contexts = [(d, "Rest") for d in registry.donor.levels]
    change = next(observed.changes(["GATA3"], observed.controls(contexts, 20), 20))
    for context in contexts:
        np.testing.assert_allclose(*change[context].distances[:, 0].T)


def test_absent_conditions_are_named_not_ranked(ranked: Any, four_donors: Any, signature: pd.Series) -> None:
    from scldm_cd4 import CD4Model

    obs = four_donors.obs
    kept = four_donors[~((obs["perturbation"] == "JAK2") & (obs["donor_id"] == ranked.donors[0])).to_numpy()].copy()
    model = object.__new__(CD4Model)
    model.__dict__.update(ranked.__dict__, adata=kept)
    table = model.rank_perturbations(signature, effects="observed", donor="each", **OPTIONS)
    absent = table[(table["perturbation"] == "JAK2") & (table["donor"] == ranked.donors[0])].iloc[0]
    assert np.isnan(absent["score"])
    assert np.isnan(absent["rank"])
    assert "no cells" in absent["warning"]
    own = table[table["donor"] == ranked.donors[0]]
    assert own.iloc[-1]["perturbation"] == "JAK2"
    assert sorted(own["rank"].dropna()) == list(range(1, 8))
    mean = model.rank_perturbations(signature, effects="observed", **OPTIONS).set_index("perturbation")
    assert "6 of 8 contexts" in mean.loc["JAK2", "warning"]
    assert mean.loc["JAK2", "n_donors"] == 3


def test_shrinkage_follows_the_cells() -> None:
    rng = np.random.default_rng(0)
    truth, model = rng.normal(size=200), rng.normal(size=200)
    rows = leave_one_out(20)

    def seen(noise: float) -> Change:
        folds = truth + noise * rng.normal(size=(20, 200))
        return Change(rows @ folds / rows.sum(axis=1, keepdims=True), np.zeros((21, 0, 2)), 0.1, 20)

    made = Change(np.tile(model, (21, 1)), np.zeros((21, 0, 2)), 0.1, 20)
    noisy = seen(30.0)
    sure, unsure = shrink(seen(0.1), made).delta[0], shrink(noisy, made).delta[0]
    assert np.linalg.norm(sure - truth) < 0.1 * np.linalg.norm(model - truth)
    assert np.linalg.norm(unsure - model) < 0.3 * np.linalg.norm(noisy.delta[0] - model)
    near = Change(np.tile(truth + 0.1 * model, (21, 1)), np.zeros((21, 0, 2)), 0.1, 20)
    observed = seen(3.0)
    mixed = shrink(observed, near).delta[0]
    assert np.linalg.norm(mixed - truth) < np.linalg.norm(observed.delta[0] - truth)


def test_jackknife_of_a_mean_is_its_sampling_variance() -> None:
    values = np.random.default_rng(1).normal(size=(20, 3))
    left_out = (values.sum(axis=0) - values) / 19
    np.testing.assert_allclose(jackknife_variance(left_out), values.var(axis=0, ddof=1) / 20)


def test_both_needs_cells_and_lies_between(ranked: Any, signature: pd.Series) -> None:
    tables = {
        kind: ranked.rank_perturbations(
            signature, effects=kind, method="projection", perturbations=["GATA3", "NKTR"], timepoint="Rest", **OPTIONS
        )
        for kind in ("generated", "observed", "both")
    }
    scores = pd.DataFrame({kind: t.set_index("perturbation")["score"] for kind, t in tables.items()})
    low, high = scores[["generated", "observed"]].min(axis=1), scores[["generated", "observed"]].max(axis=1)
    assert (scores["both"] >= low - 0.3).all()
    assert (scores["both"] <= high + 0.3).all()
    assert tables["both"].attrs["effects"] == "both"
    with pytest.raises(DataError, match="distances"):
        ranked.rank_perturbations("timepoint == 'Rest'", effects="both", **OPTIONS)


def test_evidence_columns(ranked: Any, signature: pd.Series) -> None:
    table = ranked.rank_perturbations(signature, off_target={"GATA3": True}, guidance=1.5, **OPTIONS)
    table = table.set_index("perturbation")
    registry = ranked._state.registry
    for name, row in table.iterrows():
        assert row["gene_symbol"] == name
        assert row["gene_id"] == registry.var["gene_id"][registry.genes.index(name)]
        assert row["n_train_contexts"] == 6
        scores = row[[f"score_{donor}" for donor in registry.donor.levels]].astype(float)
        assert row["score_min_donor"] == scores.min()
        assert row["n_donors_agree"] == (np.sign(scores) == np.sign(row["score"])).sum()
        assert row["n_donors"] == 4
        assert np.isfinite(row["ontarget_pred_log2fc"])
    assert table.loc["GATA3", "offtarget_flag"]
    assert table.attrs["guidance"] == 1.5
    assert table.attrs["reliability"]["n_conditions"] > 10
    assert (
        table["calibrated_hi"] - table["calibrated_lo"] >= table["score_hi"] - table["score_lo"] - 1e-9
    ).mean() > 0.5
    with pytest.raises(DataError, match="off_target"):
        ranked.rank_perturbations(signature, off_target=["GATA3"], **OPTIONS)


def test_minimum_effect(ranked: Any, signature: pd.Series) -> None:
    table = ranked.rank_perturbations(signature, effects="observed", **OPTIONS).set_index("perturbation")
    assert table.loc[["GATA3", "JAK2"], "passes_min_effect"].all()
    assert table.loc["GATA3", "effect_ratio"] > 2 > table.loc["NKTR", "effect_ratio"]
    every = ranked.rank_perturbations(signature, effects="observed", min_effect=100.0, **OPTIONS)
    assert not every["passes_min_effect"].any()
    for options, message in (({"min_effect": -1}, "min_effect"), ({"top_k": 0}, "top_k"), ({"n_boot": 1.5}, "n_boot")):
        with pytest.raises(DataError, match=message):
            ranked.rank_perturbations(signature, **OPTIONS, **options)


def test_held_out_conditions_tell_the_error_of_the_model(ranked: Any, four_donors: Any) -> None:
    registry = ranked._state.registry
    names = [n for n in registry.perturbation.levels if n != "NTC"]
    contexts = [(d, t) for d in registry.donor.levels for t in registry.timepoint.levels]
    found = held_out_conditions(four_donors, registry, names, contexts, 0)
    assert len(found) == 16
    assert all(registry.n_train(name, *context) == 0 for name, context in found)
    observed = Observed(CellData.from_adata(four_donors, registry), registry)
    held_out = HeldOut(observed, found, 20)
    assert np.isnan(held_out.reliability().model_sd(0.0, 1))
    rng = np.random.default_rng(0)
    n, shared, own = 4000, 0.5, 0.3
    error = np.repeat(shared * rng.normal(size=n // 4), 4) + own * rng.normal(size=n)
    made = rng.normal(size=n)
    seen = made - error * np.hypot(1.0, 2.0 * made)  # the error grows with the score
    held_out.found = {
        (str(i // 4), ("donor", str(i % 4))): (float(m), float(s + 0.2 * z), 0.04)
        for i, (m, s, z) in enumerate(zip(made, seen, rng.normal(size=n), strict=True))
    }
    reliability = held_out.reliability()
    total = np.hypot(shared, own)
    assert reliability.base_sd == pytest.approx(total, rel=0.3)
    assert reliability.relative_sd == pytest.approx(2 * total, rel=0.15)
    assert 0 < reliability.shared < 1
    assert reliability.model_sd(1.0, 1) == pytest.approx(total * np.sqrt(5), rel=0.15)
    assert reliability.model_sd(1.0, 4) < reliability.model_sd(1.0, 1)
    assert reliability.spearman > 0.2


def test_empty_cells_can_be_summed() -> None:
    from scldm_cd4.ranking.effects import Side

    arm = Summariser().arm(sparse.csr_matrix((20, 5)), 20)
    assert np.isfinite(Side.of(leave_one_out(20), arm).profiles).all()


def test_perturbed_gene_of_control_cells() -> None:
    counts, control = sparse.csr_matrix(np.arange(12).reshape(4, 3)), sparse.csr_matrix([[7, 7, 7], [0, 0, 0]])
    found = exchange(counts, control, np.array([False, True, False])).toarray()
    np.testing.assert_array_equal(found[:, 1], [7, 0, 7, 0])
    np.testing.assert_array_equal(found[:, [0, 2]], counts.toarray()[:, [0, 2]])
