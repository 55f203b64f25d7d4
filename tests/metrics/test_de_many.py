"""Tests of many conditions at once, recovery of significant genes, and discrimination."""

import sys

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.spatial.distance import cdist
from sklearn.metrics import average_precision_score, roc_auc_score

from scldm_cd4 import metrics
from scldm_cd4._errors import DataError

CONTROL = "NT"
KEYS = [("A", CONTROL), ("A", "g0"), ("A", "g1"), ("B", CONTROL), ("B", "g0")]


def cells(seed=0, *, sizes=(90, 40, 30, 60, 50), n_genes=80, effect=1.0):
    """Counts and condition codes in the order of `KEYS`; contexts differ, g0 and g1 have effects."""
    rng, fixed = np.random.default_rng(seed), np.random.default_rng(7)
    base = fixed.lognormal(0.3, 1, (2, n_genes))
    change = np.exp(effect * fixed.normal(0, 0.9, (3, n_genes)) * (fixed.random((3, n_genes)) < 0.3))
    change[0] = 1
    means = [base[0], base[0] * change[1], base[0] * change[2], base[1], base[1] * change[1]]
    codes = np.repeat(np.arange(5), sizes)
    counts = rng.poisson(rng.gamma(6, 1 / 6, (len(codes), 1)) * np.stack(means)[codes])
    return counts.astype(np.float32), codes


def all_tests(seed=0, *, controls=None, **keywords):
    counts, codes = cells(seed, **{k: keywords.pop(k) for k in ("sizes", "effect") if k in keywords})
    values = metrics.log_normalize(counts)
    if controls is None:
        controls = metrics.control_ranks(values, codes, KEYS, control=CONTROL)
    return metrics.de_tests(values, codes, KEYS, controls, control=CONTROL, **keywords)


class TestRanks:
    @settings(max_examples=30, deadline=None)
    @given(seed=st.integers(0, 10_000), signed=st.booleans(), groups=st.integers(1, 5))
    def test_all_groups_at_once_equal_scipy(self, seed, signed, groups):
        rng = np.random.default_rng(seed)
        n, m = int(rng.integers(groups, 30)), int(rng.integers(1, 25))
        values = rng.integers(-2 if signed else 0, 4, (n, 6)).astype(float)
        control = rng.integers(-1 if signed else 0, 3, (m, 6)).astype(float)
        codes = np.r_[np.arange(groups), rng.integers(-1, groups, n - groups)]
        for form in (np.asarray, sp.csr_matrix, lambda x: sp.csr_matrix(x).astype(np.float32)):
            test = metrics.ControlRanks(form(control)).test_groups(form(values), codes, groups)
            _, p = metrics.combine_tests([test])
            for group in range(groups):
                own = values[codes == group]
                varies = np.ptp(np.vstack([own, control]), axis=0) > 0
                if varies.any():
                    expected = stats.mannwhitneyu(own[:, varies], control[:, varies], method="asymptotic").pvalue
                    np.testing.assert_allclose(p[group, varies], expected, rtol=1e-10)
                assert (p[group, ~varies] == 1).all()

    def test_blocks_and_order_of_cells_do_not_matter(self, monkeypatch):
        expected = all_tests()
        monkeypatch.setattr("scldm_cd4.metrics.de.ranks.BLOCK", 100)
        counts, codes = cells()
        order = np.random.default_rng(0).permutation(len(codes))
        values = metrics.log_normalize(counts[order])
        controls = metrics.control_ranks(values, codes[order], KEYS, control=CONTROL)
        got = metrics.de_tests(values, codes[order], KEYS, controls, control=CONTROL)
        for name in ("z", "p", "p_adjusted", "log2_fold_change"):
            np.testing.assert_allclose(getattr(got, name), getattr(expected, name), rtol=1e-9, atol=1e-12)

    def test_wrong_input(self):
        ranks = metrics.ControlRanks(np.ones((3, 2)))
        with pytest.raises(DataError, match="has 3 genes, the control 2"):
            ranks.test_groups(np.ones((4, 3)), np.zeros(4, dtype=int), 1)
        with pytest.raises(DataError, match="one code per cell"):
            ranks.test_groups(np.ones((4, 2)), np.zeros(3, dtype=int), 1)

    def test_adjusted_by_row_and_without_untested_genes(self):
        rng = np.random.default_rng(0)
        p = rng.random((4, 30))
        p[1, [3, 9]] = p[2] = np.nan
        adjusted = metrics.benjamini_hochberg(p)
        for row, got in zip(p, adjusted, strict=True):
            given_p = ~np.isnan(row)
            assert (np.isnan(got) == ~given_p).all()
            if given_p.any():
                np.testing.assert_allclose(got[given_p], stats.false_discovery_control(row[given_p]), rtol=1e-12)


