"""Metric values against independent implementations, and their behaviour at the edges."""

import itertools

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from scldm_cd4 import metrics
from scldm_cd4._errors import DataError


def counts(n: int, genes: int, seed: int = 0, mean: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).poisson(mean, (n, genes)).astype(np.float32)


class TestPseudobulk:
    def test_log_normalize_equals_scanpy(self):
        import scanpy as sc

        adata = ad.AnnData(sp.csr_matrix(counts(30, 20)))
        result = metrics.log_normalize(adata)
        before = adata.X.copy()
        sc.pp.normalize_total(adata, target_sum=1e4)
        sc.pp.log1p(adata)
        np.testing.assert_allclose(result.toarray(), adata.X.toarray(), rtol=1e-5)
        assert before.max() == before.max().round(), "the input must stay raw counts"

    def test_log_normalize_keeps_empty_cells_and_formats(self):
        x = counts(10, 6)
        x[3] = 0
        dense = metrics.log_normalize(x)
        assert dense[3].nnz == 0
        for form in (sp.csr_matrix, sp.csc_matrix, sp.coo_matrix):
            np.testing.assert_array_equal(metrics.log_normalize(form(x)).toarray(), dense.toarray())

    def test_layer_of_adata(self):
        adata = ad.AnnData(np.zeros((4, 5), dtype=np.float32), layers={"raw": counts(4, 5)})
        assert metrics.log_normalize(adata, layer="raw").nnz > 0
        with pytest.raises(DataError, match="needs an AnnData"):
            metrics.log_normalize(counts(4, 5), layer="raw")

    @pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
    def test_log_normalize_refuses_bad_counts(self, bad):
        x = counts(4, 5)
        x[1, 1] = bad
        with pytest.raises(DataError, match="raw counts"):
            metrics.log_normalize(x)

    def test_group_means(self):
        x, codes = counts(20, 4), np.array([0, 2, -1, 0] * 5)
        means, sizes = metrics.group_means(sp.csr_matrix(x), codes, 3)
        np.testing.assert_allclose(means[0], x[codes == 0].mean(axis=0), rtol=1e-6)
        np.testing.assert_allclose(means[2], x[codes == 2].mean(axis=0), rtol=1e-6)
        assert np.isnan(means[1]).all()
        assert sizes.tolist() == [10, 0, 5]
        with pytest.raises(DataError, match="one code per cell"):
            metrics.group_means(x, codes[:3], 3)


class TestProjection:
    def test_stores_and_applies_the_reference_mean(self):
        x = np.random.default_rng(0).normal(5, 1, (60, 12))
        projection = metrics.fit_projection(x, 4)
        np.testing.assert_allclose(projection.apply(x).mean(axis=0), 0, atol=1e-10)
        np.testing.assert_allclose(projection.apply(projection.mean[None]), 0, atol=1e-10)
        singular = np.linalg.svd(x - x.mean(axis=0), compute_uv=False)[:4]
        np.testing.assert_allclose(np.linalg.norm(projection.apply(x), axis=0), singular, rtol=1e-8)

    def test_signs_do_not_depend_on_cell_order_or_sparsity(self):
        x = counts(80, 15).astype(float)
        first = metrics.fit_projection(x, 3)
        for other in (x[::-1], sp.csr_matrix(x)):
            np.testing.assert_allclose(metrics.fit_projection(other, 3).components, first.components, atol=1e-8)
        np.testing.assert_allclose(first.apply(sp.csr_matrix(x)), first.apply(x), atol=1e-10)

    def test_refuses_what_cannot_be_fitted_or_applied(self):
        with pytest.raises(DataError, match="use 1 to 4"):
            metrics.fit_projection(counts(5, 30), 30)
        with pytest.raises(DataError, match="fitted on 8"):
            metrics.fit_projection(counts(20, 8), 2).apply(counts(3, 7))


