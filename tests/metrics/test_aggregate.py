"""From conditions to one number per metric: averages, anchored scores, ranks, intervals."""

import numpy as np
import pandas as pd
import pytest

from scldm_cd4 import metrics
from scldm_cd4._errors import DataError


def table(rows):
    """Rows of (context, perturbation, metric, value, baseline, ceiling)."""
    columns = ["context", "perturbation", "metric", "value", "baseline_control", "ceiling"]
    out = pd.DataFrame(rows, columns=columns).assign(n_real=50, n_pred=50, n_ctrl=100, floor=0.0, note="")
    return out.assign(matched_value=out["value"], matched_baseline_control=out["baseline_control"])


@pytest.fixture
def plain():
    rng = np.random.default_rng(0)
    rows = []
    for context in ("a", "b"):
        for i in range(8):
            noise = rng.normal(0, 0.05, 3)
            rows.append((context, f"p{i}", "pearson_delta", *(np.array([0.5, 0.1, 0.9]) + noise)))
            rows.append((context, f"p{i}", "energy_distance", *(np.array([2.0, 4.0, 0.0]) + noise)))
            rows.append((context, f"p{i}", "de_f1", *(np.array([0.3, 0.0, 0.6]) + noise)))
    return table(rows)


def test_contexts_have_equal_weight():
    rows = [("a", f"p{i}", "mse", 1.0, 2.0, 0.0) for i in range(9)] + [("b", "p0", "mse", 3.0, 2.0, 0.0)]
    found = table(rows)
    assert metrics.aggregate(found).loc["mse", "value"] == pytest.approx(2.0)
    assert metrics.aggregate(found, "weighted").loc["mse", "value"] == pytest.approx(1.2)
    found.loc[found["context"] == "b", "n_real"] = 450
    assert metrics.aggregate(found, "weighted").loc["mse", "value"] == pytest.approx(2.0)
    assert metrics.aggregate(found, by="context").loc[("b", "mse"), "value"] == 3.0
    outlier = table([*rows, ("b", "p1", "mse", 100.0, 2.0, 0.0), ("b", "p2", "mse", 3.0, 2.0, 0.0)])
    assert metrics.aggregate(outlier, "median").loc["mse", "value"] == pytest.approx(2.0)


def test_undefined_values_are_left_out_counted_and_refused_on_request(plain):
    rows = plain["metric"] == "de_f1"
    plain.loc[plain.index[rows][:4], "value"] = np.nan
    found = metrics.aggregate(plain)
    assert found.loc["de_f1", ["n_valid", "n_conditions"]].tolist() == [12, 16]
    assert found.loc["de_f1", "value"] == pytest.approx(0.3, abs=0.1)
    assert metrics.aggregate(plain, max_missing=0.25) is not None
    with pytest.raises(DataError, match="25% of the conditions are undefined"):
        metrics.aggregate(plain, max_missing=0.2)


def test_score_is_anchored_and_not_clipped(plain):
    found = metrics.score(plain)
    assert found["score"].to_dict() == pytest.approx(
        {"pearson_delta": 0.5, "energy_distance": 0.5, "de_f1": 0.5}, abs=0.03
    )
    assert found["is_resolved"].all()
    assert (found["n_valid"] == 16).all()
    plain[["value", "matched_value"]] = plain[["matched_baseline_control", "matched_baseline_control"]].to_numpy()
    assert metrics.score(plain)["score"].abs().max() < 1e-12
    plain["matched_value"] = plain["ceiling"]
    np.testing.assert_allclose(metrics.score(plain)["score"], 1.0)
    plain["matched_value"] = 2 * plain["matched_baseline_control"] - plain["ceiling"]
    np.testing.assert_allclose(metrics.score(plain)["score"], -1.0)
    assert metrics.score(plain, clip=(0, 1))["score"].tolist() == [0, 0, 0]


def test_score_of_a_prediction_without_any_change_is_that_of_the_baseline(plain):
    silent = plain.copy()
    rows = silent["metric"] == "pearson_delta"
    silent.loc[rows, ["value", "matched_value"]] = np.nan
    assert metrics.score(silent).loc["pearson_delta", "score"] == pytest.approx(0.0, abs=1e-12)
    partly = plain.copy()
    partly.loc[partly.index[rows][:8], ["value", "matched_value"]] = np.nan
    assert metrics.score(partly).loc["pearson_delta", "score"] == pytest.approx(0.25, abs=0.05)


