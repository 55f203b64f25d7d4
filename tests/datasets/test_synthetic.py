"""The simulated data against their own truth."""

import csv
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from scipy.stats import spearmanr

from scldm_cd4 import datasets
from scldm_cd4.datasets._regulators import KNOWN_REGULATORS, LOG_LIBRARY, PROGRAMMES


@pytest.fixture(scope="module")
def cells() -> ad.AnnData:
    return datasets.synthetic_cd4()


def _measured_log2fc(adata: ad.AnnData, perturbation: str, *, responders: bool = False) -> pd.Series:
    """log2 fold change of the mean share of the library, within context, averaged over contexts."""
    changes = []
    for _, group in adata.obs.groupby(["donor_id", "timepoint"], observed=True):
        counts = adata[group.index].X.toarray()
        shares = counts / counts.sum(axis=1, keepdims=True)
        hit = (group["perturbation"] == perturbation).to_numpy()
        if responders:
            hit &= group["true_responder"].to_numpy()
        control = (group["perturbation"] == "NTC").to_numpy()
        changes.append(np.log2(shares[hit].mean(axis=0)) - np.log2(shares[control].mean(axis=0)))
    return pd.Series(np.mean(changes, axis=0), index=adata.var_names)


def test_layout(cells):
    assert cells.shape == (6000, 500)
    assert sparse.isspmatrix_csr(cells.X)
    assert cells.X.dtype == np.float32
    assert cells.X.data.min() >= 1
    np.testing.assert_array_equal(cells.X.data, np.round(cells.X.data))
    assert cells.obs_names.is_unique
    assert cells.var_names.is_unique
    assert cells.uns["simulated"] is True
    assert cells.obs["donor_id"].cat.categories.tolist() == ["CE0008162", "CE0010866", "CE0008678", "CE0006864"]
    assert cells.obs["timepoint"].cat.categories.tolist() == ["Rest", "Stim8hr", "Stim48hr"]
    assert cells.obs["perturbation"].cat.categories[-1] == "NTC"
    assert cells.obs["perturbation"].nunique() == 13


def test_every_condition_has_cells(cells):
    sizes = cells.obs.groupby(["donor_id", "timepoint", "perturbation"], observed=False).size()
    assert len(sizes) == 4 * 3 * 13
    assert sizes.min() >= 30
    assert (cells.obs["perturbation"] == "NTC").sum() == 1200


def test_real_names_carry_their_ensembl_ids(cells):
    assert cells.var.loc[["STAT1", "IFNG", "CD3E"], "gene_id"].tolist() == [
        "ENSG00000115415",
        "ENSG00000111537",
        "ENSG00000198851",
    ]
    assert cells.var["gene_id"].str.fullmatch(r"ENSG\d{11}").all()
    assert cells.var["gene_id"].is_unique


def test_more_genes_than_real_names_are_made_up():
    adata = datasets.synthetic_cd4(60, 700, n_perturbations=2, n_donors=1)
    made_up = adata.var_names.str.startswith("SIM")
    assert 0 < made_up.sum() < 100
    assert (adata.var.loc[made_up, "gene_id"] == "").all()


def test_the_default_panel_holds_whole_programmes(cells):
    for name, genes in PROGRAMMES.items():
        assert set(genes) <= set(cells.var_names), name


def test_library_sizes_follow_the_published_context(cells):
    totals = np.log(np.asarray(cells.X.sum(axis=1)).ravel())
    for context, group in pd.Series(totals, index=cells.obs_names).groupby(
        [cells.obs["donor_id"], cells.obs["timepoint"]], observed=True
    ):
        mean, sd = LOG_LIBRARY[context]
        assert group.mean() == pytest.approx(mean, abs=4 * sd / np.sqrt(len(group)) + 0.02)
        assert group.std() == pytest.approx(sd, rel=0.15)