class TestDistribution:
    def test_energy_equals_the_formula(self):
        rng = np.random.default_rng(0)
        x, y = rng.normal(0, 1, (9, 3)), rng.normal(1, 1, (7, 3))

        def mean_distance(a, b, skip):
            pairs = [np.linalg.norm(a[i] - b[j]) for i in range(len(a)) for j in range(len(b)) if not (skip and i == j)]
            return np.mean(pairs)

        expected = 2 * mean_distance(x, y, False) - mean_distance(x, x, True) - mean_distance(y, y, True)
        assert metrics.energy_distance(x, y) == pytest.approx(expected, abs=1e-12)
        known = metrics.energy_distance(x, y, within_x=metrics.within_distance(x), within_y=metrics.within_distance(y))
        assert known == pytest.approx(expected, abs=1e-12)

    def test_energy_is_unbiased_and_negative_for_copies(self):
        rng = np.random.default_rng(1)
        draws = np.array(
            [metrics.energy_distance(rng.normal(size=(15, 4)), rng.normal(size=(25, 4))) for _ in range(300)]
        )
        assert abs(draws.mean()) < 4 * draws.std() / np.sqrt(len(draws))
        assert (draws < 0).any()
        x = rng.normal(size=(30, 4))
        assert metrics.energy_distance(x, x) == pytest.approx(-2 * metrics.within_distance(x) / 30, rel=1e-9)

    def test_wasserstein_equals_the_best_assignment(self):
        rng = np.random.default_rng(2)
        x, y = rng.normal(size=(5, 3)), rng.normal(size=(5, 3))
        best = min(np.square(x - y[list(order)]).sum(axis=1).mean() for order in itertools.permutations(range(5)))
        assert metrics.wasserstein(x, y) == pytest.approx(np.sqrt(best), abs=1e-9)
        assert metrics.wasserstein(x, x[::-1]) == pytest.approx(0, abs=1e-6)

    @pytest.mark.parametrize("distance", [metrics.energy_distance, metrics.wasserstein])
    def test_order_of_cells_does_not_matter(self, distance):
        rng = np.random.default_rng(3)
        x, y = rng.normal(size=(12, 3)), rng.normal(1, 2, size=(10, 3))
        assert distance(x[::-1], y[::-1]) == pytest.approx(distance(x, y), abs=1e-9)

    def test_too_few_cells_and_other_features(self):
        x = np.ones((1, 3))
        assert np.isnan(metrics.energy_distance(x, np.ones((5, 3))))
        assert np.isnan(metrics.wasserstein(np.empty((0, 3)), x))
        with pytest.raises(DataError, match="3 and 4 features"):
            metrics.energy_distance(x, np.ones((5, 4)))


class TestDelta:
    def test_chance_level_is_what_no_signal_gives(self):
        rng = np.random.default_rng(0)
        values = [metrics.pearson_delta(*(rng.normal(size=(n, 400)) for n in (50, 50, 100))) for _ in range(40)]
        assert metrics.chance_level(50, 100) == pytest.approx(1 / 3)
        assert np.mean(values) == pytest.approx(1 / 3, abs=0.03)

    def test_context_does_not_pass_for_an_effect(self):
        rng = np.random.default_rng(1)
        shift = np.zeros(300)
        shift[:50] = 3.0
        here, there = np.repeat([0, 1], [10, 90]), np.repeat([0, 1], [400, 100])
        real, pred = (rng.normal(size=(100, 300)) + here[:, None] * shift for _ in range(2))
        control = rng.normal(size=(500, 300)) + there[:, None] * shift
        assert metrics.pearson_delta(real, pred, control) > 0.9
        assert abs(metrics.pearson_delta(real, pred, control, contexts=(here, here, there))) < 0.6

    def test_weights_are_the_cells(self):
        values, control = np.array([[1.0], [1.0], [4.0]]), np.zeros((2, 1))
        delta = metrics.context_delta(values, control, np.array([0, 0, 1]), np.array([0, 1]))
        assert delta == pytest.approx([2.0])

    def test_target_gene_is_left_out(self):
        rng = np.random.default_rng(2)
        real, pred, control = (rng.normal(size=(50, 40)) for _ in range(3))
        real[:, 7] -= 50
        pred[:, 7] -= 50
        assert metrics.pearson_delta(real, pred, control) > 0.99
        assert metrics.pearson_delta(real, pred, control, exclude=[7]) < 0.9

    def test_edges(self):
        x = counts(6, 5).astype(float)
        control = np.tile(x.mean(axis=0), (3, 1))
        assert np.isnan(metrics.pearson_delta(x + x, control, control))
        with pytest.raises(DataError, match="no control cells in context"):
            metrics.context_delta(x, x, np.array([0, 0, 0, 1, 1, 1]), np.zeros(6))
        with pytest.raises(DataError, match="or of neither"):
            metrics.context_delta(x, x, np.zeros(6))
        with pytest.raises(DataError, match="no perturbed cells"):
            metrics.context_delta(x[:0], x)