def test_score_of_a_target_inside_the_range_counts_distances():
    rows = [(c, f"p{i}", "one_nn_accuracy", v, 0.9, 0.5) for c in "ab" for i, v in enumerate([0.4, 0.6, 0.5])]
    found = metrics.score(table(rows)).loc["one_nn_accuracy"]
    assert found["value"] == pytest.approx(0.2 / 3)
    assert found["score"] == pytest.approx(1 - (0.2 / 3) / 0.4)


def test_score_that_nothing_resolves_says_so(plain):
    plain["ceiling"] = plain["matched_baseline_control"] + np.random.default_rng(1).normal(0, 0.1, len(plain))
    assert not metrics.score(plain)["is_resolved"].any()


def test_score_names_what_it_lacks(plain):
    with pytest.raises(DataError, match="one of the baselines"):
        metrics.score(plain, "two_way")
    with pytest.raises(DataError, match="training cells, ceilings"):
        metrics.score(plain.drop(columns="matched_value"))
    with pytest.raises(DataError, match=r"give a table of metrics\.evaluate"):
        metrics.aggregate(pd.DataFrame({"a": [1]}))
    with pytest.raises(DataError, match="'mean', 'median' or 'weighted'"):
        metrics.aggregate(plain, "mode")


def test_families_have_equal_weight_in_ranks():
    # better in one column of effects, worse in three columns of rank tests
    metrics_of = ["pearson_delta", "de_f1", "de_roc_auc", "de_spearman_lfc"]
    rows = [("a", f"p{i}", m, 0.8 if m == "pearson_delta" else 0.1, 0.4, 0.9) for i in range(4) for m in metrics_of]
    ranks = metrics.rank_average(table(rows))
    assert ranks.loc["prediction", "effect"] == 1
    assert ranks.loc["prediction", "de"] == 2
    assert ranks["rank"].tolist() == [1.5, 1.5]


def test_ranks_share_ties_and_put_undefined_last(plain):
    plain["value"] = plain["baseline_control"]
    ranks = metrics.rank_average(plain)
    assert (ranks["rank"] == 1.5).all()
    plain.loc[plain["metric"] == "de_f1", "value"] = np.nan
    ranks = metrics.rank_average(plain)
    assert ranks.loc["prediction", "de"] == 2
    assert ranks.loc["prediction", "n_undefined"] == 16
    with_ceiling = metrics.rank_average(plain, ceiling=True)
    assert with_ceiling.index[0] == "ceiling"


def test_ranks_of_several_tables(plain):
    better = plain.assign(value=plain["ceiling"])
    ranks = metrics.rank_average({"one": plain, "two": better})
    assert ranks.index.tolist() == ["two", "one", "control"]
    with pytest.raises(DataError, match="different conditions"):
        metrics.rank_average({"one": plain, "two": better.iloc[3:]})
    with pytest.raises(DataError, match="at least two methods"):
        metrics.rank_average(plain.drop(columns=["baseline_control", "matched_baseline_control"]))


def test_intervals_hold_the_truth_and_widen_with_few_perturbations():
    def draw(n, seed):
        rng = np.random.default_rng(seed)
        effects = rng.normal(1.0, 0.5, n)  # perturbations differ, contexts of one share its effect
        rows = [(c, f"p{i:02d}", "mse", e + rng.normal(0, 0.1), 0.0, 2.0) for i, e in enumerate(effects) for c in "ab"]
        return metrics.aggregate(table(rows), intervals=True, n_boot=120, seed=seed).loc["mse"]

    found = [draw(25, seed) for seed in range(12)]
    hit = [row["value_low"] <= 1.0 <= row["value_high"] for row in found]
    assert sum(hit) >= 9
    widths = [row["value_high"] - row["value_low"] for row in found]
    # the error of a mean over 25 perturbations, not over 50 independent conditions
    assert np.mean(widths) == pytest.approx(2 * 1.96 * 0.5 / 5, rel=0.2)
    few = draw(6, 0)
    assert few["value_high"] - few["value_low"] > np.mean(widths)
    assert np.isnan(draw(2, 0)["value_low"])


def test_intervals_of_scores_are_paired_and_seeded(plain):
    found = [metrics.score(plain, intervals=True, n_boot=60, seed=s) for s in (1, 1, 2)]
    pd.testing.assert_frame_equal(found[0], found[1])
    assert not found[0].equals(found[2])
    row = found[0].loc["pearson_delta"]
    # the noise is shared by value, baseline and ceiling of a condition only in part
    assert row["score_low"] < row["score"] < row["score_high"]
    assert row["score_high"] - row["score_low"] < 0.15