class TestManyConditions:
    def test_equal_one_condition_at_a_time(self):
        counts, codes = cells()
        values, tests = metrics.log_normalize(counts), all_tests()
        assert tests.keys == (("A", "g0"), ("A", "g1"), ("B", "g0"))
        assert tests.n.tolist() == [40, 30, 50]
        assert tests.n_control.tolist() == [90, 90, 60]
        for row, (code, control) in enumerate(((1, 0), (2, 0), (4, 3))):
            table = metrics.de_genes(values[codes == code], values[codes == control])
            np.testing.assert_allclose(tests.z[row], table["z"], rtol=1e-10)
            np.testing.assert_allclose(tests.p_adjusted[row], table["p_adjusted"], rtol=1e-10)
            shares = 1e4 * counts / counts.sum(axis=1, keepdims=True)
            levels = [shares[codes == side].mean(axis=0) + 0.01 for side in (code, control)]
            np.testing.assert_allclose(tests.log2_fold_change[row], np.log2(levels[0] / levels[1]), rtol=1e-4)

    def test_scanpy_agrees(self):
        ours, theirs = all_tests(), all_tests(backend="scanpy")
        assert np.abs(np.log10(theirs.p) - np.log10(ours.p)).max() < 0.01
        assert (theirs.significant() == ours.significant()).mean() > 0.99

    def test_illico_agrees_where_installed(self):
        pytest.importorskip("illico", reason="the extra de is not installed")
        ours, theirs = all_tests(), all_tests(backend="illico")
        np.testing.assert_allclose(theirs.p, ours.p, rtol=1e-4)
        np.testing.assert_allclose(theirs.z, ours.z, atol=1e-3)

    def test_backends_refuse_in_words(self, monkeypatch):
        with pytest.raises(DataError, match="use 'ranks', 'illico' or 'scanpy'"):
            all_tests(backend="edgeR")
        monkeypatch.setitem(sys.modules, "illico", None)
        with pytest.raises(DataError, match=r"scldm_cd4\[de\]"):
            all_tests(backend="illico")

    def test_constant_cells_are_refused_by_name(self):
        counts, codes = cells()
        values = metrics.log_normalize(counts)
        controls = metrics.control_ranks(values, codes, KEYS, control=CONTROL)
        counts[codes == 2] = counts[codes == 0].mean(axis=0)
        with pytest.raises(DataError, match=r"condition \('A', 'g1'\): all 30 cells are the same profile"):
            metrics.de_tests(metrics.log_normalize(counts), codes, KEYS, controls, control=CONTROL)

    def test_genes_left_out_or_too_rare_in_the_control_are_not_tested(self):
        everything = all_tests()
        counts, codes = cells()
        level = (1e4 * counts / counts.sum(axis=1, keepdims=True))[codes == 0].mean(axis=0)
        limit = np.median(level)
        some = all_tests(min_control=limit)
        assert (np.isnan(some.p[0]) == (level < limit)).all()
        kept = ~np.isnan(some.p)
        np.testing.assert_array_equal(some.p[kept], everything.p[kept])
        assert (some.p_adjusted[kept] <= everything.p_adjusted[kept] + 1e-15).mean() > 0.9
        mask = np.zeros((3, 80), dtype=bool)
        mask[1, 5] = True
        out = all_tests(exclude=mask)
        assert np.argwhere(np.isnan(out.p)).tolist() == [[1, 5]]
        assert not out.significant()[1, 5]
        with pytest.raises(DataError, match="conditions x genes"):
            all_tests(exclude=mask[:1])

    def test_fold_changes_are_finite_where_a_gene_is_absent_on_one_side(self):
        counts, codes = cells()
        counts[codes == 0, 3] = 0
        counts[codes == 1, 4] = 0
        values = metrics.log_normalize(counts)
        controls = metrics.control_ranks(values, codes, KEYS, control=CONTROL)
        for mean in ("arithmetic", "geometric"):
            tests = metrics.de_tests(values, codes, KEYS, controls, control=CONTROL, mean=mean)
            assert np.isfinite(tests.log2_fold_change).all()
            assert tests.log2_fold_change[0, 3] > 3
            assert tests.log2_fold_change[0, 4] < -3
        with pytest.raises(DataError, match="pseudocount must be above 0"):
            metrics.de_tests(values, codes, KEYS, controls, control=CONTROL, pseudocount=0)

    def test_context_without_control_and_conditions_without_cells(self):
        counts, codes = cells()
        values = metrics.log_normalize(counts)
        controls = metrics.control_ranks(values, codes, KEYS, control=CONTROL)
        del controls[("B",)]
        with pytest.raises(DataError, match=r"no real control cells \('NT'\) in context \[\('B',\)\]"):
            metrics.de_tests(values, codes, KEYS, controls, control=CONTROL)
        few = metrics.de_tests(values, np.where(codes == 4, -1, codes), KEYS, controls, control=CONTROL)
        assert few.keys == (("A", "g0"), ("A", "g1"))

    def test_null_is_calibrated(self):
        p = all_tests(seed=3, effect=0.0, sizes=(200, 100, 100, 200, 100)).p
        assert (p < 0.05).mean() == pytest.approx(0.05, abs=0.035)