def test_typed_in_library_sizes_equal_the_table(shared_dir: Path):
    with (shared_dir / "data/cd4_stats/zhu2025_log_size_factors_3699hvg.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(LOG_LIBRARY) == 12
    for row in rows:
        mean, sd = LOG_LIBRARY[row["donor_id"], row["time_point"]]
        assert mean == pytest.approx(float(row["log_size_factor_mu"]), abs=6e-5)
        assert sd == pytest.approx(float(row["log_size_factor_sd"]), abs=6e-5)


def test_depth_scales_the_library():
    shallow = datasets.synthetic_cd4(600, 200, n_perturbations=2, depth=0.1)
    deep = datasets.synthetic_cd4(600, 200, n_perturbations=2)
    np.testing.assert_allclose(shallow.obs["true_library"], 0.1 * deep.obs["true_library"])
    assert shallow.X.sum() == pytest.approx(0.1 * deep.X.sum(), rel=0.05)


def test_zeros_of_the_published_panel_size():
    adata = datasets.synthetic_cd4(500, 3699, n_perturbations=3)
    assert 0.72 < 1 - adata.X.nnz / np.prod(adata.shape) < 0.88


def test_depth_gives_a_small_panel_the_published_zeros():
    adata = datasets.synthetic_cd4(500, 500, n_perturbations=3, depth=500 / 3699)
    assert 0.65 < 1 - adata.X.nnz / np.prod(adata.shape) < 0.88


def test_counts_have_the_stated_dispersion():
    adata = datasets.synthetic_cd4(
        8000, 60, n_perturbations=1, n_donors=1, n_timepoints=1, effect_scale=0, control_share=0.95
    )
    control = adata[(adata.obs["perturbation"] == "NTC").to_numpy()]
    counts, library = control.X.toarray(), control.obs["true_library"].to_numpy()[:, None]
    loading, theta = control.var["true_activation_log2"].to_numpy(), control.var["true_dispersion"].to_numpy()
    expression = control.var["true_base_log2"].to_numpy() + control.obs["true_activation"].to_numpy()[:, None] * loading
    share = np.exp2(expression)
    mean = library * share / share.sum(axis=1, keepdims=True)
    squared = (counts - mean) ** 2
    np.testing.assert_allclose(counts.sum(axis=0), mean.sum(axis=0), rtol=0.1)
    expected = (mean + mean**2 / theta).sum(axis=0)
    assert np.median(squared.sum(axis=0) / expected) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("responders", [True, False])
def test_measured_changes_match_the_truth(responders: bool):
    adata = datasets.synthetic_cd4(
        24_000, 150, n_perturbations=3, n_donors=2, n_timepoints=2, responder_share=0.7, depth=10, control_share=0.3
    )
    for perturbation in adata.uns["synthetic_cd4"]["perturbations"]:
        measured = _measured_log2fc(adata, perturbation, responders=responders)
        truth = datasets.true_log2fc(adata, perturbation, responders_only=responders)
        assert (measured - truth).abs().mean() < 0.06
        assert (measured - truth).abs().max() < 0.5
        assert abs((measured - truth).mean()) < 0.02


def test_strong_effects_show_in_a_hundred_cells(cells):
    counts = cells.X.toarray()
    log_shares = np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True))
    labels = cells.obs["perturbation"].to_numpy()
    rng = np.random.default_rng(1)
    expressed = (cells.var["true_base_log2"] > 6).to_numpy()
    for perturbation in ("IFNGR1", "GATA3", "JAK2", "STAT6", "STAT1", "ZAP70"):
        hundred = rng.choice(np.flatnonzero(labels == perturbation), 100, replace=False)
        measured = log_shares[hundred].mean(axis=0) - log_shares[labels == "NTC"].mean(axis=0)
        truth = datasets.true_log2fc(cells, perturbation)
        genes = expressed & (cells.var_names != perturbation)
        assert np.corrcoef(measured[genes], truth[genes])[0, 1] > 0.5, perturbation


def test_no_effect_perturbations_change_only_their_target():
    adata = datasets.synthetic_cd4(1000, 300, n_perturbations=20, n_donors=2, n_timepoints=1)
    settings = adata.uns["synthetic_cd4"]
    none = settings["perturbations"][settings["kinds"] == "none"]
    assert len(none) == 6
    for perturbation in none:
        effect = adata.varm["true_perturbation_log2fc"][perturbation]
        assert effect[effect != 0].index.tolist() == [perturbation]
        truth = datasets.true_log2fc(adata, perturbation, "CE0010866", "Rest").drop(perturbation)
        assert truth.abs().max() < 0.05
        np.testing.assert_allclose(truth, truth.iloc[0])  # one shift for all: what the lost target leaves to the others


def test_reach_and_knock_down_follow_the_published_shares():
    adata = datasets.synthetic_cd4(4100, 2000, n_perturbations=200, n_donors=2, n_timepoints=2)
    effects = adata.varm["true_perturbation_log2fc"]
    targets = effects.columns
    on_target = np.array([effects.loc[target, target] for target in targets])
    assert np.median(on_target) == pytest.approx(-2.9, abs=0.15)
    assert on_target.max() < -1
    changed = (effects != 0).sum() - 1
    assert (changed <= 0).mean() == pytest.approx(0.30, abs=0.01)
    assert (changed > 10).mean() == pytest.approx(0.23, abs=0.02)
    assert (changed > 75).mean() == pytest.approx(0.10, abs=0.02)
    assert (changed > 480).mean() == pytest.approx(0.035, abs=0.01)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.6])
