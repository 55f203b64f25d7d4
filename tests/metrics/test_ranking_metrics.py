"""Metrics of rankings: hand-worked values, ties, chance, baselines."""

import numpy as np
import pandas as pd
import pytest

from scldm_cd4 import DataError, metrics
from scldm_cd4.metrics import ranking


def test_hand_worked() -> None:
    truth = np.array([5.0, 4, 3, 2, 1])
    guess = np.array([5.0, 1, 4, 3, 2])
    assert ranking.precision_at_k(truth, guess, 2) == 0.5
    assert ranking.enrichment(truth, guess, 2) == pytest.approx(0.5 * 5 / 2)
    assert ranking.regret_at_k(truth, guess, 2) == pytest.approx((5 + 4) / 2 - (5 + 3) / 2)
    assert ranking.spearman(truth, guess) == pytest.approx(1 - 6 * (0 + 9 + 1 + 1 + 1) / (5 * 24))
    assert ranking.kendall(truth, guess) == pytest.approx((7 - 3) / 10)
    discount = 1 / np.log2([2, 3])
    assert ranking.ndcg(truth, guess, 2) == pytest.approx((4 * discount[0] + 2 * discount[1]) / ([4, 3] @ discount))
    assert ranking.auroc([1, 1, 0, 0, 0], guess) == pytest.approx(3 / 6)


def test_the_true_order_is_best_and_its_reverse_worst() -> None:
    truth = np.random.default_rng(0).normal(size=50)
    assert ranking.precision_at_k(truth, np.exp(truth), 10) == 1
    assert ranking.regret_at_k(truth, truth, 10) == 0
    assert ranking.ndcg(truth, truth) == pytest.approx(1)
    assert ranking.spearman(truth, -truth) == pytest.approx(-1)
    assert ranking.precision_at_k(truth, -truth, 10) == 0


def test_a_constant_guess_is_chance() -> None:
    truth = np.arange(40.0)
    flat = np.zeros(40)
    assert ranking.precision_at_k(truth, flat, 10) == pytest.approx(0.25)
    assert ranking.enrichment(truth, flat, 10) == pytest.approx(1)
    assert ranking.auroc(truth > 30, flat) == pytest.approx(0.5)
    assert ranking.regret_at_k(truth, flat, 10) == pytest.approx(truth[-10:].mean() - truth.mean())
    assert np.isnan(ranking.spearman(truth, flat))
    assert np.isnan(ranking.auroc(flat, truth))


def test_auroc_interval() -> None:
    rng = np.random.default_rng(1)
    positive = np.arange(100) < 20
    guess = rng.normal(size=100) + positive
    value, low, high = ranking.bootstrap_auroc(positive, guess, n_boot=200, seed=0)
    assert low < value < high < 1
    assert low > 0.5


def test_table_beside_baselines() -> None:
    rng = np.random.default_rng(2)
    names, contexts = [f"p{i}" for i in range(30)], ["a", "b", "c"]
    main = rng.normal(size=(30, 8))
    effects = {(c, p): main[i] + 0.2 * rng.normal(size=8) for i, p in enumerate(names) for c in contexts}
    wanted = [("c", p) for p in names[:20]]
    direction = rng.normal(size=8)
    truth = pd.Series({key: effects[key] @ direction for key in wanted})
    train = {key: value for key, value in effects.items() if key not in set(wanted)}
    guesses = ranking.baselines(train, wanted, lambda d: d @ direction)
    table = ranking.compare(truth, {name: guesses[name] for name in guesses}, k=5, known=[wanted[int(truth.argmax())]])
    assert list(table.index) == ["transfer", "mean_context", "effect_size", "random"]
    assert table.loc["transfer", "spearman"] > 0.9
    assert abs(table.loc["effect_size", "spearman"]) < 0.6
    assert np.isnan(table.loc["mean_context", "spearman"])  # one value for all perturbations of a context
    assert table.loc["mean_context", "precision"] == pytest.approx(table.attrs["precision_by_chance"])
    assert table.loc["transfer", "auroc"] > 0.9
    again = ranking.baselines(train, wanted, lambda d: d @ direction)
    pd.testing.assert_frame_equal(guesses, again)


def test_refusals() -> None:
    with pytest.raises(DataError, match="give it away"):
        ranking.baselines({("a", "p"): np.ones(2)}, [("a", "p")], lambda d: d.sum(axis=1))
    with pytest.raises(DataError, match="at least 1"):
        ranking.precision_at_k([1, 2], [1, 2], 0)
    with pytest.raises(DataError, match="same perturbations"):
        ranking.spearman([1, 2, 3], [1, 2])
    with pytest.raises(DataError, match="finite"):
        ranking.spearman([1, 2, np.nan], [1, 2, 3])
    truth = pd.Series([1.0, 2, 3], index=list("abc"))
    with pytest.raises(DataError, match="none of the known"):
        ranking.compare(truth, {"x": truth}, known=["z"])
    with pytest.raises(DataError, match="no score"):
        ranking.compare(truth, {"x": pd.Series([1.0], index=["q"])})
    assert metrics.ranking is ranking


def test_a_missing_score_is_worst() -> None:
    truth = pd.Series([3.0, 2, 1], index=list("abc"))
    table = ranking.compare(truth, {"x": pd.Series({"b": 1.0, "c": 0.5})}, k=1)
    assert table.loc["x", "precision"] == 0
    assert table.loc["x", "regret"] == 1