class TestRecovery:
    def test_against_sets_and_curves_one_condition_at_a_time(self):
        real, pred = all_tests(1), all_tests(2, effect=0.7)
        table = metrics.de_table(real, pred, min_genes=2, top=(5,))
        for k in range(3):
            r, p = real.p_adjusted[k] < 0.05, pred.p_adjusted[k] < 0.05
            both = (r & p).sum()
            assert table["de_precision"][k] == pytest.approx(both / p.sum())
            assert table["de_recall"][k] == pytest.approx(both / r.sum())
            assert table["de_f1"][k] == pytest.approx(metrics.de_recovery(r, p)["f1"])
            assert table["de_jaccard"][k] == pytest.approx(both / (r | p).sum())
            score = np.abs(pred.z[k])
            assert table["de_roc_auc"][k] == pytest.approx(roc_auc_score(r, score))
            assert table["de_pr_auc"][k] == pytest.approx(average_precision_score(r, score))
            x, y = real.log2_fold_change[k], pred.log2_fold_change[k]
            assert table["de_spearman_lfc"][k] == pytest.approx(stats.spearmanr(x[r], y[r]).statistic)
            assert table["de_lfc_nmae"][k] == pytest.approx(np.abs(x - y)[r].sum() / np.abs(x)[r].sum())
            assert table["de_direction_match"][k] == pytest.approx((np.sign(x) == np.sign(y))[r].mean())
            tops = [set(np.flatnonzero(s)[np.argsort(-np.abs(v[s]))[:5]]) for s, v in ((r, x), (p, y))]
            assert table["de_overlap_top5"][k] == pytest.approx(len(tops[0] & tops[1]) / min(5, r.sum()))
            assert table["de_n_real"][k] == r.sum()

    def test_self_is_perfect_and_order_of_genes_does_not_matter(self):
        real, pred = all_tests(1), all_tests(2)
        same = metrics.de_table(real, real)
        for name in (
            "de_f1",
            "de_overlap",
            "de_roc_auc",
            "de_spearman_lfc",
            "de_direction_match",
            "de_direction_reach",
        ):
            np.testing.assert_allclose(same[name], 1.0, err_msg=name)
        np.testing.assert_allclose(same["de_lfc_nmae"], 0.0)
        order = np.random.default_rng(0).permutation(80)

        def reorder(tests):
            arrays = (tests.z, tests.p, tests.p_adjusted, tests.log2_fold_change)
            return metrics.DETests(tests.keys, *(a[:, order] for a in arrays), tests.n, tests.n_control)

        expected, got = metrics.de_table(real, pred), metrics.de_table(reorder(real), reorder(pred))
        for name, values in expected.items():
            np.testing.assert_allclose(got[name], values, rtol=1e-9, err_msg=name)

    def test_nothing_real_is_undefined_and_silence_is_zero(self):
        real, pred = all_tests(1), all_tests(2)
        silent = metrics.DETests(
            pred.keys, 0 * pred.z, 0 * pred.p + 1, 0 * pred.p + 1, 0 * pred.z, pred.n, pred.n_control
        )
        empty = metrics.de_table(silent, pred)
        for name, values in empty.items():
            assert np.isnan(values).all() != name.startswith("de_n_"), name
        assert (empty["de_n_real"] == 0).all()
        table = metrics.de_table(real, silent)
        for name in ("de_precision", "de_recall", "de_f1", "de_jaccard", "de_overlap", "de_precision_top20"):
            assert (table[name] == 0).all(), name
        for name in ("de_direction_match", "de_direction_yield", "de_direction_reach"):
            assert (table[name] == 0).all(), name
        np.testing.assert_allclose(table["de_roc_auc"], 0.5)
        np.testing.assert_allclose(table["de_lfc_nmae"], 1.0)
        assert np.isnan(table["de_spearman_lfc"]).all()

    def test_one_class_has_no_curve(self):
        everything = np.ones((1, 4), dtype=bool)
        for labels in (everything, ~everything):
            roc, pr = metrics.area_under_curves(labels, np.arange(4.0)[None], everything)
            assert np.isnan([roc[0], pr[0]]).all()

    @settings(max_examples=30, deadline=None)
    @given(seed=st.integers(0, 10_000))
    def test_curves_with_ties_and_left_out_genes_equal_sklearn(self, seed):
        rng = np.random.default_rng(seed)
        labels, scores = rng.random((1, 25)) < 0.4, rng.integers(0, 5, (1, 25)).astype(float)
        keep = rng.random((1, 25)) < 0.8
        roc, pr = metrics.area_under_curves(labels, scores, keep)
        y = labels[keep]
        if 0 < y.sum() < y.size:
            assert roc[0] == pytest.approx(roc_auc_score(y, scores[keep]))
            assert pr[0] == pytest.approx(average_precision_score(y, scores[keep]))

    def test_missing_conditions_and_untested_genes(self):
        real, pred = all_tests(1), all_tests(2)
        with pytest.raises(DataError, match="1 conditions were not predicted"):
            metrics.de_table(real, pred.take(np.array([0, 2])))
        table = metrics.de_table(real, pred.take(np.array([2, 0])), allow_missing=True)
        assert np.isnan(table["de_f1"]).tolist() == [False, True, False]
        assert table["de_f1"][0] == metrics.de_table(real, pred)["de_f1"][0]
        top = np.zeros((3, 80), dtype=bool)
        top[np.arange(3), np.argmax(np.abs(real.z), axis=1)] = True
        without = metrics.de_table(real, pred, exclude=top)
        assert (metrics.de_table(real, pred)["de_n_real"] - without["de_n_real"]).tolist() == [1, 1, 1]
        missed = metrics.DETests(
            pred.keys,
            *(np.where(top, np.nan, a) for a in (pred.z, pred.p, pred.p_adjusted, pred.log2_fold_change)),
            pred.n,
            pred.n_control,
        )
        assert (metrics.de_table(real, missed)["de_direction_match"] < 1).all(), "a gene that is missing is a miss"
        short = (a[:, 1:] for a in (pred.z, pred.p, pred.p_adjusted, pred.log2_fold_change))
        fewer = metrics.DETests(pred.keys, *short, pred.n, pred.n_control)
        with pytest.raises(DataError, match="80 real and 79 predicted genes"):
            metrics.de_table(real, fewer)