def test_interaction_share_is_recovered(share: float):
    adata = datasets.synthetic_cd4(400, 300, n_perturbations=6, n_donors=3, n_timepoints=3, interaction=share)
    main = adata.varm["true_perturbation_log2fc"]
    added = adata.varm["true_interaction_log2fc"].toarray().reshape(300, 6, 9)
    np.testing.assert_allclose(added.sum(axis=2), 0, atol=1e-9)
    for p, perturbation in enumerate(main.columns):
        trans = (main.index != perturbation) & (main[perturbation] != 0)
        np.testing.assert_allclose(added[~trans, p], 0)
        if trans.any():
            total = main[perturbation].to_numpy()[trans, None] + added[trans, p]
            assert 1 - 9 * (main[perturbation][trans] ** 2).sum() / (total**2).sum() == pytest.approx(share, abs=1e-9)


def test_interaction_shows_between_contexts(cells):
    rest = datasets.true_log2fc(cells, "ZAP70", "CE0008162", "Rest")
    early = datasets.true_log2fc(cells, "ZAP70", "CE0008162", "Stim8hr")
    genes = [gene for gene in PROGRAMMES["tcr"] if gene != "ZAP70"]
    assert early[genes].abs().mean() > rest[genes].abs().mean()
    assert early["ZAP70"] < -1.5
    assert rest["ZAP70"] < -1.5


def test_a_single_context_has_no_interaction():
    adata = datasets.synthetic_cd4(200, 60, n_perturbations=3, n_donors=1, n_timepoints=1, interaction=0.5)
    assert adata.varm["true_interaction_log2fc"].nnz == 0
    assert adata.obs["donor_id"].nunique() == adata.obs["timepoint"].nunique() == 1


def test_responder_share(cells):
    perturbed = cells.obs["perturbation"] != "NTC"
    assert cells.obs["true_responder"][perturbed].mean() == pytest.approx(0.9, abs=0.02)
    assert not cells.obs["true_responder"][~perturbed].any()
    nobody = datasets.synthetic_cd4(300, 60, n_perturbations=2, n_donors=1, responder_share=0.0)
    np.testing.assert_allclose(datasets.true_log2fc(nobody, "IFNGR1"), 0, atol=1e-12)


def test_known_regulators_rank_toward_th1():
    adata = datasets.synthetic_cd4(800, 500, n_perturbations=40, n_donors=1, n_timepoints=1)
    axis = adata.var["true_th1_axis"]
    settings = adata.uns["synthetic_cd4"]
    known = settings["perturbations"][settings["kinds"] == "known"]
    score = pd.Series({p: np.corrcoef(datasets.true_log2fc(adata, p).drop(p), axis.drop(p))[0, 1] for p in known})
    toward = {p for p in known if KNOWN_REGULATORS[p].get("th2", 0) < -0.3}
    away = {p for p in known if KNOWN_REGULATORS[p].get("th1", 0) < -0.3}
    assert {"GATA3", "STAT6", "IL4R"} <= toward
    assert {"JAK2", "STAT1", "IFNGR1", "TBX21"} <= away
    assert score[list(toward)].min() > 0.3
    assert score[list(away)].max() < -0.2
    planted = [KNOWN_REGULATORS[p].get("th1", 0) - KNOWN_REGULATORS[p].get("th2", 0) for p in known]
    assert spearmanr(score, planted).statistic > 0.85


def test_time_points_differ_more_than_donors(cells):
    assert cells.varm["true_timepoint_log2fc"]["Stim8hr"].std() > 3 * cells.varm["true_donor_log2fc"].std().max()
    control = cells[(cells.obs["perturbation"] == "NTC").to_numpy()]
    shares = pd.DataFrame(control.X.toarray() / control.X.toarray().sum(axis=1, keepdims=True), columns=cells.var_names)
    means = shares.groupby(control.obs["timepoint"].to_numpy(), observed=True).mean()
    assert means.loc["Stim8hr", "IL12RB2"] > 2 * means.loc["Rest", "IL12RB2"]  # published log2 change: 2.7


def test_effect_scale_zero_leaves_only_the_knock_down():
    adata = datasets.synthetic_cd4(200, 100, n_perturbations=4, n_donors=1, effect_scale=0)
    assert (adata.varm["true_perturbation_log2fc"] != 0).sum().tolist() == [1, 1, 1, 1]