class TestDifferentialExpression:
    @settings(max_examples=40, deadline=None)
    @given(n=st.integers(2, 12), m=st.integers(2, 15), top=st.integers(2, 6), seed=st.integers(0, 1000))
    def test_equals_scipy(self, n, m, top, seed):
        rng = np.random.default_rng(seed)
        group, control = rng.integers(0, top, (n, 8)).astype(float), rng.integers(0, top, (m, 8)).astype(float)
        group[0, 0] = group[1, 0] + 1  # not a constant group
        table = metrics.de_genes(group, control)
        varies = np.ptp(np.vstack([group, control]), axis=0) > 0
        expected = stats.mannwhitneyu(group[:, varies], control[:, varies], method="asymptotic", axis=0).pvalue
        np.testing.assert_allclose(table["p"][varies], expected, rtol=1e-10)
        assert (table["p"][~varies] == 1).all()
        np.testing.assert_allclose(table["p_adjusted"], stats.false_discovery_control(table["p"]), rtol=1e-10)

    def test_sparse_input_names_and_target(self):
        group, control = counts(40, 30, 1), counts(60, 30, 2)
        group[:, 4] += 3
        names = np.array([f"g{i}" for i in range(30)])
        table = metrics.de_genes(sp.csr_matrix(group), sp.csr_matrix(control), genes=names)
        assert table.loc[table["significant"], "gene"].tolist() == ["g4"]
        assert table.loc[4, "z"] > 5
        assert table.loc[4, "delta"] > 2
        without = metrics.de_genes(group, control, genes=names, exclude=[4])
        assert len(without) == 29
        assert not without["significant"].any()

    def test_contexts_are_compared_within(self):
        rng = np.random.default_rng(3)
        here, there = np.repeat([0, 1], [10, 90]), np.repeat([0, 1], [200, 50])
        group = rng.normal(size=(100, 50)) + 2.0 * here[:, None]
        control = rng.normal(size=(250, 50)) + 2.0 * there[:, None]
        assert metrics.de_genes(group, control)["significant"].all()
        assert metrics.de_genes(group, control, contexts=(here, there))["significant"].sum() <= 2
        null = metrics.de_genes(rng.normal(size=(100, 4000)), rng.normal(size=(250, 4000)), contexts=(here, there))
        assert (null["p"] < 0.05).mean() == pytest.approx(0.05, abs=0.015)

    def test_tiled_profile_is_refused(self):
        control = counts(50, 20).astype(float)
        with pytest.raises(DataError, match="all 30 cells are the same profile"):
            metrics.de_genes(np.tile(control.mean(axis=0), (30, 1)), control)

    def test_missing_control_and_other_genes(self):
        group, control = counts(6, 5), counts(9, 5)
        with pytest.raises(DataError, match=r"no control cells in context \[1\]"):
            metrics.de_genes(group, control, contexts=(np.array([0, 0, 0, 1, 1, 1]), np.zeros(9, dtype=int)))
        with pytest.raises(DataError, match="has 4 genes, the control 5"):
            metrics.ControlRanks(control).test(group[:, :4])

    def test_recovery(self):
        real, pred = np.array([1, 1, 1, 0, 0], bool), np.array([1, 1, 0, 1, 0], bool)
        scores = metrics.de_recovery(real, pred)
        assert scores["precision"] == pytest.approx(2 / 3)
        assert scores["recall"] == pytest.approx(2 / 3)
        assert scores["f1"] == pytest.approx(2 / 3)
        none = np.zeros(5, bool)
        assert metrics.de_recovery(real, none)["f1"] == 0
        assert metrics.de_recovery(real, none)["precision"] == 0
        assert np.isnan(metrics.de_recovery(none, pred)["f1"])
        with pytest.raises(DataError, match="align the genes"):
            metrics.de_recovery(real, pred[:4])


