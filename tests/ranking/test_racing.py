"""Racing, and sources of effects with known truth."""

from typing import Any

import numpy as np
import pandas as pd
import pytest

from scldm_cd4 import DataError
from scldm_cd4.ranking.racing import race, rounds


def test_rounds() -> None:
    assert rounds(200) == [12, 50, 200]
    assert rounds(64) == [4, 16, 64]
    assert rounds(15) == [15]


def test_race_stops_who_is_surely_in_or_out() -> None:
    names = [f"p{i}" for i in range(64)]
    truth = np.array([np.arange(64.0), -np.arange(64.0)])
    calls: list[tuple[int, int]] = []

    def evaluate(some: Any, n: int) -> tuple[np.ndarray, np.ndarray]:
        calls.append((len(some), n))
        scores = truth[:, [names.index(name) for name in some]]
        return scores, np.full(scores.shape, 4.0 / np.sqrt(n))

    reached = race(names, [4, 16, 64], evaluate, 8)
    # after the first round all within 3 standard errors (6) of a border (55.5 and 7.5) go on, after the second within 3
    assert calls == [(64, 4), (24, 16), (12, 64)]
    assert set(np.flatnonzero(reached == 2)) == {5, 6, 7, 8, 9, 10, 53, 54, 55, 56, 57, 58}
    assert (
        race(names, [4, 16], lambda some, n: (np.full((1, len(some)), np.nan), np.ones((1, len(some)))), 8).max() == 0
    )
    assert race(names[:5], [4, 16], lambda some, n: (np.ones((1, len(some))), np.ones((1, len(some)))), 8).max() == 0


def test_scores_of_a_race_are_those_without(ranked: Any, four_donors: Any) -> None:
    signature = four_donors.var["true_th1_axis"] + 0.01 * np.arange(four_donors.n_vars)
    options = {"timepoint": "Rest", "donor": ranked.donors[0], "n_cells": 80, "top_k": 1, "seed": 0}
    table = ranked.rank_perturbations(signature, racing=True, **options)
    exact = ranked.rank_perturbations(signature, **options).set_index("perturbation")
    assert table.attrs["rounds"] == [5, 20, 80]
    for n_cells, stopped in table.groupby("n_cells"):
        same = ranked.rank_perturbations(signature, **(options | {"n_cells": max(int(n_cells), 20)}))
        same = same.set_index("perturbation")
        if n_cells >= 20:
            np.testing.assert_array_equal(stopped["score"], same.loc[stopped["perturbation"], "score"])
    assert table["n_cells"].max() > 5 >= table["n_cells"].min()
    assert table["rank"].is_monotonic_increasing
    assert set(table["perturbation"]) == set(exact.index)


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
    from scldm_cd4.ranking.table import Criteria, group_table
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
    criteria = Criteria(1.0, 100, 20, None, 0, Reliability.unknown("simulated"))
    table = group_table(registry, group, names, rows, np.zeros(len(names), dtype=int), criteria).set_index(
        "perturbation"
    )
    true = pd.Series(truth)[table.index]
    covered = (table["score_lo"] <= true) & (true <= table["score_hi"])
    assert 0.85 < covered.mean() < 0.95
    found = table["fdr"] < 0.1
    assert found.sum() > 10
    assert (true[found] <= 0).mean() < 0.12
    in_interval = (table["rank_lo"] <= true.rank(ascending=False)) & (true.rank(ascending=False) <= table["rank_hi"])
    assert in_interval[true != 0].mean() > 0.8
