"""Scores of effects against formulas and libraries; populations."""

import tracemalloc
from typing import Any

import numpy as np
import pytest
from scipy import sparse, stats

from scldm_cd4 import metrics
from scldm_cd4.ranking.population import Population
from scldm_cd4.ranking.scores import SCORES

G = 40


@pytest.fixture
def effect() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {"delta": rng.normal(size=(3, G)), "weights": rng.normal(size=(2, G)), "spread": rng.uniform(0.5, 2, G)}


@pytest.mark.parametrize("name", SCORES)
def test_shape_sign_and_no_effect(effect: dict[str, Any], name: str) -> None:
    score = SCORES[name]
    found = score(**effect)
    assert found.shape == (3, 2)
    np.testing.assert_allclose(score(effect["delta"], -effect["weights"], effect["spread"]), -found, atol=1e-12)
    order = np.random.default_rng(1).permutation(G)
    mixed = score(effect["delta"][:, order], effect["weights"][:, order], effect["spread"][order])
    np.testing.assert_allclose(mixed, found)
    none = score(np.zeros((1, G)), effect["weights"], effect["spread"])
    np.testing.assert_allclose(none, 0, atol=1e-12)
    best = score(effect["weights"] * effect["spread"], effect["weights"], effect["spread"])
    assert best[0, 0] > abs(found[:, 0]).max()


def test_against_formulas(effect: dict[str, Any]) -> None:
    d, w, s = effect["delta"], effect["weights"], effect["spread"]
    a, b = d[0] / s, w[1]
    assert SCORES["cosine"](**effect)[0, 1] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert SCORES["projection"](**effect)[0, 1] == pytest.approx(d[0] @ b / np.linalg.norm(b))
    assert SCORES["spearman"](**effect)[0, 1] == pytest.approx(stats.spearmanr(a, b).statistic)
    fit = stats.linregress(b, d[0])
    assert SCORES["ulm"](**effect)[0, 1] == pytest.approx(fit.slope / fit.stderr)
    up = w[1] > 0
    assert SCORES["mean_diff"](**effect)[0, 1] == pytest.approx(d[0, up].mean() - d[0, ~up].mean())
    u = stats.mannwhitneyu(d[0, up], d[0, ~up]).statistic / (up.sum() * (~up).sum())
    assert SCORES["auc"](**effect)[0, 1] == pytest.approx(2 * u - 1)


def test_weighted_connectivity_by_hand() -> None:
    delta = np.array([[4.0, 3, 2, -1, -2]])
    ones = np.ones(5)
    up = np.array([[1.0, 0, 1, 0, 0]])
    # walk: 4/6, 4/6 - 1/3, 4/6 - 1/3 + 2/6, ... -> the largest deviation is 2/3, at the first and at the third gene
    assert SCORES["wtcs"](delta, up, ones)[0, 0] == pytest.approx(2 / 3)
    both = np.array([[1.0, 0, 1, 0, -1]])
    assert SCORES["wtcs"](delta, both, ones)[0, 0] == pytest.approx((2 / 3 + 1) / 2)
    assert SCORES["wtcs"](delta, np.array([[1.0, -1, 0, 0, 0]]), ones)[0, 0] == 0  # both sets rise: no connection


def test_one_sided_gene_set_is_against_the_rest() -> None:
    delta = np.random.default_rng(2).normal(size=(1, 10))
    weights = np.zeros((1, 10))
    weights[0, :3] = 1
    assert SCORES["mean_diff"](delta, weights, np.ones(10))[0, 0] == pytest.approx(
        delta[0, :3].mean() - delta[0, 3:].mean()
    )


@pytest.mark.parametrize("method", ["edistance", "mmd"])
@pytest.mark.parametrize("n_folds", [1, 7, 40])
def test_pairs_are_summed_in_blocks(method: str, n_folds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    target, cells = rng.normal(size=(25, 3)), rng.normal(1.0, size=(33, 3))
    wanted = Population.of(sparse.csr_matrix(target), lambda c: c.toarray(), method)
    monkeypatch.setattr("scldm_cd4.ranking.population.BLOCK", 5 * 33)
    found = wanted.pairs(sparse.csr_matrix(cells), n_folds)
    fold = np.arange(33) * n_folds // 33
    members = (fold == np.arange(n_folds)[:, None]).astype(float)
    own = wanted.dissimilarity(cells, cells) * (1 - np.eye(33))
    np.testing.assert_allclose(found.within, members @ own @ members.T, rtol=1e-12)
    np.testing.assert_allclose(found.cross, members @ wanted.dissimilarity(cells, target).mean(axis=1), rtol=1e-12)
    np.testing.assert_array_equal(found.sizes, members.sum(axis=1))


def test_not_all_pairs_are_held_at_once() -> None:
    rng = np.random.default_rng(5)
    wanted = Population.of(sparse.csr_matrix(rng.normal(size=(30, 2))), lambda c: c.toarray(), "edistance")
    cells = sparse.csr_matrix(rng.normal(size=(4000, 2)))
    tracemalloc.start()
    try:
        wanted.pairs(cells, 20)
        assert tracemalloc.get_traced_memory()[1] < 30e6  # all take 128 MB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("method", ["edistance", "mmd"])
def test_population_distance(method: str) -> None:
    rng = np.random.default_rng(3)
    target, cells = rng.normal(size=(30, 4)), rng.normal(1.0, size=(24, 4))
    wanted = Population.of(sparse.csr_matrix(target), lambda c: c.toarray(), method)
    pairs = wanted.pairs(sparse.csr_matrix(cells), 6)
    rows = np.ones((2, 6))
    rows[1, 2] = 0
    left = np.delete(cells, np.s_[8:12], axis=0)
    for found, kept in zip(pairs.distance(rows), (cells, left), strict=True):
        if method == "edistance":
            assert found == pytest.approx(metrics.energy_distance(kept, target))
        else:
            x, y = (-wanted.dissimilarity(a, a) for a in (kept, target))
            cross = -wanted.dissimilarity(kept, target)
            inside = sum((k.sum() - len(k)) / (len(k) * (len(k) - 1)) for k in (x, y))
            assert found == pytest.approx(inside - 2 * cross.mean())
