"""Effect metrics from pseudobulks: independent formulas, chance levels, and what must not be rewarded."""

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from scipy import stats
from sklearn.metrics import r2_score

from scldm_cd4 import metrics
from scldm_cd4._errors import DataError

CONTROL = "NT"


def simulate(seed=0, *, sizes=(80, 30, 25, 40), n_genes=60, contexts=("A", "B"), effect=1.0, truth=3):
    """Counts and labels (context, perturbation); the effects depend on `truth` only, the draws on `seed`."""
    rng, fixed = np.random.default_rng(seed), np.random.default_rng(truth)
    names = [CONTROL, *(f"g{i}" for i in range(len(sizes) - 1))]
    base = fixed.lognormal(1, 0.7, (len(contexts), n_genes))
    change = effect * fixed.normal(0, 0.5, (len(sizes), n_genes))
    change[0] = 0
    blocks, labels = [], []
    for c, context in enumerate(contexts):
        for p, n in enumerate(sizes):
            blocks.append(rng.poisson(rng.gamma(5, 0.2, (n, 1)) * base[c] * np.exp(change[p])))
            labels += [(context, names[p])] * n
    frame = pd.DataFrame(labels, columns=["context", "perturbation"])
    return np.concatenate(blocks).astype(np.float32), frame


def bulks_of(counts, labels, **keywords):
    codes, keys = metrics.condition_codes(labels)
    return metrics.pseudobulks(metrics.log_normalize(counts), codes, keys, counts=counts, **keywords)


def table_of(real, pred, **keywords):
    return metrics.effect_table(bulks_of(*real), bulks_of(*pred), control=CONTROL, **keywords)


class TestPseudobulks:
    def test_equal_numpy_per_condition(self):
        counts, labels = simulate()
        values = metrics.log_normalize(counts).toarray()
        bulks = bulks_of(counts, labels)
        assert bulks.keys[0] == ("A", CONTROL)
        for row, (context, perturbation) in enumerate(bulks.keys):
            cells = ((labels["context"] == context) & (labels["perturbation"] == perturbation)).to_numpy()
            np.testing.assert_allclose(bulks.means[row], values[cells].mean(axis=0), rtol=1e-12)
            np.testing.assert_allclose(bulks.variances[row], values[cells].var(axis=0, ddof=1), rtol=1e-9, atol=1e-12)
            total = counts[cells].sum(axis=0)
            np.testing.assert_allclose(bulks.log_sum[row], np.log1p(5e4 * total / total.sum()), rtol=1e-6)
            left_out = np.stack([total - counts[i] for i in np.flatnonzero(cells)]).astype(np.float64)
            logs = np.log1p(5e4 * left_out / left_out.sum(axis=1, keepdims=True))
            expected = (cells.sum() - 1) * logs.var(axis=0).sum()
            assert bulks.log_sum_noise[row] == pytest.approx(expected, rel=1e-6)
            assert bulks.n[row] == cells.sum()

    def test_order_chunks_sparsity_and_unused_labels_do_not_matter(self, monkeypatch):
        counts, labels = simulate()
        expected = bulks_of(counts, labels)
        monkeypatch.setattr("scldm_cd4.metrics.cells.pseudobulk.CHUNK", 37)
        order = np.random.default_rng(0).permutation(len(counts))
        shuffled = labels.iloc[order].astype("category")
        shuffled["perturbation"] = shuffled["perturbation"].cat.add_categories("unused")
        for form in (sp.csr_matrix, sp.csc_matrix, np.asarray):
            codes, keys = metrics.condition_codes(shuffled)
            values = metrics.log_normalize(counts[order])
            got = metrics.pseudobulks(form(values.toarray()), codes, keys, counts=form(counts[order]))
            assert got.keys == expected.keys
            for name in ("means", "variances", "log_sum", "log_sum_noise"):
                np.testing.assert_allclose(getattr(got, name), getattr(expected, name), rtol=1e-9, atol=1e-12)

    def test_labels(self):
        codes, keys = metrics.condition_codes([np.array([1, 2, 1]), np.array(["b", "a", "b"], dtype=object)])
        assert keys == (("1", "b"), ("2", "a"))
        assert codes.tolist() == [0, 1, 0]
        with pytest.raises(DataError, match="1 cells have no label"):
            metrics.condition_codes([np.array(["a", None], dtype=object)])
        with pytest.raises(DataError, match="one code per cell"):
            metrics.pseudobulks(np.ones((3, 2)), np.zeros(2, dtype=int), [("a",)])
        with pytest.raises(DataError, match="same cells and genes"):
            metrics.pseudobulks(np.ones((3, 2)), np.zeros(3, dtype=int), [("a",)], counts=np.ones((3, 3)))

    def test_cells_in_no_group_and_conditions_without_cells(self):
        values, keys = np.array([[1.0], [3.0], [9.0]]), [("a",), ("b",), ("c",)]
        bulks = metrics.pseudobulks(values, np.array([2, 2, -1]), keys)
        assert bulks.keys == (("c",),)
        assert bulks.means.tolist() == [[2.0]]
        assert bulks.variances.tolist() == [[2.0]]

    def test_equal_shares_of_unequal_totals_are_ties(self):
        rng = np.random.default_rng(0)
        small = rng.integers(0, 9, (200, 7))
        small[:, 0] += 1
        factors = rng.integers(1, 60, (200, 1))
        np.testing.assert_array_equal(
            metrics.log_normalize(small * factors).toarray(), metrics.log_normalize(small).toarray()
        )

    def test_totals_of_the_whole_transcriptome(self):
        counts = np.array([[1.0, 3.0], [0.0, 2.0]])
        values = metrics.log_normalize(counts, totals=np.array([100.0, 50.0])).toarray()
        np.testing.assert_allclose(values, np.log1p(1e4 * counts / np.array([[100.0], [50.0]])))
        for bad in (np.ones(3), np.array([1.0, 0.0]), np.array([1.0, np.nan])):
            with pytest.raises(DataError, match="positive number for each cell"):
                metrics.log_normalize(counts, totals=bad)


