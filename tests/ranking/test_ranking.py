"""Ranking: targets, effects, order, chance, refusals."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from scldm_cd4 import DataError, UnknownCategoryError
from scldm_cd4.ranking.effects import FOLDS, fold_sums, profile, target_genes
from scldm_cd4.ranking.targets import Reader


@pytest.fixture(scope="module")
def signature(trained: Any) -> pd.Series:
    rng = np.random.default_rng(0)
    genes = trained._state.registry.genes
    return pd.Series(rng.normal(size=len(genes)), index=genes)


@pytest.fixture(scope="module")
def table(trained: Any, signature: pd.Series) -> pd.DataFrame:
    return trained.rank_perturbations(signature, n_cells=40, seed=0)


def test_table(trained: Any, table: pd.DataFrame) -> None:
    assert set(table["perturbation"]) == set(trained.perturbations) - {"NTC"}
    assert list(table["rank"]) == [1, 2, 3]
    assert table["score"].is_monotonic_decreasing
    unknown = ["se_donors", "se_model", "calibrated_lo", "calibrated_hi", "ontarget_pred_log2fc"]
    assert np.isfinite(table.select_dtypes("number").drop(columns=unknown).to_numpy()).all()
    assert (table["score_lo"] <= table["score"]).all()
    assert (table["score"] <= table["score_hi"]).all()
    assert (table["chance_lo"] < table["chance_hi"]).all()
    assert table["score"].abs().max() <= 1
    assert table.attrs["seed"] == 0
    assert table.attrs["control"] == "NTC"
    assert "fewer than three" in table.attrs["donor_interval"]
    assert (table["n_train_contexts"] >= 2).all()


def test_away_is_the_reverse(trained: Any, signature: pd.Series, table: pd.DataFrame) -> None:
    away = trained.rank_perturbations(signature, n_cells=40, seed=0, direction="away")
    assert list(away["perturbation"]) == list(table["perturbation"])[::-1]
    np.testing.assert_allclose(away["score"], -table["score"][::-1])
    np.testing.assert_allclose(away["score_lo"], -table["score_hi"][::-1])


def test_scores_do_not_depend_on_the_other_perturbations(
    trained: Any, signature: pd.Series, table: pd.DataFrame
) -> None:
    name = table["perturbation"][1]
    alone = trained.rank_perturbations(signature, perturbations=name, n_cells=40, seed=0)
    assert alone["score"][0] == table["score"][1]


def test_each_gives_one_row_per_level(trained: Any, signature: pd.Series) -> None:
    each = trained.rank_perturbations(signature, donor="each", timepoint="Rest", n_cells=20, seed=0)
    assert len(each) == 6
    assert set(each["donor"]) == set(trained.donors)
    assert set(each["timepoint"]) == {"Rest"}
    for _, group in each.groupby("donor"):
        assert sorted(group["rank"]) == [1, 2, 3]
    one = trained.rank_perturbations(signature, donor=trained.donors[1], timepoint="Rest", n_cells=20, seed=0)
    merged = one.merge(each[each["donor"] == trained.donors[1]], on="perturbation")
    np.testing.assert_array_equal(merged["score_x"], merged["score_y"])


def test_direction_between_groups(trained: Any) -> None:
    table = trained.rank_perturbations(("timepoint", "Rest", "Stim8hr"), n_cells=20, seed=0)
    assert table.attrs["target"] == "direction"
    assert (np.abs(table["score"]) <= table["effect_size"] + 1e-9).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"direction": "up"}, "toward"),
        ({"effects": "real"}, "observed"),
        ({"n_cells": 5}, "at least 20"),
        ({"perturbations": ["NTC"]}, "no perturbation"),
        ({"target": "GATA3"}, "Series"),
        ({"target": ("timepoint", "Rest", "Stim9hr")}, "Stim9hr"),
        ({"target": ("timepont", "Rest", "Stim8hr")}, "timepont"),
    ],
)
def test_refused(trained: Any, signature: pd.Series, options: dict[str, Any], message: str) -> None:
    options = {"target": signature} | options
    with pytest.raises(DataError, match=message):
        trained.rank_perturbations(options.pop("target"), **options)


def test_unknown_labels(trained: Any, signature: pd.Series) -> None:
    with pytest.raises(UnknownCategoryError):
        trained.rank_perturbations(signature, perturbations=["NOTAGENE"])
    with pytest.raises(UnknownCategoryError):
        trained.rank_perturbations(signature, donor="D9")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.iloc[:9], "9 of the 9"),
        (lambda s: s * 0 + 1, "constant"),
        (lambda s: s.where(s > 0), "missing"),
        (lambda s: pd.concat([s, s]), "twice"),
        (lambda s: s.set_axis([f"ENSG{i}" for i in range(len(s))]), "ENSG0"),
        (lambda s: pd.concat([s, pd.Series(1.0, index=[f"x{i}" for i in range(1000)])]), "10%"),
    ],
)
def test_unusable_signatures(trained: Any, signature: pd.Series, change: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Reader(trained._state.registry).read(change(signature))


def test_partial_overlap_warns_and_other_names_are_found(trained: Any, signature: pd.Series) -> None:
    registry = trained._state.registry
    longer = pd.concat([signature, pd.Series(1.0, index=[f"x{i}" for i in range(100)])])
    with pytest.warns(UserWarning, match="33%"):
        Reader(registry).read(longer)
    by_id = pd.Series(signature.to_numpy(), index=[i or f"none{k}" for k, i in enumerate(registry.var["gene_id"])])
    target = Reader(registry).read_one(by_id)
    assert target.known.sum() == sum(map(bool, registry.var["gene_id"]))
    np.testing.assert_array_equal(target.weights[target.known], signature[target.known])


def test_the_perturbed_gene_takes_no_part(trained: Any, table: pd.DataFrame) -> None:
    registry = trained._state.registry
    for name, n_genes in zip(table["perturbation"], table["n_genes_used"], strict=True):
        hit = target_genes(registry, name)
        assert hit.sum() == (name in registry.genes)
        assert n_genes <= registry.n_genes - hit.sum()


def test_folds_and_profile() -> None:
    counts = sparse.csr_matrix(np.arange(60).reshape(20, 3))
    folds = fold_sums(counts, FOLDS)
    np.testing.assert_array_equal(folds[0], counts[:1].toarray().sum(0))
    np.testing.assert_array_equal(folds.sum(0), counts.toarray().sum(0))
    np.testing.assert_allclose(profile(np.array([[1.0, 3.0]])), np.log1p([[2500.0, 7500.0]]))
    assert np.isfinite(profile(np.zeros((1, 3)))).all()


def test_perturbation_and_control_share_their_noise(trained: Any) -> None:
    from scldm_cd4.conditions import Request
    from scldm_cd4.sampling import Sampler, Sampling, plan_units

    state = trained._state
    sampler = Sampler(state.vae, state.dit, state.registry, Sampling(seed=0), noise_labels=lambda x: (x[0], x[1], None))
    context = (trained.donors[0], "Rest")
    drawn = [
        sampler.run(next(plan_units([Request((*context, p), 64)], 128))) for p in ("NTC", trained.perturbations[0])
    ]
    np.testing.assert_array_equal(drawn[0].library, drawn[1].library)
    paired = np.corrcoef(drawn[0].values.toarray().ravel(), drawn[1].values.toarray().ravel())[0, 1]
    shuffled = np.corrcoef(drawn[0].values.toarray().ravel(), drawn[1].values.toarray()[::-1].ravel())[0, 1]
    assert paired > shuffled


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The decoder makes little use")
def test_known_regulators_come_out_on_their_side() -> None:
    from scldm_cd4 import CD4Model, datasets

    adata = datasets.synthetic_cd4(2000, 120, n_perturbations=6, n_donors=2, n_timepoints=2, seed=0)
    CD4Model.setup_anndata(
        adata, perturbation_key="perturbation", donor_key="donor_id", timepoint_key="timepoint", control="NTC"
    )
    model = CD4Model(adata, "tiny")
    model.train(seed=0, max_epochs={"vae": 20, "flow": 40})
    table = model.rank_perturbations(adata.var["true_th1_axis"], timepoint="Stim8hr", n_cells=100, seed=0)
    table = table.set_index("perturbation")
    toward, away = table.loc[["STAT6", "GATA3"]], table.loc[["IFNGR1", "JAK2"]]  # loss leads toward Th1, and away
    none = table.loc[["NKTR", "NELFCD"], "score"]
    assert (toward["score"] > toward["chance_hi"]).all()
    assert (away["score"] < away["chance_lo"]).all()
    assert away["score"].max() < none.min()
    assert none.max() < toward["score"].min()
