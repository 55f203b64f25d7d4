"""Racing, and sources of effects with known truth."""

from typing import Any

import numpy as np
import pandas as pd
import pytest

from scldm_cd4 import DataError
from scldm_cd4.ranking.racing import race, rounds


def test_plan() -> None:
    assert rounds(200, 10_571, 100) == [(12, 10_571), (50, 2643), (200, 661)]
    assert rounds(200, 30, 20) == [(200, 30)]  # no more than twice the shortlist: nothing to race
    assert rounds(20, 1000, 20) == [(5, 1000), (20, 250)]
    for n_cells, n_names, top_k in ((64, 500, 5), (1000, 100, 1), (32, 3, 1)):
        plan = rounds(n_cells, n_names, top_k)
        assert plan[-1][0] == n_cells
        assert plan[0][1] == n_names
        assert [n for n, _ in plan] == sorted(n for n, _ in plan)
        assert [k for _, k in plan] == sorted((k for _, k in plan), reverse=True)


def test_race_keeps_the_best_of_every_group() -> None:
    names = [f"p{i}" for i in range(64)]
    truth = np.array([np.arange(64.0), -np.arange(64.0)])

    def scores(some: Any, n: int) -> np.ndarray:
        return truth[:, [names.index(name) for name in some]]

    last, reached = race(names, [(1, 64), (4, 16), (16, 4)], scores)
    assert last == ["p0", "p1", "p62", "p63"]
    assert np.bincount(reached).tolist() == [48, 12, 4]
    missing, _ = race(names, [(1, 64), (4, 4)], lambda some, n: np.full((1, len(some)), np.nan))
    assert len(missing) >= 4


def test_last_round_is_the_ranking_without_racing(ranked: Any, four_donors: Any) -> None:
    signature = four_donors.var["true_th1_axis"] + 0.01 * np.arange(four_donors.n_vars)
    options = {"timepoint": "Rest", "donor": ranked.donors[0], "n_cells": 32, "top_k": 1, "seed": 0}
    table = ranked.rank_perturbations(signature, racing=True, **options)
    exact = ranked.rank_perturbations(signature, **options).set_index("perturbation")
    last = table[table["round"] == table["round"].max()]
    assert len(last) == 2
    assert table.attrs["rounds"] == [[8, 8], [32, 2]]
    np.testing.assert_array_equal(last["score"], exact.loc[last["perturbation"], "score"])
    assert table["rank"].is_monotonic_increasing
    assert table["round"].is_monotonic_decreasing


def names_of(model: Any) -> list[str]:
    return [name for name in model.perturbations if name != "NTC"]


def test_a_source_of_effects_replaces_the_model(ranked: Any, simulator: Any) -> None:
    names, genes = names_of(ranked), ranked._state.registry.genes
    direction = np.zeros(len(genes))
    direction[::2] = 1.0
    truth = dict(zip(names, np.linspace(-1, 1, len(names)), strict=True))
    source = simulator(truth, direction, noise=0.5)
    signature = pd.Series(direction + np.linspace(0, 0.01, len(genes)), index=genes)
    table = ranked.rank_perturbations(
        signature, effects=source, method="projection", n_cells=40, top_k=3, seed=0, donor=ranked.donors[:2]
    ).set_index("perturbation")
    assert list(table.index) == names[::-1]
    assert source.drawn == len(names) * 4 * 40
    expected = pd.Series(truth)[table.index] * np.linalg.norm(direction)
    assert np.abs(table["score"] - expected).max() < 0.5
    assert table.attrs["effects"] == "simulated"
    assert (table["p_top_k"][:2] == 1).all()
    with pytest.raises(DataError, match="population"):
        ranked.rank_perturbations("timepoint == 'Rest'", effects=source, n_cells=20)


def test_intervals_and_rates_hold_on_known_truth(ranked: Any, simulator: Any) -> None:
    """Many candidates through the parts of the ranking that do not know the model."""
    from scldm_cd4.ranking.evidence import Reliability
    from scldm_cd4.ranking.scoring import Group, Scorer
    from scldm_cd4.ranking.table import group_table
    from scldm_cd4.ranking.targets import Part, Profile

    registry = ranked._state.registry
    rng = np.random.default_rng(0)
    n_genes = registry.n_genes
    weights = rng.normal(size=n_genes)
    names = [f"s{i}" for i in range(300)]
    truth = {name: (0.5 * rng.normal() if i < 60 else 0.0) for i, name in enumerate(names)}
    source = simulator(truth, weights / np.linalg.norm(weights), noise=1.0)
    contexts = tuple((donor, "Rest") for donor in registry.donor.levels)
    controls = source.controls(contexts, 40)
    target = Profile("signature", "projection", weights, np.ones(n_genes, dtype=bool))
    group = Group("average", "Rest", contexts)
    scorer = Scorer(group, (Part("target", 1.0, target),), controls, 0)
    everything, nothing = np.ones(n_genes, dtype=bool), np.zeros(n_genes, dtype=bool)
    rows = [scorer.row(c, everything, nothing) for c in source.changes(names, controls, 40)]
    table = group_table(
        registry,
        group,
        names,
        rows,
        sign=1.0,
        reached=np.zeros(len(names), dtype=int),
        reliability=Reliability.unknown("simulated"),
        n_boot=100,
        top_k=20,
        min_effect=None,
        seed=0,
    ).set_index("perturbation")
    true = pd.Series(truth)[table.index]
    covered = (table["score_lo"] <= true) & (true <= table["score_hi"])
    assert 0.85 < covered.mean() < 0.95
    found = table["fdr"] < 0.1
    assert found.sum() > 10
    assert (true[found] <= 0).mean() < 0.12
    in_interval = (table["rank_lo"] <= true.rank(ascending=False)) & (true.rank(ascending=False) <= table["rank_hi"])
    assert in_interval[true != 0].mean() > 0.8