def test_same_seed_same_cells_and_other_seed_others():
    first, again, other = (datasets.synthetic_cd4(300, 80, n_perturbations=3, seed=seed) for seed in (3, 3, 4))
    assert (first.X != again.X).nnz == 0
    pd.testing.assert_frame_equal(first.obs, again.obs)
    pd.testing.assert_frame_equal(first.var, again.var)
    assert (first.X != other.X).nnz > 0


def test_the_global_generator_is_not_touched():
    np.random.seed(5)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    datasets.synthetic_cd4(60, 40, n_perturbations=2, n_donors=1)
    np.testing.assert_array_equal(before, np.random.get_state()[1])  # noqa: NPY002


@pytest.mark.parametrize("n_donors", [1, 4])
@pytest.mark.parametrize("n_timepoints", [1, 3])
@pytest.mark.parametrize("n_perturbations", [1, 2, 30])
def test_any_size_of_design(n_donors: int, n_timepoints: int, n_perturbations: int):
    adata = datasets.synthetic_cd4(
        500, 60, n_perturbations=n_perturbations, n_donors=n_donors, n_timepoints=n_timepoints, control_share=0.2
    )
    sizes = adata.obs.groupby(["donor_id", "timepoint", "perturbation"], observed=False).size()
    assert len(sizes) == n_donors * n_timepoints * (n_perturbations + 1)
    assert sizes.min() >= 1
    assert set(adata.uns["synthetic_cd4"]["perturbations"]) <= set(adata.var_names)


def test_more_targets_than_real_names():
    adata = datasets.synthetic_cd4(2000, 2400, n_perturbations=1200, n_donors=1, n_timepoints=1)
    assert adata.var_names.is_unique
    assert adata.obs["perturbation"].nunique() == 1201


def test_round_trip_through_a_file(tmp_path: Path):
    adata = datasets.synthetic_cd4(300, 80, n_perturbations=3)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    back = ad.read_h5ad(tmp_path / "cells.h5ad")
    assert (back.X != adata.X).nnz == 0
    assert bool(back.uns["simulated"])
    pd.testing.assert_frame_equal(back.obs, adata.obs, check_categorical=False)
    for target in adata.uns["synthetic_cd4"]["perturbations"]:
        pd.testing.assert_series_equal(
            datasets.true_log2fc(back, target, "CE0008678"), datasets.true_log2fc(adata, target, "CE0008678")
        )


def test_truth_of_a_subset_of_the_cells(cells):
    part = cells[:50].copy()
    pd.testing.assert_series_equal(datasets.true_log2fc(part, "JAK2"), datasets.true_log2fc(cells, "JAK2"))
    assert (datasets.true_log2fc(cells, "NTC") == 0).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"n_cells": 0}, "n_cells must be a whole number"),
        ({"n_cells": 10.0}, "n_cells must be a whole number"),
        ({"n_cells": 100}, "ask for more cells"),
        ({"n_genes": 5}, "n_genes must be"),
        ({"n_genes": 30, "n_perturbations": 16}, "at least 32 genes"),
        ({"n_perturbations": 0}, "n_perturbations must be"),
        ({"n_donors": 5}, "n_donors must be a whole number from 1 to 4, not 5"),
        ({"n_timepoints": 0}, "n_timepoints must be a whole number from 1 to 3"),
        ({"n_timepoints": True}, "n_timepoints must be"),
        ({"interaction": 1.0}, "interaction must be a number from 0.0 to 0.9"),
        ({"interaction": float("nan")}, "interaction must be"),
        ({"responder_share": -0.1}, "responder_share must be"),
        ({"responder_share": "all"}, "responder_share must be"),
        ({"no_effect_share": 2}, "no_effect_share must be"),
        ({"control_share": 0.0}, "control_share must be"),
        ({"effect_scale": -1}, "effect_scale must be"),
        ({"depth": 0}, "depth must be"),
        ({"seed": -1}, "seed must be"),
        ({"seed": None}, "seed must be"),
    ],
)
def test_unusual_arguments_are_refused(arguments: dict[str, object], words: str):
    with pytest.raises(ValueError, match=words):
        datasets.synthetic_cd4(**arguments)


def test_truth_of_unknown_names_is_refused(cells):
    with pytest.raises(ValueError, match=r"'JAK9' is no perturbation .* JAK2"):
        datasets.true_log2fc(cells, "JAK9")
    with pytest.raises(ValueError, match="'D1' is no donor"):
        datasets.true_log2fc(cells, "JAK2", "D1")
    with pytest.raises(ValueError, match="'8h' is no time point"):
        datasets.true_log2fc(cells, "JAK2", timepoint="8h")
    with pytest.raises(ValueError, match="synthetic_cd4"):
        datasets.true_log2fc(ad.AnnData(np.zeros((2, 2), dtype=np.float32)), "JAK2")