class TestDiscrimination:
    def effects(self, seed=0, n=12, genes=40):
        rng = np.random.default_rng(seed)
        real = rng.normal(size=(n, genes))
        return real, real + 1.5 * rng.normal(size=(n, genes))

    @pytest.mark.parametrize("metric", ["cosine", "l1", "l2"])
    @pytest.mark.parametrize("direction", ["real", "pred"])
    def test_equals_ranks_one_at_a_time(self, metric, direction):
        real, pred = self.effects()
        mask = np.eye(12, 40, dtype=bool)
        name = {"l1": "cityblock", "l2": "euclidean", "cosine": "cosine"}[metric]
        for scope in ("panel", "own"):
            got = metrics.discrimination(real, pred, metric=metric, exclude=mask, scope=scope, direction=direction)
            for k in range(12):
                keep = ~(mask.any(axis=0) if scope == "panel" else mask[k])
                query, pool = (pred, real) if direction == "real" else (real, pred)
                d = cdist(query[[k]][:, keep], pool[:, keep], metric=name)[0]
                assert got[k] == pytest.approx(1 - (d < d[k]).sum() / 11)

    def test_no_effect_and_one_effect_for_all_score_a_half(self):
        real, _ = self.effects()
        np.testing.assert_array_equal(metrics.discrimination(real, 0 * real), 0.5)
        shared = np.broadcast_to(real.mean(axis=0), real.shape)
        for metric in ("cosine", "l1", "l2"):
            assert metrics.discrimination(real, shared, metric=metric).mean() == pytest.approx(0.5)
        assert (metrics.discrimination(real, shared, direction="pred") == 0.5).all()
        twice = np.vstack([real[:1], real])
        assert metrics.discrimination(twice, twice).tolist() == pytest.approx([1 - 0.5 / 12] * 2 + [1.0] * 11)

    def test_ranks_are_within_context(self):
        rng = np.random.default_rng(0)
        contexts = np.repeat(["d1", "d2", "d3"], 10)
        donor = np.repeat(20 * rng.normal(size=(3, 50)), 10, axis=0)
        real, pred = (donor + rng.normal(size=(30, 50)) for _ in range(2))
        assert metrics.discrimination(real, pred).mean() > 0.75, "the donor alone solves the pooled task"
        assert metrics.discrimination(real, pred, contexts).mean() == pytest.approx(0.5, abs=0.15)
        tuples = [(c, "48h") for c in contexts]
        np.testing.assert_array_equal(
            metrics.discrimination(real, pred, tuples), metrics.discrimination(real, pred, contexts)
        )

    def test_scale_and_order_of_genes(self):
        real, pred = self.effects()
        order = np.random.default_rng(1).permutation(40)
        expected = metrics.discrimination(real, pred)
        np.testing.assert_allclose(metrics.discrimination(real, 9 * pred), expected)
        np.testing.assert_allclose(metrics.discrimination(real[:, order], pred[:, order]), expected)
        np.testing.assert_allclose(metrics.discrimination(real[::-1], pred[::-1])[::-1], expected)

    def test_edges(self):
        real, pred = self.effects(n=3, genes=3)
        assert np.isnan(metrics.discrimination(real[:1], pred[:1])).all()
        missing = pred.copy()
        missing[1] = np.nan
        for direction in ("real", "pred"):
            got = metrics.discrimination(real, missing, direction=direction)
            assert np.isnan(got).tolist() == [False, True, False]
        with pytest.raises(DataError, match="every gene is the target"):
            metrics.discrimination(real, pred, exclude=np.eye(3, dtype=bool))
        with pytest.raises(DataError, match="same shape"):
            metrics.discrimination(real, pred[:2])
        with pytest.raises(DataError, match="'l3' is not known"):
            metrics.discrimination(real, pred, metric="l3")
        with pytest.raises(DataError, match="2 contexts for 3 conditions"):
            metrics.discrimination(real, pred, ["a", "b"])


