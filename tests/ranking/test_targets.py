"""Kinds of targets: read, scored on cells with known truth, and refused."""

from typing import Any

import numpy as np
import pandas as pd
import pytest

from scldm_cd4 import DataError
from scldm_cd4.ranking import targets
from scldm_cd4.ranking.targets import Reader


@pytest.fixture(scope="module")
def axis(four_donors: Any) -> dict[str, list[str]]:
    weights = four_donors.var["true_th1_axis"]
    return {"up": list(weights.index[weights > 0]), "down": list(weights.index[weights < 0])}


TARGETS = {
    "gene set": lambda axis, adata: axis,
    "list": lambda axis, adata: axis["up"],
    "signature": lambda axis, adata: adata.var["true_th1_axis"] + 0.01 * np.arange(adata.n_vars),
    "direction": lambda axis, adata: ("perturbation", "NTC", "GATA3"),
    "query": lambda axis, adata: "perturbation == 'GATA3' and timepoint == 'Rest'",
    "mask": lambda axis, adata: (adata.obs["perturbation"] == "GATA3").to_numpy(),
    "cells": lambda axis, adata: adata[(adata.obs["perturbation"] == "GATA3").to_numpy()],
    "sum": lambda axis, adata: {"th1": (axis, 1.0), "size": (("perturbation", "NTC", "GATA3"), 0.5)},
}


def test_of_many_wanted_cells_a_random_part_is_read(
    four_donors: Any, ranked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "MAX_TARGET", 20)
    read: list[int] = []

    def embed(counts: Any) -> Any:
        read.append(counts.shape[0])
        return counts.toarray()

    parts = [
        Reader(ranked._state.registry, four_donors, embed, seed).read_one("perturbation == 'GATA3'", "edistance").cells
        for seed in (0, 0, 1)
    ]
    assert read == [20, 20, 20]
    np.testing.assert_array_equal(parts[0], parts[1])
    assert not np.array_equal(parts[0], parts[2])


@pytest.mark.parametrize("kind", TARGETS)
def test_observed_effects_find_the_right_one(ranked: Any, four_donors: Any, axis: Any, kind: str) -> None:
    target = TARGETS[kind](axis, four_donors)
    options: dict[str, Any] = {"effects": "observed", "n_cells": 20, "seed": 0}
    if kind in ("query", "mask", "cells"):
        options["timepoint"] = "Rest"
        gata3 = four_donors[(four_donors.obs["perturbation"] == "GATA3").to_numpy()]
        assert gata3.n_obs > 100
    table = ranked.rank_perturbations(target, **options).set_index("perturbation")
    if kind in ("query", "mask", "cells"):  # the latent of this model is not trained enough to tell more
        assert np.isfinite(table["score"]).all()
        assert table.attrs["target"] == "population"
        return
    assert set(table.index[:2]) == {"GATA3", "STAT6"}  # loss of both leads to the Th1 side
    assert (table.loc[["GATA3", "STAT6"], "fdr"] < 0.1).all()
    assert (table.loc[["IFNGR1", "JAK2"], "score"] < 0).all()
    away = ranked.rank_perturbations(target, direction="away", **options).set_index("perturbation")
    np.testing.assert_allclose(away["score"].reindex(table.index), -table["score"])
    np.testing.assert_allclose(away["score_lo"].reindex(table.index), -table["score_hi"])


@pytest.mark.parametrize("method", ["edistance", "mmd"])
def test_a_population_is_reached_by_its_own_perturbation(ranked: Any, four_donors: Any, method: str) -> None:
    """In gene coordinates, where the latent of a hardly trained model does not blur what is seen."""
    from scldm_cd4.data.cells import CellData
    from scldm_cd4.metrics import log_normalize
    from scldm_cd4.ranking.effects import Observed, Summariser, jackknife_variance
    from scldm_cd4.ranking.scoring import Group, Scorer
    from scldm_cd4.ranking.targets import Part

    registry = ranked._state.registry
    reader = Reader(registry, four_donors, lambda counts: log_normalize(counts).toarray())
    wanted = reader.read_one("perturbation == 'GATA3' and timepoint == 'Rest'", method)
    observed = Observed(CellData.from_adata(four_donors, registry), registry, Summariser((wanted,)))
    contexts = tuple((donor, "Rest") for donor in registry.donor.levels)
    controls = observed.controls(contexts, 20)
    scorer = Scorer(Group("average", "Rest", contexts), (Part("target", 1.0, wanted),), controls, 0)
    everything, nothing = np.ones(registry.n_genes, dtype=bool), np.zeros(registry.n_genes, dtype=bool)
    names = [name for name in registry.perturbation.levels if name != "NTC"]
    rows = [scorer.row(c, everything, nothing) for c in observed.changes(names, controls, 20)]
    found = {name: row for name, row in zip(names, rows, strict=True) if row is not None}
    # GATA3 itself takes no part, and without it loss of STAT6 leads as far
    assert set(sorted(found, key=lambda name: -found[name].score)[:2]) == {"GATA3", "STAT6"}
    assert found["GATA3"].score > 0.4
    no_effect = found["NKTR"]
    assert abs(no_effect.score) < 3 * np.sqrt(jackknife_variance(no_effect.folds))