class TestReconstruction:
    def test_nb_error_equals_scipy(self):
        rng = np.random.default_rng(0)
        x, mu, theta = counts(20, 7), rng.uniform(0.1, 4, (20, 7)), rng.uniform(0.2, 5, 7)
        expected = -stats.nbinom.logpmf(x, theta, theta / (theta + mu)).sum(axis=1).mean()
        assert metrics.nb_error(x, mu, theta) == pytest.approx(expected, abs=1e-5)
        assert metrics.nb_error(sp.csr_matrix(x), mu, np.tile(theta, (20, 1))) == pytest.approx(expected, abs=1e-5)
        with pytest.raises(DataError, match="same shape"):
            metrics.nb_error(x, mu[:3], theta)

    def test_intercept_nb_recovers_the_truth_and_is_the_best_theta(self):
        rng = np.random.default_rng(1)
        library, share = rng.uniform(2000, 6000, 4000), np.array([0.2, 0.3, 0.5])
        theta = np.array([0.5, 2.0, 10.0])
        mu = library[:, None] * share
        x = rng.negative_binomial(theta, theta / (theta + mu))
        # many constant genes keep the totals near the library
        x = np.hstack([x, np.full((len(x), 1), 10**7)])
        fitted_share, fitted = metrics.intercept_nb(x)
        np.testing.assert_allclose(fitted_share[:3] / fitted_share[:3].sum(), share, rtol=0.1)
        expected = x.sum(axis=1)[:, None] * fitted_share
        best = metrics.nb_error(x[:, :3], expected[:, :3], fitted[:3])
        for factor in (0.8, 1.25):
            assert metrics.nb_error(x[:, :3], expected[:, :3], fitted[:3] * factor) > best

    def test_pcc_axes(self):
        rng = np.random.default_rng(2)
        x, y = rng.normal(size=(30, 6)), rng.normal(size=(30, 6))
        by_gene = np.mean([np.corrcoef(x[:, g], y[:, g])[0, 1] for g in range(6)])
        assert metrics.pcc(x, y) == pytest.approx(by_gene)
        assert metrics.pcc(x, y, axis="cell") == pytest.approx(metrics.pcc(x.T, y.T))
        assert metrics.mse(x, y) == pytest.approx(np.mean((x - y) ** 2))
        y[:, 0] = 0.1 + 0.2  # a constant gene is left out
        assert metrics.pcc(x, y) == pytest.approx(metrics.pcc(x[:, 1:], y[:, 1:]))
        assert np.isnan(metrics.pcc(x, np.ones_like(x)))
        with pytest.raises(DataError, match="use 'gene' or 'cell'"):
            metrics.pcc(x, y, axis="genes")
        with pytest.raises(DataError, match="same shape"):
            metrics.mse(x, y[:4])


class TestAnchoredScore:
    @pytest.mark.parametrize("sign", [1, -1])
    def test_orientation(self, sign):
        baseline, ceiling = sign * np.array([0.0, 0.2, 0.1]), sign * np.array([0.9, 1.1, 1.0])
        result = metrics.anchored_score(np.array([sign * 0.55]), baseline, ceiling, higher_is_better=sign > 0)
        assert result.score == pytest.approx(0.5)
        assert result.counted
        assert np.isnan(result.model_se)
        wrong = metrics.anchored_score(np.array([sign * 0.55]), baseline, ceiling, higher_is_better=sign < 0)
        assert not wrong.counted

    def test_single_draw_is_the_stricter_rule(self):
        rng = np.random.default_rng(0)
        baseline, ceiling = rng.normal(0, 1, 20), rng.normal(2, 1, 20)
        assert metrics.anchored_score(np.ones(1), baseline, ceiling).counted
        assert not metrics.anchored_score(np.ones(1), baseline, ceiling, single_draw=True).counted

    def test_undefined_metrics_do_not_count(self):
        nothing = np.full(5, np.nan)
        result = metrics.anchored_score(nothing, nothing, nothing)
        assert not result.counted
        assert np.isnan(result.score)
        same = metrics.anchored_score(np.ones(3), np.ones(3), np.ones(3))
        assert np.isnan(same.score)
        assert not same.counted