def test_ladder_of_predictions_is_in_order():
    """Self, fresh draw, half effect, perturbed mean, control: 10 perturbations of one context, equal numbers."""
    rng = np.random.default_rng(0)
    n_genes, names = 200, [CONTROL, *(f"p{i}" for i in range(10))]
    base = rng.lognormal(0.5, 1, n_genes)
    effect = rng.normal(0, 0.8, (11, n_genes)) * (rng.random((11, n_genes)) < 0.15)
    effect[0] = 0
    codes, keys = np.repeat(np.arange(11), [300] + [80] * 10), [("A", name) for name in names]

    def draw(change):
        mean = rng.gamma(6, 1 / 6, (len(codes), 1)) * (base * np.exp(change))[codes]
        return metrics.log_normalize(rng.poisson(mean))

    mean_effect = np.vstack([effect[:1], np.tile(effect[1:].mean(axis=0), (10, 1))])
    real = draw(effect)
    ladder = {
        "self": real,
        "oracle": draw(effect),
        "half": draw(effect / 2),
        "mean": draw(mean_effect),
        "control": draw(0 * effect),
    }
    bulks = metrics.pseudobulks(real, codes, keys)
    controls = metrics.control_ranks(real, codes, keys, control=CONTROL)
    truth = metrics.de_tests(real, codes, keys, controls, control=CONTROL)
    rows = []
    for values in ladder.values():
        pred = metrics.pseudobulks(values, codes, keys)
        tests = metrics.de_tests(values, codes, keys, controls, control=CONTROL)
        effects = metrics.effect_table(bulks, pred, control=CONTROL)
        own, deltas = bulks.rows(bulks.conditions(CONTROL)), [side.means - bulks.means[0] for side in (bulks, pred)]
        rows.append(
            {
                "pearson_delta": effects["pearson_delta"].mean(),
                "discrimination": metrics.discrimination(*(d[own] for d in deltas)).mean(),
                "recall": metrics.de_table(truth, tests)["de_recall"].mean(),
                "error": -effects["mse_corrected"].mean(),
            }
        )
    table = pd.DataFrame(rows, index=list(ladder))
    assert (table.loc["self", ["pearson_delta", "discrimination", "recall"]] == 1).all()
    for name in ("pearson_delta", "recall"):
        assert table[name].is_monotonic_decreasing, table
    assert table["discrimination"].to_numpy() == pytest.approx([1, 1, 1, 0.5, 0.5], abs=0.15)
    assert table.loc[["oracle", "half", "control"], "error"].is_monotonic_decreasing