class TestEffectTable:
    def test_equals_the_formulas_one_condition_at_a_time(self):
        real, pred, train = simulate(1), simulate(2, effect=0.6), simulate(3, sizes=(20, 9, 9, 9))
        codes, keys = metrics.condition_codes(train[1])
        trained = metrics.pseudobulks(metrics.log_normalize(train[0]), codes, keys)
        table = table_of(real, pred, train=trained, top=(20,))
        x, y, t = (metrics.log_normalize(side[0]).toarray() for side in (real, pred, train))
        for k, (context, name) in enumerate(bulks_of(*real).conditions(CONTROL)):

            def cells(side, values, what, context=context):
                labels = side[1]
                return values[((labels["context"] == context) & (labels["perturbation"] == what)).to_numpy()]

            own, control, guess = cells(real, x, name), cells(real, x, CONTROL), cells(pred, y, name)
            a, b = own.mean(axis=0) - control.mean(axis=0), guess.mean(axis=0) - control.mean(axis=0)
            assert table["pearson_delta"][k] == pytest.approx(stats.pearsonr(a, b).statistic, abs=1e-10)
            assert table["pearson_delta"][k] == pytest.approx(metrics.pearson_delta(own, guess, control), abs=1e-10)
            assert table["spearman_delta"][k] == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-10)
            assert table["spearman_delta"][k] == pytest.approx(metrics.spearman_delta(own, guess, control), abs=1e-10)
            assert table["cosine_delta"][k] == pytest.approx(metrics.cosine_delta(own, guess, control), abs=1e-10)
            assert table["cosine_delta"][k] == pytest.approx(a @ b / np.sqrt(a @ a * (b @ b)), abs=1e-10)
            assert table["l2_delta"][k] == pytest.approx(metrics.l2_delta(own, guess, control), abs=1e-10)
            assert table["mse"][k] == pytest.approx(np.square(a - b).mean(), abs=1e-10)
            assert table["mae"][k] == pytest.approx(np.abs(a - b).mean(), abs=1e-10)
            assert table["r2_delta"][k] == pytest.approx(r2_score(a, b), abs=1e-10)
            t_control = np.abs(stats.ttest_ind(own, control, equal_var=False).statistic)
            top = np.argsort(-t_control)[:20]
            assert table["pearson_delta_top20"][k] == pytest.approx(stats.pearsonr(a[top], b[top]).statistic, abs=1e-10)
            others = [other for other in ("g0", "g1", "g2") if other != name]
            rest = np.concatenate([cells(real, x, other) for other in others])
            score = np.abs(stats.ttest_ind(own, rest, equal_var=False).statistic)
            weights = np.square((score - score.min()) / np.ptp(score))
            weights /= weights.sum()
            assert table["wmse"][k] == pytest.approx((weights * np.square(a - b)).sum(), rel=1e-8)
            assert table["wr2_delta"][k] == pytest.approx(r2_score(a, b, sample_weight=weights), rel=1e-8)
            noise = own.var(axis=0, ddof=1).sum() / len(own)
            guess_noise = guess.var(axis=0, ddof=1).sum() / len(guess)
            corrected = (np.square(a - b).sum() - noise - min(noise, guess_noise)) / len(a)
            assert table["mse_corrected"][k] == pytest.approx(corrected, rel=1e-8)
            centre = np.mean([cells(train, t, p).mean(axis=0) for p in ("g0", "g1", "g2")], axis=0)
            systema = stats.pearsonr(own.mean(axis=0) - centre, guess.mean(axis=0) - centre).statistic
            assert table["pearson_delta_pert"][k] == pytest.approx(systema, abs=1e-10)

    def test_without_effects_correlations_are_at_chance_and_disjoint_controls_at_zero(self):
        values, disjoint = [], []
        for seed in range(12):
            real, pred = (simulate(2 * seed + i, effect=0.0, sizes=(50, 50, 50), n_genes=200) for i in (0, 1))
            codes, keys = metrics.condition_codes(real[1])
            halves = metrics.control_halves(metrics.log_normalize(real[0]), codes, keys, control=CONTROL, seed=seed)
            table = table_of(real, pred, halves=halves)
            np.testing.assert_allclose(table["pearson_delta_chance"], 0.5)
            values.append(table["pearson_delta"].mean())
            disjoint.append(table["pearson_delta_disjoint"].mean())
        assert np.mean(values) == pytest.approx(0.5, abs=0.03)
        assert np.mean(disjoint) == pytest.approx(0.0, abs=0.03)

    def test_chance_for_unequal_numbers(self):
        assert metrics.chance_level(100, 100) == pytest.approx(0.5)
        assert metrics.chance_level(100, 10_000) == pytest.approx(0.0099, abs=1e-4)
        rng = np.random.default_rng(0)
        draws = [
            metrics.pearson_delta(*(rng.normal(size=(n, 500)) for n in (20, 200, 60)))  # real, predicted, control
            for _ in range(40)
        ]
        assert np.mean(draws) == pytest.approx(metrics.chance_level(20, 60, 200), abs=0.03)

    def test_halves_share_no_cell_and_cover_the_controls(self):
        values = np.arange(9.0)[:, None]
        codes, keys = np.array([0, 0, 0, 0, 0, 1, 1, 2, 2]), [("A", CONTROL), ("A", "g"), ("B", CONTROL)]
        first, second = metrics.control_halves(values, codes, keys, control=CONTROL, seed=1)
        assert (first.n + second.n).tolist() == [5, 2]
        np.testing.assert_allclose(first.n @ first.means + second.n @ second.means, values[codes != 1].sum())

    def test_controls_are_those_of_the_context(self):
        counts, labels = simulate(1, effect=0.0, sizes=(200, 60))
        shared = labels.assign(context="all", perturbation=labels["perturbation"] + labels["context"])
        shared["perturbation"] = shared["perturbation"].replace({"NTA": CONTROL, "NTB": CONTROL})
        other = simulate(2, effect=0.0, sizes=(200, 60))
        pooled = table_of((counts, shared), (other[0], shared))
        within = table_of((counts, labels), other)
        assert pooled["pearson_delta"].min() > 0.9, "the difference of contexts passes for an effect"
        assert within["pearson_delta"].max() < 0.6

    def test_target_gene_is_left_out(self):
        real, pred = simulate(1, effect=0.0), simulate(2, effect=0.0)
        columns = np.argsort(-real[0].mean(axis=0))[:3]
        names = [f"x{i}" for i in range(60)]
        for i, column in enumerate(columns):
            names[column] = f"g{i}"
            for counts, labels in (real, pred):
                counts[(labels["perturbation"] == f"g{i}").to_numpy(), column] = 0
        mask = metrics.target_mask(bulks_of(*real).conditions(CONTROL), names)
        assert [np.flatnonzero(row).tolist() for row in mask] == [[column] for column in columns] * 2
        with_target, without = table_of(real, pred), table_of(real, pred, exclude=mask)
        for name, least in (("pearson_delta", 0.7), ("cosine_delta", 0.7), ("r2_delta", 0.4)):
            assert with_target[name].min() > least, name
            assert without[name].max() < with_target[name].min(), name
        assert (without["mse_effect"] < with_target["mse_effect"] / 5).all()
        named = metrics.target_mask([("A", "guide-1")], ["x", "y"], {"guide-1": "y"})
        assert named.tolist() == [[False, True]]
        assert not metrics.target_mask([("A", "IL2")], ["x", "y"]).any()

    def test_no_change_and_one_profile_for_all_are_undefined_not_rewarded(self):
        real = simulate(1)
        bulks = bulks_of(*real)
        still = metrics.Pseudobulks(bulks.keys, bulks.means[[0, 0, 0, 0, 4, 4, 4, 4]], bulks.variances, bulks.n)
        assert [key[1] for key in bulks.keys] == [CONTROL, "g0", "g1", "g2"] * 2
        table = metrics.effect_table(bulks, still, control=CONTROL, train=still)
        for name in ("pearson_delta", "spearman_delta", "cosine_delta", "pearson_delta_top20", "pearson_delta_pert"):
            assert np.isnan(table[name]).all(), name
        assert (table["r2_delta"] <= 0).all()
        assert (table["mse"] > 0).all()

    def test_top_genes_come_from_real_cells_alone(self):
        real = simulate(1)
        bulks = bulks_of(*real)
        keys = bulks.conditions(CONTROL)
        scores = np.zeros((6, 60))
        scores[:, 7:12] = 1.0
        table = metrics.effect_table(bulks, bulks_of(*simulate(2)), control=CONTROL, scores=scores, top=(5,))
        deltas = [
            side.means[side.rows(keys)][:, 7:12] - bulks.means[bulks.rows([(k[0], CONTROL) for k in keys])][:, 7:12]
            for side in (bulks, bulks_of(*simulate(2)))
        ]
        expected = [stats.pearsonr(a, b).statistic for a, b in zip(*deltas, strict=True)]
        np.testing.assert_allclose(table["pearson_delta_top5"], expected)
        genes, counts = metrics.top_genes(np.array([[1.0, 5.0, 3.0]]), 2, np.array([[True, False, True]]))
        assert genes.tolist() == [[2, 0]]
        assert counts.all()
        assert metrics.top_genes(np.array([[1.0, 5.0]]), 9, np.array([[False, True]]))[1].tolist() == [[True, False]]

    def test_corrected_error_of_a_repeat_is_zero_and_noise_does_not_lower_it(self):
        for space in ("mean_log", "log_sum"):
            tables = [table_of(simulate(i), simulate(100 + i), space=space) for i in range(12)]
            ratios = [table["mse_corrected"].sum() / table["mse_effect"].sum() for table in tables]
            assert np.mean(ratios) == pytest.approx(0, abs=4 * np.std(ratios) / np.sqrt(12) + 0.02)
            assert np.mean([table["mse"].mean() for table in tables]) > 5 * abs(
                np.mean([table["mse_corrected"].mean() for table in tables])
            )
        real, pred = bulks_of(*simulate(1)), bulks_of(*simulate(2, effect=0.0))
        noisy = metrics.Pseudobulks(pred.keys, pred.means, 50 * pred.variances, pred.n)
        ceiling = metrics.effect_table(real, noisy, control=CONTROL)["mse_corrected"]
        plain = metrics.effect_table(real, pred, control=CONTROL)
        assert (plain["mse"] - ceiling <= 2 * real.noise()[real.rows(real.conditions(CONTROL))] / 60 + 1e-12).all()

    def test_missing_conditions(self):
        real, pred = simulate(1), simulate(2)
        absent = (pred[1]["perturbation"] == "g1").to_numpy()
        fewer = (pred[0][~absent], pred[1][~absent])
        with pytest.raises(DataError, match="2 real conditions were not predicted"):
            table_of(real, fewer)
        table = table_of(real, fewer, allow_missing=True)
        assert np.isnan(table["pearson_delta"]).tolist() == [False, True, False] * 2
        assert np.isnan(table["mse"]).sum() == 2
        with pytest.raises(DataError, match="2 predicted ones have no real cells"):
            table_of(fewer, pred)
        control = ((real[1]["context"] == "B") & (real[1]["perturbation"] == CONTROL)).to_numpy()
        with pytest.raises(DataError, match=r"no real control cells \('NT'\) in context \[\('B',\)\]"):
            table_of((real[0][~control], real[1][~control]), pred)
        with pytest.raises(DataError, match="60 real and 59 predicted genes"):
            table_of(real, (pred[0][:, 1:], pred[1]))
        with pytest.raises(DataError, match="conditions x genes"):
            table_of(real, pred, exclude=np.zeros((2, 2), dtype=bool))
        with pytest.raises(DataError, match="space='sum' is not known"):
            table_of(real, pred, space="sum")

    def test_order_of_genes_and_block_size_do_not_matter(self, monkeypatch):
        real, pred = simulate(1), simulate(2)
        expected = table_of(real, pred)
        order = np.random.default_rng(0).permutation(60)
        monkeypatch.setattr("scldm_cd4.metrics.effects.table.ROWS", 4)
        got = table_of((real[0][:, order], real[1]), (pred[0][:, order], pred[1]))
        for name, values in expected.items():
            np.testing.assert_allclose(got[name], values, rtol=1e-9, atol=1e-10, err_msg=name)


class TestRows:
    def test_rank_correlation_with_ties_and_left_out_genes(self):
        from scldm_cd4.metrics.effects.rows import spearman_rows

        rng = np.random.default_rng(0)
        x, y, keep = rng.integers(0, 5, (20, 30)), rng.normal(size=(20, 30)), rng.random((20, 30)) < 0.7
        expected = [stats.spearmanr(a[k], b[k]).statistic for a, b, k in zip(x, y, keep, strict=True)]
        np.testing.assert_allclose(spearman_rows(x.astype(float), y, keep), expected)

    def test_weights(self):
        scores = np.array([[0.0, 1.0, 3.0], [2.0, 2.0, 2.0]])
        weights = metrics.effect_weights(scores)
        np.testing.assert_allclose(weights[0], np.array([0, 1, 9]) / 10)
        assert np.isnan(weights[1]).all(), "no gene stands out"
        np.testing.assert_allclose(
            metrics.effect_weights(scores, np.array([[True, True, False]] * 2), exponent=1)[0], [0, 1, 0]
        )