def test_parts_of_a_sum(ranked: Any, four_donors: Any, axis: Any) -> None:
    options: dict[str, Any] = {"effects": "observed", "n_cells": 20, "seed": 0}
    signature = four_donors.var["true_th1_axis"] + 0.01 * np.arange(four_donors.n_vars)
    table = ranked.rank_perturbations({"a": (axis, 2.0), "b": (signature, -1.0)}, **options).set_index("perturbation")
    alone = ranked.rank_perturbations(axis, **options).set_index("perturbation").reindex(table.index)
    other = ranked.rank_perturbations(signature, **options).set_index("perturbation").reindex(table.index)
    np.testing.assert_allclose(table["part_a"], alone["score"])
    np.testing.assert_allclose(table["part_b"], other["score"])
    slopes = np.linalg.lstsq(table[["part_a", "part_b"]].to_numpy(), table["score"].to_numpy(), rcond=None)[0]
    np.testing.assert_allclose(table[["part_a", "part_b"]].to_numpy() @ slopes, table["score"])
    assert slopes[0] > 0 > slopes[1]
    methods = ranked.rank_perturbations(
        {"a": (axis, 1.0), "b": (signature, 1.0)}, method={"a": "mean_diff", "b": "spearman"}, **options
    )
    assert methods.attrs["parts"]["a"]["method"] == "mean_diff"


def test_direction_is_within_donors(four_donors: Any, ranked: Any) -> None:
    obs = four_donors.obs
    adata = four_donors.copy()
    first = ranked.donors[0]
    # a group that is mostly of one donor: without strata the direction would be that donor's
    mixed = (obs["timepoint"] == "Stim8hr") & ((obs["donor_id"] == first) | (np.arange(len(obs)) % 8 == 0))
    adata.obs["group"] = np.where(mixed, "b", np.where(obs["timepoint"] == "Rest", "a", "none"))
    registry = ranked._state.registry
    stratified = Reader(registry, adata).read_one(("group", "a", "b")).weights
    truth = Reader(registry, adata).read_one(("timepoint", "Rest", "Stim8hr")).weights
    adata.obs["donor_id"] = adata.obs["donor_id"].where(adata.obs["group"] == "none", first).astype("category")
    pooled = Reader(registry, adata).read_one(("group", "a", "b")).weights
    assert np.linalg.norm(stratified - truth) < np.linalg.norm(pooled - truth)
    adata.obs["half"] = np.where(obs["donor_id"] == first, "x", "y")
    adata.obs["donor_id"] = obs["donor_id"]
    with pytest.warns(UserWarning, match="mixes groups and donors"):
        Reader(registry, adata).read_one(("half", "x", "y"))


@pytest.mark.parametrize(
    ("target", "method", "message"),
    [
        (["GATA3", "nogene"], None, "1 of the 2.*does not know 'nogene'"),
        (["GATA3"], None, "1 of the 1 genes of the gene set; at least 3 and 10% are needed.$"),
        ({"up": ["GATA3", "STAT6", "JAK2"], "down": ["JAK2"]}, None, "both up and down"),
        (["GATA3", "GATA3", "STAT6"], None, "twice"),
        ({"up": "GATA3"}, None, "single name"),
        (["GATA3.1", "STAT6.2", "JAK2.1"], None, "version suffix"),
        (["gata3", "stat6", "jak2"], None, "letter case"),
        ("perturbation = 1", None, "query"),
        ("perturbation", None, "does not choose"),
        ("perturbation == 'nothing'", None, "0 cells"),
        (np.ones(3, dtype=bool), None, "shape"),
        (5, None, "target must be"),
        ({"a": ["GATA3", "STAT6", "JAK2"]}, None, "weight"),
        ({"a": (["GATA3", "STAT6", "JAK2"], 0.0)}, None, "not 0"),
        ({"a": (["GATA3", "STAT6", "JAK2"], 1.0)}, {"b": "ulm"}, "dict by the names"),
        (["GATA3", "STAT6", "JAK2"], "cosine", "scored by one of"),
    ],
)
def test_refused(ranked: Any, four_donors: Any, target: Any, method: Any, message: str) -> None:
    reader = Reader(ranked._state.registry, four_donors, lambda counts: counts.toarray())
    with pytest.raises(DataError, match=message):
        reader.read(target, method)


def test_cells_are_needed(ranked: Any) -> None:
    reader = Reader(ranked._state.registry, None, lambda counts: counts.toarray())
    for target in ("perturbation == 'NTC'", ("timepoint", "Rest", "Stim8hr"), np.ones(4, dtype=bool)):
        with pytest.raises(DataError, match="adata="):
            reader.read(target)


def test_other_names_are_found(ranked: Any) -> None:
    registry = ranked._state.registry
    by_symbol = Reader(registry).read_one(["GATA3", "STAT6", "JAK2"])
    ids = [registry.var["gene_id"][registry.genes.index(name)] for name in ("GATA3", "STAT6", "JAK2")]
    by_id = Reader(registry).read_one(ids)
    np.testing.assert_array_equal(by_symbol.weights, by_id.weights)
    with pytest.warns(UserWarning, match="43%"):
        Reader(registry).read_one(["GATA3", "STAT6", "JAK2", "a", "b", "c", "d"])


def test_sets_and_index(ranked: Any) -> None:
    registry = ranked._state.registry
    names = ["GATA3", "STAT6", "JAK2"]
    for same in (set(names), pd.Index(names), np.array(names), {"up": names}):
        np.testing.assert_array_equal(Reader(registry).read_one(same).weights, Reader(registry).read_one(names).weights)
