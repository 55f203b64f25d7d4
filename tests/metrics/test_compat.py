"""Conventions of other packages, from AnnData, equal the goldens that those packages gave."""

import importlib.util
import json
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy.spatial.distance import cdist

from scldm_cd4 import metrics
from scldm_cd4._errors import DataError

GOLDENS = Path(__file__).parent / "goldens"
_spec = importlib.util.spec_from_file_location("compat_cells", GOLDENS / "effects_cells.py")
assert _spec is not None
assert _spec.loader is not None
cells = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cells)
KEYS = {"perturbation_key": "target", "context_keys": [], "control": cells.CONTROL}


@pytest.fixture(scope="module")
def goldens():
    return json.loads((GOLDENS / "effects.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def sides():
    out = []
    for side in ("real", "pred"):
        counts, labels = cells.effect_cells(side)
        obs = pd.DataFrame({"target": labels}, index=[f"{side}{i}" for i in range(len(labels))])
        out.append(ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=cells.GENES)))
    return out


def wide(table):
    return table.pivot_table(index="perturbation", columns="metric", values="value", dropna=False)


def test_cell_eval_v1_equals_cell_eval(sides, goldens):
    normalised = [ad.AnnData(metrics.log_normalize(side), obs=side.obs, var=side.var) for side in sides]
    table = wide(metrics.compat.evaluate(*normalised, "cell_eval_v1", input_type="lognorm", **KEYS))
    golden = goldens["cell_eval"]
    shared = sorted(set(golden) & set(table.columns) - {"overlap_at_N"})
    assert len(shared) >= 18
    for name in shared:
        expected = pd.Series(golden[name]).reindex(table.index)
        np.testing.assert_allclose(table[name], expected, rtol=1e-6, atol=1e-6, err_msg=name)


def test_vcc2026_equals_cell_eval2(sides, goldens):
    found = metrics.compat.evaluate(*sides, "vcc2026", **KEYS)
    panel = found[found["perturbation"] == "(panel)"]
    table = wide(found[found["perturbation"] != "(panel)"])
    golden = goldens["cell_eval2"]
    shared = sorted(set(golden) & set(table.columns))
    assert len(shared) == 7
    for name in shared:
        expected = pd.Series(golden[name]).reindex(table.index)
        np.testing.assert_allclose(table[name], expected, rtol=1e-4, atol=1e-6, err_msg=name)
    ratio = sum(golden["expr_mse_unbiased_capped"].values()) / sum(golden["expr_distance_unbiased"].values())
    assert panel["value"].item() == pytest.approx(ratio, rel=1e-4)


def test_scores_of_2026_lie_between_mean_response_and_replicate(sides):
    real, pred = sides
    mean = metrics.baselines.predict(
        "perturbed_mean", real, pd.DataFrame({"target": cells.PERTURBATIONS[1:], "n_cells": 60}), seed=7, **KEYS
    )
    found = {name: metrics.compat.vcc2026_score(real, side, **KEYS) for name, side in (("pred", pred), ("mean", mean))}
    table = found["pred"]
    assert table.loc["pds_cosine", "baseline"] == pytest.approx(0.5, abs=0.2)
    assert table.loc["pds_cosine", "replicate"] > 0.9
    assert table.loc["expr_mse_unbiased_capped_norm", "replicate"] == pytest.approx(0.0, abs=0.2)
    assert (table["score"] > found["mean"]["score"]).all()
    assert found["mean"]["score"].abs().median() < 0.2
    halves = [real[i::2] for i in (0, 1)]
    repeat = metrics.compat.vcc2026_score(*halves, **KEYS)
    assert repeat.loc[["pds_cosine", "expr_mse_unbiased_capped_norm"], "score"].min() > 0.7


def test_cfgen_mmd_is_a_biased_sum_over_bandwidths(sides):
    table = metrics.compat.evaluate(*sides, "cfgen", **KEYS)
    projection = metrics.fit_projection(metrics.log_normalize(sides[0]), 30)
    label = cells.PERTURBATIONS[7]  # equal numbers of cells: nothing is drawn
    a, b = (projection.apply(metrics.log_normalize(side[side.obs["target"] == label])) for side in sides)
    assert len(a) == len(b)
    expected = 0.0
    for sigma in (0.01, 0.1, 1.0, 10.0, 100.0):
        xx, yy, xy = (np.exp(-cdist(*pair, "sqeuclidean") / (2 * sigma**2)) for pair in ((a, a), (b, b), (a, b)))
        expected += xx.mean() + yy.mean() - 2 * xy.mean()
    row = wide(table).loc[label]
    assert row["RBF_MMD"] == pytest.approx(expected, rel=1e-9)
    assert row["2-Wasserstein"] == pytest.approx(metrics.wasserstein(a, b), rel=1e-9)


def test_scldm_mmd_sees_nothing_but_numbers_of_cells(sides):
    row = wide(metrics.compat.evaluate(*sides, "scldm", **KEYS)).loc[cells.PERTURBATIONS[7]]
    n = int((sides[0].obs["target"] == cells.PERTURBATIONS[7]).sum())
    assert row["mmd_rbf"] == pytest.approx(2 / n, rel=1e-6)


def test_mistakes_are_named(sides):
    real, pred = sides
    with pytest.raises(DataError, match="conventions are"):
        metrics.compat.evaluate(real, pred, "vcc2031", **KEYS)
    without = pred[pred.obs["target"] != cells.CONTROL]
    with pytest.raises(DataError, match="predicted controls"):
        metrics.compat.evaluate(real, without, "cell_eval_v1", **KEYS)
    with pytest.raises(DataError, match="2 real conditions were not predicted"):
        metrics.compat.evaluate(real, pred[~pred.obs["target"].isin(cells.PERTURBATIONS[1:3])], "cfgen", **KEYS)
    normalised = [ad.AnnData(metrics.log_normalize(side), obs=side.obs, var=side.var) for side in sides]
    with pytest.raises(DataError, match="needs raw counts"):
        metrics.compat.evaluate(*normalised, "vcc2026", input_type="lognorm", **KEYS)
